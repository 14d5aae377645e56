//! The states of an object and every way from one to another, in one table.

use super::lease::LeaseId;

/// Where an object is in its life. An object that is not in the table is absent (before)
/// or gone (after); there is no state for either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its slot is handed to the writer that holds the lease. Invisible to readers.
    Reserved(LeaseId),
    /// Committed: readers find it.
    Readable,
    /// No reader finds it any more; its bytes stay until the last hold on it ends.
    Withdrawn,
}

/// What happens to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Its write lease was committed.
    Commit(LeaseId),
    /// Its write lease was aborted, ran out, or ended with its owner.
    Abort(LeaseId),
    /// It was evicted, cleared or found corrupt.
    Withdraw,
    /// A read lock or a copy in progress ended.
    Released,
}

/// What becomes of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is in this state now (perhaps as before).
    Now(Stage),
    /// It ends and its slot is free.
    Gone,
    /// The event has no place in this state: nothing changes.
    Refused,
}

/// The table. `held` tells whether a read lock or a copy in progress still needs the bytes.
///
/// The only row that leads to `Readable` asks for the very lease that reserved the slot.
pub(super) fn next(stage: Stage, event: Event, held: bool) -> Outcome {
    use Event::{Abort, Commit, Released, Withdraw};
    use Outcome::{Gone, Now, Refused};
    use Stage::{Readable, Reserved, Withdrawn};
    match (stage, event, held) {
        (Reserved(own), Commit(lease), false) if own == lease => Now(Readable),
        (Reserved(own), Abort(lease), false) if own == lease => Gone,
        (Reserved(own), Abort(lease), true) if own == lease => Now(Withdrawn),
        (Readable, Withdraw, false) => Gone,
        (Readable, Withdraw, true) => Now(Withdrawn),
        (Withdrawn, Released, false) => Gone,
        (Reserved(_) | Readable, Released, _) | (Withdrawn, Released, true) => Now(stage),
        (Reserved(_), Commit(_) | Abort(_) | Withdraw, _)
        | (Readable, Commit(_) | Abort(_), _)
        | (Withdrawn, Commit(_) | Abort(_) | Withdraw, _) => Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_commit_makes_a_slot_readable() {
        let (own, other) = (LeaseId::test(1), LeaseId::test(2));
        let stages = [Stage::Reserved(own), Stage::Readable, Stage::Withdrawn];
        let events = [
            Event::Commit(own),
            Event::Commit(other),
            Event::Abort(own),
            Event::Abort(other),
            Event::Withdraw,
            Event::Released,
        ];
        for stage in stages {
            for event in events {
                for held in [false, true] {
                    let outcome = next(stage, event, held);
                    if outcome == Outcome::Now(Stage::Readable) && stage != Stage::Readable {
                        let way = (stage, event, held);
                        assert_eq!(way, (Stage::Reserved(own), Event::Commit(own), false));
                    }
                    if held {
                        assert_ne!(outcome, Outcome::Gone, "{stage:?} {event:?}");
                    }
                }
            }
        }
    }
}

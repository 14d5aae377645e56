//! Workers that live on without their registration, and how they learn of it.
//!
//! A registration ends without its worker when the server is restarted or when the worker was
//! silent for too long. LMCache's worker registers again only after a ping of its own has
//! failed (`HeartbeatThread` in `integration/vllm/vllm_multi_process_adapter.py`), which a
//! server that is back before the next ping never causes. So such a ping is answered `False`:
//! the worker goes on without its cache until the next one, which is answered `True`, and
//! registers again then.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

use super::workers::WorkerId;

/// Connections that come this early are taken for those of engines that outlived the last
/// server: LMCache's client tries again at least once a second (`RECONNECT_IVL_MAX_MS` in
/// `transport/zmq_impl/mq.py`).
pub(super) const RECONNECT_WINDOW: Duration = Duration::from_secs(3);

/// Most instances remembered; beyond it all are forgotten, and told once more.
const MAX_LAPSED: usize = 16_384;

/// Instances that use a registration they do not have.
#[derive(Default)]
pub(super) struct Lapsed {
    /// Whether the last ping was answered `False`.
    instances: Mutex<HashMap<WorkerId, bool>>,
}

impl Lapsed {
    /// Remembers an instance; `true` if it was known before.
    pub(super) fn note(&self, id: &WorkerId) -> bool {
        let mut instances = self.instances.lock();
        if instances.contains_key(id) {
            return true;
        }
        if instances.len() >= MAX_LAPSED {
            instances.clear();
        }
        instances.insert(id.clone(), false);
        false
    }

    /// Forgets an instance that has registered or has gone.
    pub(super) fn forget(&self, id: &WorkerId) {
        self.instances.lock().remove(id);
    }

    /// What a ping is answered with: for a lapsed instance `False` and `True` in turn, because
    /// its worker needs one of each to recover.
    pub(super) fn answer_ping(&self, id: &WorkerId) -> bool {
        match self.instances.lock().get_mut(id) {
            Some(was_told) => {
                *was_told = !*was_told;
                !*was_told
            }
            None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use stockade_wire::InstanceId;

    use super::*;
    use crate::tenancy::Caller;

    fn worker(number: i128) -> WorkerId {
        WorkerId::new(&Caller::internal(), InstanceId(number))
    }

    #[test]
    fn a_lapsed_instance_is_told_by_every_other_ping_until_it_registers() {
        let lapsed = Lapsed::default();
        let id = &worker(7);
        assert!(lapsed.answer_ping(id), "nothing is known against it");
        assert!(!lapsed.note(id));
        assert!(lapsed.note(id));
        assert_eq!(
            [(); 4].map(|()| lapsed.answer_ping(id)),
            [false, true, false, true]
        );
        lapsed.forget(id);
        assert!(lapsed.answer_ping(id));
    }

    #[test]
    fn the_number_of_remembered_instances_has_a_bound() {
        let lapsed = Lapsed::default();
        for id in 0..=MAX_LAPSED {
            lapsed.note(&worker(id as i128));
        }
        assert!(lapsed.instances.lock().len() <= MAX_LAPSED);
    }
}

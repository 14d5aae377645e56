//! Linked lists whose links live in one table indexed by [`EntryId`], so that every move
//! is a few writes and no search.

use super::EntryId;

/// No neighbour, or no list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    /// The list the entry is in, by its tag.
    list: u32,
}

const UNLINKED: Link = Link {
    previous: NONE,
    next: NONE,
    list: NONE,
};

/// The links of all entries of one policy. An entry is in at most one list.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: Vec<Link>,
}

impl Links {
    /// The tag of the list that holds `id`.
    fn list_of(&self, id: EntryId) -> Option<u32> {
        let list = self.links.get(id as usize)?.list;
        (list != NONE).then_some(list)
    }

    fn slot(&mut self, id: EntryId) -> &mut Link {
        let index = id as usize;
        if index >= self.links.len() {
            self.links.resize(index + 1, UNLINKED);
        }
        &mut self.links[index]
    }
}

/// One list; its front is taken first. The tag tells lists over the same links apart.
#[derive(Debug)]
pub(super) struct List {
    tag: u32,
    front: u32,
    back: u32,
    len: usize,
}

impl List {
    /// An empty list. `tag` must differ from that of other lists over the same links.
    pub(super) fn new(tag: u32) -> Self {
        Self {
            tag,
            front: NONE,
            back: NONE,
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn contains(&self, links: &Links, id: EntryId) -> bool {
        links.list_of(id) == Some(self.tag)
    }

    /// Appends an entry that is in no list.
    pub(super) fn push_back(&mut self, links: &mut Links, id: EntryId) {
        let previous = self.back;
        *links.slot(id) = Link {
            previous,
            next: NONE,
            list: self.tag,
        };
        match previous {
            NONE => self.front = id,
            previous => links.slot(previous).next = id,
        }
        self.back = id;
        self.len += 1;
    }

    /// Prepends an entry that is in no list.
    pub(super) fn push_front(&mut self, links: &mut Links, id: EntryId) {
        let next = self.front;
        *links.slot(id) = Link {
            previous: NONE,
            next,
            list: self.tag,
        };
        match next {
            NONE => self.back = id,
            next => links.slot(next).previous = id,
        }
        self.front = id;
        self.len += 1;
    }

    /// Takes an entry out; returns whether it was in this list.
    pub(super) fn remove(&mut self, links: &mut Links, id: EntryId) -> bool {
        if !self.contains(links, id) {
            return false;
        }
        let link = std::mem::replace(links.slot(id), UNLINKED);
        match link.previous {
            NONE => self.front = link.next,
            previous => links.slot(previous).next = link.next,
        }
        match link.next {
            NONE => self.back = link.previous,
            next => links.slot(next).previous = link.previous,
        }
        self.len -= 1;
        true
    }

    /// Takes the first entry out.
    pub(super) fn pop_front(&mut self, links: &mut Links) -> Option<EntryId> {
        let id = self.front;
        self.remove(links, id).then_some(id)
    }
}

/// One of the two lists of a [`Pair`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    First,
    Second,
}

/// Two lists that entries move between.
#[derive(Debug)]
pub(super) struct Pair {
    links: Links,
    first: List,
    second: List,
}

impl Default for Pair {
    fn default() -> Self {
        Self {
            links: Links::default(),
            first: List::new(0),
            second: List::new(1),
        }
    }
}

impl Pair {
    fn parts(&mut self, side: Side) -> (&mut List, &mut Links) {
        match side {
            Side::First => (&mut self.first, &mut self.links),
            Side::Second => (&mut self.second, &mut self.links),
        }
    }

    pub(super) fn len(&self, side: Side) -> usize {
        match side {
            Side::First => self.first.len(),
            Side::Second => self.second.len(),
        }
    }

    /// Takes an entry out of whichever list holds it.
    pub(super) fn unlink(&mut self, id: EntryId) {
        if !self.first.remove(&mut self.links, id) {
            self.second.remove(&mut self.links, id);
        }
    }

    /// Makes an entry the last of a list, wherever it was.
    pub(super) fn push_back(&mut self, side: Side, id: EntryId) {
        self.unlink(id);
        let (list, links) = self.parts(side);
        list.push_back(links, id);
    }

    /// Makes an entry that is in neither list the first of one.
    pub(super) fn restore(&mut self, side: Side, id: EntryId) {
        if self.links.list_of(id).is_none() {
            let (list, links) = self.parts(side);
            list.push_front(links, id);
        }
    }

    /// Takes the first entry of a list out.
    pub(super) fn pop_front(&mut self, side: Side) -> Option<EntryId> {
        let (list, links) = self.parts(side);
        list.pop_front(links)
    }
}

/// A table indexed by [`EntryId`] for what a policy notes about its entries.
#[derive(Debug)]
pub(super) struct Notes<T> {
    notes: Vec<Option<T>>,
    len: usize,
}

impl<T> Default for Notes<T> {
    fn default() -> Self {
        Self {
            notes: Vec::new(),
            len: 0,
        }
    }
}

impl<T> Notes<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, id: EntryId) -> Option<&T> {
        self.notes.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: EntryId) -> Option<&mut T> {
        self.notes.get_mut(id as usize)?.as_mut()
    }

    pub(super) fn insert(&mut self, id: EntryId, note: T) {
        let index = id as usize;
        if index >= self.notes.len() {
            self.notes.resize_with(index + 1, || None);
        }
        self.len += usize::from(self.notes[index].replace(note).is_none());
    }

    pub(super) fn remove(&mut self, id: EntryId) -> Option<T> {
        let note = self.notes.get_mut(id as usize)?.take();
        self.len -= usize::from(note.is_some());
        note
    }
}

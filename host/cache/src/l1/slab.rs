//! A table of entries with small dense numbers, which policies use as indexes.

/// Entries by number; numbers of removed entries are given out again.
#[derive(Debug)]
pub(super) struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// Files an entry; `None` when all numbers below `u32::MAX` are in use.
    pub(super) fn insert(&mut self, entry: T) -> Option<u32> {
        if let Some(id) = self.free.pop() {
            if let Some(place) = self.entries.get_mut(id as usize) {
                *place = Some(entry);
            }
            return Some(id);
        }
        // u32::MAX stands for "none" in the policies' lists.
        let id = u32::try_from(self.entries.len())
            .ok()
            .filter(|&id| id < u32::MAX)?;
        self.entries.push(Some(entry));
        Some(id)
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<T> {
        let entry = self.entries.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(entry)
    }

    pub(super) fn get(&self, id: u32) -> Option<&T> {
        self.entries.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.entries.get_mut(id as usize)?.as_mut()
    }

    /// Numbers given out so far, whether in use or free again.
    pub(super) fn numbers(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(id, entry)| Some((id as u32, entry.as_ref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().flatten()
    }
}

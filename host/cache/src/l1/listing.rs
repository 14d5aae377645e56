//! Pages of keys, for who looks at the cache from outside.

use std::ops::Range;
use std::time::Instant;

use super::L1;
use crate::engine::Listed;
use crate::key::KeyScope;

impl L1 {
    /// Adds the readable objects numbered `range` whose scope is wanted, until `out` has `most`.
    /// Returns the number to go on with, or `None` when there are no more.
    pub(crate) fn list_range(
        &self,
        now: Instant,
        range: Range<u32>,
        wanted: &dyn Fn(&KeyScope) -> bool,
        most: usize,
        out: &mut Vec<Listed>,
    ) -> Option<u32> {
        let numbers = self.objects.numbers();
        for id in range.clone() {
            if id as usize >= numbers {
                return None;
            }
            if out.len() >= most {
                return Some(id);
            }
            let Some(object) = self.objects.get(id).filter(|object| object.is_readable()) else {
                continue;
            };
            let is_wanted = self
                .scopes
                .scope(object.scope)
                .is_some_and(|scope| wanted(scope));
            if is_wanted && let Some(key) = self.key_of(id) {
                out.push(Listed {
                    key,
                    bytes: object.length,
                    idle: self.uses.of(id, now).map(|usage| usage.idle),
                    is_kept: self.keep_hints.has(id),
                });
            }
        }
        Some(range.end)
    }
}

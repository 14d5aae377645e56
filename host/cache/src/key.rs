//! What identifies a cached object.
//!
//! An object is one chunk of one rank's KV cache. Its identity is the rolling hash of the
//! tokens up to the end of the chunk together with the model, the rank, the object group
//! and the cache salt; only the tokens go into the hash. Follows `ObjectKey` in LMCache's
//! `v1/distributed/api.py`.

use std::fmt;
use std::sync::Arc;

/// Most characters a cache salt may have, as in LMCache.
pub const MAX_SALT_CHARS: usize = 128;

/// The rolling hash of all tokens up to the end of one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkHash(pub [u8; 32]);

impl fmt::Display for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkHash({self})")
    }
}

/// Keeps the objects of one tenant apart from all others; empty for unsalted deployments.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct CacheSalt(Arc<str>);

/// Why a text is not a cache salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SaltError {
    /// The salt has more than [`MAX_SALT_CHARS`] characters.
    #[error("cache_salt has {chars} characters: use at most {MAX_SALT_CHARS}")]
    TooLong {
        /// Characters (code points) found.
        chars: usize,
    },
    /// The salt has a character that keys and file names use as a separator.
    #[error("cache_salt contains {found:?}: leave out '@', '/', '\\' and NUL")]
    Forbidden {
        /// The first such character.
        found: char,
    },
}

impl CacheSalt {
    /// Checks `text` by LMCache's rule: at most 128 characters, none of `@ / \ NUL`.
    ///
    /// # Errors
    /// [`SaltError`] says which part of the rule was broken.
    pub fn parse(text: &str) -> Result<Self, SaltError> {
        // A character takes at most four bytes, so a longer text need not be counted.
        let chars = if text.len() > 4 * MAX_SALT_CHARS {
            text.len().div_ceil(4)
        } else {
            text.chars().count()
        };
        if chars > MAX_SALT_CHARS {
            return Err(SaltError::TooLong { chars });
        }
        if let Some(found) = text.chars().find(|c| matches!(c, '@' | '/' | '\\' | '\0')) {
            return Err(SaltError::Forbidden { found });
        }
        Ok(Self(Arc::from(text)))
    }

    /// The salt as it was parsed.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CacheSalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Everything but the tokens that tells one object from another. All chunks of one row of
/// a request share it, so it is kept behind an [`Arc`] and interned by the engine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct KeyScope {
    /// The model whose KV cache this is, as the engine names it.
    pub model_name: Arc<str>,
    /// Which slice of the KV cache; see [`kv_rank`].
    pub kv_rank: u32,
    /// Index of the group of layers stored together; 0 unless groups are split.
    pub object_group_id: u32,
    /// The tenant's salt.
    pub cache_salt: CacheSalt,
}

/// Packs a worker's place into the `kv_rank` of its keys, as `ObjectKey.ComputeKVRank`
/// does with the local world equal to the global one:
/// `world_size << 24 | rank << 16 | world_size << 8 | rank`.
///
/// `None` unless `world_size` is 1..=255 and `rank < world_size`: beyond that the fields
/// overlap and two ranks could share one key.
pub fn kv_rank(world_size: u32, rank: u32) -> Option<u32> {
    if !(1..=255).contains(&world_size) || rank >= world_size {
        return None;
    }
    Some(world_size << 24 | rank << 16 | world_size << 8 | rank)
}

/// The full identity of one cached object. Cheap to clone; equality and hashing go by
/// content, so keys with separate but equal scopes are the same key.
#[derive(Clone, Debug)]
pub struct ObjectKey {
    /// Model, rank, group and salt.
    pub scope: Arc<KeyScope>,
    /// Hash of the tokens up to the end of the chunk.
    pub chunk_hash: ChunkHash,
}

impl ObjectKey {
    /// Joins a scope and a chunk hash.
    pub fn new(scope: Arc<KeyScope>, chunk_hash: ChunkHash) -> Self {
        Self { scope, chunk_hash }
    }
}

impl PartialEq for ObjectKey {
    fn eq(&self, other: &Self) -> bool {
        self.chunk_hash == other.chunk_hash
            && (Arc::ptr_eq(&self.scope, &other.scope) || self.scope == other.scope)
    }
}

impl Eq for ObjectKey {}

impl std::hash::Hash for ObjectKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.scope.hash(state);
        self.chunk_hash.hash(state);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_salt_is_held_to_lmcaches_rule() {
        assert_eq!(CacheSalt::parse("").unwrap(), CacheSalt::default());
        assert_eq!(CacheSalt::parse("tenant-7").unwrap().as_str(), "tenant-7");
        assert!(CacheSalt::parse(&"ü".repeat(128)).is_ok());
        assert_eq!(
            CacheSalt::parse(&"ü".repeat(129)),
            Err(SaltError::TooLong { chars: 129 })
        );
        assert!(matches!(
            CacheSalt::parse(&"x".repeat(1 << 20)),
            Err(SaltError::TooLong { .. })
        ));
        for forbidden in ['@', '/', '\\', '\0'] {
            assert_eq!(
                CacheSalt::parse(&format!("a{forbidden}b")),
                Err(SaltError::Forbidden { found: forbidden })
            );
        }
    }

    #[test]
    fn ranks_that_would_overlap_are_refused() {
        assert_eq!(kv_rank(8, 7), Some(134_678_535));
        assert_eq!(kv_rank(255, 254), Some(4_294_901_758));
        for (world_size, rank) in [(0, 0), (8, 8), (256, 0), (300, 299), (u32::MAX, 1)] {
            assert_eq!(kv_rank(world_size, rank), None);
        }
    }

    #[test]
    fn equal_content_is_the_same_key_whatever_the_allocation() {
        let scope = |rank| {
            Arc::new(KeyScope {
                model_name: Arc::from("m"),
                kv_rank: rank,
                object_group_id: 0,
                cache_salt: CacheSalt::default(),
            })
        };
        let hash = ChunkHash([7; 32]);
        assert_eq!(
            ObjectKey::new(scope(1), hash),
            ObjectKey::new(scope(1), hash)
        );
        assert_ne!(
            ObjectKey::new(scope(1), hash),
            ObjectKey::new(scope(2), hash)
        );
        assert_eq!(hash.to_string(), "07".repeat(32));
    }
}

//! What the HTTP API says of objects in words of the fleet: tokens, and keys without a layout.
//! Follows `cache_control/key_resolver.py` and `storage_manager.py` of LMCache 0.5.6.

use std::{collections::HashSet, sync::Arc};

use stockade_cache::{CacheSalt, KeyScope, ObjectKey};

use super::{Service, kv_rank, store::object_keys};

/// Objects looked at by one step over the cache.
const LIST_BATCH: usize = 1024;

/// Why tokens name no objects.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// A name cannot be.
    #[error("{0}")]
    Invalid(String),
    /// No worker of the model is here, so that nobody knows how long its objects are.
    #[error(
        "no worker of model_name {model_name:?} with world_size {world_size} is registered here: start the engine first"
    )]
    NoLayout {
        /// The model.
        model_name: String,
        /// Its ranks.
        world_size: u32,
    },
}

/// The objects of a prompt.
#[derive(Debug)]
pub struct WarmKeys {
    /// Their keys: all ranks of one chunk before the next chunk.
    pub keys: Vec<ObjectKey>,
    /// Chunks.
    pub chunks: usize,
    /// Bytes of each object.
    pub object_bytes: u64,
}

impl Service {
    /// The objects of the whole chunks of a prompt, as the salt's tenant has them. Takes as long
    /// as hashing all tokens.
    ///
    /// # Errors
    /// [`WarmError`]
    pub fn warm_keys(
        &self,
        model_name: &str,
        world_size: u32,
        token_ids: &[u32],
        salt: &CacheSalt,
    ) -> Result<WarmKeys, WarmError> {
        if model_name.is_empty() || model_name.contains('@') {
            let problem =
                "model_name is empty or contains '@': give the engine's name of the model";
            return Err(WarmError::Invalid(problem.to_owned()));
        }
        let model_name: Arc<str> = model_name.into();
        let realm = self.tenancy.realm_of(salt);
        let group = self.workers.object_group(&realm, &model_name, world_size);
        let (group, object_bytes) = group.ok_or_else(|| WarmError::NoLayout {
            model_name: model_name.to_string(),
            world_size,
        })?;
        let tokens: Vec<u8> = token_ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        let chunks = token_ids.len() / self.hasher.chunk_size();
        let mut hashes = Vec::with_capacity(chunks);
        self.hasher.chunk_hashes(&tokens, &mut hashes, chunks);
        let rows: Vec<Vec<ObjectKey>> = (0..world_size)
            .filter_map(|rank| kv_rank(world_size, rank))
            .map(|kv_rank| {
                let scope = Arc::new(KeyScope {
                    model_name: Arc::clone(&model_name),
                    kv_rank,
                    object_group_id: group,
                    cache_salt: salt.clone(),
                });
                object_keys(&scope, &hashes)
            })
            .collect();
        let keys = (0..hashes.len())
            .flat_map(|chunk| rows.iter().filter_map(move |row| row.get(chunk)))
            .cloned()
            .collect();
        Ok(WarmKeys {
            keys,
            chunks: hashes.len(),
            object_bytes,
        })
    }

    /// Removes objects from memory, whatever their layout where a key has the group 0; with
    /// `force` also those that are in use, with the last use of them. Returns how many went or will go, and how many
    /// are in use and stay. Goes over the whole cache in steps.
    pub fn delete_from_memory(&self, keys: &[ObjectKey], force: bool) -> (usize, usize) {
        type Scope<'k> = (&'k str, u32, &'k CacheSalt);
        fn scope_of(scope: &KeyScope) -> Scope<'_> {
            (&scope.model_name, scope.kv_rank, &scope.cache_salt)
        }
        let scopes: HashSet<Scope<'_>> = keys.iter().map(|key| scope_of(&key.scope)).collect();
        let named: HashSet<_> = keys
            .iter()
            .map(|key| {
                (
                    scope_of(&key.scope),
                    key.scope.object_group_id,
                    &key.chunk_hash.0,
                )
            })
            .collect();
        let mut found = Vec::new();
        let mut next = Some(0);
        while let Some(start) = next {
            let wanted = |scope: &KeyScope| scopes.contains(&scope_of(scope));
            let (listed, end) = self.engine.list(start, LIST_BATCH, &wanted);
            next = end;
            found.extend(listed.into_iter().map(|listed| listed.key).filter(|key| {
                let groups = [0, key.scope.object_group_id];
                let is_named = |&group: &u32| {
                    named.contains(&(scope_of(&key.scope), group, &key.chunk_hash.0))
                };
                groups.iter().any(is_named)
            }));
        }
        let deleted = match force {
            true => self.engine.release(&found),
            false => self.engine.withdraw(&found),
        };
        (deleted, found.len().saturating_sub(deleted))
    }
}

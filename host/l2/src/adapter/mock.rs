//! Memory that behaves like slow storage: LMCache's `mock`, for trials and tests.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::mpsc;

use super::{Adapter, AdapterError, Entry, Form, IsWanted};
use crate::{integrity::Fault, integrity::Seal, name::ObjectName};

/// See the module. Follows `mock_l2_adapter.py` of LMCache 0.5.6.
#[derive(Debug)]
pub(crate) struct MockAdapter {
    max_bytes: u64,
    bytes_per_second: f64,
    values: Mutex<HashMap<ObjectName, (Bytes, Seal)>>,
}

impl MockAdapter {
    /// Storage for `max_bytes`, that moves `bytes_per_second`.
    #[must_use]
    pub(crate) fn new(max_bytes: u64, bytes_per_second: f64) -> Self {
        Self {
            max_bytes,
            bytes_per_second,
            values: Mutex::default(),
        }
    }

    async fn take_time(&self, bytes: usize) {
        let seconds = bytes as f64 / self.bytes_per_second;
        if let Ok(time) = Duration::try_from_secs_f64(seconds) {
            tokio::time::sleep(time).await;
        }
    }

    fn sum_of_bytes(&self) -> u64 {
        let values = self.values.lock();
        values.values().map(|(value, _)| value.len() as u64).sum()
    }
}

#[async_trait]
impl Adapter for MockAdapter {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let values = self.values.lock();
        Ok(names.iter().map(|name| values.contains_key(name)).collect())
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let value = self.values.lock().get(name).cloned();
        let (value, seal) = value.ok_or(AdapterError::NotFound)?;
        self.take_time(value.len()).await;
        Seal::check(Some(seal), &value, wanted).map_err(|fault: Fault| fault.into_error(false))?;
        Ok(value)
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        self.take_time(value.len()).await;
        let used = self.sum_of_bytes();
        let mut values = self.values.lock();
        let replaced = values.get(name).map_or(0, |(value, _)| value.len()) as u64;
        if used - replaced + value.len() as u64 > self.max_bytes {
            return Err(AdapterError::Full(format!(
                "max_size_gb is {} bytes",
                self.max_bytes
            )));
        }
        let seal = Seal::of(&value, layout);
        values.insert(name.clone(), (value, seal));
        Ok(())
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let mut values = self.values.lock();
        Ok(names
            .iter()
            .map(|name| values.remove(name).is_some())
            .collect())
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        let entries: Vec<Entry> = self
            .values
            .lock()
            .iter()
            .filter(|(name, _)| cache_salt.is_none_or(|salt| **name.cache_salt() == *salt))
            .map(|(name, (value, _))| Entry {
                name: name.clone(),
                bytes: value.len() as u64,
                last_used: None,
            })
            .collect();
        for entry in entries {
            if found.send(entry).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn discard_aside(&self, _is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        Ok(0)
    }

    fn used_bytes(&self) -> Option<u64> {
        Some(self.sum_of_bytes())
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut status = serde_json::Map::new();
        status.insert("max_bytes".into(), json!(self.max_bytes));
        status.insert("used_bytes".into(), json!(self.sum_of_bytes()));
        status
    }
}

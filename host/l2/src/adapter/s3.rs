//! A bucket: LMCache's `s3`.
//!
//! Object names and bodies are those of `s3_l2_adapter.py` of LMCache 0.5.6. The seal of a value
//! is metadata of its object, so that whatever replaces the object takes the seal away.

use std::{borrow::Cow, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    Attribute, Attributes, ClientOptions, ObjectStore, ObjectStoreExt as _, PutOptions, PutPayload,
    RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path,
};
use serde_json::json;
use tokio::sync::mpsc;

use super::{Adapter, AdapterError, Entry, Form, IsWanted};
use crate::{
    integrity::{Fault, Seal},
    name::{NameError, ObjectName},
};

const SEAL: Attribute = Attribute::Metadata(Cow::Borrowed("stockade-seal"));
const QUARANTINE: &str = "stockade-quarantine";
/// Requests on their way at once within one call.
const IN_FLIGHT: usize = 64;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which bucket, and how to reach it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct S3Options {
    /// `<bucket>.<host>` without scheme or, with `bucket`, just the host.
    pub(crate) endpoint: String,
    /// The bucket for path-style requests.
    pub(crate) bucket: Option<String>,
    pub(crate) region: String,
    pub(crate) tls: bool,
    pub(crate) express: bool,
    /// Key id and secret; taken from the environment, a profile's container or the machine's role
    /// otherwise.
    pub(crate) credentials: Option<(String, String)>,
    pub(crate) workers: usize,
    /// Objects with a salt have `salt-<salt>/` before their names. LMCache does not find those.
    pub(crate) folder_by_salt: bool,
}

impl std::fmt::Debug for S3Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Options")
            .field("endpoint", &self.endpoint)
            .field("bucket", &self.bucket)
            .finish_non_exhaustive()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct S3Adapter {
    options: S3Options,
    store: AmazonS3,
}

fn error_of(error: object_store::Error) -> AdapterError {
    use object_store::Error;
    match error {
        Error::NotFound { .. } => AdapterError::NotFound,
        Error::PermissionDenied { source, .. } | Error::Unauthenticated { source, .. } => {
            AdapterError::Denied(source.to_string())
        }
        // Sources tell what happened; the whole would hold the signed address.
        Error::Generic { source, .. } => AdapterError::Unavailable(source.to_string()),
        other => AdapterError::Unavailable(other.to_string()),
    }
}

impl S3Adapter {
    /// Prepares a client; nothing is sent yet.
    ///
    /// # Errors
    /// A sentence when the options fit no client.
    pub(crate) fn open(options: S3Options) -> Result<Self, String> {
        // Fails only if a provider is there already, which is as good.
        let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
        let scheme = if options.tls { "https" } else { "http" };
        let bucket = match &options.bucket {
            Some(bucket) => bucket.clone(),
            None => options
                .endpoint
                .split('.')
                .next()
                .unwrap_or_default()
                .to_owned(),
        };
        let client = ClientOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            // Each call has its own deadline.
            .with_timeout_disabled()
            .with_allow_http(!options.tls);
        let mut builder = match &options.credentials {
            Some((id, secret)) => AmazonS3Builder::new()
                .with_access_key_id(id)
                .with_secret_access_key(secret),
            None => AmazonS3Builder::from_env(),
        };
        builder = builder
            .with_region(&options.region)
            .with_bucket_name(bucket)
            .with_endpoint(format!("{scheme}://{}", options.endpoint))
            .with_virtual_hosted_style_request(options.bucket.is_none())
            .with_s3_express(options.express)
            // What TLS protects needs no second hash over every byte; a seal is checked at each load.
            .with_unsigned_payload(options.tls)
            .with_client_options(client)
            // Retries and pauses are the breaker's.
            .with_retry(RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            });
        let store = builder
            .build()
            .map_err(|error| format!("cannot be used: {error}"))?;
        Ok(Self { options, store })
    }

    /// Where a value lies. Names with empty segments, or segments that mean a folder, cannot be
    /// told from others there.
    fn path(&self, name: &ObjectName) -> Result<Path, AdapterError> {
        Self::path_of(name, name.key_at(self.options.folder_by_salt))
    }

    fn path_of(name: &ObjectName, key: String) -> Result<Path, AdapterError> {
        match Path::parse(&key) {
            Ok(path) if path.as_ref() == key => Ok(path),
            _ => Err(NameError::Model(name.model_name().to_string()).into()),
        }
    }

    async fn quarantine(&self, path: &Path) -> Result<(), object_store::Error> {
        let aside =
            Path::parse(format!("{QUARANTINE}/{path}")).unwrap_or_else(|_| QUARANTINE.into());
        self.store.copy(path, &aside).await?;
        self.store.delete(path).await
    }

    async fn is_there(&self, name: &ObjectName) -> Result<bool, AdapterError> {
        match self.path(name) {
            Ok(path) => self.holds(&path).await,
            Err(_) => Ok(false),
        }
    }

    /// Every place where the object may lie: also outside of its folder, where LMCache puts it.
    fn places(&self, name: &ObjectName) -> impl Iterator<Item = Path> + use<> {
        let outside = name.key_outside(self.options.folder_by_salt);
        let outside = outside.map(|key| Self::path_of(name, key));
        [Some(self.path(name)), outside]
            .into_iter()
            .flatten()
            .flatten()
    }

    fn name_of(&self, path: &str) -> Option<ObjectName> {
        ObjectName::from_key_at(path, self.options.folder_by_salt)
    }

    async fn holds(&self, path: &Path) -> Result<bool, AdapterError> {
        match self.store.head(path).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error_of(error)),
        }
    }
}

#[async_trait]
impl Adapter for S3Adapter {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        stream::iter(
            names
                .iter()
                .map(|name| self.is_there(name))
                .collect::<Vec<_>>(),
        )
        .buffered(IN_FLIGHT)
        .try_collect()
        .await
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let path = self.path(name)?;
        let found = self.store.get(&path).await.map_err(error_of)?;
        let (size, length) = (found.meta.size, wanted.length);
        let seal = found.attributes.get(&SEAL);
        let seal = seal.and_then(|seal| Seal::parse(seal.as_bytes()));
        // Nothing that nobody asked for is read into memory.
        let fault = if size > length {
            match seal {
                Some(seal) if seal.is_of(size) => Fault::OtherForm { found: size },
                _ => Fault::Damaged(format!("it has {size} bytes and not {length}")),
            }
        } else {
            let value = found.bytes().await.map_err(error_of)?;
            match Seal::check(seal, &value, wanted) {
                Ok(()) => return Ok(value),
                Err(fault) => fault,
            }
        };
        let moved = matches!(fault, Fault::Damaged(_)) && self.quarantine(&path).await.is_ok();
        Err(fault.into_error(moved))
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        let path = self.path(name)?;
        let mut attributes = Attributes::new();
        attributes.insert(SEAL, Seal::of(&value, layout).to_string().into());
        let options = PutOptions {
            attributes,
            ..PutOptions::default()
        };
        self.store
            .put_opts(&path, PutPayload::from_bytes(value), options)
            .await
            .map(|_| ())
            .map_err(error_of)
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let delete = |name: &ObjectName| {
            let places = self.places(name);
            async move {
                let mut was_there = false;
                for path in places {
                    if self.holds(&path).await? {
                        self.store.delete(&path).await.map_err(error_of)?;
                        was_there = true;
                    }
                }
                Ok(was_there)
            }
        };
        stream::iter(names.iter().map(delete).collect::<Vec<_>>())
            .buffered(IN_FLIGHT)
            .try_collect()
            .await
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        // Those that LMCache put outside of the folder are found by listing everything.
        let mut objects = self.store.list(None);
        while let Some(object) = objects.next().await {
            let object = object.map_err(error_of)?;
            let Some(name) = self.name_of(object.location.as_ref()) else {
                continue;
            };
            let is_aside = object.location.as_ref().starts_with(QUARANTINE);
            if is_aside || cache_salt.is_some_and(|salt| **name.cache_salt() != *salt) {
                continue;
            }
            let entry = Entry {
                name,
                bytes: object.size,
                last_used: Some(object.last_modified.into()),
            };
            if found.send(entry).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        let aside = Path::from(QUARANTINE);
        let mut objects = self.store.list(Some(&aside));
        let mut discarded = 0;
        while let Some(object) = objects.next().await {
            let location = object.map_err(error_of)?.location;
            let inner = location.as_ref().strip_prefix(QUARANTINE);
            let name = inner
                .and_then(|inner| inner.strip_prefix('/'))
                .and_then(|inner| self.name_of(inner));
            // A name that reads as nobody's is nobody's loss.
            if name.is_none_or(|name| is_wanted(name.cache_salt())) {
                self.store.delete(&location).await.map_err(error_of)?;
                discarded += 1;
            }
        }
        Ok(discarded)
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut status = serde_json::Map::new();
        status.insert("s3_endpoint".into(), json!(self.options.endpoint));
        status.insert("s3_bucket".into(), json!(self.options.bucket));
        status.insert("s3_region".into(), json!(self.options.region));
        status.insert("disable_tls".into(), json!(!self.options.tls));
        status
    }
}

//! What a plugin keeps: keys and values that outlive its runs and, with a directory, the server.
//!
//! Calls read and write memory alone. A moment after a change the whole state of that plugin is
//! written to a file of its own, on a thread for blocking work: a new file that takes the old
//! one's place, so that what is there is always one whole state. A file that is damaged is moved
//! aside, and the plugin starts without state.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{Code, MAX_STATE_KEY_BYTES, Refusal};

/// How long changes are gathered before they are written.
const WRITE_DELAY: Duration = Duration::from_millis(200);
/// What a file begins with: its form, and the form's version.
const MAGIC: &[u8] = b"stockade plugin state 1\n";
/// Bytes of the checksum at a file's end.
const CHECKSUM_BYTES: usize = 32;

/// The state of all plugins.
#[derive(Debug, Default)]
pub(crate) struct StateStore {
    directory: Option<PathBuf>,
    runtime: Option<Handle>,
    plugins: Mutex<HashMap<Arc<str>, Arc<PluginState>>>,
}

/// The state of one plugin.
#[derive(Debug, Default)]
pub(crate) struct PluginState {
    entries: Mutex<Entries>,
    file: Option<PathBuf>,
    runtime: Option<Handle>,
    is_scheduled: AtomicBool,
    /// Held while the file is written.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Entries {
    map: BTreeMap<String, Bytes>,
    bytes: u64,
    is_changed: bool,
}

impl StateStore {
    pub(crate) fn new(directory: Option<PathBuf>, runtime: Option<Handle>) -> Self {
        Self {
            directory,
            runtime,
            plugins: Mutex::default(),
        }
    }

    /// A plugin's state; read from its file the first time, which blocks.
    pub(crate) fn open(&self, plugin: &Arc<str>) -> Arc<PluginState> {
        let mut plugins = self.plugins.lock();
        if let Some(state) = plugins.get(plugin) {
            return Arc::clone(state);
        }
        let file = self
            .directory
            .as_ref()
            .map(|directory| directory.join(file_name(plugin)));
        let mut entries = Entries::default();
        if let Some(file) = &file {
            match read(file) {
                Ok(map) => {
                    entries.bytes = map.iter().map(|(key, value)| size(key, value)).sum();
                    entries.map = map;
                }
                Err(error) => {
                    let aside = file.with_extension("damaged");
                    // At worst it is found damaged again.
                    let _ = fs::rename(file, &aside);
                    tracing::error!(
                        plugin = &**plugin,
                        "the state of plugin `{plugin}` in {} cannot be used and is moved to {}: {error}",
                        file.display(),
                        aside.display()
                    );
                }
            }
        }
        let state = Arc::new(PluginState {
            entries: Mutex::new(entries),
            file,
            runtime: self.runtime.clone(),
            is_scheduled: AtomicBool::new(false),
            writing: Mutex::default(),
        });
        plugins.insert(Arc::clone(plugin), Arc::clone(&state));
        state
    }

    /// Writes what is not written yet; blocks.
    pub(crate) fn flush(&self) {
        let plugins: Vec<_> = self.plugins.lock().values().map(Arc::clone).collect();
        for state in plugins {
            state.write_logged();
        }
    }

    /// Forgets a plugin's state and removes its file; returns how many keys there were. Blocks.
    pub(crate) fn purge(&self, plugin: &Arc<str>) -> io::Result<usize> {
        let state = self.open(plugin);
        let _writing = state.writing.lock();
        let gone = std::mem::take(&mut *state.entries.lock());
        if let Some(file) = &state.file {
            // A crash may have left half a file, and damage a whole one, with the same content.
            for extension in ["state", "tmp", "damaged"] {
                match fs::remove_file(file.with_extension(extension)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(gone.map.len())
    }
}

impl PluginState {
    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<Bytes> {
        self.entries.lock().map.get(key).cloned()
    }

    /// Sets a key, as far as all keys and values have at most `limit` bytes.
    ///
    /// # Errors
    /// [`Refusal`] that names what is wrong.
    pub(crate) fn set(
        self: &Arc<Self>,
        key: &str,
        value: &[u8],
        limit: u64,
    ) -> Result<(), Refusal> {
        if key.is_empty() || key.len() > MAX_STATE_KEY_BYTES {
            return Err(Refusal::invalid(format!(
                "the key has {} bytes: give 1 to {MAX_STATE_KEY_BYTES}",
                key.len()
            )));
        }
        {
            let mut entries = self.entries.lock();
            let old = entries.map.get(key).map_or(0, |old| size(key, old));
            let bytes = entries.bytes - old + size(key, value);
            if bytes > limit {
                return Err(Refusal::new(
                    Code::Limit,
                    format!(
                        "its state would have {bytes} bytes, of {limit} at most: raise limits.state_kib, or delete keys"
                    ),
                ));
            }
            entries.bytes = bytes;
            entries
                .map
                .insert(key.to_owned(), Bytes::copy_from_slice(value));
            entries.is_changed = true;
        }
        self.schedule();
        Ok(())
    }

    /// Removes a key; whether there was one.
    pub(crate) fn delete(self: &Arc<Self>, key: &str) -> bool {
        let was_there = {
            let mut entries = self.entries.lock();
            let old = entries.map.remove(key);
            if let Some(old) = &old {
                entries.bytes -= size(key, old);
                entries.is_changed = true;
            }
            old.is_some()
        };
        if was_there {
            self.schedule();
        }
        was_there
    }

    /// The keys that begin with `prefix`, in order.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        let entries = self.entries.lock();
        entries
            .map
            .range(prefix.to_owned()..)
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(prefix))
            .cloned()
            .collect()
    }

    /// Bytes of all keys and values.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.lock().bytes
    }

    /// Has the state written a moment from now, once for all changes until then.
    fn schedule(self: &Arc<Self>) {
        let (Some(_), Some(runtime)) = (&self.file, &self.runtime) else {
            return;
        };
        if self.is_scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let state = Arc::clone(self);
        runtime.spawn(async move {
            tokio::time::sleep(WRITE_DELAY).await;
            let written = tokio::task::spawn_blocking(move || {
                state.is_scheduled.store(false, Ordering::Release);
                state.write_logged();
            });
            // A panic there was reported there.
            let _ = written.await;
        });
    }

    fn write_logged(&self) {
        if let (Some(file), Err(error)) = (&self.file, self.write()) {
            tracing::error!(
                "a plugin's state cannot be written to {}, and is lost with the server: {error}",
                file.display()
            );
        }
    }

    fn write(&self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let _writing = self.writing.lock();
        let map = {
            let mut entries = self.entries.lock();
            if !std::mem::take(&mut entries.is_changed) {
                return Ok(());
            }
            // The values are shared, not copied.
            entries.map.clone()
        };
        let written = write(file, &map);
        if written.is_err() {
            self.entries.lock().is_changed = true;
        }
        written
    }
}

fn size(key: &str, value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64
}

/// A file name that only this plugin has, and that tells which one it is.
fn file_name(plugin: &str) -> String {
    let readable: String = plugin
        .chars()
        .take(64)
        .map(|it| match it {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => it,
            _ => '_',
        })
        .collect();
    let digest = blake3::hash(plugin.as_bytes()).to_hex();
    format!("{readable}-{}.state", &digest[..16])
}

fn write(file: &Path, map: &BTreeMap<String, Bytes>) -> io::Result<()> {
    let mut content = MAGIC.to_vec();
    for (key, value) in map {
        for part in [key.as_bytes(), value] {
            let length = u32::try_from(part.len()).map_err(io::Error::other)?;
            content.extend(length.to_le_bytes());
            content.extend(part);
        }
    }
    let checksum = blake3::hash(&content);
    content.extend(checksum.as_bytes());
    if let Some(directory) = file.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    let unfinished = file.with_extension("tmp");
    let mut output = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)?;
    output.write_all(&content)?;
    output.sync_all()?;
    fs::rename(&unfinished, file)?;
    match file.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

fn read(file: &Path) -> io::Result<BTreeMap<String, Bytes>> {
    let content = match fs::read(file) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    let end = content
        .len()
        .checked_sub(CHECKSUM_BYTES)
        .ok_or_else(damaged)?;
    let (body, checksum) = content.split_at(end);
    if blake3::hash(body).as_bytes() != checksum {
        return Err(damaged());
    }
    let mut rest = body.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let mut map = BTreeMap::new();
    let mut part = || -> Option<&[u8]> {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (part, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        rest = after;
        Some(part)
    };
    while let Some(key) = part() {
        let value = part().ok_or_else(damaged)?;
        let key = std::str::from_utf8(key).map_err(|_| damaged())?;
        map.insert(key.to_owned(), Bytes::copy_from_slice(value));
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn name() -> Arc<str> {
        Arc::from("it/../odd name")
    }

    #[test]
    fn state_outlives_the_store_and_stays_within_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let open = || StateStore::new(Some(directory.path().join("state")), None);
        let store = open();
        let state = store.open(&name());
        state.set("a", b"12345", 10).unwrap();
        assert_eq!(state.set("b", b"1234", 10).unwrap_err().code, Code::Limit);
        state.set("b", b"123", 10).unwrap();
        state.set("a", b"1", 10).unwrap();
        assert_eq!(
            (state.bytes(), state.keys("")),
            (6, vec!["a".into(), "b".into()])
        );
        assert!(state.delete("b") && !state.delete("b"));
        state.set("ab", &[0, 255], 10).unwrap();
        store.flush();
        let again = open().open(&name());
        assert_eq!(again.get("ab").unwrap(), [0, 255][..]);
        assert_eq!(again.keys("ab"), ["ab"]);
        assert_eq!((again.bytes(), again.get("b")), (6, None));
        // One file, below the directory whatever the plugin's name.
        let files: Vec<_> = fs::read_dir(directory.path().join("state"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(files.len(), 1, "{files:?}");
        assert!(files[0].starts_with("it____odd_name-"), "{files:?}");
        assert_eq!(open().purge(&name()).unwrap(), 2);
        assert_eq!(open().open(&name()).bytes(), 0);
    }

    #[test]
    fn a_damaged_file_is_moved_aside() {
        let directory = tempfile::tempdir().unwrap();
        let open = || StateStore::new(Some(directory.path().to_owned()), None);
        let store = open();
        store.open(&name()).set("key", b"value", 100).unwrap();
        store.flush();
        let file = directory.path().join(file_name(&name()));
        let whole = fs::read(&file).unwrap();
        for damage in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[damage] ^= 1;
            fs::write(&file, &bytes).unwrap();
            assert_eq!(open().open(&name()).bytes(), 0, "byte {damage}");
            assert!(!file.exists() && file.with_extension("damaged").exists());
        }
        for length in 0..whole.len() {
            fs::write(&file, &whole[..length]).unwrap();
            assert_eq!(open().open(&name()).bytes(), 0, "{length} bytes");
        }
        fs::write(&file, &whole).unwrap();
        assert_eq!(open().open(&name()).get("key").unwrap(), "value");
    }

    #[tokio::test]
    async fn a_change_is_written_by_itself() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Some(Handle::current());
        let store = StateStore::new(Some(directory.path().to_owned()), runtime);
        store.open(&name()).set("key", b"value", 100).unwrap();
        let file = directory.path().join(file_name(&name()));
        let written = async {
            while !file.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), written)
            .await
            .unwrap();
    }
}

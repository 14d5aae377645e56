//! `--state-dir`: what a server keeps over its restarts, apart from the cache itself.
//!
//! One directory belongs to one running server. Each part of the server has a file or a folder of
//! its own in it: `tenant-budgets.json` holds the budgets that were set over HTTP
//! ([`budgets`](crate::budgets)), `plugin-state/` what plugins keep. Nothing here is on the data path; all calls may block.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::OFlags;
use serde::{Serialize, de::DeserializeOwned};

/// Held as long as a server uses the directory.
const LOCK_FILE: &str = "lock";
/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Why the directory or one of its files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another server has it.
    #[error("{} is in use by another server: give each server a directory of its own", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{} cannot be {step}: {source}", path.display())]
    Io {
        /// What was done with it.
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is there is not what this server, or its user, put there.
    #[error("{} is not usable: {why}", path.display())]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
}

/// The open state directory; clones are the same one.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: Arc<Path>,
    /// Open for its lock, which ends with the process however that ends.
    _lock: Arc<File>,
}

impl StateDir {
    /// Opens the directory, makes it (mode 0700) if its parent exists, and locks it.
    ///
    /// # Errors
    /// [`StateError`], which names the directory.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let path = std::path::absolute(path).map_err(failed("found", path))?;
        make_folder(&path)?;
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&lock_path)
            .map_err(failed("written to", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse { path }),
            Err(TryLockError::Error(source)) => return Err(failed("locked", &lock_path)(source)),
        }
        Ok(Self {
            path: path.into(),
            _lock: lock.into(),
        })
    }

    /// Where it is; absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder of its own for one part of the server, made (mode 0700) if it is missing.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be made, or is a link or another user's.
    pub fn folder(&self, name: &'static str) -> Result<PathBuf, StateError> {
        let path = self.path.join(name);
        make_folder(&path)?;
        Ok(path)
    }

    /// A file of its own for one part of the server; it need not exist yet.
    #[must_use]
    pub fn file(&self, name: &'static str) -> StateFile {
        StateFile {
            path: self.path.join(name),
            _directory: self.clone(),
        }
    }
}

/// A JSON document in the state directory. Whoever writes it does so from one thread at a time.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
    _directory: StateDir,
}

impl StateFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The document; `None` when there is no file.
    ///
    /// # Errors
    /// [`StateError`], with the line, if it is anything else than such a document.
    pub fn read<T: DeserializeOwned>(&self) -> Result<Option<T>, StateError> {
        read_document(&self.path)
    }

    /// Replaces the document as a whole: after a crash at any moment the old or the new one is
    /// there.
    ///
    /// # Errors
    /// [`StateError`]; the old document is kept then.
    pub fn write<T: Serialize>(&self, document: &T) -> Result<(), StateError> {
        let mut bytes = serde_json::to_vec_pretty(document)
            .map_err(|error| self.unusable(format!("its new content has no JSON form: {error}")))?;
        bytes.push(b'\n');
        write_atomically(&self.path, &bytes)
    }

    /// That what the file holds cannot be used, and why.
    #[must_use]
    pub fn unusable(&self, why: String) -> StateError {
        StateError::Unusable {
            path: self.path.clone(),
            why,
        }
    }
}

/// A JSON document that a server wrote; `None` when there is no file. For those who look at a
/// directory without opening it.
///
/// # Errors
/// [`StateError`], with the line, if it is anything else than such a document.
pub fn read_document<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let Some(bytes) = read_own_file(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| StateError::Unusable {
            path: path.to_owned(),
            why: format!(
                "{error}; restore it from a copy, or remove it to start without what it held"
            ),
        })
}

/// Replaces a file (mode 0600) as a whole and makes it last: temporary file, fsync, rename, fsync of
/// the folder. Two threads must not write the same file at once.
///
/// # Errors
/// [`StateError`]; the old content is kept then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let write_failed = || failed("written", path);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(write_failed()(io::ErrorKind::InvalidInput.into()));
    };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".tmp");
    let temporary = folder.join(temporary);
    // One that a crash left; `create_new` below follows no link and reuses nobody's file.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("removed", &temporary)(error));
        }
        _ => {}
    }
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(write_failed())
}

/// Reads a file that nobody but the server's user can have written; `None` when there is none.
fn read_own_file(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let unusable = |why: String| StateError::Unusable {
        path: path.to_owned(),
        why,
    };
    let opened = OpenOptions::new()
        .read(true)
        // A link is not followed, and a pipe that somebody put there does not hold the start up.
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path)(error)),
    };
    let facts = file.metadata().map_err(failed("read", path))?;
    if !facts.is_file() {
        return Err(unusable("it is no regular file".to_owned()));
    }
    let (user, mode) = (rustix::process::geteuid().as_raw(), facts.mode());
    if facts.uid() != user && facts.uid() != 0 {
        return Err(unusable(format!(
            "it belongs to user {}, not to the server's user {user}",
            facts.uid()
        )));
    }
    if mode & 0o022 != 0 {
        return Err(unusable(format!(
            "others may write it (mode {:o}): chmod go-w, after a look at what it says",
            mode & 0o7777
        )));
    }
    if facts.len() > MAX_FILE_BYTES {
        return Err(unusable(format!(
            "it has {} bytes, and more than {MAX_FILE_BYTES} are not read",
            facts.len()
        )));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    Ok(Some(bytes))
}

fn make_folder(path: &Path) -> Result<(), StateError> {
    let unusable = |why: String| StateError::Unusable {
        path: path.to_owned(),
        why,
    };
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("made", path)(error)),
    }
    let facts = std::fs::metadata(path).map_err(failed("read", path))?;
    if !facts.is_dir() {
        return Err(unusable("it is no directory".to_owned()));
    }
    Ok(())
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { step, path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn opened() -> (tempfile::TempDir, StateDir) {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::open(&parent.path().join("state")).unwrap();
        (parent, state)
    }

    #[test]
    fn only_its_user_may_read_what_is_kept() {
        let (_parent, state) = opened();
        let file = state.file("a.json");
        assert_eq!(file.read::<Vec<u32>>().unwrap(), None);
        file.write(&vec![1_u32, 2]).unwrap();
        file.write(&vec![3_u32]).unwrap();
        assert_eq!(file.read::<Vec<u32>>().unwrap(), Some(vec![3]));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.path()), 0o700);
        assert_eq!(mode(file.path()), 0o600);
        assert_eq!(mode(&state.folder("plugins").unwrap()), 0o700);
        // No temporary file stays behind.
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 3);
    }

    #[test]
    fn one_server_at_a_time() {
        let (_parent, state) = opened();
        let error = StateDir::open(state.path()).unwrap_err();
        assert!(matches!(error, StateError::InUse { .. }), "{error}");
        let path = state.path().to_owned();
        let clone = state.clone();
        drop(state);
        assert!(StateDir::open(&path).is_err(), "a clone holds it too");
        drop(clone);
        StateDir::open(&path).unwrap();
    }

    #[test]
    fn a_broken_or_foreign_file_is_named() {
        let (_parent, state) = opened();
        let file = state.file("a.json");
        let refused = |why: &str| {
            let error = file.read::<Vec<u32>>().unwrap_err().to_string();
            assert!(error.contains("a.json") && error.contains(why), "{error}");
        };
        std::fs::write(file.path(), "[1, 2").unwrap();
        refused("line 1");
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o666)).unwrap();
        refused("others may write it");
        std::fs::remove_file(file.path()).unwrap();
        symlink("/etc/hostname", file.path()).unwrap();
        refused("cannot be read");
        std::fs::remove_file(file.path()).unwrap();
        std::fs::create_dir(file.path()).unwrap();
        refused("no regular file");
    }

    #[test]
    fn a_failed_write_keeps_the_old_document() {
        let (_parent, state) = opened();
        let file = state.file("a.json");
        file.write(&vec![1_u32]).unwrap();
        // A folder where the temporary file would be cannot be replaced.
        let obstacle = state.path().join(".a.json.tmp");
        std::fs::create_dir(&obstacle).unwrap();
        std::fs::write(obstacle.join("x"), "").unwrap();
        assert!(file.write(&vec![2_u32]).is_err());
        assert_eq!(file.read::<Vec<u32>>().unwrap(), Some(vec![1]));
    }

    #[test]
    fn a_directory_without_a_parent_or_that_is_a_file_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        assert!(StateDir::open(&parent.path().join("no/state")).is_err());
        let file = parent.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = StateDir::open(&file).unwrap_err().to_string();
        assert!(error.contains("no directory"), "{error}");
    }
}

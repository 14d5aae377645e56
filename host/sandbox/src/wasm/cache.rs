//! Compiled modules on disk, in a directory that nobody else can write.
//!
//! Each artefact `<source digest>-<settings>.cwasm` has a `.sum` beside it with the digest of
//! its bytes, so that a torn or damaged file is compiled anew instead of being run, and below that
//! a note of what it was made of.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, fstat, openat, renameat, unlinkat},
    process::geteuid,
};

use super::{artefact::CheckedArtefact, error::WasmError, made::Made};

/// How many artefacts are kept from one start to the next.
const KEPT_ARTEFACTS: usize = 256;

/// The age at which a file in the making is one that a dead process left.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The permissions by which others could change a file.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The cache's directory, held open so that no rename of its parents leads elsewhere.
#[derive(Debug)]
pub(super) struct Cache {
    directory: OwnedFd,
    path: PathBuf,
    next_temporary: AtomicU64,
}

/// A file in the making; gone when dropped before [`Cache::keep`].
pub(super) struct Unfinished<'a> {
    cache: &'a Cache,
    name: String,
    /// Empty at first, open for reading and writing.
    pub(super) file: File,
}

impl Cache {
    /// Opens the directory, creating it for our user alone.
    pub(super) fn open_directory(path: &Path) -> Result<Self, WasmError> {
        let refused = |reason: &str| WasmError::CacheDirectory {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let failed = |source: io::Error| WasmError::Cache {
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed)?;
        let directory = openat(
            CWD,
            path,
            OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| failed(error.into()))?;
        let status = fstat(&directory).map_err(|error| failed(error.into()))?;
        if status.st_uid != geteuid().as_raw() {
            return Err(refused(
                "it belongs to another user; name a directory of the server's own user",
            ));
        }
        if status.st_mode & WRITABLE_BY_OTHERS != 0 {
            return Err(refused(
                "others can write it, and it holds code that is run; chmod it to 0700",
            ));
        }
        let cache = Self {
            directory,
            path: path.to_owned(),
            next_temporary: AtomicU64::new(0),
        };
        cache.prune();
        Ok(cache)
    }

    /// An artefact that is ours and has the bytes it was written with. `None`: there is none
    /// such, whether for want of one or because what lies there is not to be trusted.
    pub(super) fn open(&self, name: &str) -> Option<(CheckedArtefact, Made)> {
        let mut noted = String::new();
        self.open_ours(&sum_name(name))
            .ok()??
            .take(256)
            .read_to_string(&mut noted)
            .ok()?;
        let mut file = self.open_ours(&artefact_name(name)).ok()??;
        let (sum, note) = noted.split_once('\n')?;
        if sum_of(&mut file).ok()? != sum {
            return None;
        }
        file.rewind().ok()?;
        Some((CheckedArtefact { file }, Made::from_note(note)?))
    }

    /// A new file for an artefact.
    pub(super) fn create(&self) -> io::Result<Unfinished<'_>> {
        let name = format!(
            ".{}-{}.tmp",
            std::process::id(),
            self.next_temporary.fetch_add(1, Ordering::Relaxed)
        );
        // One of a dead process that had our id, at most.
        let _ = unlinkat(&self.directory, &name, AtFlags::empty());
        let file = openat(
            &self.directory,
            &name,
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )?;
        Ok(Unfinished {
            cache: self,
            name,
            file: file.into(),
        })
    }

    /// Gives a finished artefact its name, once it and its sum are on the disk.
    pub(super) fn keep(
        &self,
        name: &str,
        mut artefact: Unfinished<'_>,
        made: &Made,
    ) -> io::Result<()> {
        artefact.file.rewind()?;
        let sum = sum_of(&mut artefact.file)?;
        artefact.file.sync_all()?;
        let mut note = self.create()?;
        writeln!(note.file, "{sum}\n{}", made.note())?;
        note.file.sync_all()?;
        // Between the two renames a reader meets a sum of other bytes, and compiles anew.
        artefact.rename(&artefact_name(name))?;
        note.rename(&sum_name(name))
    }

    /// A file that only our user can write, or `None`.
    fn open_ours(&self, name: &str) -> io::Result<Option<File>> {
        let file: File = openat(
            &self.directory,
            name,
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )?
        .into();
        let status = file.metadata()?;
        let ours = status.is_file()
            && status.uid() == geteuid().as_raw()
            && status.mode() & WRITABLE_BY_OTHERS == 0;
        Ok(ours.then_some(file))
    }

    /// Drops all but the newest artefacts, and temporary files that dead processes left.
    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else {
            return;
        };
        let mut artefacts: Vec<(SystemTime, String)> = Vec::new();
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let Some(written) = entry.metadata().and_then(|data| data.modified()).ok() else {
                continue;
            };
            if name.ends_with(".cwasm") {
                artefacts.push((written, name));
            } else if name.ends_with(".tmp") && written.elapsed().is_ok_and(|age| age > ABANDONED) {
                let _ = unlinkat(&self.directory, &name, AtFlags::empty());
            }
        }
        artefacts.sort_unstable_by(|left, right| right.cmp(left));
        for (_, name) in artefacts.into_iter().skip(KEPT_ARTEFACTS) {
            let _ = unlinkat(&self.directory, &name, AtFlags::empty());
            if let Some(stem) = name.strip_suffix(".cwasm") {
                let _ = unlinkat(&self.directory, sum_name(stem), AtFlags::empty());
            }
        }
    }

    /// Names the directory in an error.
    pub(super) fn failed(&self, source: io::Error) -> WasmError {
        WasmError::Cache {
            path: self.path.clone(),
            source,
        }
    }
}

impl Unfinished<'_> {
    fn rename(mut self, name: &str) -> io::Result<()> {
        renameat(
            &self.cache.directory,
            &self.name,
            &self.cache.directory,
            name,
        )?;
        self.name.clear();
        Ok(())
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            let _ = unlinkat(&self.cache.directory, &self.name, AtFlags::empty());
        }
    }
}

fn artefact_name(name: &str) -> String {
    format!("{name}.cwasm")
}

fn sum_name(name: &str) -> String {
    format!("{name}.sum")
}

/// The digest and length of what is left of a file.
fn sum_of(file: &mut File) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let length = io::copy(file, &mut hasher)?;
    Ok(format!("{} {length}", hasher.finalize().to_hex()))
}

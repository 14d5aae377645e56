//! A directory of files, one per value: LMCache's `fs` and `fs_native`.
//!
//! Names and bytes are those of `fs_l2_adapter.py` and `fs_native_l2_adapter.py` of LMCache
//! 0.5.6, so that both may work in one directory. What we add lies where LMCache does not look:
//! the seal of a value in an extended attribute of its file, so that it goes and comes with the
//! inode that it describes and never speaks of a file that somebody put in its place; temporary
//! files `.stockade-*.tmp`; and damaged files in `.stockade-quarantine/`.
//!
//! Every file is reached by one name below the directory and without following links, so that
//! nothing in the directory leads out of it.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZeroU64,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
        XattrFlags, fadvise, fgetxattr, fsetxattr, fstat, fsync, futimens, mkdirat, openat,
        renameat, statat, unlinkat,
    },
    io::Errno,
};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};

use super::{Adapter, AdapterError, Entry, Form, IsWanted};
use crate::{
    integrity::{Fault, Seal},
    name::{FOLDER_OF_SALT, MAX_FILE_NAME, NameError, ObjectName},
};

const SEAL: &str = "user.stockade.seal";
const QUARANTINE: &str = ".stockade-quarantine";
/// Most damaged files that are kept for looking at; the oldest go first.
const MAX_QUARANTINED: usize = 64;
const TEMPORARY: (&str, &str) = (".stockade-", ".tmp");
/// Age at which a temporary file has no writer any more: far above every deadline.
const ABANDONED: Duration = Duration::from_secs(3600);
/// `O_DIRECT` wants memory, offset and length aligned to this on all usual devices; LMCache's
/// `fs_native` fills files up to it.
const DIRECT_ALIGN: usize = 4096;

/// How a directory is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FsOptions {
    /// The directory; made if missing.
    pub(crate) base_path: PathBuf,
    /// Where files are written before they get their name, below `base_path`.
    pub(crate) relative_tmp_dir: Option<String>,
    /// Pass the page cache by where lengths are multiples of 4096.
    pub(crate) use_odirect: bool,
    /// Ask the kernel to read this many bytes ahead.
    pub(crate) read_ahead_bytes: Option<u64>,
    /// Files that are worked on at once.
    pub(crate) workers: usize,
    /// A folder for each salt. LMCache does not find what is in folders.
    pub(crate) folder_by_salt: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FsAdapter {
    inner: Arc<Inner>,
    workers: Arc<Semaphore>,
}

/// Something that is no value.
struct Aside {
    place: Place,
    name: String,
    /// Whose it is, if that can be told.
    salt: Option<String>,
}

enum Place {
    Quarantine,
    Temporary,
    FolderOfSalt,
}

#[derive(Debug)]
struct Inner {
    options: FsOptions,
    /// Whether files can carry a seal.
    has_seals: bool,
    next_temporary: AtomicU64,
}

impl FsAdapter {
    /// Opens or makes the directory and clears away what killed writers left. Blocks.
    ///
    /// # Errors
    /// A sentence when the directory cannot be used.
    pub(crate) fn open(options: FsOptions) -> Result<Self, String> {
        let base = &options.base_path;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("base_path {}: {what}: {error}", base.display())
        };
        std::fs::create_dir_all(base).map_err(|error| failed("cannot be made", &error))?;
        let directory =
            open_directory(CWD, base).map_err(|error| failed("cannot be opened", &error))?;
        if let Some(relative) = &options.relative_tmp_dir {
            let is_inside = !relative.is_empty()
                && Path::new(relative)
                    .components()
                    .all(|part| matches!(part, std::path::Component::Normal(_)));
            if !is_inside {
                return Err(format!(
                    "relative_tmp_dir {relative:?}: give a path below base_path"
                ));
            }
            std::fs::create_dir_all(base.join(relative))
                .map_err(|error| failed("relative_tmp_dir cannot be made", &error))?;
        }
        let mut inner = Inner {
            options,
            has_seals: false,
            next_temporary: AtomicU64::new(fastrand::u64(..)),
        };
        inner.has_seals = inner
            .takes_seals(&directory)
            .map_err(|error| failed_to_write(&inner.options.base_path, error))?;
        if !inner.has_seals {
            tracing::warn!(
                base_path = %inner.options.base_path.display(),
                "the file system keeps no extended attributes: damaged values are noticed by their length only"
            );
        }
        inner.clear_abandoned();
        let workers = Arc::new(Semaphore::new(inner.options.workers.clamp(1, 1024)));
        Ok(Self {
            inner: Arc::new(inner),
            workers,
        })
    }

    /// Runs blocking work on a thread. A disk that hangs keeps at most `workers` threads.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, AdapterError> + Send + 'static,
    ) -> Result<T, AdapterError> {
        let stopped = |_| AdapterError::Unavailable("the server is stopping".to_owned());
        // The permit goes along: it is held as long as the thread, not as long as the caller.
        let permit = Arc::clone(&self.workers)
            .acquire_owned()
            .await
            .map_err(|error| stopped(error.to_string()))?;
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || {
            let result = work(&inner);
            drop(permit);
            result
        })
        .await
        .map_err(|error| stopped(error.to_string()))?
    }
}

fn failed_to_write(base: &Path, errno: Errno) -> String {
    format!(
        "base_path {}: cannot be written to: {errno}",
        base.display()
    )
}

fn open_directory(at: impl AsFd, path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(at, path, flags, Mode::empty())
}

fn error_of(errno: Errno) -> AdapterError {
    match errno {
        Errno::NOENT => AdapterError::NotFound,
        Errno::NOSPC | Errno::DQUOT => AdapterError::Full(errno.to_string()),
        Errno::ACCESS | Errno::PERM | Errno::ROFS => AdapterError::Denied(errno.to_string()),
        _ => AdapterError::Unavailable(errno.to_string()),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Something that stands where a value would and is none: a link, a directory, a device.
fn odd(what: &str) -> AdapterError {
    AdapterError::Damaged {
        what: what.to_owned(),
        moved: false,
    }
}

impl Inner {
    /// The directory that holds the file of `name`. The base is opened anew each time, so that it
    /// may be mounted or replaced while the server runs.
    fn directory(&self, name: &ObjectName, make: bool) -> Result<OwnedFd, AdapterError> {
        let base = self.base()?;
        let salt = name.cache_salt();
        if !self.options.folder_by_salt || salt.is_empty() {
            return Ok(base);
        }
        let folder = format!("{FOLDER_OF_SALT}{salt}");
        if folder.len() > MAX_FILE_NAME {
            return Err(NameError::TooLong(folder.len()).into());
        }
        if make {
            match mkdirat(&base, &folder, Mode::from_raw_mode(0o755)) {
                Ok(()) => fsync(&base).map_err(error_of)?,
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(error_of(errno)),
            }
        }
        open_inside(&base, &folder).map_err(error_of)
    }

    fn base(&self) -> Result<OwnedFd, AdapterError> {
        open_directory(CWD, &self.options.base_path).map_err(|errno| match errno {
            Errno::NOENT => AdapterError::Unavailable("base_path is gone".to_owned()),
            errno => error_of(errno),
        })
    }

    fn temporary_directory(&self, base: &OwnedFd) -> Result<OwnedFd, Errno> {
        match &self.options.relative_tmp_dir {
            Some(relative) => open_directory(base, relative.as_str()),
            None => open_directory(base, "."),
        }
    }

    /// A new one for a value of a salt, which says whose bytes a killed writer left.
    fn temporary_name(&self, cache_salt: &str) -> String {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        format!("{}{number:016x}@{cache_salt}{}", TEMPORARY.0, TEMPORARY.1)
    }

    /// Whether files of the directory can carry a seal; also whether it can be written to at all.
    fn takes_seals(&self, base: &OwnedFd) -> Result<bool, Errno> {
        let directory = self.temporary_directory(base)?;
        let name = self.temporary_name("");
        let file = create(&directory, &name, OFlags::empty())?;
        let sealed = fsetxattr(&file, SEAL, b"probe", XattrFlags::empty());
        unlinkat(&directory, &name, AtFlags::empty())?;
        Ok(sealed.is_ok())
    }

    fn find(&self, name: &ObjectName) -> Result<bool, AdapterError> {
        let Ok(file) = name.file_name() else {
            return Ok(false);
        };
        let directory = match self.directory(name, false) {
            Ok(directory) => directory,
            Err(AdapterError::NotFound | AdapterError::Name(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        match statat(&directory, &file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(error_of(errno)),
        }
    }

    fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let length = wanted.length;
        let file_name = name.file_name()?;
        let directory = self.directory(name, false)?;
        let file = match open_to_read(&directory, &file_name, OFlags::empty()) {
            Err(Errno::LOOP) => return Err(odd("a symbolic link")),
            Err(Errno::NXIO) => return Err(odd("a socket or device")),
            opened => File::from(opened.map_err(error_of)?),
        };
        let stat = fstat(&file).map_err(error_of)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(odd("not a regular file"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let seal = read_seal(&file);
        let padded = length.next_multiple_of(DIRECT_ALIGN as u64);
        // LMCache's fs_native fills up what it writes past the page cache.
        let is_padded = seal.is_none() && size == padded;
        // Nothing that nobody asked for is read into memory.
        if size > padded && seal.is_none_or(|seal| !seal.is_of(size)) {
            return Err(self.move_aside(&directory, &file_name, "its file is too long"));
        }
        if size > padded {
            return Err(AdapterError::OtherForm { found: size });
        }
        let mut value = self.read(&directory, &file_name, file, size)?;
        if is_padded {
            value.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        }
        match Seal::check(seal, &value, wanted) {
            Ok(()) => Ok(value),
            Err(Fault::Damaged(what)) => Err(self.move_aside(&directory, &file_name, &what)),
            Err(fault) => Err(fault.into_error(false)),
        }
    }

    fn read(
        &self,
        directory: &OwnedFd,
        name: &str,
        mut file: File,
        size: u64,
    ) -> Result<Bytes, AdapterError> {
        let size = usize::try_from(size).map_err(|_| error_of(Errno::NOMEM))?;
        let read = |error: io::Error| error_of(errno_of(&error));
        if let Some(ahead) = self.options.read_ahead_bytes.and_then(NonZeroU64::new) {
            // Advice only; the file is read just the same without it.
            let _ = fadvise(&file, 0, Some(ahead), rustix::fs::Advice::WillNeed);
        }
        let now = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW as _,
            },
            last_modification: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT as _,
            },
        };
        // The order of use has to outlive a restart; on a file of another user it is lost.
        let _ = futimens(&file, &now);
        if self.options.use_odirect
            && size.is_multiple_of(DIRECT_ALIGN)
            && let Ok(direct) = open_to_read(directory, name, OFlags::DIRECT)
        {
            let (mut memory, start) = aligned(size)?;
            File::from(direct)
                .read_exact(&mut memory[start..start + size])
                .map_err(read)?;
            return Ok(memory.freeze().slice(start..start + size));
        }
        let mut value = Vec::new();
        value
            .try_reserve_exact(size)
            .map_err(|_| error_of(Errno::NOMEM))?;
        io::Read::by_ref(&mut file)
            .take(size as u64)
            .read_to_end(&mut value)
            .map_err(read)?;
        Ok(value.into())
    }

    fn store(&self, name: &ObjectName, value: &Bytes, layout: u32) -> Result<(), AdapterError> {
        let file_name = name.file_name()?;
        let base = self.base()?;
        let directory = self.directory(name, true)?;
        let temporary_directory = self.temporary_directory(&base).map_err(error_of)?;
        let temporary = self.temporary_name(name.cache_salt());
        let written = self
            .write(&temporary_directory, &temporary, value, layout)
            .and_then(|()| renameat(&temporary_directory, &temporary, &directory, &file_name));
        match written {
            Ok(()) => {
                // Without it a crash could take the name back, though never half of the bytes.
                fsync(&directory).map_err(error_of)
            }
            Err(errno) => {
                // It may not even have been made; what stays is cleared away at the next start.
                let _ = unlinkat(&temporary_directory, &temporary, AtFlags::empty());
                Err(match errno {
                    Errno::NOENT => AdapterError::Unavailable("base_path is gone".to_owned()),
                    errno => error_of(errno),
                })
            }
        }
    }

    fn write(
        &self,
        directory: &OwnedFd,
        name: &str,
        value: &Bytes,
        layout: u32,
    ) -> Result<(), Errno> {
        let is_direct = self.options.use_odirect && value.len().is_multiple_of(DIRECT_ALIGN);
        let direct = match is_direct {
            true => create(directory, name, OFlags::DIRECT).ok(),
            false => None,
        };
        let write = |error: io::Error| errno_of(&error);
        let file = match direct {
            Some(file) => {
                let mut file = File::from(file);
                let (mut memory, start) = aligned(value.len()).map_err(|_| Errno::NOMEM)?;
                let memory = &mut memory[start..start + value.len()];
                memory.copy_from_slice(value);
                file.write_all(memory).map_err(write)?;
                file
            }
            None => {
                let mut file = File::from(create(directory, name, OFlags::empty())?);
                file.write_all(value).map_err(write)?;
                file
            }
        };
        if self.has_seals {
            let seal = Seal::of(value, layout).to_string();
            fsetxattr(&file, SEAL, seal.as_bytes(), XattrFlags::empty())?;
        }
        fsync(&file)
    }

    /// Moves a damaged file where nobody takes it for a value.
    fn move_aside(&self, directory: &OwnedFd, name: &str, what: &str) -> AdapterError {
        let moved = self.quarantine(directory, name);
        if let Err(errno) = &moved {
            tracing::warn!(file = name, "a damaged file cannot be moved aside: {errno}");
        }
        AdapterError::Damaged {
            what: what.to_owned(),
            moved: moved.is_ok(),
        }
    }

    fn quarantine(&self, directory: &OwnedFd, name: &str) -> Result<(), Errno> {
        let base = open_directory(CWD, &self.options.base_path)?;
        match mkdirat(&base, QUARANTINE, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        let quarantine = open_inside(&base, QUARANTINE)?;
        let since_epoch = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let mut kept = entries(&quarantine)?;
        kept.sort_unstable();
        let surplus = (kept.len() + 1).saturating_sub(MAX_QUARANTINED);
        for oldest in kept.iter().take(surplus) {
            // Another server may have removed it.
            let _ = unlinkat(&quarantine, oldest.as_str(), AtFlags::empty());
        }
        // Names sort by time, and end as the value's does: with its salt.
        let time = format!("{:020}-", since_epoch.as_nanos());
        let surplus = (time.len() + name.len()).saturating_sub(MAX_FILE_NAME);
        let tail = name.get(name.ceil_char_boundary(surplus)..);
        let aside = time + tail.unwrap_or_default();
        renameat(directory, name, &quarantine, aside)
    }

    fn delete(&self, name: &ObjectName) -> Result<bool, AdapterError> {
        let Ok(file) = name.file_name() else {
            return Ok(false);
        };
        // Also outside of its folder, where LMCache puts it.
        let outside = match self.options.folder_by_salt && !name.cache_salt().is_empty() {
            true => remove(&self.base()?, &file)?,
            false => false,
        };
        match self.directory(name, false) {
            Ok(directory) => Ok(remove(&directory, &file)? || outside),
            Err(AdapterError::NotFound) => Ok(outside),
            Err(error) => Err(error),
        }
    }

    /// What lies beside values: where, and of which salt, if that can be told.
    fn aside(&self) -> Result<Vec<Aside>, AdapterError> {
        let base = self.base()?;
        let mut found = Vec::new();
        match open_inside(&base, QUARANTINE) {
            Ok(quarantine) => {
                found.extend(
                    entries(&quarantine)
                        .map_err(error_of)?
                        .into_iter()
                        .map(|name| Aside {
                            salt: name
                                .split_once('-')
                                .and_then(|(_, file)| ObjectName::from_file_name(file))
                                .map(|name| name.cache_salt().to_string()),
                            place: Place::Quarantine,
                            name,
                        }),
                );
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(error_of(errno)),
        }
        let temporary = self.temporary_directory(&base).map_err(error_of)?;
        for name in entries(&temporary).map_err(error_of)? {
            let salt = name
                .strip_prefix(TEMPORARY.0)
                .and_then(|rest| rest.strip_suffix(TEMPORARY.1))
                .and_then(|rest| Some(rest.split_once('@')?.1.to_owned()));
            if salt.is_some() {
                let place = Place::Temporary;
                found.push(Aside { place, name, salt });
            }
        }
        if self.options.folder_by_salt {
            for name in entries(&base).map_err(error_of)? {
                let salt = name.strip_prefix(FOLDER_OF_SALT).map(ToOwned::to_owned);
                if salt.is_some() {
                    let place = Place::FolderOfSalt;
                    found.push(Aside { place, name, salt });
                }
            }
        }
        Ok(found)
    }

    /// Removes these; returns how many values there were.
    fn discard(&self, aside: &[Aside]) -> Result<u64, AdapterError> {
        let base = self.base()?;
        let mut discarded = 0;
        for Aside { place, name, .. } in aside {
            let is_gone = match place {
                Place::Quarantine => {
                    remove(&open_inside(&base, QUARANTINE).map_err(error_of)?, name)?
                }
                Place::Temporary => {
                    remove(&self.temporary_directory(&base).map_err(error_of)?, name)?
                }
                // Its name is the salt's; it stays while somebody writes to it.
                Place::FolderOfSalt => {
                    let _ = unlinkat(&base, name.as_str(), AtFlags::REMOVEDIR);
                    false
                }
            };
            discarded += u64::from(is_gone);
        }
        Ok(discarded)
    }

    fn list(
        &self,
        cache_salt: Option<&str>,
        found: &mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        let base = self.base()?;
        self.list_directory(&base, cache_salt, found)?;
        if !self.options.folder_by_salt {
            return Ok(());
        }
        for folder in entries(&base).map_err(error_of)? {
            let Some(salt) = folder.strip_prefix(FOLDER_OF_SALT) else {
                continue;
            };
            if cache_salt.is_none_or(|wanted| wanted == salt)
                && let Ok(folder) = open_inside(&base, &folder)
            {
                self.list_directory(&folder, cache_salt, found)?;
            }
        }
        Ok(())
    }

    fn list_directory(
        &self,
        directory: &OwnedFd,
        cache_salt: Option<&str>,
        found: &mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        for entry in Dir::read_from(directory).map_err(error_of)? {
            let entry = entry.map_err(error_of)?;
            let Some(name) = entry
                .file_name()
                .to_str()
                .ok()
                .and_then(ObjectName::from_file_name)
            else {
                continue;
            };
            if cache_salt.is_some_and(|wanted| **name.cache_salt() != *wanted) {
                continue;
            }
            // Gone since it was read from the directory, or never a value.
            let Ok(stat) = statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                continue;
            }
            let used = stat.st_atime.max(stat.st_mtime);
            let entry = Entry {
                name,
                bytes: u64::try_from(stat.st_size).unwrap_or(0),
                last_used: u64::try_from(used)
                    .ok()
                    .map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
            };
            if found.blocking_send(entry).is_err() {
                return Ok(()); // Nobody listens any more.
            }
        }
        Ok(())
    }

    /// Removes temporary files that nobody will finish.
    fn clear_abandoned(&self) {
        let Ok(directory) = open_directory(CWD, &self.options.base_path)
            .and_then(|base| self.temporary_directory(&base))
        else {
            return;
        };
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let mut cleared = 0;
        for name in entries(&directory).unwrap_or_default() {
            let is_ours = name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1);
            let is_old = is_ours
                && statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
                    let modified = u64::try_from(stat.st_mtime).unwrap_or(0);
                    now.saturating_sub(modified) > ABANDONED.as_secs()
                });
            if is_old && unlinkat(&directory, &name, AtFlags::empty()).is_ok() {
                cleared += 1;
            }
        }
        if cleared > 0 {
            tracing::info!(
                cleared,
                "removed temporary files of writers that were killed"
            );
        }
    }
}

/// Whether there was a file of the name, which is gone now.
fn remove(directory: &OwnedFd, name: &str) -> Result<bool, AdapterError> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(error_of(errno)),
    }
}

fn create(directory: &OwnedFd, name: &str, more: OFlags) -> Result<OwnedFd, Errno> {
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
    openat(directory, name, flags, Mode::from_raw_mode(0o644))
}

/// `NONBLOCK`, because opening a FIFO would wait for its writer.
fn open_to_read(directory: &OwnedFd, name: &str, more: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | more;
    openat(directory, name, flags, Mode::empty())
}

fn open_inside(base: &OwnedFd, folder: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(base, folder, flags, Mode::empty())
}

fn entries(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        if let Ok(name) = entry?.file_name().to_str()
            && name != "."
            && name != ".."
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn read_seal(file: &File) -> Option<Seal> {
    let mut text = [0; 64];
    let length = fgetxattr(file, SEAL, &mut text[..]).ok()?;
    Seal::parse(text.get(..length)?)
}

/// Memory for `size` bytes at an aligned place, and that place.
fn aligned(size: usize) -> Result<(BytesMut, usize), AdapterError> {
    let total = size
        .checked_add(DIRECT_ALIGN)
        .ok_or_else(|| error_of(Errno::NOMEM))?;
    let memory = BytesMut::zeroed(total);
    let start = memory.as_ptr().align_offset(DIRECT_ALIGN);
    match start < DIRECT_ALIGN {
        true => Ok((memory, start)),
        false => Err(error_of(Errno::INVAL)),
    }
}

#[async_trait]
impl Adapter for FsAdapter {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let names = names.to_vec();
        self.run(move |inner| names.iter().map(|name| inner.find(name)).collect())
            .await
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let name = name.clone();
        self.run(move |inner| inner.load(&name, wanted)).await
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        let name = name.clone();
        self.run(move |inner| inner.store(&name, &value, layout))
            .await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let names = names.to_vec();
        self.run(move |inner| names.iter().map(|name| inner.delete(name)).collect())
            .await
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        let cache_salt = cache_salt.map(ToOwned::to_owned);
        self.run(move |inner| inner.list(cache_salt.as_deref(), &found))
            .await
    }

    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        let mut aside = self.run(Inner::aside).await?;
        aside.retain(|it| it.salt.as_deref().is_none_or(is_wanted));
        self.run(move |inner| inner.discard(&aside)).await
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let Inner {
            options, has_seals, ..
        } = &*self.inner;
        let mut status = serde_json::Map::new();
        status.insert("base_path".into(), json!(options.base_path));
        status.insert("use_odirect".into(), json!(options.use_odirect));
        status.insert("num_workers".into(), json!(options.workers));
        status.insert("checksums".into(), json!(has_seals));
        status
    }
}

//! Files of JSON lines in a directory: each up to a size, so many of them, the oldest goes first.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// A file of this size gets no more lines.
const FILE_BYTES: u64 = 16 << 20;
/// Files kept; the oldest one goes first, with a warning.
const MAX_FILES: usize = 256;

/// The files of one kind in a directory, readable by this user only.
#[derive(Debug)]
pub(super) struct LineFiles {
    directory: PathBuf,
    /// Name of the files, before the time of their first line and `.jsonl`.
    prefix: &'static str,
    /// The one that is written, and its bytes.
    file: Option<(File, u64)>,
}

impl LineFiles {
    /// Writes into a directory, which is made if its parent exists.
    ///
    /// # Errors
    /// When it cannot be made or written to; found out now, and not when the first line is due.
    pub(super) fn open(directory: &Path, prefix: &'static str) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut files = Self {
            directory: directory.to_owned(),
            prefix,
            file: None,
        };
        files.rotate()?;
        Ok(files)
    }

    /// Writes whole lines in one call, so that a crash leaves whole ones, or at worst one that is
    /// cut. Blocks.
    ///
    /// # Errors
    /// When they could not be written; the next ones begin another file then.
    pub(super) fn append(&mut self, lines: &str) -> io::Result<()> {
        if self
            .file
            .as_ref()
            .is_none_or(|(_, size)| *size >= FILE_BYTES)
        {
            self.rotate()?;
        }
        let Some((file, size)) = &mut self.file else {
            return Err(io::Error::other("there is no file"));
        };
        let written = file.write_all(lines.as_bytes());
        *size += lines.len() as u64;
        if written.is_err() {
            // Half a line may be in it.
            self.file = None;
        }
        written
    }

    /// Begins a new file, and removes the oldest one if there are too many.
    fn rotate(&mut self) -> io::Result<()> {
        self.file = None;
        let mut names: Vec<PathBuf> = std::fs::read_dir(&self.directory)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                name.is_some_and(|name| name.starts_with(self.prefix) && name.ends_with(".jsonl"))
            })
            .collect();
        names.sort_unstable();
        for oldest in names.iter().take(names.len().saturating_sub(MAX_FILES - 1)) {
            tracing::warn!("{} is removed, the oldest of {MAX_FILES}", oldest.display());
            std::fs::remove_file(oldest)?;
        }
        let name = format!("{}{:012}.jsonl", self.prefix, since_epoch().as_secs());
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.directory.join(name))?;
        let size = file.metadata()?.len();
        self.file = Some((file, size));
        Ok(())
    }

    /// Where they are.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

/// The time as these files have it.
pub(super) fn since_epoch() -> std::time::Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn a_full_file_is_followed_by_another_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for number in 0..MAX_FILES + 3 {
            std::fs::write(path.join(format!("it-{number:012}.jsonl")), "{}\n").unwrap();
        }
        std::fs::write(path.join("other-000000000000.jsonl"), "{}\n").unwrap();
        let mut files = LineFiles::open(path, "it-").unwrap();
        assert_eq!(std::fs::read_dir(path).unwrap().count(), MAX_FILES + 1);
        assert!(!path.join("it-000000000000.jsonl").exists());
        assert!(path.join("other-000000000000.jsonl").exists());
        files.file.as_mut().unwrap().1 = FILE_BYTES;
        files.append("{}\n").unwrap();
        assert!(files.file.unwrap().1 < FILE_BYTES);
    }
}

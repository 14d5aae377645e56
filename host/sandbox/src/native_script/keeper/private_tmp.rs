//! Temporary directories of the script's own.

use std::{
    ffi::CString,
    io,
    path::{Path, PathBuf},
};

use rustix::mount::MountFlags;
use tempfile::TempDir;

use crate::native_script::confinement::{Confinement, Granted, Protection};

/// Where programs put temporary files and POSIX shared memory, the server's pool among it.
const PLACES: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// An empty file system takes memory per file, too.
const INODES_PER_MIB: u32 = 64;

/// Mounts an empty file system over each of [`PLACES`] that holds nothing the script was
/// granted, and grants that instead. Needs a mount namespace and privilege in it. The first of
/// them is where its temporary files go.
///
/// # Errors
/// When a file system cannot be mounted.
pub(super) fn mount(confinement: &mut Confinement) -> io::Result<Option<&'static Path>> {
    let mut first = None;
    let working_directory = std::env::current_dir();
    for place in PLACES.map(Path::new) {
        let below: Vec<PathBuf> = [
            &confinement.executable,
            &confinement.readable,
            &confinement.writable,
        ]
        .into_iter()
        .flatten()
        .filter(|path| path.starts_with(place))
        .cloned()
        .collect();
        if !below.is_empty() || !place.is_dir() {
            continue;
        }
        let options = format!(
            "mode=1777,size={}m,nr_inodes={}",
            confinement.tmp_mib,
            u64::from(confinement.tmp_mib) * u64::from(INODES_PER_MIB)
        );
        let options = CString::new(options)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("stockade", place, "tmpfs", flags, options.as_c_str())?;
        confinement.writable.push(place.to_owned());
        first = first.or(Some(place));
    }
    // The old directory may lie under one of the new file systems, where no path leads to it.
    if working_directory
        .and_then(std::env::set_current_dir)
        .is_err()
    {
        std::env::set_current_dir("/")?;
    }
    Ok(first)
}

/// A directory beside everybody's temporary files, where no file system could be mounted over
/// them. It goes with the value that is returned.
pub(super) fn stand_in(confinement: &mut Confinement, granted: &mut Granted) -> Option<TempDir> {
    if granted.protections.contains(&Protection::PrivateTmp) {
        return None;
    }
    let made = tempfile::Builder::new()
        .prefix("stockade-plugin-")
        .tempdir()
        .and_then(|directory| {
            if let Some(user) = confinement.user {
                std::os::unix::fs::chown(directory.path(), Some(user.uid), Some(user.gid))?;
            }
            Ok(directory)
        });
    match made {
        Ok(directory) => {
            confinement.writable.push(directory.path().to_owned());
            granted.note(Protection::PrivateTmp, Ok(()));
            Some(directory)
        }
        Err(error) => {
            granted.note(Protection::PrivateTmp, Err(error.to_string()));
            None
        }
    }
}

//! A file system that the script cannot change, but for what it was granted.
//!
//! File rules say what is opened. Modes, owners, times and attributes are changed without
//! opening anything, and a script has its user's right to do that, root's included.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use rustix::{io::Errno, mount::MountFlags};

use crate::native_script::confinement::Confinement;

/// Makes every mount of this mount namespace read-only, except the writable paths.
///
/// # Errors
/// When a mount that can be reached stays writable.
pub(super) fn apply(confinement: &Confinement) -> io::Result<()> {
    let is_writable = |path: &Path| {
        let mut writable = confinement.writable.iter();
        writable.any(|writable| path.starts_with(writable))
    };
    for path in &confinement.writable {
        // A mount of its own, which stays as it is.
        rustix::mount::mount_bind_recursive(path, path)?;
    }
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let Some((path, flags)) = mount_of(line) else {
            continue;
        };
        if flags.contains(MountFlags::RDONLY) || is_writable(&path) {
            continue;
        }
        let flags = flags | MountFlags::RDONLY | MountFlags::BIND;
        match rustix::mount::mount_remount(&path, flags, c"") {
            // What another mount covers cannot be reached by the script either.
            Ok(()) | Err(Errno::NOENT | Errno::INVAL | Errno::NOTDIR) => {}
            Err(error) => {
                return Err(io::Error::other(format!("{}: {error}", path.display())));
            }
        }
    }
    Ok(())
}

/// Mount point and flags of a line of `/proc/self/mountinfo`.
fn mount_of(line: &str) -> Option<(PathBuf, MountFlags)> {
    let mut fields = line.split(' ').skip(4);
    let path = unescaped(fields.next()?);
    let mut flags = MountFlags::empty();
    for option in fields.next()?.split(',') {
        // A remount by a user namespace must keep what its owner set.
        flags |= match option {
            "ro" => MountFlags::RDONLY,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "noatime" => MountFlags::NOATIME,
            "nodiratime" => MountFlags::NODIRATIME,
            "relatime" => MountFlags::RELATIME,
            _ => MountFlags::empty(),
        };
    }
    Some((path, flags))
}

/// White space and backslashes are written as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| byte == b'\\') {
            Some(escaped) => {
                bytes.push(escaped);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line =
            r"36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime,nosuid master:1 - ext3 /dev/root rw";
        let flags = MountFlags::NOATIME | MountFlags::NOSUID;
        assert_eq!(mount_of(line), Some((r"/mnt/a b\c".into(), flags)));
        assert!(mount_of("36 35 98:0 /").is_none());
    }
}

//! Whether the kernel gives the pool's memory in huge pages, and what that takes.
//!
//! `/dev/shm` is a mount whose `huge=` option decides; memory without a name follows
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled`, which can also deny or force them
//! for both.

use std::fs;
use std::path::Path;

/// Bytes of a huge page on the machines that have them in this size, which is nearly all;
/// elsewhere it only makes steps larger.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What the kernel does about huge pages in one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HugePages {
    /// Not given.
    Never,
    /// Given when a range is allocated.
    Given,
    /// Given when a range is touched through a mapping that asks for them.
    OnAdvice,
}

impl HugePages {
    /// For the segments in `/dev/shm`.
    pub(crate) fn of_shm() -> Self {
        Self::find(Path::new("/proc"), Path::new("/sys"), true)
    }

    /// For memory without a name.
    pub(crate) fn of_private_memory() -> Self {
        Self::find(Path::new("/proc"), Path::new("/sys"), false)
    }

    fn find(proc: &Path, sys: &Path, is_mounted: bool) -> Self {
        let enabled = sys.join("kernel/mm/transparent_hugepage/shmem_enabled");
        let enabled = fs::read_to_string(enabled).unwrap_or_default();
        let chosen = enabled
            .split_whitespace()
            .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        match chosen {
            Some("deny") | None => Self::Never,
            Some("force") => Self::Given,
            Some(_) if is_mounted => {
                let mounts = fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
                huge_option(&mounts, "/dev/shm").map_or(Self::Never, Self::named)
            }
            Some(word) => Self::named(word),
        }
    }

    fn named(word: &str) -> Self {
        match word {
            // The segment has its full length before any of it is allocated.
            "always" | "within_size" => Self::Given,
            "advise" => Self::OnAdvice,
            _ => Self::Never,
        }
    }

    /// For status and log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Never => "not given",
            Self::Given => "given",
            Self::OnAdvice => "given on advice",
        }
    }
}

/// The `huge=` option of what is mounted last at a place.
fn huge_option<'m>(mountinfo: &'m str, place: &str) -> Option<&'m str> {
    let mount = mountinfo
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some(place))?;
    // The options of the file system stand last, those of the mount before.
    let options = mount.rsplit(' ').next()?;
    options
        .split(',')
        .find_map(|option| option.strip_prefix("huge="))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_mount_decides_for_shm_and_the_system_for_what_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, sys) = (dir.path().join("proc"), dir.path().join("sys"));
        let enabled = sys.join("kernel/mm/transparent_hugepage");
        fs::create_dir_all(&enabled).unwrap();
        fs::create_dir_all(proc.join("self")).unwrap();
        let found = |enabled_text: &str, huge: &str| {
            let mounts = format!(
                "20 1 0:5 / / rw - ext4 /dev/vda rw\n\
                 21 20 0:6 / /dev/shm rw,nosuid shared:3 - tmpfs tmpfs rw,size=64k{huge}\n"
            );
            fs::write(proc.join("self/mountinfo"), mounts).unwrap();
            fs::write(enabled.join("shmem_enabled"), enabled_text).unwrap();
            [true, false].map(|is_mounted| HugePages::find(&proc, &sys, is_mounted))
        };
        use HugePages::{Given, Never, OnAdvice};
        let never = "always within_size advise [never] deny force\n";
        assert_eq!(found(never, ""), [Never, Never]);
        assert_eq!(found(never, ",huge=within_size"), [Given, Never]);
        assert_eq!(found(never, ",huge=advise"), [OnAdvice, Never]);
        let advise = "always within_size [advise] never deny force\n";
        assert_eq!(found(advise, ",huge=always"), [Given, OnAdvice]);
        assert_eq!(found(advise, ",huge=never"), [Never, OnAdvice]);
        let deny = "always within_size advise never [deny] force\n";
        assert_eq!(found(deny, ",huge=always"), [Never, Never]);
        let force = "always within_size advise never deny [force]\n";
        assert_eq!(found(force, ""), [Given, Given]);
        assert_eq!(
            found("", ",huge=always"),
            [Never, Never],
            "a kernel without them"
        );
    }
}

//! Whether a pool fits before it is made. A pool that does not would not fail at creation
//! but later, with a SIGBUS in a worker or the kernel's out-of-memory killer.

use std::fs;
use std::path::Path;

use crate::error::CacheError;

const GIB: u64 = 1 << 30;

/// Checks the free space of `/dev/shm`.
pub(crate) fn check_shm(pool_bytes: u64) -> Result<(), CacheError> {
    let stat = rustix::fs::statvfs("/dev/shm").map_err(|errno| CacheError::Os {
        step: "look at /dev/shm",
        source: errno.into(),
    })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let total = stat.f_blocks.saturating_mul(stat.f_frsize);
    // A tmpfs mounted with size=0 has no limit of its own.
    if total == 0 || pool_bytes <= free {
        return Ok(());
    }
    Err(shm_too_small(pool_bytes, free, total))
}

fn shm_too_small(pool_bytes: u64, free: u64, total: u64) -> CacheError {
    let in_use = total.saturating_sub(free);
    let wanted = pool_bytes.saturating_add(in_use);
    CacheError::ShmTooSmall {
        pool: binary_units(pool_bytes),
        free: binary_units(free),
        // A fifth more than is needed, so that the next small thing still fits.
        remount_gib: wanted.saturating_add(wanted / 5).div_ceil(GIB),
    }
}

/// Checks the memory that this process may use: the machine's and each cgroup's.
pub(crate) fn check_memory(pool_bytes: u64) -> Result<(), CacheError> {
    match available(Path::new("/proc"), Path::new("/sys/fs/cgroup")) {
        Some((free, source_name)) if pool_bytes > free => Err(CacheError::MemoryTooSmall {
            pool: binary_units(pool_bytes),
            free: binary_units(free),
            source_name,
        }),
        _ => Ok(()),
    }
}

/// The tightest limit found; `None` where the system tells nothing.
fn available(proc: &Path, cgroups: &Path) -> Option<(u64, &'static str)> {
    let machine = fs::read_to_string(proc.join("meminfo"))
        .ok()
        .and_then(|text| mem_available(&text))
        .map(|bytes| (bytes, "MemAvailable in /proc/meminfo"));
    let membership = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let container = membership
        .lines()
        .filter_map(|line| cgroup_headroom(cgroups, line))
        .min()
        .map(|bytes| (bytes, "the cgroup's memory limit"));
    [machine, container].into_iter().flatten().min()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Headroom under one line of `/proc/self/cgroup`: the least of the group and all above it.
fn cgroup_headroom(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (base, limit_file, usage_file) = if controllers.is_empty() {
        (root.to_owned(), "memory.max", "memory.current")
    } else if controllers.split(',').any(|name| name == "memory") {
        let base = root.join("memory");
        (base, "memory.limit_in_bytes", "memory.usage_in_bytes")
    } else {
        return None;
    };
    // Inside a container the path may name a group that is mounted as the root.
    Path::new(path.trim_start_matches('/'))
        .ancestors()
        .filter_map(|group| {
            let group = base.join(group);
            let limit = number(&group.join(limit_file))?;
            let usage = number(&group.join(usage_file))?;
            // Page cache counts as usage but is given back under pressure.
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let value = |name: &str| {
                let mut lines = stat.lines();
                lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            };
            // In version 1 only the `total_` lines count the groups below, as usage does.
            let reclaimable = value("total_inactive_file ")
                .or_else(|| value("inactive_file "))
                .unwrap_or(0);
            Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
        })
        .min()
}

/// A file that holds one number; `max` stands for none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn binary_units(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", GIB),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    for (unit, size) in UNITS {
        if bytes >= size {
            let tenths = u128::from(bytes) * 10 / u128::from(size);
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            };
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_pool_too_large_for_shm_names_the_flag_and_the_way_out() {
        let error = shm_too_small(10 * GIB, 39 * GIB / 10, 4 * GIB);
        assert_eq!(
            error.to_string(),
            "pool of 10 GiB does not fit /dev/shm (3.8 GiB free): lower --l1-size-gb, or \
             remount with `mount -o remount,size=13G /dev/shm`"
        );
        assert!(check_shm(u64::MAX).is_err());
        assert!(check_shm(1).is_ok());
    }

    #[test]
    fn the_tightest_memory_limit_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (dir.path().join("proc"), dir.path().join("cgroup"));
        let group = cgroups.join("pods/one");
        fs::create_dir_all(proc.join("self")).unwrap();
        fs::create_dir_all(&group).unwrap();
        fs::write(
            proc.join("meminfo"),
            "MemTotal: 9 kB\nMemAvailable:   8388608 kB\n",
        )
        .unwrap();
        assert_eq!(
            available(&proc, &cgroups),
            Some((8 * GIB, "MemAvailable in /proc/meminfo"))
        );

        fs::write(proc.join("self/cgroup"), "0::/pods/one\n").unwrap();
        fs::write(group.join("memory.max"), "max\n").unwrap();
        fs::write(group.join("memory.current"), "0\n").unwrap();
        assert_eq!(available(&proc, &cgroups).unwrap().0, 8 * GIB);

        // The limit of a group above counts, and page cache does not count as used.
        fs::write(cgroups.join("pods/memory.max"), format!("{}\n", 2 * GIB)).unwrap();
        fs::write(cgroups.join("pods/memory.current"), format!("{GIB}\n")).unwrap();
        fs::write(
            cgroups.join("pods/memory.stat"),
            format!("anon 1\ninactive_file {}\n", GIB / 2),
        )
        .unwrap();
        assert_eq!(
            available(&proc, &cgroups),
            Some((3 * GIB / 2, "the cgroup's memory limit"))
        );
    }

    #[test]
    fn nested_groups_of_version_1_count_like_those_of_version_2() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (dir.path().join("proc"), dir.path().join("cgroup"));
        let outer = cgroups.join("memory/kubepods");
        let inner = outer.join("pod1/container");
        fs::create_dir_all(proc.join("self")).unwrap();
        fs::create_dir_all(&inner).unwrap();
        // The hybrid layout: version 2 without controllers beside version 1.
        fs::write(
            proc.join("self/cgroup"),
            "9:name=systemd:/\n4:cpu,memory:/kubepods/pod1/container\n0::/\n",
        )
        .unwrap();
        let group = |path: &Path, limit: u64, usage: u64, stat: &str| {
            fs::write(path.join("memory.limit_in_bytes"), format!("{limit}\n")).unwrap();
            fs::write(path.join("memory.usage_in_bytes"), format!("{usage}\n")).unwrap();
            fs::write(path.join("memory.stat"), stat).unwrap();
        };
        let headroom = || available(&proc, &cgroups).map(|(bytes, _)| bytes);
        assert_eq!(headroom(), None);
        group(&inner, 6 * GIB, GIB, "inactive_file 0\n");
        assert_eq!(headroom(), Some(5 * GIB));
        // The outer group is tighter; what it could give back lies in the group below.
        let stat = format!("inactive_file 0\ntotal_inactive_file {GIB}\n");
        group(&outer, 4 * GIB, 3 * GIB, &stat);
        assert_eq!(headroom(), Some(2 * GIB));
        group(&outer, 4 * GIB, 6 * GIB, "");
        assert_eq!(headroom(), Some(0), "over its limit");
        // No limit is a very large number there.
        group(&outer, 0x7fff_ffff_ffff_f000, 3 * GIB, "");
        assert_eq!(headroom(), Some(5 * GIB));
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(binary_units(10 * GIB), "10 GiB");
        assert_eq!(binary_units(GIB + GIB / 2), "1.5 GiB");
        assert_eq!(binary_units(4096), "4 KiB");
        assert_eq!(binary_units(100), "100 bytes");
        assert_eq!(binary_units(u64::MAX), "16777215.9 TiB");
    }
}

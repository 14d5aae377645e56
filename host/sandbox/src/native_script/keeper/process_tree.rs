//! Which processes descend from this one, and killing them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{Dir, Mode, OFlags},
    process::{Pid, Signal},
};

/// One process as `/proc/PID/stat` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: Pid,
    parent: i32,
    group: i32,
    is_zombie: bool,
}

/// A view of `/proc` that stays the one of the keeper when another is mounted over it.
pub(super) struct ProcessTree {
    proc_directory: OwnedFd,
}

impl ProcessTree {
    /// # Errors
    /// When `/proc` is not mounted.
    pub(super) fn open() -> io::Result<Self> {
        let proc_directory = rustix::fs::open(
            "/proc",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        // An empty or foreign directory there would make every tree look empty.
        rustix::fs::statat(&proc_directory, "self/stat", rustix::fs::AtFlags::empty())?;
        Ok(Self { proc_directory })
    }

    /// All living processes that descend from this one, without `except`.
    pub(super) fn descendants(&self, except: Option<Pid>) -> io::Result<Vec<Process>> {
        let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
        for entry in Dir::read_from(&self.proc_directory)? {
            let entry = entry?;
            let Some(pid) = entry
                .file_name()
                .to_str()
                .ok()
                .and_then(|name| name.parse().ok())
                .and_then(Pid::from_raw)
            else {
                continue;
            };
            // A process that ended since the listing has no stat to read.
            if let Some(process) = self.read_process(pid) {
                children.entry(process.parent).or_default().push(process);
            }
        }
        let mut found = Vec::new();
        let mut open = vec![rustix::process::getpid().as_raw_pid()];
        while let Some(parent) = open.pop() {
            for process in children.remove(&parent).unwrap_or_default() {
                open.push(process.pid.as_raw_pid());
                if !process.is_zombie && Some(process.pid) != except {
                    found.push(process);
                }
            }
        }
        Ok(found)
    }

    /// Kills all that descends from this process, whole process groups at once: the kernel
    /// does that atomically against `fork`, so a fork bomb cannot outrun it.
    /// Returns how many processes there were.
    pub(super) fn kill_descendants(&self) -> io::Result<usize> {
        let processes = self.descendants(None)?;
        let own_group = rustix::process::getpgrp().as_raw_pid();
        let groups: BTreeSet<i32> = processes.iter().map(|process| process.group).collect();
        // A group lies within one session, and every session but ours was made by the tree.
        for group in groups.into_iter().filter(|&group| group != own_group) {
            if let Some(group) = Pid::from_raw(group) {
                let _ = rustix::process::kill_process_group(group, Signal::KILL);
            }
        }
        for process in &processes {
            if process.group == own_group {
                let _ = rustix::process::kill_process(process.pid, Signal::KILL);
            }
        }
        Ok(processes.len())
    }

    fn read_process(&self, pid: Pid) -> Option<Process> {
        let stat = rustix::fs::openat(
            self.proc_directory.as_fd(),
            format!("{}/stat", pid.as_raw_pid()),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        let mut text = Vec::with_capacity(512);
        std::fs::File::from(stat)
            .take(4096)
            .read_to_end(&mut text)
            .ok()?;
        parse_stat(pid, &text)
    }
}

/// `PID (NAME) STATE PPID PGRP ...`, where NAME is the process's own choice.
fn parse_stat(pid: Pid, stat: &[u8]) -> Option<Process> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let fields = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    Some(Process {
        pid,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
        is_zombie: matches!(state, "Z" | "X" | "x"),
    })
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use super::*;

    fn parse(stat: &str) -> Option<Process> {
        parse_stat(Pid::from_raw(7).unwrap(), stat.as_bytes())
    }

    #[test]
    fn a_process_cannot_forge_its_parent_through_its_name() {
        let process = parse("7 (x) S 1 1 1) R 42 43 44 0 -1").unwrap();
        assert_eq!((process.parent, process.group), (42, 43));
        assert!(!process.is_zombie);
        assert!(parse("7 (sh) Z 42 43 44").unwrap().is_zombie);
    }

    #[test]
    fn a_cut_line_is_no_process() {
        for stat in [
            "",
            "7 (sh",
            "7 (sh)",
            "7 (sh) S",
            "7 (sh) S 1",
            "7 (sh) S x 1",
        ] {
            assert_eq!(parse(stat), None, "{stat:?}");
        }
    }
}

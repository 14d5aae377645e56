//! What a script may touch of the machine, and what of that the kernel granted.
//!
//! The server decides ([`Confinement`]), the process that becomes the script applies it
//! (`keeper/launch.rs`), and [`Granted`] says what holds: a kernel or a container that lacks
//! one of the means is reported, never assumed.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    error::ScriptError,
    interpreter::{CommandLine, find_program},
    messages::ProcessLimits,
};
use crate::{grants::Access, manifest::Manifest};

/// How far the operator trusts scripts (`--native-plugins`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NativePolicy {
    /// They run with the rights of the server, as under LMCache; nothing is left behind all the same.
    Allow,
    /// They run with what their manifests grant and every program needs.
    #[default]
    Confined,
    /// They do not run.
    Deny,
}

impl FromStr for NativePolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "allow" => Ok(Self::Allow),
            "confined" => Ok(Self::Confined),
            "deny" => Ok(Self::Deny),
            _ => Err("give allow, confined or deny".to_owned()),
        }
    }
}

/// One thing that the kernel holds a script to, by the name it has in manifests and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protection {
    /// The script sees and reaches no process but its own.
    PidNamespace,
    /// Its temporary files are its own, bounded and gone with it.
    PrivateTmp,
    /// It changes nothing but its temporary files and what it was granted, modes and owners included.
    ReadOnlySystem,
    /// It opens, runs and changes the content of only the files that it was granted.
    Landlock,
    /// It cannot signal processes other than its own.
    SignalScope,
    /// System calls that programs do not need, and sockets that were not granted, are refused.
    Seccomp,
    /// It holds no capability, also when its user is root.
    NoCapabilities,
    /// It reaches no network. Only where the manifest says `network = false`.
    NoNetwork,
    /// The number of its processes has a bound.
    ProcessLimit,
}

impl Protection {
    /// The name in manifests and in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PidNamespace => "pid-namespace",
            Self::PrivateTmp => "private-tmp",
            Self::ReadOnlySystem => "read-only-system",
            Self::Landlock => "landlock",
            Self::SignalScope => "signal-scope",
            Self::Seccomp => "seccomp",
            Self::NoCapabilities => "no-capabilities",
            Self::NoNetwork => "no-network",
            Self::ProcessLimit => "process-limit",
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What of a script's confinement holds, told by the process that became the script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// What the kernel granted.
    pub protections: BTreeSet<Protection>,
    /// What was asked for and is not there, with what the system said.
    pub missing: BTreeMap<Protection, String>,
}

impl Granted {
    pub(super) fn note(&mut self, protection: Protection, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.protections.insert(protection);
                self.missing.remove(&protection);
            }
            Err(reason) => {
                if !self.protections.contains(&protection) {
                    self.missing.insert(protection, reason);
                }
            }
        }
    }

    /// A sentence about the first of `required` that does not hold.
    pub(super) fn lacks(&self, required: &[Protection]) -> Option<String> {
        let lacking = required
            .iter()
            .find(|protection| !self.protections.contains(protection))?;
        let reason = match self.missing.get(lacking) {
            Some(reason) => reason.as_str(),
            None => "it was not asked for",
        };
        Some(format!(
            "its manifest requires {lacking}, which this machine does not give: {reason}"
        ))
    }
}

impl fmt::Display for Granted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.protections.iter().map(|it| it.name()).collect();
        match names.as_slice() {
            [] => formatter.write_str("nothing")?,
            names => formatter.write_str(&names.join(", "))?,
        }
        for (protection, reason) in &self.missing {
            write!(formatter, "; no {protection}: {reason}")?;
        }
        Ok(())
    }
}

/// Everything that the kernel is asked to hold a script to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Restrictions {
    pub(super) limits: ProcessLimits,
    /// `None`: the limits only.
    pub(super) confinement: Option<Confinement>,
    pub(super) required: Vec<Protection>,
}

/// What a confined script may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Confinement {
    /// Files and directories that it may read and execute.
    pub(super) executable: Vec<PathBuf>,
    /// Files and directories that it may read.
    pub(super) readable: Vec<PathBuf>,
    /// Files and directories that it may read and change.
    pub(super) writable: Vec<PathBuf>,
    pub(super) network: bool,
    pub(super) unix_sockets: bool,
    pub(super) processes: u32,
    pub(super) tmp_mib: u32,
    pub(super) user: Option<Identity>,
}

/// Whom a script runs as, if not as the server's user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Programs and libraries.
const SYSTEM: [&str; 7] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32",
];

/// What programs read to resolve names, check certificates, show times and count processors.
/// Not all of `/etc`: a server that is root could read everybody's secrets there.
const SYSTEM_DATA: [&str; 31] = [
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ca-certificates.conf",
    "/etc/debian_version",
    "/etc/gai.conf",
    "/etc/group",
    "/etc/host.conf",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/inputrc",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/ld.so.preload",
    "/etc/locale.alias",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/pki/ca-trust",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/certs",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/timezone",
    "/proc",
    "/sys/devices/system",
];

/// Directories for everybody's files: one in them is no directory of plugins.
const SHARED_DIRECTORIES: [&str; 5] = ["/", "/dev/shm", "/etc", "/tmp", "/var/tmp"];

impl Restrictions {
    /// What `manifest` and every program's needs grant the script at `script`, run by `command`.
    ///
    /// # Errors
    /// When the manifest grants what cannot be granted to a script.
    pub(super) fn of(
        policy: NativePolicy,
        mut limits: ProcessLimits,
        manifest: &Manifest,
        script: &Path,
        command: &CommandLine,
        variables: &BTreeMap<OsString, OsString>,
    ) -> Result<Self, ScriptError> {
        let process = &manifest.process;
        let bytes = |mib: u32| u64::from(mib) << 20;
        limits.open_files = process.open_files.map(u64::from).or(limits.open_files);
        limits.cpu_seconds = process.cpu_seconds.map(u64::from).or(limits.cpu_seconds);
        limits.file_size_bytes = process.file_mib.map(bytes).or(limits.file_size_bytes);
        let confined_memory = (policy != NativePolicy::Allow).then_some(DEFAULT_MEMORY_MIB);
        limits.address_space_bytes = process
            .memory_mib
            .or(confined_memory)
            .map(bytes)
            .or(limits.address_space_bytes);
        let confinement = match policy {
            NativePolicy::Allow => None,
            NativePolicy::Confined | NativePolicy::Deny => {
                Some(Confinement::of(manifest, script, command, variables)?)
            }
        };
        Ok(Self {
            limits,
            confinement,
            required: process.required.clone(),
        })
    }
}

/// Address space of each process of a confined script. Far more than a plugin uses: threads
/// and allocators reserve what they never touch.
const DEFAULT_MEMORY_MIB: u32 = 4096;

impl Confinement {
    fn of(
        manifest: &Manifest,
        script: &Path,
        command: &CommandLine,
        variables: &BTreeMap<OsString, OsString>,
    ) -> Result<Self, ScriptError> {
        let variable = |name: &str| variables.get(OsStr::new(name)).map(OsString::as_os_str);
        let mut executable: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
        executable.push(own_directory(script, variable("HOME")));
        executable.push(command.program.clone());
        executable.extend(python_prefixes(&command.program));
        // Bash plugins start Python too, whichever one the server would.
        let search_path = variable("PATH").unwrap_or_default();
        if let Some(python) = find_program("python3", search_path) {
            executable.extend(python_prefixes(&python));
            executable.push(python);
        }
        let mut readable: Vec<PathBuf> = SYSTEM_DATA.iter().map(PathBuf::from).collect();
        readable.extend(python_entries(Path::new("/etc")));
        let mut writable = Vec::new();
        for directory in manifest.directories.values() {
            if !directory.host.is_dir() {
                return Err(ScriptError::Directory {
                    path: script.to_owned(),
                    directory: directory.host.clone(),
                });
            }
            match directory.access {
                Access::ReadOnly => readable.push(directory.host.clone()),
                Access::ReadWrite => writable.push(directory.host.clone()),
            }
        }
        let process = &manifest.process;
        let user = match &process.user {
            Some(name) => Some(identity(name).map_err(|reason| ScriptError::User {
                path: script.to_owned(),
                user: name.clone(),
                reason,
            })?),
            None => None,
        };
        Ok(Self {
            executable,
            readable,
            writable,
            network: process.network,
            unix_sockets: process.unix_sockets,
            processes: process.processes,
            tmp_mib: process.tmp_mib,
            user,
        })
    }
}

/// The script's directory, so that it finds what lies beside it; the script alone where that
/// directory holds other things too.
pub(crate) fn own_directory(script: &Path, home: Option<&OsStr>) -> PathBuf {
    let Some(directory) = script.parent() else {
        return script.to_owned();
    };
    let is_shared = SHARED_DIRECTORIES
        .iter()
        .any(|shared| directory == Path::new(shared));
    let holds_home = home.is_some_and(|home| Path::new(home).starts_with(directory));
    match is_shared || holds_home {
        true => script.to_owned(),
        false => directory.to_owned(),
    }
}

/// The Python installations that `program` belongs to: its own virtual environment, the one
/// that it was made from, or all that a version manager's shim (`~/.pyenv/shims/python3`)
/// chooses from.
fn python_prefixes(program: &Path) -> Vec<PathBuf> {
    let mut prefixes = Vec::new();
    let canonical = std::fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    for program in [program, &canonical] {
        let Some(prefix) = program.parent().and_then(Path::parent) else {
            continue;
        };
        let is_shim = program
            .parent()
            .is_some_and(|parent| parent.ends_with("shims"));
        let is_python = is_shim
            || prefix.join("pyvenv.cfg").is_file()
            || !python_entries(&prefix.join("lib")).is_empty();
        if is_python && prefix != Path::new("/") {
            prefixes.push(prefix.to_owned());
        }
        // A copied interpreter says here where the one is that it was copied from.
        let settings = std::fs::read_to_string(prefix.join("pyvenv.cfg")).unwrap_or_default();
        let home = settings
            .lines()
            .find_map(|line| line.strip_prefix("home = "));
        let base = home.and_then(|home| Path::new(home.trim()).parent());
        prefixes.extend(
            base.filter(|base| *base != Path::new("/"))
                .map(Path::to_owned),
        );
    }
    prefixes
}

/// What of `directory` is some Python's: `python3`, `python3.12` and so on.
fn python_entries(directory: &Path) -> Vec<PathBuf> {
    let is_python = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"python3"))
    };
    std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(is_python)
        .collect()
}

fn identity(name: &str) -> Result<Identity, String> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            "only a server that runs as root can start a script as another user".to_owned(),
        );
    }
    match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => Ok(Identity {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        }),
        Ok(None) => Err("there is no such user".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn a_directory_that_is_not_for_plugins_is_not_granted() {
        let home = Some(OsStr::new("/home/me"));
        for (script, expected) in [
            ("/srv/plugins/a.py", "/srv/plugins"),
            ("/home/me/plugins/a.py", "/home/me/plugins"),
            ("/home/me/a.py", "/home/me/a.py"),
            ("/home/a.py", "/home/a.py"),
            ("/tmp/a.py", "/tmp/a.py"),
            ("/etc/a.py", "/etc/a.py"),
            ("/a.py", "/a.py"),
        ] {
            assert_eq!(
                own_directory(Path::new(script), home),
                Path::new(expected),
                "{script}"
            );
        }
    }

    #[test]
    fn a_virtual_environment_comes_with_its_interpreter() {
        let directory = tempfile::tempdir().unwrap();
        let venv = directory.path().join("venv");
        std::fs::create_dir_all(venv.join("bin")).unwrap();
        std::fs::write(venv.join("bin/python3"), "").unwrap();
        assert!(python_prefixes(&venv.join("bin/python3")).is_empty());
        let settings = "home = /opt/python/bin\nversion = 3.12.1\n";
        std::fs::write(venv.join("pyvenv.cfg"), settings).unwrap();
        let prefixes = python_prefixes(&venv.join("bin/python3"));
        assert!(prefixes.contains(&venv), "{prefixes:?}");
        assert!(prefixes.contains(&"/opt/python".into()), "{prefixes:?}");
    }

    #[test]
    fn what_is_lacking_is_said_with_its_reason() {
        let mut granted = Granted::default();
        granted.note(Protection::Seccomp, Ok(()));
        granted.note(Protection::Landlock, Err("no such call".to_owned()));
        assert_eq!(granted.lacks(&[Protection::Seccomp]), None);
        let sentence = granted
            .lacks(&[Protection::Seccomp, Protection::Landlock])
            .unwrap();
        assert!(sentence.contains("landlock") && sentence.contains("no such call"));
        assert_eq!(granted.to_string(), "seccomp; no landlock: no such call");
    }
}

//! The table of listeners: where clients come in, and how they prove who they are.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use stockade_transport::{Authenticator, Endpoint, ListenOptions, Mechanism, Principal};

/// Name of the listener that `--host` and `--port` describe.
pub const DEFAULT: &str = "default";
/// Longest name of a listener.
const MAX_NAME_BYTES: usize = 64;
/// Longest username and password: PLAIN has one byte for their lengths.
const MAX_PLAIN_BYTES: usize = 255;
/// Largest file of users.
const MAX_USERS_BYTES: u64 = 1 << 20;

/// One `[[listener]]` of `stockade.toml`, as given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ListenerTable {
    name: String,
    /// Left out by the one named `default`, which has `--host` and `--port`.
    endpoint: Option<String>,
    mechanism: Option<String>,
    users_file: Option<PathBuf>,
    ipc_mode: Option<String>,
}

/// How a listener presents itself; what it is bound to is beside it.
#[derive(Debug, Clone)]
pub struct ListenerConfig {
    /// Unique name, which log lines and later rules use.
    pub name: Arc<str>,
    /// `None` for the address of `--host` and `--port`.
    pub endpoint: Option<Endpoint>,
    /// Permission bits of an ipc socket file.
    pub ipc_mode: u32,
    /// Who may come in; `None` for everybody who can connect.
    pub users: Option<Users>,
}

/// Users of a PLAIN listener. Passwords are kept as hashes and never shown.
#[derive(Clone)]
pub struct Users(Arc<HashMap<Vec<u8>, (Principal, blake3::Hash)>>);

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Users({} users)", self.0.len())
    }
}

impl Authenticator for Users {
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal> {
        let given = blake3::hash(password);
        let (principal, expected) = self.0.get(username)?;
        // The comparison of hashes takes the same time for all of them.
        (*expected == given).then(|| principal.clone())
    }
}

impl ListenerConfig {
    /// What the transport needs to bind it.
    #[must_use]
    pub fn options(&self) -> ListenOptions {
        ListenOptions {
            name: Arc::clone(&self.name),
            mechanism: match &self.users {
                Some(users) => Mechanism::Plain(Arc::new(users.clone())),
                None => Mechanism::Null,
            },
            ipc_mode: self.ipc_mode,
        }
    }

    fn open(name: &str, endpoint: Option<Endpoint>) -> Self {
        Self {
            name: Arc::from(name),
            endpoint,
            ipc_mode: ListenOptions::default().ipc_mode,
            users: None,
        }
    }
}

/// All listeners, the default one first.
///
/// # Errors
/// One sentence that names the flag or the listener.
pub(super) fn check(
    listen: &[String],
    tables: Vec<ListenerTable>,
) -> Result<Vec<ListenerConfig>, String> {
    let mut listeners = vec![ListenerConfig::open(DEFAULT, None)];
    for text in listen {
        let endpoint: Endpoint = text.parse().map_err(|error| format!("--listen: {error}"))?;
        listeners.push(ListenerConfig::open(&endpoint.to_string(), Some(endpoint)));
    }
    let mut names = HashSet::new();
    for table in tables {
        let listener = table.check()?;
        if !names.insert(Arc::clone(&listener.name)) {
            return Err(format!(
                "listener {}: this name is given twice; names tell listeners apart",
                listener.name
            ));
        }
        match (&listener.endpoint, listeners.first_mut()) {
            (None, Some(default)) => *default = listener,
            _ => listeners.push(listener),
        }
    }
    Ok(listeners)
}

impl ListenerTable {
    fn check(self) -> Result<ListenerConfig, String> {
        let name = self.name;
        let is_plain_text = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_plain_text) {
            return Err(format!(
                "listener {name:?}: name must be 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' and '.'"
            ));
        }
        let endpoint = match &self.endpoint {
            Some(_) if name == DEFAULT => {
                return Err(format!(
                    "listener {name}: endpoint is what --host and --port say; leave it out"
                ));
            }
            Some(text) => Some(
                text.parse::<Endpoint>()
                    .map_err(|error| format!("listener {name}: {error}"))?,
            ),
            None if name == DEFAULT => None,
            None => {
                return Err(format!(
                    "listener {name}: endpoint is missing; give tcp://HOST:PORT or ipc:///PATH"
                ));
            }
        };
        let users = match (self.mechanism.as_deref().unwrap_or("null"), self.users_file) {
            ("null", None) => None,
            ("null", Some(_)) => {
                return Err(format!(
                    "listener {name}: users-file is for mechanism = \"plain\"; set it or leave the file out"
                ));
            }
            ("plain", Some(path)) => {
                Some(read_users(&path).map_err(|problem| format!("listener {name}: {problem}"))?)
            }
            ("plain", None) => {
                return Err(format!(
                    "listener {name}: mechanism plain needs a users-file with a line NAME:PASSWORD per user"
                ));
            }
            (other, _) => {
                return Err(format!(
                    "listener {name}: mechanism {other} is not served; give null or plain"
                ));
            }
        };
        let ipc_mode = match self.ipc_mode.as_deref() {
            None => ListenOptions::default().ipc_mode,
            Some(text) => u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| mode & !0o660 == 0)
                .ok_or_else(|| {
                    format!("listener {name}: ipc-mode {text} must be at most 0660, such as \"0600\" or \"0660\"")
                })?,
        };
        Ok(ListenerConfig {
            name: Arc::from(name),
            endpoint,
            ipc_mode,
            users,
        })
    }
}

/// Reads `NAME:PASSWORD` lines; blank lines and those that begin with `#` are skipped.
///
/// No sentence about the file shows what is in it.
fn read_users(path: &Path) -> Result<Users, String> {
    let shown = path.display();
    let cannot = |error: std::io::Error| format!("users-file {shown} cannot be read: {error}");
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() || metadata.size() > MAX_USERS_BYTES {
        return Err(format!(
            "users-file {shown} must be a file of at most {MAX_USERS_BYTES} bytes"
        ));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(format!(
            "users-file {shown} holds passwords and can be read by others; run chmod 600 on it"
        ));
    }
    let text = std::fs::read_to_string(path).map_err(cannot)?;
    let mut users = HashMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let bounded = |text: &str| (1..=MAX_PLAIN_BYTES).contains(&text.len());
        let (name, password) = line
            .split_once(':')
            .filter(|(name, password)| bounded(name) && bounded(password))
            .ok_or_else(|| {
                format!("users-file {shown} line {number}: give NAME:PASSWORD, each 1 to {MAX_PLAIN_BYTES} bytes")
            })?;
        let user = (Principal::new(name), blake3::hash(password.as_bytes()));
        if users.insert(name.as_bytes().to_vec(), user).is_some() {
            return Err(format!(
                "users-file {shown} line {number}: this name is given twice"
            ));
        }
    }
    if users.is_empty() {
        return Err(format!("users-file {shown} has no users"));
    }
    Ok(Users(Arc::new(users)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn table(text: &str) -> Result<Vec<ListenerConfig>, String> {
        #[derive(Deserialize)]
        struct File {
            listener: Vec<ListenerTable>,
        }
        check(&[], toml::from_str::<File>(text).unwrap().listener)
    }

    fn users_file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn plain(file: &tempfile::NamedTempFile) -> String {
        format!(
            "[[listener]]\nname = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'plain'\nusers-file = {:?}\n",
            file.path()
        )
    }

    #[test]
    fn users_come_in_with_their_own_password_only() {
        let file = users_file("# who may\nann:se:cret\n\nbob:x\n", 0o600);
        let listeners = table(&plain(&file)).unwrap();
        assert_eq!(listeners.len(), 2);
        let users = listeners[1].users.clone().unwrap();
        assert_eq!(users.plain(b"ann", b"se:cret"), Some(Principal::new("ann")));
        for (name, password) in [
            ("ann", "x"),
            ("bob", "se:cret"),
            ("eve", "x"),
            ("", ""),
            ("ann", ""),
        ] {
            assert_eq!(
                users.plain(name.as_bytes(), password.as_bytes()),
                None,
                "{name}"
            );
        }
        assert!(!format!("{listeners:?}").contains("cret"));
    }

    #[test]
    fn a_file_of_users_that_cannot_be_used_is_refused_without_showing_it() {
        for (text, mode, reason) in [
            ("ann:secret\n", 0o644, "chmod 600"),
            ("ann:secret\n", 0o640, "chmod 600"),
            ("secret\n", 0o600, "line 1"),
            (":secret\n", 0o600, "line 1"),
            ("secret:\n", 0o600, "line 1"),
            ("secret:a\nsecret:b\n", 0o600, "line 2"),
            ("# secret\n", 0o600, "no users"),
        ] {
            let error = table(&plain(&users_file(text, mode))).unwrap_err();
            assert!(
                error.contains(reason) && !error.contains("secret"),
                "{text:?}: {error}"
            );
        }
    }

    #[test]
    fn listeners_that_contradict_themselves_are_refused_by_name() {
        for (text, reason) in [
            (
                "name = 'a b'\nendpoint = 'tcp://127.0.0.1:0'",
                "name must be",
            ),
            ("name = 'a'", "endpoint is missing"),
            ("name = 'a'\nendpoint = 'udp://x'", "udp://x"),
            ("name = 'default'\nendpoint = 'tcp://127.0.0.1:0'", "--host"),
            (
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'curve'",
                "curve",
            ),
            (
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'plain'",
                "users-file",
            ),
            (
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nusers-file = '/x'",
                "mechanism",
            ),
            (
                "name = 'a'\nendpoint = 'ipc:///x'\nipc-mode = '0666'",
                "0660",
            ),
            (
                "name = 'a'\nendpoint = 'ipc:///x'\n[[listener]]\nname = 'a'\nendpoint = 'ipc:///y'",
                "twice",
            ),
        ] {
            let error = table(&format!("[[listener]]\n{text}\n")).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let default = table("[[listener]]\nname = 'default'\n").unwrap();
        assert_eq!((default.len(), &*default[0].name), (1, DEFAULT));
    }
}

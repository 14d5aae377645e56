//! The table of listeners: where clients come in, and how they prove who they are.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use stockade_transport::{Authenticator, Curve, Endpoint, ListenOptions, Mechanism, Principal};

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
    secret_key_file: Option<PathBuf>,
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
    /// How clients prove who they are; with [`Mechanism::Null`], everybody may come in.
    pub mechanism: Mechanism,
}

/// Users of a PLAIN listener by name. Passwords are kept as hashes and never shown.
struct Passwords(HashMap<Vec<u8>, (Principal, blake3::Hash)>);

impl Authenticator for Passwords {
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal> {
        let given = blake3::hash(password);
        let (principal, expected) = self.0.get(username)?;
        // The comparison of hashes takes the same time for all of them.
        (*expected == given).then(|| principal.clone())
    }
}

/// Users of a CURVE listener by public key.
struct PublicKeys(HashMap<[u8; 32], Principal>);

impl Authenticator for PublicKeys {
    fn curve(&self, public_key: &[u8; 32]) -> Option<Principal> {
        self.0.get(public_key).cloned()
    }
}

impl ListenerConfig {
    /// What the transport needs to bind it.
    #[must_use]
    pub fn options(&self) -> ListenOptions {
        ListenOptions {
            name: Arc::clone(&self.name),
            mechanism: self.mechanism.clone(),
            ipc_mode: self.ipc_mode,
        }
    }

    fn open(name: &str, endpoint: Option<Endpoint>) -> Self {
        Self {
            name: Arc::from(name),
            endpoint,
            ipc_mode: ListenOptions::default().ipc_mode,
            mechanism: Mechanism::Null,
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
        let mechanism = mechanism(
            self.mechanism.as_deref().unwrap_or("null"),
            self.users_file.as_deref(),
            self.secret_key_file.as_deref(),
        )
        .map_err(|problem| format!("listener {name}: {problem}"))?;
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
            mechanism,
        })
    }
}

/// How clients of a listener prove who they are, as its table says.
fn mechanism(
    name: &str,
    users: Option<&Path>,
    secret_key: Option<&Path>,
) -> Result<Mechanism, String> {
    match (name, users, secret_key) {
        ("null", None, None) => Ok(Mechanism::Null),
        ("null", Some(_), _) => Err(
            "users-file is for mechanism = \"plain\" and \"curve\"; set one or leave the file out"
                .to_owned(),
        ),
        ("null" | "plain", _, Some(_)) => Err(
            "secret-key-file is for mechanism = \"curve\"; set it or leave the file out".to_owned(),
        ),
        ("plain", Some(users), None) => {
            let form = format!("NAME:PASSWORD, each 1 to {MAX_PLAIN_BYTES} bytes");
            let users = read_users(users, &form, true, |user, password| {
                let is_bounded = [user, password]
                    .iter()
                    .all(|text| text.len() <= MAX_PLAIN_BYTES);
                is_bounded.then(|| {
                    let hash = blake3::hash(password.as_bytes());
                    (user.as_bytes().to_vec(), (Principal::new(user), hash))
                })
            })?;
            Ok(Mechanism::Plain(Arc::new(Passwords(users))))
        }
        ("plain", None, None) => Err(
            "mechanism plain needs a users-file with a line NAME:PASSWORD per user".to_owned(),
        ),
        ("curve", Some(users), Some(secret_key)) => {
            let secret = read_bounded(secret_key, "secret-key-file", true)?;
            let secret = curve_key(secret.trim_end()).ok_or_else(|| {
                format!(
                    "secret-key-file {} must hold one key of 40 characters (Z85); `stockade curve-keygen` makes one",
                    secret_key.display()
                )
            })?;
            let form = "NAME:PUBLIC-KEY, the key in 40 characters (Z85)";
            // Public keys may be read by anybody.
            let users = read_users(users, form, false, |user, key| {
                Some((curve_key(key)?, Principal::new(user)))
            })?;
            let curve = Curve::new(secret, Arc::new(PublicKeys(users)));
            Ok(Mechanism::Curve(Arc::new(curve)))
        }
        ("curve", _, _) => Err(
            "mechanism curve needs a secret-key-file, which `stockade curve-keygen` makes, and a users-file with a line NAME:PUBLIC-KEY per user"
                .to_owned(),
        ),
        (other, _, _) => Err(format!(
            "mechanism {other} is not served; give null, plain or curve"
        )),
    }
}

/// A key of CURVE in Z85, as ZeroMQ writes it: 40 characters for 32 bytes.
fn curve_key(text: &str) -> Option<[u8; 32]> {
    if text.len() != 40 {
        return None;
    }
    z85::decode(text).ok()?.try_into().ok()
}

/// What is in a file, which nobody else may read if it is secret. No sentence about it shows that.
fn read_bounded(path: &Path, field: &str, is_secret: bool) -> Result<String, String> {
    let shown = path.display();
    let cannot = |error: std::io::Error| format!("{field} {shown} cannot be read: {error}");
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() || metadata.size() > MAX_USERS_BYTES {
        return Err(format!(
            "{field} {shown} must be a file of at most {MAX_USERS_BYTES} bytes"
        ));
    }
    if is_secret && metadata.permissions().mode() & 0o077 != 0 {
        return Err(format!(
            "{field} {shown} can be read by others; run chmod 600 on it"
        ));
    }
    std::fs::read_to_string(path).map_err(cannot)
}

/// Reads lines of a name, a colon and what proves it; blank lines and those that begin with `#` are
/// skipped. `form` says what a line looks like, `entry` gives what identifies a user and what is known of them.
fn read_users<K: Eq + Hash, V>(
    path: &Path,
    form: &str,
    is_secret: bool,
    entry: impl Fn(&str, &str) -> Option<(K, V)>,
) -> Result<HashMap<K, V>, String> {
    let shown = path.display();
    let text = read_bounded(path, "users-file", is_secret)?;
    let mut users = HashMap::new();
    let mut names = HashSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, (key, value)) = line
            .split_once(':')
            .filter(|(name, secret)| !name.is_empty() && !secret.is_empty())
            .and_then(|(name, secret)| Some((name, entry(name, secret)?)))
            .ok_or_else(|| format!("users-file {shown} line {number}: give {form}"))?;
        if !names.insert(name) || users.insert(key, value).is_some() {
            return Err(format!(
                "users-file {shown} line {number}: this name or key is given twice"
            ));
        }
    }
    if users.is_empty() {
        return Err(format!("users-file {shown} has no users"));
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
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
        let Mechanism::Plain(users) = listeners[1].mechanism.clone() else {
            panic!("not PLAIN");
        };
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

    fn curve(secret: &tempfile::NamedTempFile, users: &tempfile::NamedTempFile) -> String {
        format!(
            "[[listener]]\nname = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'curve'\nsecret-key-file = {:?}\nusers-file = {:?}\n",
            secret.path(),
            users.path()
        )
    }

    /// Keys that libzmq made: a public one and its secret.
    const PUBLIC: &str = "{xwPk15q:[m/PgMM]uI}F]BZ{6+od]2#*!ksPrRC";
    const SECRET: &str = "Ej)hT%iSWzVl=A%IfvmxQ83[Gc!3haR$Vzn<EtrU";

    #[test]
    fn a_curve_listener_knows_its_users_by_their_keys() {
        let secret = users_file(&format!("{SECRET}\n"), 0o600);
        let other = z85::encode([3; 32]);
        let users = users_file(&format!("# who may\nann:{PUBLIC}\nbob:{other}\n"), 0o600);
        let listeners = table(&curve(&secret, &users)).unwrap();
        let Mechanism::Curve(server) = &listeners[1].mechanism else {
            panic!("not CURVE");
        };
        assert_eq!(z85::encode(server.public_key()), PUBLIC);
        assert!(!format!("{listeners:?}").contains("Ej)h"));
        for (text, problem) in [
            ("ann:short\n".to_owned(), "line 1"),
            (format!("ann:{PUBLIC}x\n"), "line 1"),
            (format!("ann:{PUBLIC}\nbob:{PUBLIC}\n"), "line 2"),
            (format!("ann:{PUBLIC}\nann:{other}\n"), "line 2"),
            (format!(":{PUBLIC}\n"), "line 1"),
            ("\n".to_owned(), "no users"),
        ] {
            let error = table(&curve(&secret, &users_file(&text, 0o600))).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
        for (text, mode, problem) in [
            (SECRET, 0o640, "chmod 600"),
            ("", 0o600, "curve-keygen"),
            (&SECRET[..39], 0o600, "curve-keygen"),
            (
                "~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~",
                0o600,
                "curve-keygen",
            ),
            (
                "#########################################",
                0o600,
                "curve-keygen",
            ),
        ] {
            let error = table(&curve(&users_file(text, mode), &users)).unwrap_err();
            assert!(
                error.contains(problem) && !error.contains("Ej)h"),
                "{text}: {error}"
            );
        }
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
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'gssapi'",
                "gssapi",
            ),
            (
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'curve'\nusers-file = '/x'",
                "secret-key-file",
            ),
            (
                "name = 'a'\nendpoint = 'tcp://127.0.0.1:0'\nmechanism = 'plain'\nsecret-key-file = '/x'",
                "secret-key-file is for",
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

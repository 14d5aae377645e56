//! Who may call what: bearer tokens from a file, three roles, and a guard before each endpoint.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    time::SystemTime,
};

use anyhow::{Context as _, bail};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use parking_lot::RwLock;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Admin, problem::Problem};
use crate::tenancy::{self, Denial, Realm};

/// Shortest token in characters: what 128 random bits take in base64.
const MIN_TOKEN_CHARS: usize = 22;
/// Most tokens in a file.
const MAX_TOKENS: usize = 1000;

/// What an endpoint asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing: it tells only whether the server is up.
    Public,
    /// Any token; a tenant gets its own things only, which the handler sees to.
    Tenant,
    /// A token that may look at everything.
    Read,
    /// A token that may change things.
    Operate,
}

impl Access {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Tenant => "tenant",
            Self::Read => "read",
            Self::Operate => "operate",
        }
    }
}

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// Everything.
    Operator,
    /// Looking at everything.
    ReadOnly,
    /// Looking at one tenant.
    Tenant(Arc<str>),
}

/// Who calls, as handlers see it.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// Name of the token, or how the caller came in without one.
    pub(crate) name: Arc<str>,
    pub(crate) role: Role,
}

impl Caller {
    fn may(&self, access: Access) -> bool {
        match (access, &self.role) {
            (Access::Public | Access::Tenant, _) | (_, Role::Operator) => true,
            (Access::Read, Role::ReadOnly) => true,
            (Access::Read | Access::Operate, _) => false,
        }
    }

    /// Refuses a tenant that asks for another one's things.
    pub(crate) fn may_see_tenant(&self, tenant: &str) -> Result<(), Problem> {
        match &self.role {
            Role::Tenant(own) if **own != *tenant => Err(forbidden(
                "the token belongs to another tenant: use that tenant's or an operator's",
            )),
            _ => Ok(()),
        }
    }
}

/// How a connection came in; set by the listener for each of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The unix socket, whose file's permissions decide who can connect.
    Socket,
    /// A TCP listener.
    Network,
}

/// One entry of the token file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    role: String,
    tenant: Option<String>,
    token: Option<String>,
    sha256: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    token: Vec<Entry>,
}

struct Token {
    digest: [u8; 32],
    caller: Caller,
}

/// Tells one version of a file from the next.
type Version = (Option<SystemTime>, u64, u64);

/// The tokens of a file, read again when it changes.
pub struct Tokens {
    path: PathBuf,
    current: RwLock<(Version, Arc<[Token]>)>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// One sentence that names the file and what is wrong with it; never a token.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            current: RwLock::new(read(path)?),
        })
    }

    /// Reads the file again if it changed; what is wrong with it leaves the old tokens valid.
    pub(crate) fn refresh(&self) {
        let version = fs::metadata(&self.path).map(|metadata| version(&metadata));
        if version.is_ok_and(|version| version == self.current.read().0) {
            return;
        }
        match read(&self.path) {
            Ok(fresh) => {
                let count = fresh.1.len();
                *self.current.write() = fresh;
                tracing::info!(count, "HTTP tokens were read again");
            }
            Err(error) => {
                tracing::error!("HTTP tokens stay as they were: {error:#}");
            }
        }
    }

    /// Whose token this is. Takes as long for a wrong one as for a right one.
    fn caller(&self, presented: &str) -> Option<Caller> {
        let digest: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let tokens = Arc::clone(&self.current.read().1);
        let mut found = None;
        for token in tokens.iter() {
            if bool::from(token.digest.ct_eq(&digest)) {
                found = Some(&token.caller);
            }
        }
        found.cloned()
    }
}

fn version(metadata: &fs::Metadata) -> Version {
    (metadata.modified().ok(), metadata.ino(), metadata.len())
}

fn read(path: &Path) -> anyhow::Result<(Version, Arc<[Token]>)> {
    let shown = path.display();
    let metadata = fs::metadata(path).with_context(|| format!("{shown} cannot be read"))?;
    if metadata.permissions().mode() & 0o027 != 0 {
        bail!(
            "{shown} holds tokens and others can reach it: chmod 600 it (640 where a group must read it)"
        );
    }
    let text = fs::read_to_string(path).with_context(|| format!("{shown} cannot be read"))?;
    let file: File = toml::from_str(&text).map_err(|error| {
        // The error's drawing would show the line, and with it a token.
        let line = error
            .span()
            .and_then(|span| text.get(..span.start))
            .map_or(1, |before| 1 + before.matches('\n').count());
        anyhow::anyhow!("{shown} line {line} is no [[token]] with name, role and token or sha256")
    })?;
    if file.token.is_empty() {
        bail!("{shown} has no [[token]]: nobody could call the HTTP API");
    }
    if file.token.len() > MAX_TOKENS {
        bail!("{shown} has more than {MAX_TOKENS} tokens");
    }
    let tokens: Vec<Token> = file
        .token
        .into_iter()
        .map(|entry| check(entry).map_err(|problem| anyhow::anyhow!("{shown}: {problem}")))
        .collect::<anyhow::Result<_>>()?;
    Ok((version(&metadata), tokens.into()))
}

fn check(entry: Entry) -> Result<Token, String> {
    let name = &entry.name;
    let role = match (entry.role.as_str(), entry.tenant) {
        ("operator", None) => Role::Operator,
        ("read-only", None) => Role::ReadOnly,
        ("tenant", Some(tenant)) => Role::Tenant(tenant.into()),
        ("tenant", None) => {
            return Err(format!(
                "token {name:?} has role tenant: add tenant = \"NAME\""
            ));
        }
        ("operator" | "read-only", Some(_)) => {
            return Err(format!(
                "token {name:?} names a tenant: give it role = \"tenant\""
            ));
        }
        (other, _) => {
            return Err(format!(
                "token {name:?} has role {other:?}: give operator, read-only or tenant"
            ));
        }
    };
    let digest = match (entry.token, entry.sha256) {
        (Some(token), None) => {
            if token.chars().count() < MIN_TOKEN_CHARS || token.chars().any(char::is_whitespace) {
                return Err(format!(
                    "token {name:?} has less than {MIN_TOKEN_CHARS} characters or a space in it: make one with `openssl rand -hex 32`"
                ));
            }
            Sha256::digest(token.as_bytes()).into()
        }
        (None, Some(hex)) => unhex(&hex).ok_or_else(|| {
            format!("token {name:?}: sha256 is not 64 hexadecimal digits: make it with `printf %s TOKEN | sha256sum`")
        })?,
        _ => return Err(format!("token {name:?}: give either token or sha256")),
    };
    Ok(Token {
        digest,
        caller: Caller {
            name: Arc::from(name.as_str()),
            role,
        },
    })
}

fn unhex(hex: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(digest)
}

/// Requests that the guard turned away, by reason.
#[derive(Debug, Default)]
pub(crate) struct Denied {
    pub(crate) unauthenticated: AtomicU64,
    pub(crate) forbidden: AtomicU64,
    pub(crate) cross_origin: AtomicU64,
}

fn forbidden(detail: &str) -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "forbidden", detail)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

/// Stands before every endpoint.
pub(crate) async fn guard(
    State((admin, access)): State<(Arc<Admin>, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let (caller, response) = match admit(&admin, access, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller.clone());
            (Some(caller), next.run(request).await)
        }
        Err(problem) => (None, problem.into_response()),
    };
    // Of the guard or, for another tenant's things, of the endpoint.
    let reason = match response.status() {
        StatusCode::UNAUTHORIZED => Denial::HttpUnauthenticated,
        StatusCode::FORBIDDEN => Denial::HttpForbidden,
        _ => return response,
    };
    let realm = match caller.as_ref().map(|caller| &caller.role) {
        Some(Role::Tenant(name)) => Realm::of_tenant(name),
        _ => Realm::open(),
    };
    let name = caller.as_ref().map_or("nobody", |caller| &caller.name);
    admin.service.tenancy().audit().record(tenancy::Denied {
        realm: &realm,
        origin: &format!("HTTP token {name}"),
        reason,
        operation: &format!("{method} {}", uri.path()),
        salt: None,
    });
    response
}

fn admit(admin: &Admin, access: Access, request: &Request) -> Result<Caller, Problem> {
    let headers = request.headers();
    if is_cross_origin(headers, request.method()) {
        count(&admin.denied.cross_origin);
        return Err(forbidden(
            "a page of another site may not change anything here: call the API from its own origin or without an Origin header",
        ));
    }
    let anonymous = |name: &str| Caller {
        name: Arc::from(name),
        role: Role::Operator,
    };
    if access == Access::Public || request.extensions().get() == Some(&Origin::Socket) {
        return Ok(anonymous("socket"));
    }
    let Some(tokens) = &admin.tokens else {
        if !admin.insecure && !has_local_host(headers) {
            count(&admin.denied.cross_origin);
            return Err(forbidden(
                "without tokens the API answers to the names of this machine only: call it as localhost, 127.0.0.1 or [::1]",
            ));
        }
        return Ok(anonymous("loopback"));
    };
    let caller = bearer(headers)
        .and_then(|token| tokens.caller(token))
        .ok_or_else(|| {
            count(&admin.denied.unauthenticated);
            Problem::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "send the header `Authorization: Bearer TOKEN` with a token of --http-token-file",
            )
        })?;
    if !caller.may(access) {
        count(&admin.denied.forbidden);
        return Err(forbidden(match access {
            Access::Operate => "this needs an operator's token",
            _ => "this needs an operator's or a read-only token",
        }));
    }
    Ok(caller)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Browsers say where a script comes from; nothing on another page may change things here.
fn is_cross_origin(headers: &HeaderMap, method: &Method) -> bool {
    if method == Method::GET || method == Method::HEAD {
        return false;
    }
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(origin) = text(header::ORIGIN) else {
        return false;
    };
    let site = origin.split_once("://").map_or(origin, |(_, rest)| rest);
    text(header::HOST) != Some(site)
}

/// Whether the request names this machine, so that a foreign name that was made to resolve to it
/// does not let a page in.
fn has_local_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else {
        return true; // Not a browser.
    };
    let authority: Option<Authority> = host.to_str().ok().and_then(|host| host.parse().ok());
    authority.is_some_and(|authority| {
        let host = authority.host().trim_matches(['[', ']']);
        host.eq_ignore_ascii_case("localhost")
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn entry(role: &str, tenant: Option<&str>, token: Option<&str>, sha256: Option<&str>) -> Entry {
        Entry {
            name: "t".to_owned(),
            role: role.to_owned(),
            tenant: tenant.map(str::to_owned),
            token: token.map(str::to_owned),
            sha256: sha256.map(str::to_owned),
        }
    }

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn entries_that_would_let_the_wrong_people_in_are_refused() {
        for (bad, hint) in [
            (
                entry("admin", None, Some(TOKEN), None),
                "operator, read-only or tenant",
            ),
            (entry("tenant", None, Some(TOKEN), None), "add tenant"),
            (
                entry("operator", Some("a"), Some(TOKEN), None),
                "role = \"tenant\"",
            ),
            (entry("operator", None, Some("short"), None), "openssl rand"),
            (
                entry("operator", None, None, None),
                "either token or sha256",
            ),
            (
                entry("operator", None, Some(TOKEN), Some(TOKEN)),
                "either token or sha256",
            ),
            (entry("operator", None, None, Some("zz")), "sha256sum"),
        ] {
            let problem = check(bad).err().unwrap();
            assert!(problem.contains(hint), "{problem}");
            assert!(!problem.contains(TOKEN), "{problem}");
        }
    }

    #[test]
    fn a_token_and_its_digest_name_the_same_caller() {
        let hex: String = Sha256::digest(TOKEN.as_bytes())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let plain = check(entry("operator", None, Some(TOKEN), None)).unwrap();
        let hashed = check(entry("operator", None, None, Some(&hex))).unwrap();
        assert_eq!(plain.digest, hashed.digest);
    }

    #[test]
    fn the_file_must_be_the_owners_alone_and_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens.toml");
        let write = |token: &str, mode: u32| {
            fs::write(
                &path,
                format!("[[token]]\nname = 'a'\nrole = 'operator'\ntoken = '{token}'\n"),
            )
            .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write(TOKEN, 0o644);
        let refused = Tokens::read(&path).unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
        write(TOKEN, 0o600);
        let tokens = Tokens::read(&path).unwrap();
        assert!(tokens.caller(TOKEN).is_some() && tokens.caller("nobody").is_none());
        let other = "another-token-of-good-length-x";
        write(other, 0o600);
        tokens.refresh();
        assert!(tokens.caller(TOKEN).is_none() && tokens.caller(other).is_some());
        fs::write(&path, "nonsense").unwrap();
        tokens.refresh();
        assert!(
            tokens.caller(other).is_some(),
            "a broken file changes nothing"
        );
    }

    #[test]
    fn only_names_of_this_machine_are_local() {
        let with = |host: &str| HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]);
        for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:80"] {
            assert!(has_local_host(&with(host)), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:8080", "10.0.0.1"] {
            assert!(!has_local_host(&with(host)), "{host}");
        }
    }

    #[test]
    fn pages_of_other_sites_change_nothing() {
        let headers = |origin: &str| {
            HeaderMap::from_iter([
                (header::HOST, "127.0.0.1:8080".parse().unwrap()),
                (header::ORIGIN, origin.parse().unwrap()),
            ])
        };
        assert!(is_cross_origin(
            &headers("https://evil.example"),
            &Method::POST
        ));
        assert!(is_cross_origin(&headers("null"), &Method::PUT));
        assert!(!is_cross_origin(
            &headers("http://127.0.0.1:8080"),
            &Method::POST
        ));
        assert!(!is_cross_origin(
            &headers("https://evil.example"),
            &Method::GET
        ));
    }
}

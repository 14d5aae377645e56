//! What the server's configuration says of plugins: the `[plugins]` table of `stockade.toml`.
//!
//! A manifest asks; the policy narrows what it asks for and never widens it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use serde::Deserialize;

use crate::{
    grants::{self, Access, HttpGrant},
    host_api::CacheGrant,
    manifest::{Limits, Manifest, ProcessGrants},
    native_script::Protection,
    provenance::{self, PublicKey, Sha256Digest},
    wasm::CompileLimits,
};

/// The name under which a narrowing holds for every plugin.
const EVERY_PLUGIN: &str = "*";

/// The `[plugins]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Refuse plugins that no trusted key has signed.
    pub require_signatures: bool,
    /// Whose signatures count. With any key here, a signature file that does not verify
    /// refuses its plugin, required or not.
    pub trusted_keys: Vec<PublicKey>,
    /// Most seconds that compiling one module may take.
    pub compile_seconds: Option<u32>,
    /// Most MiB that compiling one module may map.
    pub compile_memory_mib: Option<u32>,
    /// Certificates in PEM form that plugins' HTTPS requests trust beside Mozilla's.
    pub http_ca_file: Option<PathBuf>,
    /// What single plugins are narrowed to, by name; `*` holds for all.
    #[serde(flatten)]
    pub plugins: BTreeMap<String, Narrowing>,
}

/// A `[plugins.NAME]` table: each field left out narrows nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Narrowing {
    /// `false` leaves the plugin alone.
    pub enabled: Option<bool>,
    /// The only plugin file that is run under this name.
    pub sha256: Option<Sha256Digest>,
    /// The only manifest that is taken for it.
    pub manifest_sha256: Option<Sha256Digest>,
    /// The variables that are left of those asked for.
    pub env: Option<Vec<String>>,
    /// The directories that are left, by the guest's name, and what may be done there at most.
    pub directories: Option<BTreeMap<String, Access>>,
    /// The hosts and ports that are left, each with the methods that are.
    pub http: Option<Vec<HttpGrant>>,
    /// What is left of what it asks for of the cache.
    pub cache: Option<BTreeSet<CacheGrant>>,
    /// `false` takes the calls.
    pub calls: Option<bool>,
    /// `false` takes the ranking.
    pub rank: Option<bool>,
    /// The most that each limit may be.
    pub limits: BTreeMap<String, u32>,
    /// What is left to a script.
    pub process: ProcessNarrowing,
}

/// A `[plugins.NAME.process]` table: each field left out narrows nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessNarrowing {
    /// What must hold besides what the manifest requires.
    pub required: Vec<Protection>,
    /// `false` takes the network.
    pub network: Option<bool>,
    /// `false` takes UNIX sockets.
    pub unix_sockets: Option<bool>,
    /// The user that it runs as, whatever the manifest says.
    pub user: Option<String>,
    /// The most address space of each process, in MiB.
    pub memory_mib: Option<u32>,
    /// The most processes and threads.
    pub processes: Option<u32>,
}

impl ProcessNarrowing {
    fn narrow(&self, grants: &mut ProcessGrants) {
        grants.required.extend(&self.required);
        grants.network &= self.network.unwrap_or(true);
        grants.unix_sockets &= self.unix_sockets.unwrap_or(true);
        if self.user.is_some() {
            grants.user.clone_from(&self.user);
        }
        if let Some(most) = self.memory_mib {
            grants.memory_mib = Some(grants.memory_mib.map_or(most, |asked| asked.min(most)));
        }
        if let Some(most) = self.processes {
            grants.processes = grants.processes.min(most);
        }
    }
}

/// A plugin's files, as read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PluginFiles<'a> {
    pub(crate) plugin: &'a [u8],
    pub(crate) manifest: Option<&'a [u8]>,
    pub(crate) signature: Option<&'a str>,
}

/// How much is known of where a plugin comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nothing was asked for.
    Unchecked,
    /// Its digest is the pinned one.
    Pinned,
    /// A trusted key has signed it.
    Signed(PublicKey),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unchecked => formatter.write_str("unchecked"),
            Self::Pinned => formatter.write_str("pinned"),
            Self::Signed(key) => write!(formatter, "signed by {key}"),
        }
    }
}

impl Origin {
    /// Whether somebody vouches for these very bytes.
    #[must_use]
    pub fn is_checked(self) -> bool {
        self != Self::Unchecked
    }
}

impl Policy {
    /// Checks what only makes sense together.
    ///
    /// # Errors
    /// One sentence that names the key and the way out.
    pub fn check(&self) -> Result<(), String> {
        if self.require_signatures && self.trusted_keys.is_empty() {
            return Err("[plugins] require_signatures is set without trusted_keys, so no plugin could run: name the keys, or remove it".to_owned());
        }
        for (field, value, range) in [
            ("compile_seconds", self.compile_seconds, 1..=600),
            ("compile_memory_mib", self.compile_memory_mib, 256..=65536),
        ] {
            if let Some(value) = value
                && !range.contains(&value)
            {
                return Err(format!(
                    "[plugins] {field} is {value}: give {} to {}",
                    range.start(),
                    range.end()
                ));
            }
        }
        for (name, narrowing) in &self.plugins {
            grants::check_http(narrowing.http.as_deref().unwrap_or_default())
                .map_err(|reason| format!("[plugins.{name}] {reason}"))?;
            Limits::default()
                .at_most(&narrowing.limits)
                .map_err(|reason| format!("[plugins.{name}.limits] {reason}"))?;
        }
        Ok(())
    }

    /// What compiling one module may take.
    #[must_use]
    pub fn compile_limits(&self) -> CompileLimits {
        let default = CompileLimits::default();
        CompileLimits {
            time: self
                .compile_seconds
                .map_or(default.time, |seconds| Duration::from_secs(seconds.into())),
            memory_bytes: self
                .compile_memory_mib
                .map_or(default.memory_bytes, |mib| u64::from(mib) << 20),
        }
    }

    /// Takes from a manifest what this server does not grant.
    ///
    /// # Errors
    /// One sentence that names the limit that cannot be applied.
    pub fn narrow(&self, name: &str, manifest: &mut Manifest) -> Result<(), String> {
        for narrowing in self.of(name) {
            if let Some(enabled) = narrowing.enabled {
                manifest.enabled &= enabled;
            }
            if let Some(env) = &narrowing.env {
                manifest.env.retain(|variable| env.contains(variable));
            }
            if let Some(directories) = &narrowing.directories {
                manifest.directories.retain(|guest, directory| {
                    let most = directories.get(guest);
                    directory.access =
                        most.map_or(directory.access, |most| directory.access.min(*most));
                    most.is_some()
                });
            }
            if let Some(allowed) = &narrowing.http {
                manifest.http = grants::narrow_http(&manifest.http, allowed);
            }
            if let Some(cache) = &narrowing.cache {
                manifest.cache.retain(|grant| cache.contains(grant));
            }
            manifest.calls &= narrowing.calls.unwrap_or(true);
            manifest.rank &= narrowing.rank.unwrap_or(true);
            narrowing.process.narrow(&mut manifest.process);
            manifest.limits = manifest
                .limits
                .at_most(&narrowing.limits)
                .map_err(|reason| format!("[plugins.{name}.limits] {reason}"))?;
        }
        Ok(())
    }

    /// Whether the plugin is the one that was meant.
    ///
    /// # Errors
    /// One sentence: why it is not run.
    pub(crate) fn origin(&self, name: &str, files: PluginFiles<'_>) -> Result<Origin, String> {
        let mut origin = Origin::Unchecked;
        for narrowing in self.of(name) {
            let pins = [
                ("", "sha256", narrowing.sha256, Some(files.plugin)),
                (
                    "manifest ",
                    "manifest_sha256",
                    narrowing.manifest_sha256,
                    files.manifest,
                ),
            ];
            for (what, field, pin, bytes) in pins {
                let Some(pin) = pin else { continue };
                let found = bytes.map(Sha256Digest::of);
                if found != Some(pin) {
                    let found = found.map_or_else(|| "missing".to_owned(), |it| it.to_string());
                    return Err(format!(
                        "its {what}digest is {found}, and [plugins.{name}] pins {field} to {pin}"
                    ));
                }
                if what.is_empty() {
                    origin = Origin::Pinned;
                }
            }
        }
        match files.signature {
            Some(text) if !self.trusted_keys.is_empty() => {
                let key =
                    provenance::verify(&self.trusted_keys, text, files.plugin, files.manifest)?;
                origin = Origin::Signed(key);
            }
            _ if self.require_signatures => {
                return Err(format!(
                    "it is not signed, and [plugins] has require_signatures; put the signature of `stockade plugin sign` beside it, as its file name and {}",
                    provenance::SIGNATURE_SUFFIX
                ));
            }
            _ => {}
        }
        Ok(origin)
    }

    fn of(&self, name: &str) -> impl Iterator<Item = &Narrowing> {
        [EVERY_PLUGIN, name]
            .into_iter()
            .filter_map(|name| self.plugins.get(name))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;
    use crate::provenance::SecretKey;

    fn policy(text: &str) -> Policy {
        let policy: Policy = toml::from_str(text).unwrap();
        policy.check().unwrap();
        policy
    }

    fn narrowed(policy_text: &str, manifest_text: &str) -> Manifest {
        let mut manifest: Manifest = toml::from_str(manifest_text).unwrap();
        policy(policy_text).narrow("it", &mut manifest).unwrap();
        manifest
    }

    #[test]
    fn a_script_is_left_what_the_server_grants() {
        let narrowing = "[it.process]\nnetwork = false\nunix_sockets = false\nuser = 'plugins'\n\
                         memory_mib = 100\nprocesses = 20\nrequired = ['seccomp']";
        let mut manifest = Manifest::default();
        manifest.process.unix_sockets = true;
        manifest.process.memory_mib = Some(50);
        manifest.process.required = vec![Protection::Landlock];
        policy(narrowing).narrow("it", &mut manifest).unwrap();
        let process = &manifest.process;
        assert_eq!((process.network, process.unix_sockets), (false, false));
        assert_eq!((process.memory_mib, process.processes), (Some(50), 20));
        assert_eq!(process.user.as_deref(), Some("plugins"));
        assert_eq!(
            process.required,
            [Protection::Landlock, Protection::Seccomp]
        );
        let mut other = Manifest::default();
        policy(narrowing).narrow("other", &mut other).unwrap();
        assert_eq!(other, Manifest::default());
    }

    #[test]
    fn what_a_plugin_may_ask_of_the_server_is_narrowed() {
        let asks = "cache = ['stats', 'events', 'evict']\ncalls = true\nrank = true\n[limits]\nstate_kib = 64";
        let left = narrowed(
            "['*']\ncache = ['stats', 'keys', 'events']\n[it]\nrank = false\nlimits = { state_kib = 0 }",
            asks,
        );
        assert_eq!(
            left.cache,
            BTreeSet::from([CacheGrant::Stats, CacheGrant::Events])
        );
        assert_eq!(
            (left.calls, left.rank, left.limits.state_kib),
            (true, false, 0)
        );
        assert_eq!(narrowed("", asks).cache.len(), 3);
    }

    #[test]
    fn nothing_is_widened() {
        let asks = "env = ['A']\n[directories]\n'/a' = { host = '/x' }\n[limits]\nmemory_mib = 20\nrun_seconds = 30";
        let allows = "[it]\nenv = ['A', 'B']\ndirectories = { '/a' = 'read-write', '/b' = 'read-write' }\nlimits = { memory_mib = 100, run_seconds = 0 }";
        let asked: Manifest = toml::from_str(asks).unwrap();
        assert_eq!(narrowed(allows, asks), asked);
        assert_eq!(narrowed("", asks), asked);
        assert_eq!(narrowed(allows, ""), Manifest::default());
    }

    #[test]
    fn each_grant_is_narrowed_for_one_and_for_all() {
        let asks = "env = ['A', 'B']\n[directories]\n'/a' = { host = '/x', access = 'read-write' }\n'/b' = { host = '/y' }\n[limits]\nmemory_mib = 200";
        let left = narrowed(
            "['*']\nlimits = { memory_mib = 100, run_seconds = 60 }\n[it]\nenv = ['B']\ndirectories = { '/a' = 'read-only' }\nlimits = { cpu_percent = 5 }\n[other]\nenabled = false",
            asks,
        );
        assert!(left.enabled);
        assert_eq!(left.env, ["B"]);
        assert_eq!(left.directories.len(), 1);
        assert_eq!(left.directories["/a"].access, Access::ReadOnly);
        assert_eq!((left.limits.memory_mib, left.limits.cpu_percent), (100, 5));
        // No limit at all is more than any limit.
        assert_eq!(left.limits.run_seconds, 60);
        let asks = "[[http]]\nhost = 'a.example'\nport = 443\nmethods = ['GET', 'POST']\n[[http]]\nhost = 'b.example'\nport = 443";
        let left = narrowed(
            "[[it.http]]\nhost = 'a.example'\nport = 443\nmethods = ['POST', 'PUT']",
            asks,
        );
        assert_eq!(left.http.len(), 1);
        assert_eq!(left.http[0].methods, ["POST"]);
        assert_eq!(narrowed("[it]\nhttp = []", asks).http, []);
        assert_eq!(narrowed("['*']\nhttp = []", asks).http, []);
        assert!(!narrowed("[it]\nenabled = false", "").enabled);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |text: &str| {
            let policy: Result<Policy, _> = toml::from_str(text);
            match policy {
                Ok(policy) => policy.check().unwrap_err(),
                Err(error) => error.to_string(),
            }
        };
        for (text, named) in [
            ("require_signatures = true", "trusted_keys"),
            ("trusted_keys = ['abc']", "public key"),
            ("compile_seconds = 0", "compile_seconds"),
            ("[it]\nmemory = 1", "memory"),
            ("[it.limits]\nmemory = 1", "memory"),
            ("[it.limits]\nmemory_mib = 0", "memory_mib"),
            (
                "[[it.http]]\nhost = '*'\nport = 443",
                "[plugins.it] http[0].host",
            ),
            ("[it]\nsha256 = 'xyz'", "SHA-256"),
        ] {
            let reason = refused(text);
            assert!(reason.contains(named), "{text}: {reason}");
        }
    }

    #[test]
    fn a_pin_refuses_every_other_file() {
        let files = |plugin, manifest| PluginFiles {
            plugin,
            manifest,
            signature: None,
        };
        let pinned = policy(&format!("[it]\nsha256 = '{}'", Sha256Digest::of(b"good")));
        assert_eq!(
            pinned.origin("it", files(b"good", None)),
            Ok(Origin::Pinned)
        );
        assert!(
            pinned
                .origin("it", files(b"bad", None))
                .unwrap_err()
                .contains("pins sha256")
        );
        assert_eq!(
            pinned.origin("other", files(b"bad", None)),
            Ok(Origin::Unchecked)
        );

        let digest = Sha256Digest::of(b"asks");
        let pinned = policy(&format!("[it]\nmanifest_sha256 = '{digest}'"));
        assert!(pinned.origin("it", files(b"good", Some(b"asks"))).is_ok());
        assert!(
            pinned
                .origin("it", files(b"good", Some(b"asks for more")))
                .is_err()
        );
        let missing = pinned.origin("it", files(b"good", None)).unwrap_err();
        assert!(missing.contains("missing"), "{missing}");
    }

    #[test]
    fn signatures_fail_closed() {
        let key = SecretKey::from_random(&[3; 32]);
        let signature = key.sign(b"good", None);
        let files = |plugin, signature| PluginFiles {
            plugin,
            manifest: None,
            signature,
        };
        let keys = format!("trusted_keys = ['{}']", key.public());
        let required = policy(&format!("require_signatures = true\n{keys}"));
        let signed = Ok(Origin::Signed(key.public()));
        assert_eq!(
            required.origin("it", files(b"good", Some(&signature))),
            signed
        );
        assert!(
            required
                .origin("it", files(b"bad", Some(&signature)))
                .is_err()
        );
        let unsigned = required.origin("it", files(b"good", None)).unwrap_err();
        assert!(unsigned.contains("plugin sign"), "{unsigned}");

        // A signature that is there and wrong is never ignored while there are keys.
        let optional = policy(&keys);
        assert_eq!(
            optional.origin("it", files(b"good", Some(&signature))),
            signed
        );
        assert_eq!(
            optional.origin("it", files(b"good", None)),
            Ok(Origin::Unchecked)
        );
        assert!(
            optional
                .origin("it", files(b"bad", Some(&signature)))
                .is_err()
        );
    }
}

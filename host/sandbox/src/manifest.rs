//! What a plugin's author or operator says of it: `<name>.plugin.toml` beside the plugin.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    grants::{self, Directories, HttpGrant},
    host_api::CacheGrant,
    log_stream::{self, LogLimits},
    native_script::Protection,
};

/// Largest manifest that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 64 * 1024;

/// When a plugin that ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never, as LMCache does.
    Never,
    /// After an exit code other than 0, a signal or a trap.
    #[default]
    OnFailure,
    /// After every end.
    Always,
}

/// A plugin's manifest. Every field has a default, as has a plugin without manifest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Manifest {
    /// `false` leaves the plugin alone.
    pub enabled: bool,
    /// When it is started again.
    pub restart: Restart,
    /// Seconds between being told to stop and being killed.
    pub stop_grace_seconds: u32,
    /// Variables of the server's environment that it may see, by name.
    pub env: Vec<String>,
    /// Directories that it may use, by the name a sandboxed plugin knows them under; a script
    /// knows them by the host's.
    pub directories: Directories,
    /// Hosts that a sandboxed plugin may send HTTP requests to; scripts have `process.network`.
    pub http: Vec<HttpGrant>,
    /// What it may do with the cache.
    pub cache: BTreeSet<CacheGrant>,
    /// Whether it serves `server_module_call` for methods that begin with its name and a dot.
    pub calls: bool,
    /// Whether it ranks candidates for eviction.
    pub rank: bool,
    /// What it may use.
    pub limits: Limits,
    /// Whether a Python script runs in the sandbox where the server has a Python for that.
    pub sandbox: bool,
    /// What a script may use as a process of its own.
    pub process: ProcessGrants,
}

/// The `[process]` table: what only scripts have. Limits hold for each process.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessGrants {
    /// What must hold; the script is refused on a machine that does not give it.
    pub required: Vec<Protection>,
    /// Whether it may use the network.
    pub network: bool,
    /// Whether it may use UNIX sockets: with them, daemons of the host that root may command.
    pub unix_sockets: bool,
    /// The user that it runs as, by name; needs a server that runs as root.
    pub user: Option<String>,
    /// Address space in MiB; 4096 when confined.
    pub memory_mib: Option<u32>,
    /// Seconds of CPU time after which it is killed.
    pub cpu_seconds: Option<u32>,
    /// Files open at once; 1024.
    pub open_files: Option<u32>,
    /// Largest file that it may write, in MiB.
    pub file_mib: Option<u32>,
    /// Processes and threads of the script at once.
    pub processes: u32,
    /// Size of its private temporary directories, in MiB.
    pub tmp_mib: u32,
}

/// The `[limits]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Linear memory of a sandboxed plugin over all its memories, in MiB.
    pub memory_mib: u32,
    /// Share of one core that a sandboxed plugin may use over time, 1 to 100.
    pub cpu_percent: u32,
    /// Log lines a second; more are dropped.
    pub log_lines_per_second: u32,
    /// KiB of output a second; the plugin waits when it prints more.
    pub log_kib_per_second: u32,
    /// Elements of a sandboxed plugin's tables.
    pub table_elements: u32,
    /// Milliseconds of processor time that a sandboxed plugin may take ahead of its share.
    pub cpu_burst_ms: u32,
    /// Turns of a sandboxed plugin when others want to run too, against their weights.
    pub cpu_weight: u32,
    /// Seconds that a sandboxed plugin's start function may take.
    pub start_seconds: u32,
    /// Seconds that a whole run of a sandboxed plugin may take; 0 is no limit.
    pub run_seconds: u32,
    /// Seconds that one call of a sandboxed plugin into the file system may take.
    pub host_call_seconds: u32,
    /// KiB of arguments and environment of a sandboxed plugin.
    pub environment_kib: u32,
    /// Files and directories that a sandboxed plugin may have open.
    pub open_files: u32,
    /// MiB that may lie in a sandboxed plugin's writable directories.
    pub directory_mib: u32,
    /// Milliseconds that one HTTP request of a sandboxed plugin may take.
    pub http_timeout_ms: u32,
    /// KiB of the body of such a request, and of its response.
    pub http_body_kib: u32,
    /// Such requests a second.
    pub http_per_second: u32,
    /// KiB of keys and values that a sandboxed plugin keeps; 0 is none.
    pub state_kib: u32,
    /// Milliseconds that one handler of a sandboxed plugin may take.
    pub call_ms: u32,
    /// Milliseconds until a sandboxed plugin's order for eviction.
    pub rank_ms: u32,
    /// Events that may wait for a sandboxed plugin.
    pub queued_events: u32,
    /// Metrics that a sandboxed plugin may make.
    pub metrics: u32,
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            enabled: true,
            restart: Restart::default(),
            stop_grace_seconds: 5,
            env: Vec::new(),
            directories: Directories::default(),
            http: Vec::new(),
            cache: BTreeSet::new(),
            calls: false,
            rank: false,
            limits: Limits::default(),
            sandbox: true,
            process: ProcessGrants::default(),
        }
    }
}

impl Default for ProcessGrants {
    fn default() -> Self {
        Self {
            required: Vec::new(),
            network: true,
            unix_sockets: false,
            user: None,
            memory_mib: None,
            cpu_seconds: None,
            open_files: None,
            file_mib: None,
            processes: 256,
            tmp_mib: 64,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_mib: 64,
            cpu_percent: 50,
            log_lines_per_second: 200,
            log_kib_per_second: 1024,
            table_elements: 100_000,
            cpu_burst_ms: 50,
            cpu_weight: 100,
            // Guests have the lowest priority: on a busy machine a second of work takes many.
            start_seconds: 60,
            run_seconds: 0,
            host_call_seconds: 10,
            environment_kib: 256,
            open_files: 32,
            directory_mib: 64,
            http_timeout_ms: 10_000,
            http_body_kib: 1024,
            http_per_second: 10,
            state_kib: 0,
            call_ms: 1000,
            rank_ms: 20,
            queued_events: 4096,
            metrics: 32,
        }
    }
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file exists and cannot be read.
    #[error("plugin manifest {} cannot be read: {cause}", path.display())]
    Unreadable {
        /// The manifest.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Its text is not what a manifest holds.
    #[error("plugin manifest {} is not valid: {reason}", path.display())]
    Invalid {
        /// The manifest.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
}

impl Manifest {
    /// Reads the manifest beside `plugin`; the defaults if there is none.
    ///
    /// # Errors
    /// [`ManifestError`], which names the file and the field.
    pub fn beside(plugin: &Path) -> Result<Self, ManifestError> {
        Ok(Self::read(plugin)?.0)
    }

    /// The manifest beside `plugin` and its bytes, if there is one.
    pub(crate) fn read(plugin: &Path) -> Result<(Self, Option<Vec<u8>>), ManifestError> {
        let path = Self::path_beside(plugin);
        let unreadable = |cause| ManifestError::Unreadable {
            path: path.clone(),
            cause,
        };
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return Ok((Self::default(), None));
            }
            Err(cause) => return Err(unreadable(cause)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_MANIFEST_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        Ok((Self::parse(&path, &bytes)?, Some(bytes)))
    }

    /// Reads a manifest from its text; `path` is what errors call it.
    ///
    /// # Errors
    /// [`ManifestError::Invalid`], which names the field.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ManifestError> {
        // It repeats what the manifest holds, which shall not draw in the operator's terminal.
        let invalid = |reason: String| ManifestError::Invalid {
            path: path.to_owned(),
            reason: log_stream::printable(reason.trim_end().replace('\n', " ").as_bytes()),
        };
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(invalid(format!(
                "it has more than the {MAX_MANIFEST_BYTES} bytes allowed"
            )));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| invalid(error.to_string()))?;
        let manifest: Self = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
        manifest.check().map_err(invalid)?;
        Ok(manifest)
    }

    /// Where the manifest of `plugin` is, if it has one.
    pub(crate) fn path_beside(plugin: &Path) -> PathBuf {
        plugin.with_extension("plugin.toml")
    }

    fn check(&self) -> Result<(), String> {
        if !(0..=600).contains(&self.stop_grace_seconds) {
            return Err(out_of_range(
                "stop_grace_seconds",
                self.stop_grace_seconds,
                &(0..=600),
            ));
        }
        for (field, value, range) in [
            ("process.processes", self.process.processes, 1..=1_000_000),
            ("process.tmp_mib", self.process.tmp_mib, 1..=1_048_576),
        ] {
            if !range.contains(&value) {
                return Err(out_of_range(field, value, &range));
            }
        }
        grants::check_directories(&self.directories)?;
        grants::check_http(&self.http)?;
        self.limits
            .check()
            .map_err(|reason| format!("limits.{reason}"))
    }

    /// How much it may print.
    #[must_use]
    pub fn log_limits(&self) -> LogLimits {
        LogLimits {
            lines_per_second: self.limits.log_lines_per_second,
            bytes_per_second: self.limits.log_kib_per_second * 1024,
            ..LogLimits::default()
        }
    }
}

impl Limits {
    /// Checks that each value is within its range.
    fn check(&self) -> Result<(), String> {
        let ranges = [
            ("memory_mib", self.memory_mib, 1..=4096),
            ("cpu_percent", self.cpu_percent, 1..=100),
            (
                "log_lines_per_second",
                self.log_lines_per_second,
                1..=100_000,
            ),
            ("log_kib_per_second", self.log_kib_per_second, 1..=1_048_576),
            ("table_elements", self.table_elements, 1..=10_000_000),
            ("cpu_burst_ms", self.cpu_burst_ms, 5..=10_000),
            ("cpu_weight", self.cpu_weight, 10..=1000),
            ("start_seconds", self.start_seconds, 1..=600),
            ("run_seconds", self.run_seconds, 0..=u32::MAX),
            ("host_call_seconds", self.host_call_seconds, 1..=600),
            ("environment_kib", self.environment_kib, 1..=16_384),
            ("open_files", self.open_files, 0..=200),
            ("directory_mib", self.directory_mib, 0..=1_048_576),
            ("http_timeout_ms", self.http_timeout_ms, 1..=600_000),
            // Both bodies are held in memory.
            ("http_body_kib", self.http_body_kib, 1..=65_536),
            ("http_per_second", self.http_per_second, 1..=10_000),
            ("state_kib", self.state_kib, 0..=65_536),
            ("call_ms", self.call_ms, 1..=600_000),
            ("rank_ms", self.rank_ms, 1..=1000),
            ("queued_events", self.queued_events, 1..=65_536),
            ("metrics", self.metrics, 0..=256),
        ];
        for (field, value, range) in ranges {
            if !range.contains(&value) {
                return Err(out_of_range(field, value, &range));
            }
        }
        Ok(())
    }

    /// These limits, none above what `caps` says of it by name.
    ///
    /// # Errors
    /// One sentence that names the limit that does not exist or is out of its range.
    pub(crate) fn at_most(&self, caps: &BTreeMap<String, u32>) -> Result<Self, String> {
        // A cap is checked like a limit, so that a typing error is found at the start.
        let given = toml::Table::from_iter(
            caps.iter()
                .map(|(name, cap)| (name.clone(), toml::Value::from(*cap))),
        );
        let given: Self = given
            .try_into()
            .map_err(|error: toml::de::Error| error.message().to_owned())?;
        given.check()?;
        let mut limits = toml::Table::try_from(self).map_err(|error| error.to_string())?;
        for (name, cap) in caps {
            // Only the run time has a 0, which is none.
            let cap = match i64::from(*cap) {
                0 if name == "run_seconds" => continue,
                cap => cap,
            };
            if let Some(toml::Value::Integer(limit)) = limits.get_mut(name) {
                let is_none = *limit == 0 && name == "run_seconds";
                *limit = if is_none { cap } else { cap.min(*limit) };
            }
        }
        limits
            .try_into()
            .map_err(|error: toml::de::Error| error.message().to_owned())
    }
}

fn out_of_range(field: &str, value: u32, range: &std::ops::RangeInclusive<u32>) -> String {
    format!(
        "{field} is {value}: give {} to {}",
        range.start(),
        range.end()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn manifest(text: &str) -> Result<Manifest, ManifestError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("it.plugin.toml"), text).unwrap();
        Manifest::beside(&directory.path().join("it.wasm"))
    }

    #[test]
    fn a_plugin_without_manifest_has_the_defaults() {
        assert_eq!(
            Manifest::beside(Path::new("/nowhere/it.wasm")).unwrap(),
            Manifest::default()
        );
        assert_eq!(manifest("").unwrap(), Manifest::default());
    }

    #[test]
    fn fields_are_read() {
        let read = manifest("restart = 'never'\nenv = ['A']\n[limits]\nmemory_mib = 20").unwrap();
        assert_eq!(
            (read.restart, read.env, read.limits.memory_mib),
            (Restart::Never, vec!["A".to_owned()], 20)
        );
    }

    #[test]
    fn errors_name_the_field() {
        for (text, field) in [
            ("memory = 1", "memory"),
            ("[limits]\ncpu_percent = 0", "limits.cpu_percent"),
            (
                "[limits]\nlog_lines_per_second = 'x'",
                "log_lines_per_second",
            ),
            ("restart = 'sometimes'", "sometimes"),
            ("[process]\nrequired = ['magic']", "magic"),
            ("[process]\nprocesses = 0", "process.processes"),
            ("[[http]]\nhost = 'a.example'", "port"),
            ("[[http]]\nhost = '*'\nport = 1", "http[0].host"),
            ("[[http]]\nhost = 'a'\nport = 70000", "70000"),
            ("[limits]\nhttp_body_kib = 0", "limits.http_body_kib"),
            (
                "[directories]\n'/a' = { host = 'b' }",
                "\"/a\".host is \"b\"",
            ),
        ] {
            let error = manifest(text).unwrap_err().to_string();
            assert!(
                error.contains(field) && error.contains("it.plugin.toml"),
                "{error}"
            );
        }
    }

    /// Fuzzing found the first.
    #[test]
    fn a_refusal_is_one_line_whatever_the_manifest_holds() {
        for text in [
            "[directories]\n'/a' = { host = \"\"\"b\nc\"\"\" }",
            "restart = \"\u{1b}[31mred\"",
            "restart = \"\\u001b]0;title\\u0007\"",
            "restart = \"\u{2028}\"",
        ] {
            let error = manifest(text).unwrap_err().to_string();
            let is_safe = |character: char| !character.is_control() && character != '\u{2028}';
            assert!(error.chars().all(is_safe), "{error:?}");
        }
    }
}

//! What a plugin's author or operator says of it: `<name>.plugin.toml` beside the plugin.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::log_stream::LogLimits;

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
    /// What it may use.
    pub limits: Limits,
}

/// The `[limits]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
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
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            enabled: true,
            restart: Restart::default(),
            stop_grace_seconds: 5,
            env: Vec::new(),
            limits: Limits::default(),
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
        let path = plugin.with_extension("plugin.toml");
        let unreadable = |cause| ManifestError::Unreadable {
            path: path.clone(),
            cause,
        };
        let invalid = |reason: String| ManifestError::Invalid {
            path: path.clone(),
            reason,
        };
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_MANIFEST_BYTES => {
                return Err(invalid(format!(
                    "{} bytes are more than the {MAX_MANIFEST_BYTES} allowed",
                    metadata.len()
                )));
            }
            Ok(_) => {}
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(cause) => return Err(unreadable(cause)),
        }
        let text = std::fs::read_to_string(&path).map_err(unreadable)?;
        let manifest: Self = toml::from_str(&text)
            .map_err(|error| invalid(error.to_string().trim_end().replace('\n', " ")))?;
        manifest.check().map_err(invalid)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let limits = &self.limits;
        let ranges = [
            ("stop_grace_seconds", self.stop_grace_seconds, 0..=600),
            ("limits.memory_mib", limits.memory_mib, 1..=4096),
            ("limits.cpu_percent", limits.cpu_percent, 1..=100),
            (
                "limits.log_lines_per_second",
                limits.log_lines_per_second,
                1..=100_000,
            ),
            (
                "limits.log_kib_per_second",
                limits.log_kib_per_second,
                1..=1_048_576,
            ),
        ];
        for (field, value, range) in ranges {
            if !range.contains(&value) {
                return Err(format!(
                    "{field} is {value}: give {} to {}",
                    range.start(),
                    range.end()
                ));
            }
        }
        Ok(())
    }

    /// How much it may print.
    #[must_use]
    pub fn log_limits(&self) -> LogLimits {
        LogLimits {
            lines_per_second: self.limits.log_lines_per_second,
            bytes_per_second: self.limits.log_kib_per_second * 1024,
        }
    }
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
        ] {
            let error = manifest(text).unwrap_err().to_string();
            assert!(
                error.contains(field) && error.contains("it.plugin.toml"),
                "{error}"
            );
        }
    }
}

//! `stockade log-level`: how much a running server says.

use clap::Args;
use serde_json::json;

use super::{print, print_json, remote::Remote};

/// Arguments of `stockade log-level`.
#[derive(Debug, Args)]
pub struct LogLevelCommand {
    #[command(flatten)]
    remote: Remote,
    /// error, warn, info, debug or trace; shows the level when left out
    level: Option<String>,
}

impl LogLevelCommand {
    /// Does what was asked and prints the level.
    ///
    /// # Errors
    /// When no server answers, or it refuses.
    pub fn run(self) -> anyhow::Result<()> {
        let answer = match &self.level {
            Some(level) => self.remote.put("/v1/log-level", &json!({"level": level}))?,
            None => self.remote.get("/v1/log-level")?,
        };
        if self.remote.is_json() {
            return print_json(&answer);
        }
        print(&format!(
            "{}\n",
            answer["level"].as_str().unwrap_or("unknown")
        ))
    }
}

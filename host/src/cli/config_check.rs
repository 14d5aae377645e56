//! `stockade config check`: what `serve` would say to the same flags, environment and file.

use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    admin::Tokens,
    budgets,
    config::{Config, Settings, UsageError},
};

/// Arguments of `stockade config`.
#[derive(Debug, Args)]
pub struct ConfigCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Read flags, environment and file as `serve` does, and say whether they hold together
    Check {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Print the resulting configuration, without secrets, as JSON
        #[arg(long)]
        json: bool,
    },
}

impl ConfigCommand {
    /// The text to print when the settings are good.
    ///
    /// # Errors
    /// The sentence that `serve` would end with.
    pub(super) fn check(self) -> Result<String, UsageError> {
        let Action::Check { settings, json } = self.action;
        let config = Config::load(*settings)?;
        if let Some(path) = &config.http_token_file {
            Tokens::read(path)
                .map_err(|error| UsageError(format!("--http-token-file: {error:#}")))?;
        }
        if let Some(path) = &config.state_dir {
            budgets::check(path).map_err(|error| UsageError(format!("--state-dir: {error}")))?;
        }
        if !json {
            return Ok("the settings are good\n".to_owned());
        }
        let shm = config.shm_name.clone().unwrap_or_default();
        let document = config.plugin_json(config.port, config.http_port, &shm);
        let text = json!({"status": "ok", "config": document});
        Ok(format!("{text:#}\n"))
    }
}

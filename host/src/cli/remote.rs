//! The HTTP API of a running server, as the command line uses it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::Value;

/// Longest answer that is waited for.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest answer that is waited for where something is compiled first.
const LONG_TIMEOUT: Duration = Duration::from_secs(660);
/// Largest body that is read, in bytes.
const MAX_BODY_BYTES: u64 = 64 << 20;

/// Which server is asked, and how the answer is shown.
#[derive(Debug, Clone, Args)]
pub(super) struct Remote {
    /// HTTP address of the server
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "STOCKADE_SERVER",
        default_value = "http://127.0.0.1:8080"
    )]
    server: String,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

impl Remote {
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.read(self.agent().get(self.url(path)).call())
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn post(&self, path: &str) -> anyhow::Result<Value> {
        self.read(self.agent().post(self.url(path)).send_empty())
    }

    /// As [`post`](Self::post), for what the server may take minutes over.
    ///
    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn post_patiently(&self, path: &str) -> anyhow::Result<Value> {
        let agent = self.agent_waiting(LONG_TIMEOUT);
        self.read(agent.post(self.url(path)).send_empty())
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.trim_end_matches('/'))
    }

    fn agent(&self) -> ureq::Agent {
        self.agent_waiting(TIMEOUT)
    }

    fn agent_waiting(&self, timeout: Duration) -> ureq::Agent {
        ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            // A refusal has a body that says why.
            .http_status_as_error(false)
            .build()
            .into()
    }

    fn read(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<Value> {
        let mut response = answer.with_context(|| {
            format!(
                "no server answers at {}; name another with --server",
                self.server
            )
        })?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_BODY_BYTES)
            .read_to_string()
            .context("the answer could not be read")?;
        let body: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if !status.is_success() {
            let detail = body.get("detail").and_then(Value::as_str);
            match detail {
                Some(detail) => bail!("{detail}"),
                None => bail!("the server answered {status}"),
            }
        }
        Ok(body)
    }
}

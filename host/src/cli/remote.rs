//! The HTTP API of a running server, as the command line uses it.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::Value;
use tokio_rustls::rustls::crypto::ring;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

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
    /// File with the bearer token to send
    #[arg(long, global = true, value_name = "FILE", env = "STOCKADE_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// PEM roots to trust for an https server; this machine's are not looked at
    #[arg(long, global = true, value_name = "FILE", env = "STOCKADE_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

impl Remote {
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// The address that is asked.
    pub(super) fn server(&self) -> &str {
        &self.server
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.query(path, &[])
    }

    /// As [`get`](Self::get), with parameters as they are: they are encoded here.
    ///
    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn query(&self, path: &str, query: &[(&str, String)]) -> anyhow::Result<Value> {
        let agent = self.agent(Some(TIMEOUT))?;
        let request = agent.get(self.url(path));
        let query = query.iter().map(|(name, value)| (*name, value));
        self.read(self.authorised(request.query_pairs(query))?.call())
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn post(&self, path: &str) -> anyhow::Result<Value> {
        let agent = self.agent(Some(TIMEOUT))?;
        self.read(self.authorised(agent.post(self.url(path)))?.send_empty())
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let agent = self.agent(Some(TIMEOUT))?;
        let request = self.authorised(agent.put(self.url(path)))?;
        let request = request.header("Content-Type", "application/json");
        self.read(request.send(body.to_string()))
    }

    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn delete(&self, path: &str) -> anyhow::Result<Value> {
        let agent = self.agent(Some(TIMEOUT))?;
        self.read(self.authorised(agent.delete(self.url(path)))?.call())
    }

    /// Gives each JSON line of an answer without end to `each`.
    ///
    /// # Errors
    /// When no server answers there, it refuses, or `each` fails.
    pub(super) fn follow(
        &self,
        path: &str,
        query: &[(&str, String)],
        mut each: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let agent = self.agent(None)?;
        let query = query.iter().map(|(name, value)| (*name, value));
        let request = agent.get(self.url(path)).query_pairs(query);
        let answer = self.authorised(request)?.call();
        if !answer.as_ref().is_ok_and(|it| it.status().is_success()) {
            return self.read(answer).map(|_| ());
        }
        let body = answer?.into_body().into_reader();
        for line in BufReader::new(body).lines() {
            let line = line.context("the server ended the answer")?;
            if !line.trim().is_empty() {
                each(serde_json::from_str(&line).context("a line is not JSON")?)?;
            }
        }
        Ok(())
    }

    /// As [`post`](Self::post), for what the server may take minutes over.
    ///
    /// # Errors
    /// When no server answers there, or it refuses; its own sentence is passed on.
    pub(super) fn post_patiently(&self, path: &str) -> anyhow::Result<Value> {
        let agent = self.agent(Some(LONG_TIMEOUT))?;
        self.read(self.authorised(agent.post(self.url(path)))?.send_empty())
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.trim_end_matches('/'))
    }

    fn agent(&self, timeout: Option<Duration>) -> anyhow::Result<ureq::Agent> {
        let mut tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()));
        if let Some(path) = &self.ca_file {
            tls = tls.root_certs(RootCerts::new_with_certs(&roots(path)?));
        } else if self.server.starts_with("https:") {
            bail!(
                "{} is https: give the roots to trust with --ca-file",
                self.server
            );
        }
        Ok(ureq::Agent::config_builder()
            .timeout_global(timeout)
            .tls_config(tls.build())
            // A refusal has a body that says why.
            .http_status_as_error(false)
            .build()
            .into())
    }

    fn authorised<B>(
        &self,
        request: ureq::RequestBuilder<B>,
    ) -> anyhow::Result<ureq::RequestBuilder<B>> {
        let Some(path) = &self.token_file else {
            return Ok(request);
        };
        let token = std::fs::read_to_string(path)
            .with_context(|| format!("--token-file {} cannot be read", path.display()))?;
        Ok(request.header("Authorization", format!("Bearer {}", token.trim())))
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

fn roots(path: &Path) -> anyhow::Result<Vec<Certificate<'static>>> {
    let what = || format!("--ca-file {} holds no PEM certificates", path.display());
    let pem = std::fs::read(path).with_context(what)?;
    let mut roots = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(root) = item.with_context(what)? {
            roots.push(root);
        }
    }
    if roots.is_empty() {
        bail!(what());
    }
    Ok(roots)
}

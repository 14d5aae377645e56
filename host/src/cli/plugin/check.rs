//! `stockade plugin check`: what keeps a module from running as its author means it to, and what to do.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use stockade_sandbox::{
    Manifest,
    host_api::{self, CacheGrant, Requirement},
    loader::{Found, PluginKind},
    wasm::{self, ModuleFacts},
};

use super::{
    super::{print, print_json},
    local::{self, Local},
};
use crate::config::PluginSettings;

/// Where preview 1's functions are.
const PREVIEW_1: &str = "wasi_snapshot_preview1";

/// Size above which a module is worth making smaller, in bytes.
const LARGE_BYTES: u64 = 8 << 20;

/// Arguments of `stockade plugin check`.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// A .wasm or .wat file, its manifest beside it
    file: PathBuf,
    /// Fail for warnings too
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    local: Local,
}

impl Check {
    /// Checks the file.
    ///
    /// # Errors
    /// When it cannot be read, or the server would not run it.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let verdict = examine(&self.file, &self.local)?;
        match is_json {
            true => print_json(&verdict.to_json())?,
            false => print(&verdict.to_text())?,
        }
        if self.strict
            && verdict
                .findings
                .iter()
                .any(|it| it.weight == Weight::Warning)
        {
            bail!("there are warnings, and --strict was given");
        }
        verdict.into_result()
    }
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Weight {
    /// The server would not run it.
    Error,
    /// It would run, and not do all that it means to.
    Warning,
    /// Worth knowing.
    Note,
}

impl Weight {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One thing that was found, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    weight: Weight,
    what: String,
    fix: Option<String>,
}

/// All that was found of a module.
#[derive(Debug)]
pub(super) struct Verdict {
    file: PathBuf,
    name: String,
    style: &'static str,
    bytes: usize,
    sha256: Option<String>,
    requirements: Vec<Requirement>,
    findings: Vec<Finding>,
}

impl Verdict {
    /// An error where the server would not run the module.
    pub(super) fn into_result(self) -> anyhow::Result<()> {
        let mut errors = self
            .findings
            .into_iter()
            .filter(|it| it.weight == Weight::Error);
        match errors.next() {
            Some(error) => bail!(
                "the server would not run {}: {}",
                self.file.display(),
                error.what
            ),
            None => Ok(()),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let findings = self.findings.iter().map(|finding| {
            json!({"level": finding.weight.name(), "what": finding.what, "fix": finding.fix})
        });
        json!({
            "file": self.file.to_string_lossy(),
            "name": self.name,
            "style": self.style,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "needs": self.requirements,
            "findings": findings.collect::<Vec<_>>(),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let mut text = format!(
            "{}: a {} of {} KiB\n",
            self.name,
            self.style,
            self.bytes.div_ceil(1024)
        );
        for need in &self.requirements {
            if let Some(grant) = &need.grant {
                let state = if need.granted {
                    "granted"
                } else {
                    "NOT GRANTED"
                };
                text.push_str(&format!("  {:<18} needs {grant}: {state}\n", need.function));
            }
        }
        for finding in &self.findings {
            text.push_str(&format!("{}: {}\n", finding.weight.name(), finding.what));
            if let Some(fix) = &finding.fix {
                text.push_str(&format!("  fix: {fix}\n"));
            }
        }
        if self.findings.is_empty() {
            text.push_str("nothing is missing\n");
        }
        text
    }
}

/// Looks at a module, its manifest and the server's file.
///
/// # Errors
/// When one of them cannot be read.
pub(super) fn examine(file: &Path, local: &Local) -> anyhow::Result<Verdict> {
    let settings = PluginSettings::load(local.config())?;
    let asked = Manifest::beside(file)?;
    let found = local::read(file, &settings)?;
    if found.kind != PluginKind::Wasm {
        bail!(
            "{} is a script, which has no imports to check: `stockade plugin inspect` shows what it gets",
            file.display()
        );
    }
    let mut verdict = Verdict {
        file: file.to_owned(),
        name: found.name.to_string(),
        style: "module",
        bytes: found.bytes.len(),
        sha256: found.sha256.map(|digest| digest.to_string()),
        requirements: Vec::new(),
        findings: Vec::new(),
    };
    match wasm::inspect(&found.name, &found.bytes) {
        Ok(facts) => look(&mut verdict, &found, &asked, &facts),
        Err(error) => verdict.findings.push(Finding {
            weight: Weight::Error,
            what: error.to_string(),
            fix: None,
        }),
    }
    verdict.findings.sort_by_key(|finding| finding.weight);
    Ok(verdict)
}

fn look(verdict: &mut Verdict, found: &Found, asked: &Manifest, facts: &ModuleFacts) {
    let manifest = verdict.file.with_extension("plugin.toml");
    let manifest = manifest
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut add = |weight, what: String, fix: Option<String>| {
        verdict.findings.push(Finding { weight, what, fix });
    };
    if let Err(reason) = &found.origin {
        add(Weight::Error, reason.to_string(), None);
    }
    if !found.manifest.enabled {
        let what = "enabled = false in the manifest or the server's [plugins]";
        add(Weight::Error, what.to_owned(), Some("remove it".to_owned()));
    }
    let is_command = facts.exports.iter().any(|export| export == "_start");
    let is_handler = |export: &String| {
        host_api::Handler::ALL
            .iter()
            .any(|handler| handler.export() == export)
    };
    let is_reactor = facts.exports.iter().any(is_handler);
    verdict.style = match (facts.is_component, is_command, is_reactor) {
        (true, ..) => "component",
        (_, true, _) => "command",
        (_, _, true) => "reactor",
        _ => "module",
    };
    if verdict.style == "module" {
        add(
            Weight::Error,
            "it exports neither _start nor a handler such as stockade_start".to_owned(),
            Some(
                "in Rust, call stockade_plugin::export_plugin! in a cdylib, or write a main; in Go, call reactor.Register and build with -buildmode=c-shared".to_owned(),
            ),
        );
    }
    if facts.bytes > LARGE_BYTES {
        add(
            Weight::Note,
            format!("it has {} MiB, of which 16 are allowed", facts.bytes >> 20),
            Some(
                "in Rust, strip = true, opt-level = \"s\" and lto = true; in Go, -ldflags='-s -w'"
                    .to_owned(),
            ),
        );
    }
    if facts.is_component {
        return;
    }
    for (module, field) in &facts.imports {
        if let Some((what, fix)) = stranger(module, field) {
            add(Weight::Error, what, fix);
        }
    }
    verdict.requirements = host_api::requirements(&facts.imports, &facts.exports, &found.manifest);
    let wanted = host_api::requirements(&facts.imports, &facts.exports, asked);
    for (need, wanted) in verdict.requirements.iter().zip(&wanted) {
        let (Some(grant), false) = (&need.grant, need.granted) else {
            continue;
        };
        let weight = match need.function.starts_with("stockade_") {
            // Go exports all handlers, whatever the plugin has.
            true => Weight::Note,
            false => Weight::Warning,
        };
        let (what, fix) = match wanted.granted {
            true => (
                format!(
                    "{} is asked for in {manifest}, and the server's file takes it away",
                    need.function
                ),
                format!(
                    "let [plugins.{}] of the server's file grant {grant}",
                    found.name
                ),
            ),
            false => (
                format!(
                    "{} is not granted, so it is refused when it is called",
                    need.function
                ),
                format!("add to {manifest}: {grant}"),
            ),
        };
        verdict.findings.push(Finding {
            weight,
            what,
            fix: Some(fix),
        });
    }
    verdict.findings.extend(unused(found, facts, &manifest));
    verdict.findings.extend(directories(found, &manifest));
}

/// An import that this server does not have: what it is, and where it may come from.
fn stranger(module: &str, field: &str) -> Option<(String, Option<String>)> {
    if module == PREVIEW_1 {
        return None;
    }
    let family = host_api::NAMESPACE.split('/').next().unwrap_or_default();
    if module == host_api::NAMESPACE {
        if host_api::FUNCTIONS.iter().any(|(name, _)| *name == field) {
            return None;
        }
        let what =
            format!("it imports {module}.{field}, a function that this server does not have");
        return Some((
            what,
            Some("build it with the SDK of this server".to_owned()),
        ));
    }
    let fix = match module {
        _ if module.split('/').next() == Some(family) => {
            format!("this server has {}: build it with an SDK for that", host_api::NAMESPACE)
        }
        "wasi_unstable" => {
            "it was built for an older WASI: use a compiler for wasm32-wasip1".to_owned()
        }
        "env" => "a C function was declared and never defined, or it was built for another target than wasm32-wasip1 (Go: GOOS=wasip1)".to_owned(),
        "gojs" | "go" => "it was built for browsers: use GOOS=wasip1".to_owned(),
        "__wbindgen_placeholder__" | "wbg" => {
            "a crate on wasm-bindgen is for browsers: do without, or turn its feature for it off".to_owned()
        }
        _ => format!("only {PREVIEW_1} and {} can be imported", host_api::NAMESPACE),
    };
    Some((
        format!("it imports {module}.{field}, which no plugin gets"),
        Some(fix),
    ))
}

/// Grants that the module has no use for: what is not needed should not be given.
fn unused(found: &Found, facts: &ModuleFacts, manifest: &str) -> Vec<Finding> {
    let imports: BTreeSet<&str> = facts
        .imports
        .iter()
        .filter(|(module, _)| module == host_api::NAMESPACE)
        .map(|(_, field)| &**field)
        .collect();
    let exports: BTreeSet<&str> = facts.exports.iter().map(|export| &**export).collect();
    let has = |name: &str| imports.contains(name) || exports.contains(name);
    let mut grants: Vec<(String, bool)> = found
        .manifest
        .cache
        .iter()
        .map(|grant| {
            let function = match grant {
                CacheGrant::Stats => "cache_stats",
                CacheGrant::Keys => "cache_keys",
                CacheGrant::Events => "events_subscribe",
                CacheGrant::Pin | CacheGrant::Evict | CacheGrant::Prefetch => "cache_request",
            };
            (grant.line(), has(function))
        })
        .collect();
    let given = &found.manifest;
    let is_reactor = !exports.contains("_start");
    if given.calls && is_reactor {
        grants.push(("calls = true".to_owned(), has("stockade_call")));
    }
    if given.rank && is_reactor {
        grants.push(("rank = true".to_owned(), has("stockade_rank")));
    }
    if !given.http.is_empty() {
        grants.push(("[[http]]".to_owned(), has("http_request")));
    }
    if given.limits.state_kib > 0 {
        let has_state = ["state_get", "state_set", "state_keys"]
            .into_iter()
            .any(has);
        grants.push(("state_kib".to_owned(), has_state));
    }
    grants
        .into_iter()
        .filter(|(_, is_used)| !is_used)
        .map(|(line, _)| Finding {
            weight: Weight::Note,
            what: format!("it is granted {line} and has no use for it"),
            fix: Some(format!("remove it from {manifest}")),
        })
        .collect()
}

/// Directories that are not there.
fn directories(found: &Found, manifest: &str) -> Vec<Finding> {
    let missing = |(guest, directory): (&String, &stockade_sandbox::Directory)| {
        (!directory.host.is_dir()).then(|| Finding {
            weight: Weight::Warning,
            what: format!(
                "{guest} is {} on the host, which is no directory of this machine",
                directory.host.display()
            ),
            fix: Some(format!(
                "make it, or change host of [directories.\"{guest}\"] in {manifest}"
            )),
        })
    };
    found
        .manifest
        .directories
        .iter()
        .filter_map(missing)
        .collect()
}

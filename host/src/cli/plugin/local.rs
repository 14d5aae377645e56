//! What `stockade plugin` does without a server: look into files, attack limits, sign.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};
use stockade_sandbox::{
    Manifest, SecretKey,
    host_api::{Handler, NAMESPACE, check_imports, requirements},
    loader::{self, Found, PluginKind},
    prove::{Held, Proof, prove},
    wasm::{self, ModuleFacts},
};

use super::super::{print, print_json, secret_key};
use crate::{config::PluginSettings, plugin_host::flood, server::wasm_config};

/// Settings of the server that the plugin would run in.
#[derive(Debug, Args)]
pub(super) struct Local {
    /// Configuration file of the server, whose [plugins] narrows what plugins get
    #[arg(long, value_name = "FILE", env = "STOCKADE_CONFIG")]
    config: Option<PathBuf>,
}

impl Local {
    pub(super) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }
}

/// Shows what a plugin file is, what it wants and what it would get.
///
/// # Errors
/// When the file cannot be read, or would not be run.
pub(super) fn inspect(file: &Path, local: &Local, is_json: bool) -> anyhow::Result<()> {
    let settings = PluginSettings::load(local.config.as_deref())?;
    let asked = Manifest::beside(file)?;
    let found = read(file, &settings)?;
    let (facts, mut refusal) = match found.kind {
        // There is nothing to look into.
        _ if found.sha256.is_none() => (None, None),
        PluginKind::Wasm => match wasm::inspect(&found.name, &found.bytes) {
            Ok(facts) => (Some(facts), None),
            Err(error) => (None, Some(error.to_string())),
        },
        PluginKind::Script => (None, None),
    };
    if let Some(facts) = &facts {
        refusal = missing(&found.name, facts);
    }
    if let Err(refused) = &found.origin {
        refusal.get_or_insert_with(|| refused.reason.clone());
    }
    if !found.manifest.enabled {
        refusal.get_or_insert_with(|| "its manifest or [plugins] has enabled = false".to_owned());
    }
    let shown = report(&found, &asked, facts.as_ref(), refusal.as_deref());
    match is_json {
        true => print(&format!("{}\n", serde_json::to_string_pretty(&shown)?))?,
        false => print(&text(&shown))?,
    }
    match refusal {
        Some(reason) => bail!("it would be refused: {reason}"),
        None => Ok(()),
    }
}

pub(super) fn read(file: &Path, settings: &PluginSettings) -> anyhow::Result<Found> {
    let found = loader::find(&[file.to_owned()], &settings.policy)?.pop();
    match found {
        Some(found) => Ok(found),
        // One that is disabled is not found, and still worth looking at.
        None => {
            let stem = file.file_stem().context("it has no name")?;
            let kind = match file.extension().and_then(|it| it.to_str()) {
                Some("wasm" | "wat") => PluginKind::Wasm,
                _ => PluginKind::Script,
            };
            let name = stem.to_string_lossy().as_ref().into();
            Ok(loader::read(name, file, kind, &settings.policy))
        }
    }
}

/// What a module lacks or wants that it does not get. The whole truth comes with compiling.
fn missing(name: &str, facts: &ModuleFacts) -> Option<String> {
    let granted = |module: &str| match facts.is_component {
        true => module.starts_with("wasi:") && !module.starts_with("wasi:http"),
        false => module == "wasi_snapshot_preview1" || module == NAMESPACE,
    };
    let is_run = |export: &String| match facts.is_component {
        true => export.starts_with("wasi:cli/run@0.2"),
        false => {
            export == "_start"
                || Handler::ALL
                    .iter()
                    .any(|handler| export == handler.export())
        }
    };
    let imports = facts.imports.iter();
    let imports = imports.map(|(module, field)| (module.as_str(), field.as_str()));
    if let Err(error) = check_imports(name, imports) {
        return Some(error.to_string());
    }
    if let Some((module, field)) = facts.imports.iter().find(|(module, _)| !granted(module)) {
        let hint = match module.starts_with("wasi:http") {
            true => "; components are not offered HTTP, modules have http_request",
            false => "",
        };
        return Some(format!(
            "{name} imports {module}.{field}, which is not granted{hint}"
        ));
    }
    if facts.exports.iter().any(is_run) {
        return None;
    }
    Some(format!(
        "{name} exports neither _start, nor a handler such as stockade_timer, nor, as a component, wasi:cli/run"
    ))
}

/// What each function that needs a grant needs, and what is missing with the line to add.
fn needs_json(facts: &ModuleFacts, granted: &Manifest) -> Value {
    let needs = requirements(&facts.imports, &facts.exports, granted);
    let shown = needs.into_iter().filter_map(|need| {
        let line = need.grant?;
        let shown = match need.granted {
            true => format!("granted: {line}"),
            false => {
                format!("missing: add {line} to the manifest, and leave it to it in [plugins]")
            }
        };
        Some((need.function, Value::from(shown)))
    });
    Value::Object(shown.collect())
}

fn manifest_json(manifest: &Manifest) -> Value {
    let directories: serde_json::Map<String, Value> = manifest
        .directories
        .iter()
        .map(|(guest, directory)| {
            let shown =
                json!({"host": directory.host.to_string_lossy(), "access": directory.access});
            (guest.clone(), shown)
        })
        .collect();
    json!({
        "env": manifest.env,
        "directories": directories,
        "http": manifest.http.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "cache": manifest.cache,
        "calls": manifest.calls,
        "rank": manifest.rank,
        "limits": manifest.limits,
    })
}

fn report(
    found: &Found,
    asked: &Manifest,
    facts: Option<&ModuleFacts>,
    refusal: Option<&str>,
) -> Value {
    let origin = match &found.origin {
        Ok(origin) => origin.to_string(),
        Err(reason) => format!("refused: {reason}"),
    };
    json!({
        "name": &*found.name,
        "kind": found.kind.name(),
        "component": facts.map(|facts| facts.is_component),
        "bytes": found.bytes.len(),
        "sha256": found.sha256.map(|digest| digest.to_string()),
        "origin": origin,
        "functions": facts.map(|facts| facts.functions),
        "imports": facts.map(|facts| facts.imports.iter().map(|(module, field)| match field.as_str() {
            "" => module.clone(),
            field => format!("{module}.{field}"),
        }).collect::<Vec<_>>()),
        "exports": facts.map(|facts| facts.exports.clone()),
        "needs": facts.map(|facts| needs_json(facts, &found.manifest)),
        "asks_for": manifest_json(asked),
        "granted": manifest_json(&found.manifest),
        "refused": refusal,
    })
}

/// The same for people: one thing a line, lists below their names.
fn text(value: &Value) -> String {
    fn add(name: &str, value: &Value, indent: usize, text: &mut String) {
        let space = "  ".repeat(indent);
        match value {
            Value::Null => {}
            Value::Object(fields) => {
                text.push_str(&format!("{space}{name}:\n"));
                for (name, value) in fields {
                    add(name, value, indent + 1, text);
                }
            }
            Value::Array(items) if items.is_empty() => {
                text.push_str(&format!("{space}{name}: none\n"));
            }
            Value::Array(items) => {
                text.push_str(&format!("{space}{name}:\n"));
                for item in items {
                    let item = item
                        .as_str()
                        .map_or_else(|| item.to_string(), str::to_owned);
                    text.push_str(&format!("{space}  {item}\n"));
                }
            }
            value => {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                text.push_str(&format!("{space}{name}: {value}\n"));
            }
        }
    }
    let mut shown = String::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        add(name, value, 0, &mut shown);
    }
    shown
}

/// Attacks the limits that plugins have under this configuration; `lift` makes of them what is
/// applied, which is the same outside tests.
///
/// # Errors
/// When a limit does not hold, or nothing could be tried.
pub(super) fn prove_limits(
    files: &[PathBuf],
    only: Option<&str>,
    lift: impl Fn(&Held) -> anyhow::Result<Held>,
    local: &Local,
    is_json: bool,
) -> anyhow::Result<()> {
    let settings = PluginSettings::load(local.config.as_deref())?;
    let locations = match files {
        [] => &settings.locations,
        files => files,
    };
    let found = loader::find(locations, &settings.policy)?;
    let modules = found
        .into_iter()
        .filter(|found| found.kind == PluginKind::Wasm);
    let mut held: Vec<(String, Held)> = Vec::new();
    for found in modules {
        // Its limits are not known where its manifest cannot be used.
        if let Err(refusal) = &found.origin {
            bail!("plugin `{}` would be refused: {refusal}", found.name);
        }
        let compile = settings.policy.compile_limits();
        held.push((found.name.to_string(), Held::new(&found.manifest, compile)));
    }
    if held.is_empty() {
        // What any plugin would be held to that has no manifest.
        let mut manifest = Manifest::default();
        settings
            .policy
            .narrow("*", &mut manifest)
            .map_err(anyhow::Error::msg)?;
        let compile = settings.policy.compile_limits();
        held.push(("(default)".to_owned(), Held::new(&manifest, compile)));
    }
    let compiler = wasm_config(settings.cache_dir.as_deref(), &settings.policy)?.compiler;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut all = Vec::new();
    let mut is_broken = false;
    for (name, held) in held {
        // Files of the attacks, away from everything that is granted.
        let scratch = Scratch::new()?;
        if !is_json {
            print(&format!("{name}\n"))?;
        }
        let tell = |proof: &Proof| {
            if is_json {
                // Progress, for people who wait for the document; its loss costs nothing.
                let _ = writeln!(std::io::stderr(), "{name}: {} tried", proof.what);
            } else {
                let verdict = if proof.holds { "holds " } else { "BROKEN" };
                // Whoever closed our output wants the exit code alone.
                let _ = print(&format!(
                    "  {verdict} {:<34} declared {:<22} measured {}\n",
                    proof.what, proof.declared, proof.measured
                ));
            }
        };
        let applied = lift(&held)?;
        let compiler = compiler.clone();
        let attacks = prove(&held, &applied, compiler, &scratch.0, only, flood(), tell);
        let proofs = runtime.block_on(attacks)?;
        is_broken |= proofs.iter().any(|proof| !proof.holds);
        all.extend(proofs.iter().map(|proof| {
            json!({
                "plugin": name,
                "limit": proof.what,
                "declared": proof.declared,
                "measured": proof.measured,
                "holds": proof.holds,
            })
        }));
    }
    // A call that an attack left hanging in the kernel does not keep us.
    runtime.shutdown_background();
    if is_json {
        print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?;
    }
    if all.is_empty() {
        bail!("nothing was attacked: --only names no limit that these plugins have");
    }
    if is_broken {
        let broken: Vec<&str> = all
            .iter()
            .filter(|proof| proof["holds"] == false)
            .filter_map(|proof| proof["limit"].as_str())
            .collect();
        bail!(
            "{} of {} limits do not hold: {}",
            broken.len(),
            all.len(),
            broken.join(", ")
        );
    }
    Ok(())
}

/// A directory of ours that goes when this does.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = std::env::temp_dir().join(format!("stockade-prove-{}", uuid::Uuid::new_v4()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // At worst, an empty directory stays where temporary files go.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes a key pair: the secret half into a file, the public half to stdout.
///
/// # Errors
/// When the file exists or cannot be written.
pub(super) fn keygen(file: &Path, is_json: bool) -> anyhow::Result<()> {
    let key = SecretKey::from_random(&secret_key::random()?);
    secret_key::create(file, &key.to_text())?;
    match is_json {
        true => print_json(&json!({
            "secret_key_file": file.display().to_string(),
            "public_key": key.public().to_string(),
        })),
        false => print(&format!("{}\n", key.public())),
    }
}

/// Signs a plugin and its manifest; the signature goes beside them.
///
/// # Errors
/// When a file cannot be read or written, or the key is none.
pub(super) fn sign(file: &Path, key: &Path, is_json: bool) -> anyhow::Result<()> {
    let text = fs::read_to_string(key).with_context(|| key.display().to_string())?;
    let key: SecretKey = text.parse().map_err(anyhow::Error::msg)?;
    let plugin = fs::read(file).with_context(|| file.display().to_string())?;
    // A manifest that cannot be used should not be vouched for.
    Manifest::beside(file)?;
    let manifest = match fs::read(file.with_extension("plugin.toml")) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let path = loader::signature_path(file);
    fs::write(&path, key.sign(&plugin, manifest.as_deref()))
        .with_context(|| path.display().to_string())?;
    match is_json {
        true => print_json(&json!({
            "signature_file": path.display().to_string(),
            "public_key": key.public().to_string(),
        })),
        false => print(&format!("{} by {}\n", path.display(), key.public())),
    }
}

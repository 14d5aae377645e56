//! `stockade plugin build`: from a folder in Rust or Go to a module with its manifest beside it.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};

use super::{
    super::{print, print_json},
    check::{self, Verdict},
    local::Local,
};

/// The target of modules in Rust.
const TARGET: &str = "wasm32-wasip1";

/// The oldest Go with `//go:wasmexport` and strings in `//go:wasmimport`.
const MIN_GO: (u32, u32) = (1, 24);

/// Arguments of `stockade plugin build`.
#[derive(Debug, Args)]
pub(super) struct Build {
    /// Folder with a Cargo.toml or a go.mod
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Where the module and its manifest go [default: dist/ in the folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    local: Local,
}

impl Build {
    /// Builds, then checks as `stockade plugin check` does.
    ///
    /// # Errors
    /// When a compiler is missing, the plugin does not build, or the server would not run it.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let directory = fs::canonicalize(&self.dir)
            .with_context(|| format!("{} cannot be used", self.dir.display()))?;
        let out = self.out.clone().unwrap_or_else(|| self.dir.join("dist"));
        fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
        let folder = directory
            .file_name()
            .and_then(|name| name.to_str())
            .context("the folder has no name")?;
        let name = folder.replace('-', "_");
        let module = out.join(format!("{name}.wasm"));
        let is_rust = directory.join("Cargo.toml").is_file();
        if !is_rust && !directory.join("go.mod").is_file() {
            bail!(
                "{} has neither a Cargo.toml nor a go.mod: make a plugin with `stockade plugin new --lang rust|go NAME`",
                self.dir.display()
            );
        }
        match is_rust {
            true => build_rust(&directory, &module)?,
            false => build_go(&directory, &module)?,
        }
        let manifest = directory.join(format!("{name}.plugin.toml"));
        let beside = module.with_extension("plugin.toml");
        match manifest.is_file() {
            true => {
                fs::copy(&manifest, &beside).with_context(|| manifest.display().to_string())?;
            }
            false if beside.exists() => {
                fs::remove_file(&beside).with_context(|| beside.display().to_string())?;
            }
            false => {}
        }
        let verdict = check::examine(&module, &self.local)?;
        report(&module, &verdict, is_json)?;
        verdict.into_result()
    }
}

fn report(module: &Path, verdict: &Verdict, is_json: bool) -> anyhow::Result<()> {
    if is_json {
        return print_json(&json!({
            "module": module.to_string_lossy(),
            "check": verdict.to_json(),
        }));
    }
    print(&format!("built {}\n", module.display()))?;
    print(&verdict.to_text())
}

/// Where `plugin-sdk/toolchain.sh` puts compilers.
fn toolchain() -> Option<PathBuf> {
    let folder = match env::var_os("STOCKADE_TOOLCHAIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let cache = env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
            cache.join("stockade/toolchain")
        }
    };
    Some(folder.join("bin"))
}

/// A compiler of the toolchain's folder.
fn wrapper(name: &str) -> Option<PathBuf> {
    toolchain()
        .map(|bin| bin.join(name))
        .filter(|path| path.is_file())
}

/// What a program prints; `None` where there is none, or it fails.
fn asked(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

/// Cargo that can build for the sandbox.
fn cargo() -> anyhow::Result<Command> {
    if let Some(path) = wrapper("wasm-cargo") {
        return Ok(Command::new(path));
    }
    let Some(libraries) = asked("rustc", &["--print", "target-libdir", "--target", TARGET]) else {
        bail!(
            "there is no rustc: install Rust with https://rustup.rs, then `rustup target add {TARGET}`, or run plugin-sdk/toolchain.sh rust of Stockade's repository"
        );
    };
    if !Path::new(&libraries).is_dir() {
        bail!(
            "rustc has no {TARGET}: run `rustup target add {TARGET}`, or plugin-sdk/toolchain.sh rust of Stockade's repository"
        );
    }
    let mut command = Command::new("cargo");
    command.env("CARGO_BUILD_TARGET", TARGET);
    Ok(command)
}

fn build_rust(directory: &Path, module: &Path) -> anyhow::Result<()> {
    let mut command = cargo()?;
    command.args([
        "build",
        "--release",
        "--message-format",
        "json-render-diagnostics",
    ]);
    if directory.join("Cargo.lock").is_file() {
        command.arg("--locked");
    }
    let output = command
        .current_dir(directory)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo could not be started")?;
    if !output.status.success() {
        bail!("{} does not build, see above", directory.display());
    }
    let mut built = output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter_map(artefact);
    // A dependency may have a module too; the plugin itself comes last.
    let Some(built) = built.next_back() else {
        bail!(
            "{} built no module: put crate-type = [\"cdylib\"] into [lib] of its Cargo.toml, or give it a main",
            directory.display()
        );
    };
    replace(&built, module)
}

/// The module that a line of cargo's messages announces.
fn artefact(line: &[u8]) -> Option<PathBuf> {
    let message: Value = serde_json::from_slice(line).ok()?;
    let names = message["filenames"].as_array()?.iter();
    let mut names = names.filter_map(Value::as_str);
    names
        .find(|name| name.ends_with(".wasm"))
        .map(PathBuf::from)
}

/// Puts a file in the place of another at once, so that a server which looks never finds half of it.
fn replace(from: &Path, to: &Path) -> anyhow::Result<()> {
    let fresh = to.with_extension("wasm.new");
    fs::copy(from, &fresh).with_context(|| from.display().to_string())?;
    fs::rename(&fresh, to).with_context(|| to.display().to_string())
}

/// Go that can build for the sandbox.
fn go() -> anyhow::Result<OsString> {
    if let Some(path) = wrapper("wasm-go") {
        return Ok(path.into());
    }
    let (major, minor) = MIN_GO;
    let Some(version) = asked("go", &["env", "GOVERSION"]) else {
        bail!(
            "there is no go: install Go {major}.{minor} or later from https://go.dev/dl, or run plugin-sdk/toolchain.sh go of Stockade's repository"
        );
    };
    if parse_go(&version).is_none_or(|found| found < MIN_GO) {
        bail!(
            "go is {version}, and plugins need {major}.{minor} or later: install it, or run plugin-sdk/toolchain.sh go of Stockade's repository"
        );
    }
    Ok("go".into())
}

/// `go1.26.8` or `go1.27-devel_abc` as numbers.
fn parse_go(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version
        .strip_prefix("go")?
        .split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn build_go(directory: &Path, module: &Path) -> anyhow::Result<()> {
    let go = go()?;
    let command = || {
        let mut command = Command::new(&go);
        command
            .current_dir(directory)
            .env("GOOS", "wasip1")
            .env("GOARCH", "wasm")
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        command
    };
    let imports = command()
        .args(["list", "-f", "{{join .Imports \"\\n\"}}", "."])
        .output()
        .context("go could not be started")?;
    if !imports.status.success() {
        bail!("{} does not build, see above", directory.display());
    }
    let imports = String::from_utf8_lossy(&imports.stdout).into_owned();
    // What registers itself with the SDK is a reactor, which Go builds as a shared library.
    let is_reactor = imports
        .lines()
        .any(|it| it == "stockade.dev/plugin/reactor");
    let fresh = std::path::absolute(module.with_extension("wasm.new"))?;
    let built = command()
        .arg("build")
        .arg(match is_reactor {
            true => "-buildmode=c-shared",
            false => "-buildmode=default",
        })
        .args(["-trimpath", "-ldflags=-s -w", "-o"])
        .args([fresh.as_os_str(), ".".as_ref()])
        .status()
        .context("go could not be started")?;
    if !built.success() {
        // What it may have left is no module.
        let _ = fs::remove_file(&fresh);
        bail!("{} does not build, see above", directory.display());
    }
    fs::rename(&fresh, module).with_context(|| module.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_told_apart() {
        assert_eq!(parse_go("go1.26.8"), Some((1, 26)));
        assert_eq!(parse_go("go1.24"), Some((1, 24)));
        assert_eq!(parse_go("go1.27-devel_0123"), Some((1, 27)));
        assert_eq!(parse_go("go2.0rc1"), Some((2, 0)));
        assert_eq!(parse_go("devel"), None);
        assert!((1, 23) < MIN_GO && (2, 0) > MIN_GO);
    }

    #[test]
    fn the_module_is_found_in_cargo_s_messages() {
        let line = br#"{"reason":"compiler-artifact","filenames":["/t/libx.rlib","/t/x.wasm"]}"#;
        assert_eq!(artefact(line), Some(PathBuf::from("/t/x.wasm")));
        for line in [
            &b""[..],
            b"{}",
            br#"{"filenames":["/t/libx.rlib"]}"#,
            b"warning: x",
        ] {
            assert_eq!(artefact(line), None);
        }
    }
}

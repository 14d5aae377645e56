//! `stockade plugin new`: a folder with a plugin that builds, a test, a manifest, and the SDK.
//!
//! What is written is what `plugin-sdk/templates/` and `plugin-sdk/{rust,go}/` hold, so that all of it is
//! built and tested as it is.

use std::{fs, io::Write as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::super::{print, print_json};

/// Where the SDK goes, below the plugin.
const SDK: &str = "stockade-plugin";

/// Longest name of a plugin.
const MAX_NAME: usize = 64;

/// A path and a text.
type File = (&'static str, &'static str);

macro_rules! files {
    ($directory:literal: $($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!("../../../../plugin-sdk/", $directory, "/", $path)))),*]
    };
}

const RUST: &[File] = files!("templates/rust": "Cargo.toml", "Cargo.lock", "src/lib.rs", ".gitignore",
    "README.md", "my_plugin.plugin.toml", "my_plugin.test.toml");
const RUST_SDK: &[File] = files!("rust": "Cargo.toml", "README.md", "src/abi.rs", "src/abi/imports.rs",
    "src/cache.rs", "src/config.rs", "src/error.rs", "src/export.rs", "src/http.rs", "src/lib.rs",
    "src/log.rs", "src/message.rs", "src/metrics.rs", "src/state.rs", "src/testing.rs",
    "src/testing/abi.rs", "src/testing/running.rs", "src/timer.rs");
const GO: &[File] = files!("templates/go": "go.mod", "main.go", "main_test.go", ".gitignore",
    "README.md", "my_plugin.plugin.toml", "my_plugin.test.toml");
const GO_SDK: &[File] = files!("go": "README.md", "cache.go", "config.go", "doc.go", "errors.go", "go.mod",
    "handlers.go", "http.go", "internal/abi/double.go", "internal/abi/imports_wasip1.go",
    "internal/dispatch/dispatch.go", "log.go", "message.go", "metrics.go", "plugintest/plugintest.go",
    "plugintest/running.go", "reactor/exports_wasip1.go", "reactor/reactor.go", "state.go", "timer.go");

/// Languages that there is an SDK for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Language {
    /// A crate for wasm32-wasip1
    Rust,
    /// A module for wasip1
    Go,
}

/// Arguments of `stockade plugin new`.
#[derive(Debug, Args)]
pub(super) struct New {
    /// Name of the plugin, such as my-plugin; its module is then my_plugin.wasm
    name: String,
    /// Language that it is written in
    #[arg(long, value_enum)]
    lang: Language,
    /// Folder to make [default: the name, here]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl New {
    /// Makes the folder.
    ///
    /// # Errors
    /// When the name is none, or the folder exists or cannot be written.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let name = &*self.name;
        check_name(name)?;
        let directory = self.dir.clone().unwrap_or_else(|| PathBuf::from(name));
        if directory.exists() {
            bail!(
                "{} is there already: choose another name, or another folder with --dir",
                directory.display()
            );
        }
        let (template, sdk, sdk_path, native_test) = match self.lang {
            Language::Rust => (RUST, RUST_SDK, "../../rust", "cargo test"),
            Language::Go => (GO, GO_SDK, "../../go", "go test ./..."),
        };
        let spelt = Spelling::of(name);
        let own = template.iter().map(|(path, text)| {
            let text = match *path {
                "Cargo.toml" | "go.mod" => text.replace(sdk_path, &local(self.lang)),
                _ => (*text).to_owned(),
            };
            (spelt.apply(path), spelt.apply(&text))
        });
        let sdk = sdk
            .iter()
            .map(|(path, text)| (format!("{SDK}/{path}"), (*text).to_owned()));
        let mut written = Vec::new();
        for (path, text) in own.chain(sdk) {
            let target = directory.join(&path);
            let parent = target.parent().context("a file has no folder")?;
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            // The folder is new, so whatever is there came from somebody else meanwhile.
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&target)
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .with_context(|| target.display().to_string())?;
            written.push(path);
        }
        let next = [
            format!("cd {}", directory.display()),
            native_test.to_owned(),
            "stockade plugin build".to_owned(),
            "stockade plugin test".to_owned(),
            format!("stockade plugin run dist/{}.wasm", spelt.snake),
        ];
        if is_json {
            return print_json(&json!({
                "directory": directory.to_string_lossy(),
                "files": written,
                "next": next,
            }));
        }
        print(&format!(
            "{} holds a plugin, its tests and manifest, and the SDK in {SDK}/. Next:\n\n  {}\n",
            directory.display(),
            next.join("\n  ")
        ))
    }
}

/// The path of the SDK as the plugin's own files name it; Go takes one without `./` for a module.
fn local(language: Language) -> String {
    match language {
        Language::Rust => SDK.to_owned(),
        Language::Go => format!("./{SDK}"),
    }
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase();
    let is_part =
        |byte: u8| is_letter(byte) || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    let is_reserved = matches!(
        name,
        "test" | "main" | "plugin" | "reactor" | "core" | "std"
    ) || name.replace('-', "_") == SDK.replace('-', "_");
    if name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(is_letter)
        && name.bytes().all(is_part)
        && !is_reserved
    {
        return Ok(());
    }
    bail!(
        "{name:?} is no name for a plugin: give lower-case letters, digits, - and _, a letter first, at most {MAX_NAME}, such as my-plugin"
    )
}

/// A name in the spellings that the templates use.
struct Spelling {
    kebab: String,
    snake: String,
    camel: String,
}

impl Spelling {
    fn of(name: &str) -> Self {
        let words = name.split(['-', '_']).filter(|word| !word.is_empty());
        let capital = |word: &str| {
            let (first, rest) = word.split_at(1);
            first.to_ascii_uppercase() + rest
        };
        Self {
            kebab: name.to_owned(),
            snake: name.replace('-', "_"),
            camel: words.map(capital).collect(),
        }
    }

    fn apply(&self, text: &str) -> String {
        let (first, rest) = self.camel.split_at(1);
        text.replace("my-plugin", &self.kebab)
            .replace("my_plugin", &self.snake)
            .replace("MyPlugin", &self.camel)
            .replace("myPlugin", &(first.to_ascii_lowercase() + rest))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// The files below a folder that belong to the repository.
    fn listed(directory: &Path, below: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(directory.join(below)).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true if ["target", "tests", "dist"]
                    .iter()
                    .any(|name| path.ends_with(name)) => {}
                true => listed(directory, &path, found),
                false => {
                    found.insert(path.to_str().unwrap().to_owned());
                }
            }
        }
    }

    #[test]
    fn all_of_the_sdks_and_templates_is_written() {
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-sdk");
        for (directory, files, left_out) in [
            ("templates/rust", RUST, &[][..]),
            ("templates/go", GO, &[]),
            ("rust", RUST_SDK, &["Cargo.lock"]),
            ("go", GO_SDK, &["plugin_test.go"]),
        ] {
            let mut there = BTreeSet::new();
            listed(&sdk.join(directory), Path::new(""), &mut there);
            for name in left_out {
                there.remove(*name);
            }
            let written: BTreeSet<String> =
                files.iter().map(|(path, _)| (*path).to_owned()).collect();
            assert_eq!(written, there, "{directory}");
        }
    }

    #[test]
    fn names_are_spelt_as_the_language_wants() {
        let spelt = Spelling::of("hit-rate_2");
        let text = spelt.apply("my-plugin my_plugin MyPlugin myPlugin");
        assert_eq!(text, "hit-rate_2 hit_rate_2 HitRate2 hitRate2");
    }

    #[test]
    fn only_names_that_build_are_taken() {
        for name in ["a", "my-plugin", "x9_y"] {
            check_name(name).unwrap();
        }
        for name in [
            "",
            "A",
            "9a",
            "-a",
            "a/b",
            "../a",
            "a b",
            "stockade-plugin",
            "main",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name(&"a".repeat(65)).is_err());
    }
}

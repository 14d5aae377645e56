//! `stockade plugin`: plugins of a running server, and plugin files without one.

mod build;
mod check;
mod live;
mod local;
mod new;
mod pack;
mod run;
mod test;
mod trial;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::Value;
use stockade_sandbox::prove::Held;

use self::{
    build::Build,
    check::Check,
    local::Local,
    new::New,
    pack::{Pack, Unpack},
    run::{Bench, Run},
    test::Test,
};
use super::{print, print_json, remote::Remote};

/// Arguments of `stockade plugin`.
#[derive(Debug, Args)]
pub struct PluginCommand {
    #[command(flatten)]
    remote: Remote,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List plugins with their state and what they use
    List,
    /// Show everything known of one plugin
    Show {
        /// Name as `list` shows it
        name: String,
    },
    /// Show what a plugin printed last
    Logs {
        /// Name as `list` shows it
        name: String,
        /// Most lines to show
        #[arg(long, default_value_t = 100)]
        lines: usize,
        /// Go on with lines as they are printed
        #[arg(long, short)]
        follow: bool,
    },
    /// Start a plugin that is stopped, has ended or is quarantined
    Start {
        /// Name as `list` shows it
        name: String,
    },
    /// Stop a plugin until it is started again
    Stop {
        /// Name as `list` shows it
        name: String,
    },
    /// Stop a plugin and start it anew
    Restart {
        /// Name as `list` shows it
        name: String,
    },
    /// Take a plugin's file as it is now, and keep the running one if the new one fails
    Reload {
        /// Name as `list` shows it
        name: String,
    },
    /// Make a folder with a plugin in Rust or Go that builds, its test and manifest, and the SDK
    New(New),
    /// Build the plugin of a folder for the sandbox, and check it
    Build(Build),
    /// Say what keeps a module from running as it means to, and what to add where
    Check(Check),
    /// Run a plugin in the sandbox beside a made-up cache or a running server's, and show what it logs
    Run(Run),
    /// Send a plugin what a test file says, in the sandbox, and compare what comes of it
    Test(Test),
    /// Measure calls of a plugin, or its rankings, in the sandbox
    Bench(Bench),
    /// Put a module, its manifest and its signature into one file
    Pack(Pack),
    /// Check a pack and put its files into a directory of plugins
    Unpack(Unpack),
    /// Show what a plugin file is, imports, asks for and would be granted
    Inspect {
        /// A .wasm, .wat, .py or .sh file
        file: PathBuf,
        #[command(flatten)]
        local: Local,
    },
    /// Attack each limit that sandboxed plugins have under a configuration, and measure it
    Prove {
        /// Plugins whose limits are attacked [default: those of the configuration, or a plugin without manifest]
        files: Vec<PathBuf>,
        /// Attack this limit alone, as the first column shows it
        #[arg(long, value_name = "LIMIT")]
        only: Option<String>,
        /// Lift this limit, to see that the attack on it finds that; not in a release build
        #[cfg(debug_assertions)]
        #[arg(long, value_name = "LIMIT", hide = true)]
        without: Option<String>,
        #[command(flatten)]
        local: Local,
    },
    /// Make a key to sign plugins with; prints the public half for `trusted_keys`
    Keygen {
        /// Where the secret half goes
        file: PathBuf,
    },
    /// Sign a plugin and its manifest, into FILE.sig
    Sign {
        /// A .wasm, .wat, .py or .sh file
        file: PathBuf,
        /// The secret half that `keygen` wrote
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
}

impl PluginCommand {
    /// Does what was asked and prints the outcome.
    ///
    /// # Errors
    /// When no server answers, or it refuses.
    pub fn run(self) -> anyhow::Result<()> {
        let remote = &self.remote;
        match &self.action {
            Action::List => {
                let answer = remote.get("/v1/plugins")?;
                if remote.is_json() {
                    return print_json(&answer);
                }
                print(&table(&answer)?)
            }
            Action::Show { name } => print_json(&remote.get(&format!("/v1/plugins/{name}"))?),
            Action::Logs {
                name,
                lines,
                follow: true,
            } => {
                let path = format!("/v1/plugins/{name}/logs");
                let query = [("lines", lines.to_string()), ("follow", "true".to_owned())];
                remote.follow(&path, &query, |line| {
                    if remote.is_json() {
                        return print(&format!("{line}\n"));
                    }
                    print(&format!("{}\n", line["text"].as_str().unwrap_or_default()))
                })
            }
            Action::Logs { name, lines, .. } => {
                let answer = remote.get(&format!("/v1/plugins/{name}/logs?lines={lines}"))?;
                if remote.is_json() {
                    return print_json(&answer);
                }
                let lines = answer["lines"]
                    .as_array()
                    .context("the answer has no lines")?;
                let text: String = lines
                    .iter()
                    .filter_map(|line| line["text"].as_str())
                    .flat_map(|line| [line, "\n"])
                    .collect();
                print(&text)
            }
            Action::Start { name } => self.steer(name, "start"),
            Action::Stop { name } => self.steer(name, "stop"),
            Action::Restart { name } => self.steer(name, "restart"),
            Action::Reload { name } => {
                let answer = remote.post_patiently(&format!("/v1/plugins/{name}/reload"))?;
                if remote.is_json() {
                    return print_json(&answer);
                }
                let sha256 = answer["sha256"].as_str().unwrap_or("-");
                print(&format!("{name}: reloaded, sha256 {sha256}\n"))
            }
            Action::New(new) => new.run(remote.is_json()),
            Action::Build(build) => build.run(remote.is_json()),
            Action::Check(check) => check.run(remote.is_json()),
            Action::Run(run) => run.run(remote),
            Action::Test(test) => test.run(remote.is_json()),
            Action::Bench(bench) => bench.run(remote.is_json()),
            Action::Pack(pack) => pack.run(remote.is_json()),
            Action::Unpack(unpack) => unpack.run(remote.is_json()),
            Action::Inspect { file, local } => local::inspect(file, local, remote.is_json()),
            Action::Prove {
                files,
                only,
                #[cfg(debug_assertions)]
                without,
                local,
            } => {
                #[cfg(debug_assertions)]
                let lift = |held: &Held| match without {
                    Some(what) => held.without(what).map_err(anyhow::Error::msg),
                    None => Ok(held.clone()),
                };
                #[cfg(not(debug_assertions))]
                let lift = |held: &Held| Ok(held.clone());
                local::prove_limits(files, only.as_deref(), lift, local, remote.is_json())
            }
            Action::Keygen { file } => local::keygen(file, remote.is_json()),
            Action::Sign { file, key } => local::sign(file, key, remote.is_json()),
        }
    }

    fn steer(&self, name: &str, action: &str) -> anyhow::Result<()> {
        let answer = self.remote.post(&format!("/v1/plugins/{name}/{action}"))?;
        if self.remote.is_json() {
            return print_json(&answer);
        }
        print(&format!("{name}: {action} accepted\n"))
    }
}

fn table(answer: &Value) -> anyhow::Result<String> {
    let plugins = answer["plugins"]
        .as_array()
        .context("the answer has no plugins")?;
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "NAME", "KIND", "STATE", "RESTARTS", "MEMORY", "CPU", "LINES", "LAST END",
    ]);
    for plugin in plugins {
        let text = |field: &str| plugin[field].as_str().unwrap_or("-").to_owned();
        let memory = match plugin["memory_bytes"].as_u64() {
            Some(bytes) => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
            None => "-".to_owned(),
        };
        let cpu = match plugin["cpu_seconds"].as_f64() {
            Some(seconds) => format!("{seconds:.2} s"),
            None => "-".to_owned(),
        };
        table.add_row([
            text("name"),
            text("kind"),
            text("state"),
            plugin["restarts"].to_string(),
            memory,
            cpu,
            plugin["log_lines"].to_string(),
            text("last_end"),
        ]);
    }
    Ok(format!("{}\n", table.trim_fmt()))
}

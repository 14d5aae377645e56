//! The command line: what is asked for, and one file per sub-command other than `serve`.

mod bench;
mod config_check;
mod log_level;
mod plugin;
mod remote;
mod secret_key;
mod selftest;
mod shell;
mod simulate;
mod status;
mod tenant;

use std::io::Write as _;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind};
use serde_json::json;

pub use bench::BenchCommand;
pub use config_check::ConfigCommand;
pub use log_level::LogLevelCommand;
pub use plugin::PluginCommand;
pub use secret_key::CurveKeygenCommand;
pub use selftest::SelftestCommand;
pub use simulate::SimulateCommand;
pub use status::StatusCommand;
pub use tenant::TenantCommand;

use crate::config::{Config, Settings, UsageError, lmcache_flags};

/// The command line of `stockade`.
#[derive(Debug, Parser)]
#[command(name = "stockade", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Serve the KV cache to engines, with plugins beside it
    Serve(Box<Settings>),
    #[command(flatten)]
    Tool(Tool),
}

/// The sub-commands that are not the server.
#[derive(Debug, Subcommand)]
pub enum Tool {
    /// Look at and steer the plugins of a running server
    Plugin(PluginCommand),
    /// Show the pool, hit rate, throughput, tenants and plugins of a running server
    Status(StatusCommand),
    /// Look at and limit the tenants of a running server
    Tenant(TenantCommand),
    /// Show or change the log level of a running server
    LogLevel(LogLevelCommand),
    /// Put load on a server and measure it, beside another one if asked
    Bench(BenchCommand),
    /// Try a running server for what it promises
    Selftest(Box<SelftestCommand>),
    /// Say what hit rates policies and pool sizes would have given
    Simulate(Box<SimulateCommand>),
    /// Check the settings that `serve` would start with
    Config(Box<ConfigCommand>),
    /// Make a key pair for a listener with mechanism = "curve", or for one of its users
    CurveKeygen(CurveKeygenCommand),
    /// Print a script that completes this command line in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
        /// Print the script as a JSON document
        #[arg(long)]
        json: bool,
    },
    /// Print the manual page, of a sub-command if one is named
    Man {
        /// Sub-command
        command: Option<String>,
        /// Print the page as a JSON document
        #[arg(long)]
        json: bool,
    },
}

impl Tool {
    /// Does what was asked and prints the outcome.
    ///
    /// # Errors
    /// One sentence that says what could not be done.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Plugin(command) => command.run(),
            Self::Status(command) => command.run(),
            Self::Tenant(command) => command.run(),
            Self::LogLevel(command) => command.run(),
            Self::Bench(command) => command.run(),
            Self::Selftest(command) => command.run(),
            Self::Simulate(command) => command.run(),
            Self::Config(command) => print(&command.check()?),
            Self::CurveKeygen(command) => command.run(),
            Self::Completions { shell, json } => {
                let script = shell::completions(&mut Cli::command(), shell);
                match json {
                    true => print_json(&json!({"shell": shell.to_string(), "script": script})),
                    false => print(&script),
                }
            }
            Self::Man { command, json } => {
                let page = shell::man(Cli::command(), command.as_deref())?;
                match json {
                    true => print_json(&json!({"command": command, "roff": page})),
                    false => print(&page),
                }
            }
        }
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// `stockade serve`: the configuration, and a warning line per flag that has no effect here.
    Serve(Box<Config>, Vec<String>),
    /// Any other sub-command.
    Tool(Tool),
    /// `--help` or `--version`: text to print before a clean exit.
    Print(String),
}

impl Command {
    /// Reads the command line, the environment and the file it names.
    ///
    /// # Errors
    /// One sentence that names the flag or key and the way out.
    pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Self, UsageError> {
        let command = Cli::command().mut_subcommand("serve", lmcache_flags::augment);
        let matches = match command.try_get_matches_from(args) {
            Ok(matches) => matches,
            Err(error) if !error.use_stderr() => {
                return Ok(Self::Print(error.render().to_string()));
            }
            Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                return Err(UsageError(error.render().to_string()));
            }
            Err(error) => return Err(UsageError(one_sentence(&error.render().to_string()))),
        };
        let warnings = match matches.subcommand() {
            Some(("serve", serve)) => lmcache_flags::judge(serve).map_err(UsageError)?,
            _ => Vec::new(),
        };
        let cli = Cli::from_arg_matches(&matches)
            .map_err(|error| UsageError(one_sentence(&error.render().to_string())))?;
        Ok(match cli.command {
            CliCommand::Serve(flags) => Self::Serve(Box::new(Config::load(*flags)?), warnings),
            CliCommand::Tool(tool) => Self::Tool(tool),
        })
    }
}

/// clap prints the problem, then usage and tips over several lines; the problem is what we keep.
fn one_sentence(rendered: &str) -> String {
    let mut problem = String::new();
    for line in rendered
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"))
    {
        if !line.is_empty() {
            if !problem.is_empty() {
                problem.push(' ');
            }
            problem.push_str(line);
        }
    }
    problem.trim_start_matches("error: ").to_owned()
}

/// Writes to stdout; whoever closed it does not want the text.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes a document to stdout.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Bytes as a person reads them.
fn bytes(value: f64) -> String {
    let mut value = value;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match unit {
                "B" => format!("{value:.0} {unit}"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs read what people read: every command but the server itself has `--json`.
    #[test]
    fn every_command_has_json() {
        fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, bool)>) {
            let path = format!("{path} {}", command.get_name());
            let mut inner = command.get_subcommands().peekable();
            if inner.peek().is_none() {
                let has = command.get_arguments().any(|it| it.get_id() == "json");
                found.push((path, has));
                return;
            }
            inner.for_each(|inner| leaves(inner, &path, found));
        }
        let mut command = Cli::command();
        command.build();
        let mut found = Vec::new();
        leaves(&command, "", &mut found);
        let without: Vec<_> = found.iter().filter(|(_, has)| !has).collect();
        assert!(found.len() > 15, "{found:?}");
        assert_eq!(without, [&(" stockade serve".to_owned(), false)]);
    }
}

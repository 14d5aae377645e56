//! The command line: what is asked for, and one file per sub-command other than `serve`.

mod plugin;
mod remote;
mod simulate;

use std::io::Write as _;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind};

pub use plugin::PluginCommand;
pub use simulate::SimulateCommand;

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
    /// Look at and steer the plugins of a running server
    Plugin(PluginCommand),
    /// Say what hit rates policies and pool sizes would have given
    Simulate(Box<SimulateCommand>),
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// `stockade serve`: the configuration, and a warning line per flag that has no effect here.
    Serve(Box<Config>, Vec<String>),
    /// `stockade plugin`.
    Plugin(PluginCommand),
    /// `stockade simulate`.
    Simulate(Box<SimulateCommand>),
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
            CliCommand::Plugin(command) => Self::Plugin(command),
            CliCommand::Simulate(command) => Self::Simulate(command),
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

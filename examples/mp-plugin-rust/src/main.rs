//! A sandboxed plugin: shows the server's settings, then a heartbeat until it is told to stop.
//!
//! The server passes its settings as JSON in an environment variable, makes each line printed
//! here one line of its log, and asks a plugin to stop by closing its standard input.

#![forbid(unsafe_code)]

mod settings;
mod stop;

use std::io::{self, Write};
use std::process::ExitCode;

/// Stands in front of every line and of this plugin's own settings.
const NAME: &str = "mp_plugin_rust";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads our lines any more, so there is nobody to tell.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    say("Started")?;
    let config = settings::parse(&variable("LMCACHE_RUNTIME_PLUGIN_CONFIG")).or_else(warn)?;
    for line in settings::summary(&config) {
        say(&line)?;
    }
    let extra = variable("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG");
    let interval = settings::heartbeat_interval(&extra, &config, NAME)
        .or_else(|problem| warn(problem).map(|()| settings::DEFAULT_INTERVAL))?;

    let mut heartbeats: u64 = 0;
    loop {
        say(&format!("heartbeat #{heartbeats}"))?;
        heartbeats += 1;
        if stop::requested_within(interval) {
            return say("Asked to stop, exiting");
        }
    }
}

/// An environment variable, empty where it is not set or not UTF-8.
fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// Says what is wrong and goes on with nothing.
fn warn<T: Default>(problem: String) -> io::Result<T> {
    say(&format!("WARNING: {problem}"))?;
    Ok(T::default())
}

fn say(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "[{NAME}] {line}")?;
    stdout.flush()
}

//! What shells and `man` want to know of the command line.

use anyhow::Context as _;
use clap::Command;
use clap_complete::{Shell, generate};

/// A completion script.
pub(super) fn completions(command: &mut Command, shell: Shell) -> String {
    let mut script = Vec::new();
    generate(shell, command, "stockade", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A manual page in roff; of the sub-command if one is named.
///
/// # Errors
/// A sentence when there is no such sub-command.
pub(super) fn man(mut command: Command, name: Option<&str>) -> anyhow::Result<String> {
    command.build();
    if let Some(name) = name {
        let found = command.get_subcommands().find(|it| it.get_name() == name);
        command = found
            .cloned()
            .with_context(|| format!("there is no sub-command {name:?}: try `stockade --help`"))?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .context("the page could not be written")?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

//! `stockade selftest`: a running server is tried from outside for what it promises.

mod isolation;

use clap::{Args, Subcommand};

use self::isolation::Isolation;

/// Arguments of `stockade selftest`.
#[derive(Debug, Args)]
pub struct SelftestCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Try, for each pair of tenants, whether one can learn what the other has cached: by answers,
    /// and by how long they take. Fails also when it could not have found out
    Isolation(Isolation),
}

impl SelftestCommand {
    /// Tries and prints the outcome.
    ///
    /// # Errors
    /// When a promise is not kept, or could not be tried.
    pub fn run(self) -> anyhow::Result<()> {
        match self.action {
            Action::Isolation(isolation) => isolation.run(),
        }
    }
}

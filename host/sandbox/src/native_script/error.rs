//! Why a script could not be run.

use std::{io, path::PathBuf};

/// Why a script cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The file cannot be opened or read.
    #[error("script {} cannot be read: {cause}; give the server's user read permission on it", path.display())]
    Unreadable {
        /// The script.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The path names a directory, a pipe or a device.
    #[error("script {} is not a regular file", path.display())]
    NotAFile {
        /// The script.
        path: PathBuf,
    },
    /// None of the programs that could run the file exists.
    #[error("no interpreter for script {}: {tried} not found in PATH; install one, put it in the server's PATH, or name an existing one in the script's first line (`#!/path/to/interpreter`)", path.display())]
    NoInterpreter {
        /// The script.
        path: PathBuf,
        /// What was looked for, in that order.
        tried: String,
    },
    /// Neither a `#!` line nor an extension that says what runs the file.
    #[error("script {} says nothing about its interpreter; begin it with `#!/path/to/interpreter`, name it *.py or *.sh, or make it executable", path.display())]
    UnknownKind {
        /// The script.
        path: PathBuf,
    },
    /// A variable for the script cannot be passed to any program.
    #[error(
        "environment variable `{name}` cannot be passed to a script: a name has no `=` and neither name nor value has a zero byte"
    )]
    Variable {
        /// Its name.
        name: String,
    },
    /// A variable for the script is longer than the kernel takes.
    #[error(
        "environment variable `{name}` has {bytes} bytes and the kernel passes at most {limit} to a program; make the plugin's configuration smaller"
    )]
    VariableTooLong {
        /// Its name.
        name: String,
        /// Length of `NAME=value`.
        bytes: usize,
        /// The longest that the kernel takes.
        limit: usize,
    },
    /// The keeper process could not be started.
    #[error("the keeper of script {} cannot be started with {}: {cause}", path.display(), program.display())]
    Keeper {
        /// The script.
        path: PathBuf,
        /// The program that was to be the keeper.
        program: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The keeper started, and could not start the script.
    #[error("script {} cannot be started: {reason}", path.display())]
    Start {
        /// The script.
        path: PathBuf,
        /// What the keeper said.
        reason: String,
    },
    /// The machine does not give what the manifest requires.
    #[error("script {} is refused: {reason}; change `required` in its manifest's [process] table, or the machine", path.display())]
    Required {
        /// The script.
        path: PathBuf,
        /// What is lacking, and why.
        reason: String,
    },
    /// A directory of the manifest cannot be granted.
    #[error("script {} cannot be granted {}, which its manifest names: there is no such directory", path.display(), directory.display())]
    Directory {
        /// The script.
        path: PathBuf,
        /// The directory as the manifest names it.
        directory: PathBuf,
    },
    /// The user of the manifest cannot be taken on.
    #[error("script {} cannot run as `{user}`, as process.user in its manifest asks: {reason}", path.display())]
    User {
        /// The script.
        path: PathBuf,
        /// The user's name.
        user: String,
        /// Why.
        reason: String,
    },
    /// No way of holding the script's processes together works on this machine.
    #[error("script {} cannot be contained: {reasons}; allow another containment or give the server the rights that one needs", path.display())]
    NoContainment {
        /// The script.
        path: PathBuf,
        /// Each containment that was tried, with what the system said.
        reasons: String,
    },
    /// The keeper ended while the script ran; the script was killed with it.
    #[error("the keeper of script {} was killed, and the script with it", path.display())]
    KeeperLost {
        /// The script.
        path: PathBuf,
    },
}

impl ScriptError {
    /// Whether trying again without a change of the manifest or the machine is in vain.
    pub(crate) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Required { .. } | Self::Directory { .. } | Self::User { .. }
        )
    }
}

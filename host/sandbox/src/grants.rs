//! What a plugin may reach outside itself: nothing, except what its manifest names and the
//! server's configuration leaves.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

/// What may be done in a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reading.
    #[default]
    ReadOnly,
    /// Reading, and writing within `limits.directory_mib` and `limits.open_files`.
    ReadWrite,
}

/// A directory of the server's machine that a plugin gets under a name of its own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Where it is, as an absolute path.
    pub host: PathBuf,
    /// What may be done in it.
    #[serde(default)]
    pub access: Access,
}

/// Directories by the name the guest knows them under.
pub type Directories = BTreeMap<String, Directory>;

/// Checks the names and paths.
pub(crate) fn check_directories(directories: &Directories) -> Result<(), String> {
    const MAX_DIRECTORIES: usize = 16;
    if directories.len() > MAX_DIRECTORIES {
        return Err(format!(
            "directories has {} entries: give at most {MAX_DIRECTORIES}",
            directories.len()
        ));
    }
    for (guest, directory) in directories {
        if guest.is_empty() || guest.contains('\0') {
            return Err(format!(
                "directories.{guest:?} is no name: give the path that the plugin shall see, such as \"/data\""
            ));
        }
        if !directory.host.is_absolute() {
            return Err(format!(
                "directories.{guest:?}.host is {}: give an absolute path",
                directory.host.display()
            ));
        }
    }
    Ok(())
}

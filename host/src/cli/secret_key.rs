//! New secret keys, each in a file of its own that nobody else may read.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stockade_transport::curve_public_key;

use super::{print, print_json};

/// `stockade curve-keygen`.
#[derive(Debug, Args)]
pub struct CurveKeygenCommand {
    /// File for the secret key; must not exist
    file: PathBuf,
    /// Print JSON instead of the public key alone
    #[arg(long)]
    json: bool,
}

impl CurveKeygenCommand {
    /// Makes a key pair of CURVE: the secret half into a file, the public half to stdout, both in
    /// Z85 as ZeroMQ's own tools have them.
    ///
    /// # Errors
    /// When the file exists or cannot be written.
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let secret = random()?;
        let public = z85::encode(curve_public_key(secret));
        create(&self.file, &format!("{}\n", z85::encode(secret)))?;
        match self.json {
            true => print_json(&json!({
                "secret_key_file": self.file.display().to_string(),
                "public_key": public,
            })),
            false => print(&format!("{public}\n")),
        }
    }
}

/// 32 bytes that nobody can guess.
///
/// # Errors
/// When the system gives none.
pub(super) fn random() -> anyhow::Result<[u8; 32]> {
    let mut random = [0; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("no random numbers can be had")?;
    Ok(random)
}

/// Writes a secret into a new file.
///
/// # Errors
/// When the file exists or cannot be written.
pub(super) fn create(file: &Path, text: &str) -> anyhow::Result<()> {
    let mut output = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("{} cannot be created", file.display()))?;
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.sync_all())
        .with_context(|| file.display().to_string())
}

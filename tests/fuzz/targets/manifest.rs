//! A plugin's manifest: nothing panics, what is accepted is within its ranges, and a refusal is
//! one bounded line that names the file.
#![no_main]
#![allow(clippy::panic, reason = "a target fails by panicking")]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stockade_fuzz::INPUT_BYTES;
use stockade_sandbox::{Manifest, ManifestError};

fuzz_target!(|input: &[u8]| {
    match Manifest::parse(Path::new("a.plugin.toml"), input) {
        Ok(manifest) => {
            let limits = &manifest.limits;
            assert!((1..=4096).contains(&limits.memory_mib));
            assert!((1..=100).contains(&limits.cpu_percent));
            assert!((1..=600).contains(&limits.start_seconds));
            assert!(limits.open_files <= 200);
            assert!(manifest.log_limits().bytes_per_second >= 1024);
        }
        Err(error @ ManifestError::Invalid { .. }) => {
            let sentence = error.to_string();
            assert!(sentence.contains("a.plugin.toml"), "{sentence}");
            let is_safe = |character: char| !character.is_control() || character == '\t';
            assert!(sentence.chars().all(is_safe), "{sentence:?}");
            // The line that is wrong is drawn, with what is below it, and control characters grow.
            assert!(sentence.len() <= 8 * INPUT_BYTES, "{}", sentence.len());
        }
        Err(error) => panic!("no file was read: {error}"),
    }
});

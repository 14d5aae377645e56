//! The file of `--config`: nothing panics, what is accepted is within its ranges and can be told
//! to plugins, and a refusal names the flag.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stockade::config::{Config, Settings};
use stockade_fuzz as _;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    // Other files are not read: what they hold is not in the input.
    if text.contains("file") {
        return;
    }
    let flags = Settings {
        l1_size_gb: Some(1.0),
        ..Settings::default()
    };
    match Config::from_text(flags, text) {
        Ok(config) => {
            assert!(!config.listeners.is_empty());
            assert!(config.l1_size_bytes == 1 << 30);
            assert!(config.chunk_size.get() <= 1 << 20);
            assert!(config.worker_reap_timeout <= config.worker_registration_grace);
            let told = config.plugin_json(5555, 8080, "segment");
            assert!(told.is_object());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

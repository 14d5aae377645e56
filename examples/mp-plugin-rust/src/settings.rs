//! What the plugin reads of the server's configuration. Pure: JSON text in, lines and values out.

use serde_json::Value;
use std::time::Duration;

/// Time between two heartbeats where nothing else is set.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);
const MIN_SECONDS: f64 = 0.1;
const MAX_SECONDS: f64 = 86_400.0;
const GIB: f64 = (1_u64 << 30) as f64;

/// The configuration as a JSON object.
///
/// # Errors
/// A sentence that says what is wrong with the text.
pub fn parse(text: &str) -> Result<Value, String> {
    if text.trim().is_empty() {
        return Err("LMCACHE_RUNTIME_PLUGIN_CONFIG is empty: nothing to show".to_owned());
    }
    match serde_json::from_str(text) {
        Ok(config @ Value::Object(_)) => Ok(config),
        Ok(_) => Err("LMCACHE_RUNTIME_PLUGIN_CONFIG is not a JSON object".to_owned()),
        Err(error) => Err(format!(
            "LMCACHE_RUNTIME_PLUGIN_CONFIG is not JSON: {error}"
        )),
    }
}

/// The lines that describe the server; `?` stands for a value that is not there.
pub fn summary(config: &Value) -> [String; 3] {
    let show = |path| show(config, path);
    let size =
        config.pointer("/storage_manager_config/l1_manager_config/memory_config/size_in_bytes");
    let l1 = match size.and_then(Value::as_f64) {
        Some(bytes) => format!("{:.1}", bytes / GIB),
        None => "?".to_owned(),
    };
    [
        format!(
            "MP server: host={} port={} chunk_size={}",
            show("/mp_config/host"),
            show("/mp_config/port"),
            show("/mp_config/chunk_size"),
        ),
        format!(
            "Storage: L1={l1}GB eviction={} watermark={}",
            show("/storage_manager_config/eviction_config/eviction_policy"),
            show("/storage_manager_config/eviction_config/trigger_watermark"),
        ),
        format!(
            "Observability: enabled={} metrics={} tracing={}",
            show("/obs_config/enabled"),
            show("/obs_config/metrics_enabled"),
            show("/obs_config/tracing_enabled"),
        ),
    ]
}

/// A value as JSON spells it, strings bare.
fn show(config: &Value, path: &str) -> String {
    match config.pointer(path) {
        None | Some(Value::Null) => "?".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

/// Time between two heartbeats: `<name>.heartbeat_seconds` of the extra configuration.
///
/// LMCache's own server leaves `extra` empty; there the same settings are a section of `config`.
///
/// # Errors
/// A sentence that says what is wrong with the setting.
pub fn heartbeat_interval(extra: &str, config: &Value, name: &str) -> Result<Duration, String> {
    let parsed: Value;
    let settings = if extra.trim().is_empty() {
        config
            .get("runtime_plugin_extra_config")
            .unwrap_or(&Value::Null)
    } else {
        parsed = serde_json::from_str(extra)
            .map_err(|error| format!("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG is not JSON: {error}"))?;
        &parsed
    };
    let key = format!("{name}.heartbeat_seconds");
    match settings.get(&key) {
        None | Some(Value::Null) => Ok(DEFAULT_INTERVAL),
        Some(value) => match value.as_f64() {
            Some(seconds) if (MIN_SECONDS..=MAX_SECONDS).contains(&seconds) => {
                Ok(Duration::from_secs_f64(seconds))
            }
            _ => Err(format!(
                "{key} is not a number from {MIN_SECONDS} to {MAX_SECONDS}: using {}",
                DEFAULT_INTERVAL.as_secs()
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({
            "mp_config": {"host": "127.0.0.1", "port": 5555, "chunk_size": 256},
            "storage_manager_config": {
                "l1_manager_config": {"memory_config": {"size_in_bytes": 1_610_612_736_u64}},
                "eviction_config": {"eviction_policy": "LRU", "trigger_watermark": 0.8},
            },
            "obs_config": {"enabled": true, "metrics_enabled": true, "tracing_enabled": false},
            "runtime_plugin_extra_config": {"p.heartbeat_seconds": 7},
        })
    }

    #[test]
    fn a_full_config_is_summed_up_in_three_lines() {
        assert_eq!(
            summary(&config()),
            [
                "MP server: host=127.0.0.1 port=5555 chunk_size=256",
                "Storage: L1=1.5GB eviction=LRU watermark=0.8",
                "Observability: enabled=true metrics=true tracing=false",
            ]
        );
    }

    #[test]
    fn what_is_missing_null_or_of_another_type_is_a_question_mark() {
        let expected = [
            "MP server: host=? port=? chunk_size=?",
            "Storage: L1=?GB eviction=? watermark=?",
            "Observability: enabled=? metrics=? tracing=?",
        ];
        assert_eq!(summary(&Value::Null), expected);
        let odd = json!({"mp_config": [1], "obs_config": {"enabled": null}, "storage_manager_config":
            {"l1_manager_config": {"memory_config": {"size_in_bytes": "1"}}}});
        assert_eq!(summary(&odd), expected);
    }

    #[test]
    fn only_a_json_object_is_a_config() {
        assert_eq!(parse(&config().to_string()).unwrap(), config());
        for (text, problem) in [
            ("", "is empty"),
            (" \n", "is empty"),
            ("[1]", "not a JSON object"),
            ("{", "is not JSON"),
        ] {
            assert!(parse(text).unwrap_err().contains(problem), "{text:?}");
        }
    }

    #[test]
    fn the_interval_comes_from_the_extra_config_or_its_section() {
        let interval = |extra: &str| heartbeat_interval(extra, &config(), "p");
        assert_eq!(
            interval(r#"{"p.heartbeat_seconds": 0.5}"#),
            Ok(Duration::from_millis(500))
        );
        assert_eq!(interval(r#"{"other": 1}"#), Ok(DEFAULT_INTERVAL));
        assert_eq!(interval(""), Ok(Duration::from_secs(7)));
        assert_eq!(
            heartbeat_interval("", &Value::Null, "p"),
            Ok(DEFAULT_INTERVAL)
        );
    }

    #[test]
    fn an_unusable_interval_is_named() {
        for value in ["0", "-1", "0.09", "86401", "1e300", "\"5\"", "true", "[]"] {
            let extra = format!("{{\"p.heartbeat_seconds\": {value}}}");
            let problem = heartbeat_interval(&extra, &Value::Null, "p").unwrap_err();
            assert_eq!(
                problem, "p.heartbeat_seconds is not a number from 0.1 to 86400: using 30",
                "{value}"
            );
        }
        assert!(
            heartbeat_interval("{", &Value::Null, "p")
                .unwrap_err()
                .contains("EXTRA_CONFIG is not JSON")
        );
    }
}

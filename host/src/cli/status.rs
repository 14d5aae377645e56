//! `stockade status`: one look at a running server, or a look every second on a terminal.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use serde_json::Value;

use super::{bytes, print, print_json, remote::Remote, tenant};

/// Width of bars in characters.
const BAR: usize = 40;
/// Most points of a curve.
const CURVE: usize = 60;

/// Arguments of `stockade status`.
#[derive(Debug, Args)]
pub struct StatusCommand {
    #[command(flatten)]
    remote: Remote,
    /// Show it once even on a terminal
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0, value_parser = interval)]
    interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds between 0.1 and 3600".to_owned()),
    }
}

impl StatusCommand {
    /// Prints the state once, or again and again on a terminal until it is interrupted.
    ///
    /// # Errors
    /// When no server answers, or it refuses.
    pub fn run(self) -> anyhow::Result<()> {
        if self.remote.is_json() {
            return print_json(&self.remote.get("/v1/stats")?);
        }
        if self.once || !std::io::stdout().is_terminal() {
            return print(&self.look()?);
        }
        // Home, text with each line's rest erased, and erase below: nothing flickers, and what
        // was above the first look stays in the scrollback.
        print("\x1b[2J")?;
        loop {
            let text = match self.look() {
                Ok(text) => text,
                Err(error) => format!("{error:#}\n"),
            };
            let text = text.replace('\n', "\x1b[K\n");
            print(&format!("\x1b[H{text}\x1b[J"))?;
            std::io::stdout().flush()?;
            std::thread::sleep(Duration::from_secs_f64(self.interval));
        }
    }

    fn look(&self) -> anyhow::Result<String> {
        let stats = self.remote.get("/v1/stats")?;
        let history = self.remote.get("/v1/history")?;
        Ok(render(self.remote.server(), &stats, &history))
    }
}

fn percent(value: &Value) -> String {
    value
        .as_f64()
        .map_or("-".to_owned(), |value| format!("{:.1} %", value * 100.0))
}

fn seconds(value: &Value) -> String {
    match value.as_f64() {
        None => "-".to_owned(),
        Some(value) if value < 1e-3 => format!("{:.0} us", value * 1e6),
        Some(value) if value < 1.0 => format!("{:.1} ms", value * 1e3),
        Some(value) => format!("{value:.1} s"),
    }
}

fn size(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), bytes)
}

fn bar(share: f64) -> String {
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR - full))
}

/// The last values of a field as blocks of eight heights, the highest being `top`.
fn curve(points: &[Value], field: &str, top: Option<f64>) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values: Vec<Option<f64>> = points
        .iter()
        .skip(points.len().saturating_sub(CURVE))
        .map(|point| point[field].as_f64())
        .collect();
    let highest = values.iter().flatten().copied().fold(0.0, f64::max);
    let top = top.unwrap_or(highest).max(f64::MIN_POSITIVE);
    let block = |value: f64| {
        let index = (value / top * 7.0).round().clamp(0.0, 7.0) as usize;
        BLOCKS.get(index).copied().unwrap_or('█')
    };
    values
        .into_iter()
        .map(|value| value.map_or(' ', block))
        .collect()
}

fn render(server: &str, stats: &Value, history: &Value) -> String {
    let none = Vec::new();
    let points = history["points"].as_array().unwrap_or(&none);
    let (pool, now) = (&stats["pool"], &stats["now"]);
    let (used, capacity) = (
        pool["used_bytes"].as_f64().unwrap_or(0.0),
        pool["capacity_bytes"].as_f64().unwrap_or(1.0).max(1.0),
    );
    let health = stats["complaint"].as_str().unwrap_or("healthy");
    let mut text = format!(
        "Stockade {} at {server}: {health}\n\n",
        stats["version"].as_str().unwrap_or("?")
    );
    for note in stats["notes"].as_array().unwrap_or(&none) {
        text.push_str(&format!("note: {}\n", note.as_str().unwrap_or_default()));
    }
    let mut line = |label: &str, value: String| {
        text.push_str(&format!("{label:<11}{value}\n"));
    };
    line(
        "pool",
        format!(
            "{} {:.1} %, {} of {}, {} objects, {} evicted ({})",
            bar(used / capacity),
            used / capacity * 100.0,
            bytes(used),
            bytes(capacity),
            pool["objects"],
            pool["evicted_objects"],
            pool["eviction_policy"].as_str().unwrap_or("?"),
        ),
    );
    line("", curve(points, "used_bytes", Some(capacity)));
    line(
        "hit rate",
        format!(
            "{} now, {} since the start ({} of {} tokens)",
            percent(&now["hit_rate"]),
            percent(&stats["lookups"]["hit_rate"]),
            stats["lookups"]["hit_tokens"],
            stats["lookups"]["requested_tokens"],
        ),
    );
    line("", curve(points, "hit_rate", Some(1.0)));
    line(
        "requests",
        format!(
            "{:.0}/s, p50 {}, p99 {}, {} errors",
            now["requests_per_second"].as_f64().unwrap_or(0.0),
            seconds(&now["p50_seconds"]),
            seconds(&now["p99_seconds"]),
            stats["errors"],
        ),
    );
    line("", curve(points, "requests_per_second", None));
    line(
        "KV",
        format!(
            "{}/s stored, {}/s retrieved ({} and {} since the start)",
            size(&now["stored_bytes_per_second"]),
            size(&now["retrieved_bytes_per_second"]),
            size(&stats["stored_bytes"]),
            size(&stats["retrieved_bytes"]),
        ),
    );
    line(
        "clients",
        format!(
            "{} connections, {} workers, {} sessions",
            stats["connections"], stats["workers"], stats["sessions"]
        ),
    );
    let plugins = stats["plugins"].as_array().unwrap_or(&none);
    if !plugins.is_empty() {
        text.push('\n');
        text.push_str(&plugin_table(plugins));
    }
    let tenants = stats["tenants"].as_array().unwrap_or(&none);
    if !tenants.is_empty() {
        text.push('\n');
        text.push_str(&tenant::table(tenants));
    }
    text
}

fn plugin_table(plugins: &[Value]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["PLUGIN", "STATE", "CPU", "MEMORY", "RESTARTS", "LINES"]);
    for plugin in plugins {
        table.add_row([
            plugin["name"].as_str().unwrap_or("?").to_owned(),
            plugin["state"].as_str().unwrap_or("?").to_owned(),
            seconds(&plugin["cpu_seconds"]),
            size(&plugin["memory_bytes"]),
            plugin["restarts"].to_string(),
            plugin["log_lines"].to_string(),
        ]);
    }
    format!("{}\n", table.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_look_shows_what_the_documents_say() {
        let stats = json!({
            "version": "1", "complaint": null, "notes": ["plugin `x` is refused: why"],
            "pool": {"used_bytes": 512.0, "capacity_bytes": 1024.0, "objects": 3, "evicted_objects": 0, "eviction_policy": "LRU"},
            "lookups": {"hit_rate": 0.25, "hit_tokens": 1, "requested_tokens": 4},
            "now": {"hit_rate": 0.5, "requests_per_second": 12.0, "p50_seconds": 0.00002, "p99_seconds": 0.004},
            "stored_bytes": 2048, "retrieved_bytes": 0, "errors": 0, "connections": 1, "workers": 1, "sessions": 0,
            "plugins": [{"name": "beat", "state": "running", "restarts": 2, "log_lines": 7}],
            "tenants": [{"name": "", "used_bytes": 512, "floor_bytes": 0, "cap_bytes": null, "objects": 3}],
        });
        let history =
            json!({"points": [{"used_bytes": 0}, {"used_bytes": 1024}, {"used_bytes": null}]});
        let text = render("http://x", &stats, &history);
        for part in [
            "healthy",
            "note: plugin `x` is refused: why",
            "50.0 %",
            "512 B of 1.0 KiB",
            "▁█ ",
            "25.0 %",
            "12/s, p50 20 us, p99 4.0 ms",
            "beat",
            "(no salt)",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn documents_of_another_server_do_not_stop_it() {
        assert!(render("http://x", &json!("nonsense"), &json!(null)).contains("Stockade"));
    }
}

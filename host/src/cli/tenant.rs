//! `stockade tenant`: who uses how much, and limits.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::{Value, json};

use super::{bytes, print, print_json, remote::Remote};

/// Arguments of `stockade tenant`.
#[derive(Debug, Args)]
pub struct TenantCommand {
    #[command(flatten)]
    remote: Remote,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List tenants with what they use and may use
    List,
    /// Show one tenant
    Show {
        /// Name as `list` shows it
        name: String,
    },
    /// Limit a cache salt to so many GiB, until the server ends
    Limit {
        /// The salt; `_default` for requests without one
        cache_salt: String,
        /// GiB, 0 for nothing at all
        gib: f64,
    },
    /// Take the limit of a cache salt away
    Unlimit {
        /// The salt; `_default` for requests without one
        cache_salt: String,
    },
}

impl TenantCommand {
    /// Does what was asked and prints the outcome.
    ///
    /// # Errors
    /// When no server answers, or it refuses.
    pub fn run(self) -> anyhow::Result<()> {
        let remote = &self.remote;
        let answer = match &self.action {
            Action::List => remote.get("/v1/tenants")?,
            Action::Show { name } => remote.get(&format!("/v1/tenants/{name}"))?,
            Action::Limit { cache_salt, gib } => {
                remote.put(&format!("/quota/{cache_salt}"), &json!({"limit_gb": gib}))?
            }
            Action::Unlimit { cache_salt } => remote.delete(&format!("/quota/{cache_salt}"))?,
        };
        if remote.is_json() {
            return print_json(&answer);
        }
        match &self.action {
            Action::List => print(&table(
                answer["tenants"]
                    .as_array()
                    .context("the answer has no tenants")?,
            )),
            Action::Show { .. } => print_json(&answer),
            Action::Limit { cache_salt, gib } => {
                print(&format!("{cache_salt}: at most {gib} GiB\n"))
            }
            Action::Unlimit { cache_salt } => print(&format!(
                "{cache_salt}: {}\n",
                match answer["status"].as_str() {
                    Some("removed") => "no limit any more",
                    _ => "had no limit",
                }
            )),
        }
    }
}

/// Tenants as a table.
pub(super) fn table(tenants: &[Value]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["TENANT", "USED", "FLOOR", "CAP", "OBJECTS"]);
    for tenant in tenants {
        let size = |field: &str| tenant[field].as_f64().map_or("-".to_owned(), bytes);
        let name = match tenant["name"].as_str() {
            Some("") | None => "(no salt)",
            Some(name) => name,
        };
        table.add_row([
            name.to_owned(),
            size("used_bytes"),
            size("floor_bytes"),
            size("cap_bytes"),
            tenant["objects"].to_string(),
        ]);
    }
    format!("{}\n", table.trim_fmt())
}

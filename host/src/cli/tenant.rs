//! `stockade tenant`: who uses how much, and limits.

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use serde_json::{Value, json};

use super::{bytes, print, print_json, remote::Remote};
use crate::service::digest_of;

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
    /// Limit a cache salt to so many GiB; survives a restart of a server with --state-dir
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
    /// Remove everything of a tenant from a running server, and print a receipt
    Purge {
        /// Name as `list` shows it
        name: String,
    },
    /// Say whether a receipt is whole, and whether what it names is gone from the pool
    CheckReceipt {
        /// The receipt that `purge` printed
        receipt: std::path::PathBuf,
        /// The pool [default: the segment that the receipt names]
        #[arg(long, value_name = "FILE")]
        segment: Option<std::path::PathBuf>,
    },
    /// Have the server read the tenants of its configuration file again
    Reload,
    /// Change a tenant's floor, weight or cap; what is not named stays as it is
    Budget {
        /// Name as `list` shows it
        name: String,
        /// GiB that no other tenant can push it below
        #[arg(long, value_name = "GIB", value_parser = gib)]
        floor_gb: Option<u64>,
        /// Its part of what the floors leave, relative to the other weights
        #[arg(long)]
        weight: Option<std::num::NonZeroU32>,
        /// GiB that it never goes beyond
        #[arg(long, value_name = "GIB", value_parser = gib, conflicts_with = "no_cap")]
        cap_gb: Option<u64>,
        /// Take its cap away
        #[arg(long)]
        no_cap: bool,
    },
}

/// Compares a receipt with its seal, and what it names with what is in the pool now.
///
/// # Errors
/// When the receipt was changed, or bytes that it says are gone are in their place.
fn check_receipt(
    path: &std::path::Path,
    segment: Option<&std::path::Path>,
) -> anyhow::Result<Value> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("{shown} cannot be read"))?;
    let receipt: Value =
        serde_json::from_str(&text).with_context(|| format!("{shown} is no receipt"))?;
    if receipt["seal_blake3"].as_str() != Some(&digest_of(&receipt)) {
        bail!("{shown} is not as it was printed: its seal does not fit");
    }
    let named = receipt["l1"]["segment"].as_str();
    let segment = match (segment, named) {
        (Some(path), _) => path.to_owned(),
        (None, Some(name)) => std::path::Path::new("/dev/shm").join(name),
        (None, None) => return Ok(json!({"checked": 0, "segment": null})),
    };
    let pool = match std::fs::File::open(&segment) {
        Ok(pool) => pool,
        // With the server its memory is gone.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(json!({"checked": 0, "segment": null}));
        }
        Err(error) => {
            return Err(error).with_context(|| format!("{} cannot be read", segment.display()));
        }
    };
    let digests = receipt["l1"]["digests"].as_array();
    let digests = digests.context("the receipt has no digests")?;
    for entry in digests {
        let number = |field: &str| entry[field].as_u64();
        let (Some(offset), Some(length)) = (number("offset"), number("length")) else {
            bail!("{shown}: an object has no place");
        };
        let found = digest_at(&pool, offset, length)
            .with_context(|| format!("{} cannot be read", segment.display()))?;
        if entry["blake3"].as_str() == Some(found.to_hex().as_str()) {
            bail!(
                "{length} bytes at {offset} of {} are still there",
                segment.display()
            );
        }
    }
    Ok(json!({"checked": digests.len(), "segment": segment}))
}

fn digest_at(pool: &std::fs::File, offset: u64, length: u64) -> std::io::Result<blake3::Hash> {
    use std::os::unix::fs::FileExt as _;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < length {
        let step = usize::try_from(length - done).map_or(buffer.len(), |it| it.min(buffer.len()));
        let part = buffer.get_mut(..step).unwrap_or_default();
        pool.read_exact_at(part, offset + done)?;
        hasher.update(part);
        done += step as u64;
    }
    Ok(hasher.finalize())
}

/// GiB as bytes.
fn gib(text: &str) -> Result<u64, String> {
    let gib: Option<f64> = text.trim().parse().ok();
    match gib.filter(|gib| (0.0..=f64::from(1 << 23)).contains(gib)) {
        Some(gib) => Ok((gib * f64::from(1 << 30)) as u64),
        None => Err("give GiB, 0 or more".to_owned()),
    }
}

/// How long what was set holds, as the end of a sentence.
fn how_long(answer: &Value) -> &'static str {
    match answer["survives_restart"].as_bool() {
        Some(true) => "also after a restart",
        _ => "until the server ends (it has no --state-dir)",
    }
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
            Action::Purge { name } => {
                remote.post_patiently(&format!("/v1/tenants/{name}/purge"))?
            }
            Action::CheckReceipt { receipt, segment } => {
                check_receipt(receipt, segment.as_deref())?
            }
            Action::Reload => remote.post("/v1/config/reload")?,
            Action::Budget {
                name,
                floor_gb,
                weight,
                cap_gb,
                no_cap,
            } => {
                let mut body = serde_json::Map::new();
                body.extend(floor_gb.map(|bytes| ("floor_bytes".to_owned(), bytes.into())));
                body.extend(weight.map(|weight| ("weight".to_owned(), weight.get().into())));
                body.extend(cap_gb.map(|bytes| ("cap_bytes".to_owned(), bytes.into())));
                if *no_cap {
                    body.insert("cap_bytes".to_owned(), Value::Null);
                }
                if body.is_empty() {
                    bail!("nothing to change: give --floor-gb, --weight, --cap-gb or --no-cap");
                }
                remote.put(&format!("/v1/tenants/{name}"), &Value::Object(body))?
            }
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
            Action::Limit { cache_salt, gib } => print(&format!(
                "{cache_salt}: at most {gib} GiB, {}\n",
                how_long(&answer)
            )),
            Action::Unlimit { cache_salt } => print(&match answer["status"].as_str() {
                Some("removed") => format!("{cache_salt}: no limit, {}\n", how_long(&answer)),
                _ => format!("{cache_salt}: had no limit\n"),
            }),
            Action::Purge { .. } => {
                print_json(&answer)?;
                if answer["complete"] != true {
                    bail!(
                        "{} bytes are still in use by requests that are not the tenant's own: purge again",
                        answer["l1"]["bytes_left"]
                    );
                }
                Ok(())
            }
            Action::CheckReceipt { .. } => print(&format!(
                "the receipt is whole; none of its {} objects is in its place in the pool\n",
                answer["checked"]
            )),
            Action::Reload => print(&format!("{} tenants are in force\n", answer["tenants"])),
            Action::Budget { name, .. } => {
                let size = |field: &str| answer[field].as_f64().map_or("none".to_owned(), bytes);
                print(&format!(
                    "{name}: floor {}, weight {}, cap {}, {}\n",
                    size("floor_bytes"),
                    answer["weight"],
                    size("cap_bytes"),
                    how_long(&answer),
                ))
            }
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

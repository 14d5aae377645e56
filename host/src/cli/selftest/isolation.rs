//! Whether one tenant can learn what another has cached.
//!
//! For each ordered pair the first tenant (the owner) stores a prompt, and the second (the
//! prober) asks for it in every way it has: without a salt, with each of the owner's salts, under
//! the owner's request id. No answer may tell; nor may the time of an answer, for which lookups of
//! what is cached and of what nobody has take turns. The owner's own lookups are the positive
//! control: they must find the prompt, and their times must tell a hit from a miss, or the test
//! could not have seen a leak on this machine today.

use std::{collections::HashMap, time::Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use stockade_transport::{Credentials, Endpoint, Mechanism};

use super::super::{
    bench::client::{Client, Layout, Prompt, Worker},
    print, print_json,
};
use crate::{
    config::{Config, Settings},
    tenancy::{Rules, Standing, TenantRules, Unsalted},
};

/// Chunks of the prompt; the more, the longer a hit takes beside a miss.
const CHUNKS: usize = 64;
/// Seconds after which the server forgets what was stored.
const TTL_SECONDS: u32 = 600;
/// Rounds between two looks at the control.
const BATCH: usize = 100;
/// The control's deviation from chance at which its times tell hits from misses.
const CONTROL_Z: f64 = 6.0;
/// The probe's deviation from chance at which its times tell; chance alone gives it to one pair
/// in 15 000.
const PROBE_Z: f64 = 4.0;
/// Most salts of the owner that are tried.
const MAX_SALTS: usize = 8;

/// Arguments of `stockade selftest isolation`.
#[derive(Debug, Args)]
pub(super) struct Isolation {
    /// The settings that the server was started with, which name the tenants and listeners
    #[command(flatten)]
    settings: Box<Settings>,
    /// Where a listener is reached, if not where the settings say; repeatable
    #[arg(long = "url", value_name = "LISTENER=URL", help_heading = "Self-test")]
    urls: Vec<String>,
    /// Leave a tenant out; repeatable
    #[arg(long, value_name = "TENANT", help_heading = "Self-test")]
    skip: Vec<String>,
    /// Most timed rounds per pair
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4000,
        help_heading = "Self-test"
    )]
    rounds: usize,
    /// Print JSON instead of a table
    #[arg(long, help_heading = "Self-test")]
    json: bool,
}

/// A way in as a tenant.
#[derive(Debug, Clone)]
struct Door {
    tenant: String,
    url: String,
    /// What its requests carry.
    salt: String,
    /// All of its salts.
    salts: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// Nothing told the prober, and the control shows that it could have.
    KeptApart,
    /// The prober can learn what the owner has.
    Leaks,
    /// The control failed.
    Inconclusive,
}

/// What one pair showed.
#[derive(Debug, Serialize)]
struct Finding {
    owner: String,
    prober: String,
    verdict: Verdict,
    /// What told, or why nothing could have.
    why: String,
    rounds: usize,
    control_z: f64,
    probe_z: f64,
}

impl Isolation {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = Config::load(*self.settings)?;
        let urls = self
            .urls
            .iter()
            .map(|text| {
                text.split_once('=')
                    .map(|(name, url)| (name.to_owned(), url.to_owned()))
                    .with_context(|| format!("--url {text}: give LISTENER=URL"))
            })
            .collect::<anyhow::Result<HashMap<_, _>>>()?;
        let mut doors = Vec::new();
        for tenant in config.tenant_rules.tenants() {
            if !self.skip.iter().any(|name| **name == *tenant.name) {
                doors.push(door(&config, &urls, tenant)?);
            }
        }
        if doors.len() < 2 {
            bail!("there are less than two tenants to try against each other");
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut findings = Vec::new();
        for owner in &doors {
            for prober in doors.iter().filter(|it| it.tenant != owner.tenant) {
                let number = findings.len() as u64;
                let tried = runtime.block_on(try_pair(owner, prober, number, self.rounds));
                findings.push(tried.unwrap_or_else(|error| Finding {
                    why: format!("{error:#}"),
                    ..Finding::new(owner, prober)
                }));
            }
        }
        let failed = findings
            .iter()
            .filter(|it| it.verdict != Verdict::KeptApart)
            .count();
        if self.json {
            print_json(&serde_json::json!({"ok": failed == 0, "pairs": findings}))?;
        } else {
            print(&table(&findings))?;
        }
        if failed > 0 {
            bail!(
                "{failed} of {} pairs are not shown to be kept apart",
                findings.len()
            );
        }
        Ok(())
    }
}

/// How this process gets in as the tenant.
fn door(
    config: &Config,
    urls: &HashMap<String, String>,
    tenant: &TenantRules,
) -> anyhow::Result<Door> {
    let rules: &Rules = &config.tenant_rules;
    for listener in &config.listeners {
        // The client that this program has speaks NULL only.
        if !matches!(listener.mechanism, Mechanism::Null) {
            continue;
        }
        let is_local = matches!(listener.endpoint, Some(Endpoint::Ipc(_)));
        let own = is_local.then(|| Credentials {
            pid: None,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        });
        let is_its_own = match rules.standing(&listener.name, None, own) {
            Standing::Tenant(found) => found.name == tenant.name,
            Standing::Open => tenant.binding.is_empty(),
            Standing::Stranger => false,
        };
        if !is_its_own {
            continue;
        }
        let url = match (urls.get(&*listener.name), &listener.endpoint) {
            (Some(url), _) => url.clone(),
            (None, Some(endpoint)) => endpoint.to_string(),
            (None, None) => format!("tcp://{}:{}", config.host, config.port),
        };
        let mut salts: Vec<String> = tenant
            .salts
            .iter()
            .flatten()
            .map(|salt| salt.as_str().to_owned())
            .collect();
        salts.sort_unstable();
        let is_by_default =
            !tenant.binding.is_empty() && matches!(tenant.unsalted, Unsalted::Default(_));
        let salt = match is_by_default {
            true => String::new(),
            false => salts.first().cloned().unwrap_or_default(),
        };
        return Ok(Door {
            tenant: tenant.name.to_string(),
            url,
            salt,
            salts,
        });
    }
    bail!(
        "tenant {} cannot be tried: this user reaches none of its listeners without a password or key; run it as one of its users, or leave it out with --skip {}",
        tenant.name,
        tenant.name
    )
}

impl Finding {
    fn new(owner: &Door, prober: &Door) -> Self {
        Self {
            owner: owner.tenant.clone(),
            prober: prober.tenant.clone(),
            verdict: Verdict::Inconclusive,
            why: String::new(),
            rounds: 0,
            control_z: 0.0,
            probe_z: 0.0,
        }
    }
}

async fn try_pair(
    owner: &Door,
    prober: &Door,
    number: u64,
    most_rounds: usize,
) -> anyhow::Result<Finding> {
    let mut finding = Finding::new(owner, prober);
    let chunk_tokens = Client::connect(&owner.url)
        .await
        .with_context(|| format!("tenant {}", owner.tenant))?
        .chunk_size()
        .await?;
    let layout = Layout::of(chunk_tokens, 0);
    // The same number on both sides, which each tenant has for itself.
    let instance = fastrand::u64(1 << 40..1 << 50);
    let as_tenant = |door: &Door| format!("as tenant {} at {}", door.tenant, door.url);
    let mut own = Worker::register(&owner.url, instance, layout)
        .await
        .with_context(|| as_tenant(owner))?;
    let mut other = Worker::register(&prober.url, instance, layout)
        .await
        .with_context(|| as_tenant(prober))?;
    let seed = fastrand::u64(..);
    let tag = format!("stockade-selftest-{seed:016x}-{number}");
    let first = fastrand::u32(..1 << 20);
    let prompt = |salt: &str, first: u32| {
        Prompt::new(CHUNKS * chunk_tokens, seed, salt)
            .lasting(TTL_SECONDS)
            .renamed(first)
    };
    let cached = prompt(&owner.salt, first);
    let stored = own.store(&cached, &format!("{tag}-store"), seed).await?;
    own.client.end_session(&format!("{tag}-store")).await?;
    let found = own
        .client
        .lookup(&cached, &format!("{tag}-control"))
        .await?;
    if stored.is_none() || found < CHUNKS {
        finding.why = format!(
            "the owner itself finds {found} of {CHUNKS} chunks that it stored; give it room for them"
        );
        return Ok(finding);
    }

    // What the answers tell. The owner's session is alive and has locks.
    let mut tells = Vec::new();
    let mut salts = vec![String::new()];
    salts.extend(owner.salts.iter().take(MAX_SALTS).cloned());
    salts.dedup();
    for (at, salt) in salts.iter().enumerate() {
        let request = format!("{tag}-probe-{at}");
        let found = other.client.lookup(&prompt(salt, first), &request).await?;
        other.client.end_session(&request).await?;
        if found > 0 {
            let what = if salt.is_empty() {
                "no salt"
            } else {
                "a salt of the owner"
            };
            tells.push(format!("a lookup with {what} finds {found} chunks"));
        }
    }
    let status = other.client.status(&format!("{tag}-control")).await?;
    if status > 0 {
        tells.push("the result of the owner's request can be asked for".to_owned());
    }
    let forged = prompt(owner.salts.first().map_or("", String::as_str), first);
    if other
        .is_retrievable(&forged, &format!("{tag}-control"))
        .await?
    {
        tells.push("what the owner's request has locked can be retrieved".to_owned());
    }
    own.client.end_session(&format!("{tag}-control")).await?;

    // What the times tell.
    let mut control = (Vec::new(), Vec::new());
    let mut probe = (Vec::new(), Vec::new());
    let mut fresh = first;
    let forged_salt = owner.salts.first().map_or("", String::as_str);
    while finding.rounds < most_rounds {
        for _ in 0..BATCH {
            finding.rounds += 1;
            let request = format!("{tag}-{}", finding.rounds);
            // Each side in an order of its own, so that what one lookup leaves in the processor's
            // caches is not taken for what it finds.
            for (client, salt, samples) in [
                (&mut own.client, owner.salt.as_str(), &mut control),
                (&mut other.client, forged_salt, &mut probe),
            ] {
                let hit_first = fastrand::bool();
                for is_hit in [hit_first, !hit_first] {
                    fresh = fresh.wrapping_add(1);
                    let at = if is_hit { first } else { fresh | 1 << 21 };
                    let time = timed(client, &prompt(salt, at), &request).await?;
                    let samples = if is_hit {
                        &mut samples.0
                    } else {
                        &mut samples.1
                    };
                    samples.push(time);
                }
            }
        }
        finding.control_z = rank_z(&control.0, &control.1);
        if finding.control_z >= CONTROL_Z {
            break;
        }
    }
    finding.probe_z = rank_z(&probe.0, &probe.1);
    if finding.probe_z.abs() >= PROBE_Z {
        tells.push(format!(
            "lookups of what the owner has take another time (z {:.1})",
            finding.probe_z
        ));
    }
    own.unregister().await?;
    other.unregister().await?;
    (finding.verdict, finding.why) = if !tells.is_empty() {
        (Verdict::Leaks, tells.join("; "))
    } else if finding.control_z < CONTROL_Z {
        let why = "the owner's own times do not tell hits from misses; raise --rounds, or try on a calmer machine";
        (Verdict::Inconclusive, why.to_owned())
    } else {
        (Verdict::KeptApart, String::new())
    };
    Ok(finding)
}

/// Nanoseconds that a lookup takes; what it locked is given back.
async fn timed(client: &mut Client, prompt: &Prompt, request: &str) -> anyhow::Result<f64> {
    let began = Instant::now();
    client.lookup(prompt, request).await?;
    let time = began.elapsed();
    client.end_session(request).await?;
    Ok(time.as_secs_f64() * 1e9)
}

/// How far the first samples lie above the second ones, in standard deviations of what chance
/// gives (Mann and Whitney's rank-sum test).
fn rank_z(first: &[f64], second: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = first
        .iter()
        .map(|&value| (value, true))
        .chain(second.iter().map(|&value| (value, false)))
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut sum = 0.0;
    let mut start = 0;
    while let Some(&(value, _)) = all.get(start) {
        let equal = all.iter().skip(start).take_while(|it| it.0 == value);
        let (count, of_first) = equal.fold((0, 0), |(count, own), it| {
            (count + 1, own + usize::from(it.1))
        });
        // Equal values share the mean of their ranks.
        let rank = start as f64 + (count as f64 + 1.0) / 2.0;
        sum += rank * of_first as f64;
        start += count;
    }
    let (n, m) = (first.len() as f64, second.len() as f64);
    let u = sum - n * (n + 1.0) / 2.0;
    let spread = (n * m * (n + m + 1.0) / 12.0).sqrt();
    if spread == 0.0 {
        return 0.0;
    }
    (u - n * m / 2.0) / spread
}

fn table(findings: &[Finding]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "OWNER",
        "PROBER",
        "VERDICT",
        "ROUNDS",
        "CONTROL Z",
        "PROBE Z",
        "",
    ]);
    for finding in findings {
        table.add_row([
            finding.owner.clone(),
            finding.prober.clone(),
            match finding.verdict {
                Verdict::KeptApart => "kept apart",
                Verdict::Leaks => "LEAKS",
                Verdict::Inconclusive => "INCONCLUSIVE",
            }
            .to_owned(),
            finding.rounds.to_string(),
            format!("{:.1}", finding.control_z),
            format!("{:.1}", finding.probe_z),
            finding.why.clone(),
        ]);
    }
    format!("{}\n", table.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_tell_shifted_samples_from_equal_ones() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut noise =
            |shift: f64| -> Vec<f64> { (0..400).map(|_| random.f64() + shift).collect() };
        let (a, b, shifted) = (noise(0.0), noise(0.0), noise(0.3));
        assert!(rank_z(&a, &b).abs() < PROBE_Z, "{}", rank_z(&a, &b));
        assert!(rank_z(&shifted, &a) > CONTROL_Z);
        assert!(rank_z(&a, &shifted) < -CONTROL_Z);
        assert_eq!(rank_z(&[1.0; 50], &[1.0; 50]), 0.0);
        assert_eq!(rank_z(&[], &[]), 0.0);
    }
}

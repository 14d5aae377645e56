//! The flags of the second tier.

use std::time::Duration;

use stockade_l2::AdapterSpec;

use super::{GIB, Settings, seconds};
use crate::tier::{PrefetchPolicy, StorePolicy, TierConfig};

/// Checks what is said about the second tier; `None` without an adapter.
///
/// # Errors
/// One sentence that names the flag, the field and the way out, and no secret.
pub(super) fn check(settings: &Settings) -> Result<Option<TierConfig>, String> {
    let environment = |name: &str| std::env::var(name).ok();
    let adapters = settings
        .l2_adapter
        .iter()
        .flatten()
        .map(|text| {
            AdapterSpec::parse(text, &environment).map_err(|error| format!("--l2-adapter {error}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let store_policy = match settings.l2_store_policy.as_deref().unwrap_or("default") {
        "default" => StorePolicy::Default,
        "skip_l1" => StorePolicy::SkipL1,
        other => {
            return Err(format!(
                "--l2-store-policy {other}: give default or skip_l1"
            ));
        }
    };
    let prefetch_policy = match settings.l2_prefetch_policy.as_deref().unwrap_or("default") {
        "default" => PrefetchPolicy::Default,
        "retain" => PrefetchPolicy::Retain,
        other => {
            return Err(format!(
                "--l2-prefetch-policy {other}: give default or retain"
            ));
        }
    };
    let deadline = |flag: &str, given: Option<f64>, default: f64| -> Result<Duration, String> {
        let value = given.unwrap_or(default);
        match seconds(flag, value)? {
            Duration::ZERO => Err(format!("--{flag} {value}: give seconds above 0")),
            deadline => Ok(deadline),
        }
    };
    let prefetch_max_in_flight = settings.l2_prefetch_max_in_flight.unwrap_or(8) as usize;
    if !(1..=4096).contains(&prefetch_max_in_flight) {
        return Err(format!(
            "--l2-prefetch-max-in-flight {prefetch_max_in_flight}: give a number from 1 to 4096"
        ));
    }
    let queue_gb = settings.l2_store_queue_gb.unwrap_or(8.0);
    if !queue_gb.is_finite() || !(0.0..=1e6).contains(&queue_gb) || queue_gb == 0.0 {
        return Err(format!(
            "--l2-store-queue-gb {queue_gb}: give a number of GiB above 0"
        ));
    }
    let config = TierConfig {
        store_policy,
        prefetch_policy,
        prefetch_max_in_flight,
        lookup_deadline: deadline(
            "l2-lookup-deadline-seconds",
            settings.l2_lookup_deadline_seconds,
            1.0,
        )?,
        prefetch_deadline: deadline(
            "l2-prefetch-deadline-seconds",
            settings.l2_prefetch_deadline_seconds,
            10.0,
        )?,
        store_deadline: deadline(
            "l2-store-deadline-seconds",
            settings.l2_store_deadline_seconds,
            30.0,
        )?,
        store_queue_items: settings.l2_store_queue_items.unwrap_or(65_536) as usize,
        store_queue_bytes: (queue_gb * GIB) as u64,
        adapters,
    };
    Ok((!config.adapters.is_empty()).then_some(config))
}

//! Rounds of faults on a running server, and after each of them an audit: no lock, reservation or
//! byte is left, no wrong byte is served, and a fresh client is served soon.
//!
//! ```text
//! cargo build --workspace --bins
//! cargo test --workspace --test chaos                             # 50 rounds
//! STOCKADE_CHAOS_ROUNDS=10000 STOCKADE_CHAOS_WORLDS=4 STOCKADE_CHAOS_STRICT=1 \
//!     cargo test --workspace --test chaos
//! STOCKADE_CHAOS_SEED=7 STOCKADE_CHAOS_ROUNDS=120..121 ...              # one round again
//! ```
//!
//! `STOCKADE_CHAOS_FAULT` keeps to the faults of that name. With `STOCKADE_CHAOS_STRICT` a client
//! that is not served within a second fails the run, which only a quiet machine can promise;
//! otherwise such rounds are counted. Every round is decided by the seed and its own number, so
//! that it can be run alone; what the rounds before it left in the cache is then missing.
//!
//! The program runs in namespaces of its own where it may, so that it can fill `/dev/shm`. As root it
//! also makes a file system in a file for the second tier, whose disk it can stop.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and this one reports by itself"
)]

mod audit;
mod faults;
mod prompt;
mod victim;
mod world;

use std::{
    collections::BTreeMap,
    ops::Range,
    panic::AssertUnwindSafe,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use crate::{faults::Fault, world::World};

/// In which a client must be served after a fault has ended.
const SERVED_WITHIN: Duration = Duration::from_secs(1);
/// Size of the disk under the second tier.
const DISK_MIB: u32 = 256;
/// Size of the `/dev/shm` that is filled: two pools, because a client that outlives a killed server
/// keeps the old one while the next server makes its own, and some for what is beside them.
const SHM_MIB: u32 = 160;

fn setting(name: &str) -> Option<String> {
    std::env::var(format!("STOCKADE_CHAOS_{name}")).ok()
}

fn rounds() -> Range<u64> {
    let text = setting("ROUNDS").unwrap_or_else(|| "50".to_owned());
    let number = |text: &str| {
        text.parse()
            .unwrap_or_else(|_| panic!("STOCKADE_CHAOS_ROUNDS={text}: give COUNT or FIRST..END"))
    };
    match text.split_once("..") {
        Some((first, end)) => number(first)..number(end),
        None => 0..number(&text),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("victim") => victim::main(&arguments[2..]),
        Some("world") => return world_main(),
        _ => {}
    }
    let seed = setting("SEED").unwrap_or_else(|| fastrand::u64(..1 << 32).to_string());
    let worlds: u64 = setting("WORLDS").map_or(1, |text| text.parse().unwrap());
    let rounds = rounds();
    println!(
        "chaos: seed {seed}, rounds {}..{}",
        rounds.start, rounds.end
    );
    let share = (rounds.end - rounds.start).div_ceil(worlds.max(1));
    let mut children = Vec::new();
    for world in 0..worlds.max(1) {
        let first = (rounds.start + world * share).min(rounds.end);
        let end = (first + share).min(rounds.end);
        let child = enter_namespaces(&arguments[0])
            .env("STOCKADE_CHAOS_SEED", &seed)
            .env("STOCKADE_CHAOS_ROUNDS", format!("{first}..{end}"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        children.push(child);
    }
    let failed = children
        .iter_mut()
        .filter_map(|child| (!child.wait().unwrap().success()).then_some(()))
        .count();
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// This program again as a world, where possible with a `/dev/shm` and a disk of its own.
fn enter_namespaces(program: &str) -> Command {
    // In a namespace of users no disk can be stopped, and root needs none to mount.
    let of_users: &[&str] = if rustix::process::geteuid().is_root() {
        &[]
    } else {
        &["--user", "--map-root-user"]
    };
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(of_users);
        command.args(["--mount", "--propagation", "private"]);
        command.args(["sh", "-c", script, program]);
        command
    };
    let may = |script: &str| {
        let status = unshare(script).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if !may("mount -t tmpfs chaos /dev/shm") {
        println!("chaos: no namespaces of our own here, so a full /dev/shm is NOT TRIED");
        let mut command = Command::new(program);
        command.arg("world");
        return command;
    }
    // The tmpfs holds the image and is the place where it is mounted: both end with the namespace.
    let disk = format!(
        "mount -t tmpfs chaos /mnt && truncate -s {DISK_MIB}m /mnt/image && mkfs.ext4 -q /mnt/image \
         && mkdir /mnt/disk && mount -o loop /mnt/image /mnt/disk"
    );
    let with_disk = if may(&disk) {
        format!("{disk} && export STOCKADE_CHAOS_DISK=/mnt/disk")
    } else {
        println!("chaos: no loop device here, so there is no second tier with a disk to stop");
        "true".to_owned()
    };
    unshare(&format!(
        "mount -t tmpfs -o size={SHM_MIB}m chaos /dev/shm && {with_disk} \
         && STOCKADE_CHAOS_OWN_SHM=1 exec \"$0\" world"
    ))
}

/// What happened in one kind of round.
#[derive(Default)]
struct Tally {
    rounds: u64,
    late: u64,
    slowest: Duration,
}

fn world_main() -> ExitCode {
    let seed: u64 = setting("SEED").unwrap().parse().unwrap();
    let is_strict = setting("STRICT").is_some();
    let only = setting("FAULT");
    let rounds = rounds();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let mut world = World::begin(seed);
    let faults = Fault::possible(&world, only.as_deref());
    assert!(!faults.is_empty(), "no fault is named {only:?}");
    let started = Instant::now();
    for round in rounds.clone() {
        let mut rng = fastrand::Rng::with_seed(seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let fault = Fault::choose(&faults, &mut rng);
        let run = std::panic::catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let ended = fault.happen(&mut world, &mut rng).await;
                audit::audit(&mut world, &mut rng, round, ended).await
            })
        }));
        let Ok(served) = run else {
            println!("chaos: FAILED in round {round} ({}), after:", fault.name());
            println!("{}", world.history());
            println!(
                "chaos: again: STOCKADE_CHAOS_SEED={seed} STOCKADE_CHAOS_ROUNDS={round}..{} (or from some rounds before)",
                round + 1
            );
            println!("chaos: log of the server:\n{}", world.log_tail());
            return ExitCode::FAILURE;
        };
        let tally = tallies.entry(fault.name()).or_default();
        tally.rounds += 1;
        tally.slowest = tally.slowest.max(served);
        if served > SERVED_WITHIN {
            tally.late += 1;
            println!(
                "chaos: round {round} ({}): a client was served after {served:?}",
                fault.name()
            );
        }
        if round % 500 == 499 {
            println!(
                "chaos: {} rounds in {:?}",
                round + 1 - rounds.start,
                started.elapsed()
            );
        }
    }
    runtime.block_on(audit::at_the_end(&mut world));
    for (name, tally) in &tallies {
        println!(
            "chaos: {:>5} x {name:<22} served within {:>6.1} ms at most",
            tally.rounds,
            tally.slowest.as_secs_f64() * 1e3
        );
    }
    let late: u64 = tallies.values().map(|tally| tally.late).sum();
    println!(
        "chaos: seed {seed}, rounds {}..{} in {:?}: no lock or byte lost, {} chunks read back right, {late} clients served after more than {SERVED_WITHIN:?}",
        rounds.start,
        rounds.end,
        started.elapsed(),
        world.chunks_compared
    );
    if is_strict && late > 0 {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

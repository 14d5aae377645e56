//! What is done to the server and its clients.

use std::{
    io::Write as _,
    net::TcpStream,
    time::{Duration, Instant},
};

use rustix::process::{PidfdFlags, Resource, Rlimit, Signal};
use stockade_tests::wait_for;

use crate::{
    audit,
    prompt::Prompt,
    victim::{Step, Victim},
    world::{StoppedDisk, World, becomes, descendants, has_ended},
};

/// Longer than every lease of the world's server.
const PAST_ALL_LEASES: Duration = Duration::from_millis(1400);

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `kill -9` of a client at a step of the protocol.
    ClientKilledAtStep,
    /// `kill -9` of a client that works, at any moment.
    ClientKilledSomewhen,
    /// `kill -9` of several clients at once.
    CrowdKilled,
    /// A client is stopped until its leases have ended, and goes on.
    ClientStopped,
    /// `kill -9` of a plugin's process.
    PluginKilled,
    /// `kill -9` of the server, and a start on what it left.
    ServerKilled,
    /// The server is stopped and goes on: its clocks jump forward.
    ServerStopped,
    /// `/dev/shm` is full.
    ShmFull,
    /// The server has no descriptors left.
    NoDescriptors,
    /// The wall clock jumps, forward or back.
    ClockJumped,
    /// The disk under the second tier takes no write for a while.
    DiskStopped,
}

/// Faults, how often each comes among the sum of all, and its name.
const FAULTS: [(Fault, u32, &str); 11] = [
    (Fault::ClientKilledAtStep, 60, "client-killed-at-step"),
    (Fault::ClientKilledSomewhen, 20, "client-killed-somewhen"),
    (Fault::CrowdKilled, 4, "crowd-killed"),
    (Fault::ClientStopped, 3, "client-stopped"),
    (Fault::PluginKilled, 4, "plugin-killed"),
    (Fault::ServerKilled, 4, "server-killed"),
    (Fault::ServerStopped, 2, "server-stopped"),
    (Fault::ShmFull, 3, "shm-full"),
    (Fault::NoDescriptors, 4, "no-descriptors"),
    (Fault::ClockJumped, 4, "clock-jumped"),
    (Fault::DiskStopped, 4, "disk-stopped"),
];

impl Fault {
    /// The faults that can happen here.
    pub(crate) fn possible(world: &World, only: Option<&str>) -> Vec<Self> {
        let mut possible = Vec::new();
        for (fault, weight, name) in FAULTS {
            let missing = match fault {
                Self::ShmFull if !world.has_own_shm => "a /dev/shm of our own",
                Self::ClockJumped if world.clock_library.is_none() => {
                    "libfaketime (Debian: faketime)"
                }
                Self::DiskStopped if world.disk.is_none() => "a disk of our own",
                _ => "",
            };
            if !missing.is_empty() {
                println!("chaos: {name} is NOT TRIED: there is no {missing}");
            } else if only.is_none_or(|only| only == name) {
                possible.extend(std::iter::repeat_n(fault, weight as usize));
            }
        }
        possible
    }

    /// One of them.
    pub(crate) fn choose(possible: &[Self], rng: &mut fastrand::Rng) -> Self {
        possible[rng.usize(..possible.len())]
    }

    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        FAULTS.iter().find(|(fault, ..)| *fault == self).unwrap().2
    }

    /// Lets it happen; the time at which it was over.
    pub(crate) async fn happen(self, world: &mut World, rng: &mut fastrand::Rng) -> Instant {
        let name = self.name();
        match self {
            Self::ClientKilledAtStep => {
                let (url, step) = (world.any_url(rng), any_step(rng));
                world.note(format!("{name}: {step:?} over {url}"));
                let mut victim = Victim::start(&url, rng.u64(..), step);
                victim.await_line("stopped");
                victim.kill();
            }
            Self::ClientKilledSomewhen => {
                let (url, after) = (world.any_url(rng), rng.u64(..30_000));
                world.note(format!("{name}: after {after} us over {url}"));
                let mut victim = Victim::start(&url, rng.u64(..), Step::Never);
                tokio::time::sleep(Duration::from_micros(after)).await;
                victim.kill();
            }
            Self::CrowdKilled => {
                let mut crowd = Vec::new();
                for _ in 0..rng.usize(3..10) {
                    let (url, step) = (world.any_url(rng), any_step(rng));
                    world.note(format!("{name}: {step:?} over {url}"));
                    crowd.push(Victim::start(&url, rng.u64(..), step));
                }
                for victim in &mut crowd {
                    victim.await_line("stopped");
                }
                for victim in &mut crowd {
                    victim.kill();
                }
            }
            Self::ClientStopped => client_stopped(world, rng).await,
            Self::PluginKilled => plugin_killed(world, rng).await,
            Self::ServerKilled => {
                // Some die with clients at work, whose replies never come.
                let mut victim = rng
                    .bool()
                    .then(|| Victim::start_with_doomed_server(&world.ipc(), rng.u64(..)));
                let after = rng.u64(..20_000);
                world.note(format!(
                    "{name}: after {after} us, client {}",
                    victim.is_some()
                ));
                tokio::time::sleep(Duration::from_micros(after)).await;
                let started = world.restart_after_kill();
                if let Some(victim) = &mut victim {
                    victim.kill_after_server();
                }
                return started;
            }
            Self::ServerStopped => {
                let mut victim = Victim::start(&world.ipc(), rng.u64(..), Step::CopiedIn);
                victim.await_line("stopped");
                world.note(format!("{name}: with a client that has copied"));
                world.server.signal(Signal::STOP);
                tokio::time::sleep(PAST_ALL_LEASES).await;
                world.server.signal(Signal::CONT);
                let ended = Instant::now();
                victim.go_on();
                // Whether the lease or the commit is first, it must not be both.
                victim.await_line("outcome");
                victim.kill();
                return ended;
            }
            Self::ShmFull => shm_full(world, rng).await,
            Self::NoDescriptors => no_descriptors(world, rng).await,
            Self::DiskStopped => disk_stopped(world, rng).await,
            Self::ClockJumped => {
                const HOUR: i64 = 3600;
                let by = [HOUR, -HOUR, 87_600 * HOUR, -87_600 * HOUR][rng.usize(..4)];
                world.note(format!("{name}: {by} s"));
                let mut victim = Victim::start(&world.ipc(), rng.u64(..), Step::Never);
                world.shift_clock(by).await;
                let round = rng.u64(1 << 40..1 << 41);
                let mut worker = audit::worker(world, round).await;
                audit::store(&mut worker, Prompt::fresh(round), "jumped").await;
                drop(worker);
                victim.kill();
                if rng.bool() {
                    world.shift_clock(0).await;
                }
            }
        }
        Instant::now()
    }
}

fn any_step(rng: &mut fastrand::Rng) -> Step {
    Step::ALL[rng.usize(..Step::ALL.len())]
}

/// A client that sleeps over its leases must be told that they have ended.
async fn client_stopped(world: &mut World, rng: &mut fastrand::Rng) {
    let steps = [
        Step::CopiedIn,
        Step::LookedUp,
        Step::PreparedRetrieve,
        Step::MidCopyOut,
    ];
    let (url, step) = (world.any_url(rng), steps[rng.usize(..steps.len())]);
    world.note(format!("client-stopped: {step:?} over {url}"));
    let mut victim = Victim::start(&url, rng.u64(..), step);
    victim.await_line("stopped");
    victim.signal(Signal::STOP);
    tokio::time::sleep(PAST_ALL_LEASES).await;
    // Others must not have to wait for it meanwhile, nor get what it holds.
    let round = rng.u64(1 << 40..1 << 41);
    let mut worker = audit::worker(world, round).await;
    audit::store(&mut worker, Prompt::fresh(round), "meanwhile").await;
    audit::read_back(world, &mut worker, Prompt::fresh(round), "meanwhile-read").await;
    worker.client.call(15, &[worker.id.into()]).await.value();
    victim.signal(Signal::CONT);
    victim.go_on();
    let outcome = victim.await_line("outcome");
    if step != Step::LookedUp {
        assert_eq!(
            outcome, "outcome refused",
            "a commit after the end of its lease"
        );
    }
    victim.kill();
}

async fn plugin_killed(world: &mut World, rng: &mut fastrand::Rng) {
    becomes("a running plugin", || async {
        let plugin = world.server.json("/v1/plugins/looper").await;
        let state = plugin["state"].as_str().unwrap().to_owned();
        if state != "running" {
            // Its backoff doubles with every kill; an operator need not wait for it.
            world
                .server
                .http("POST", "/v1/plugins/looper/start", "")
                .await;
        }
        let has_process = !descendants(world.server.pid()).is_empty();
        if state == "running" && has_process {
            return Ok(());
        }
        Err(state)
    })
    .await;
    let processes = descendants(world.server.pid());
    let process = processes[rng.usize(..processes.len())];
    world.note(format!(
        "plugin-killed: one of {} processes",
        processes.len()
    ));
    let Ok(handle) = rustix::process::pidfd_open(process, PidfdFlags::empty()) else {
        return;
    };
    let _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
    wait_for("the end of a killed plugin's process", || {
        has_ended(&handle).then_some(())
    });
    if rng.bool() {
        let (status, body) = world
            .server
            .http("POST", "/v1/plugins/ticker/restart", "")
            .await;
        assert!(status < 500, "{status} {body}");
    }
}

/// Who stores and reads what is in memory does not wait for a disk that takes nothing.
async fn disk_stopped(world: &mut World, rng: &mut fastrand::Rng) {
    let disk = world.disk.clone().unwrap();
    let for_ms = rng.u64(..1500);
    let mut victim = Victim::start(&world.ipc(), rng.u64(..), Step::Never);
    world.note(format!("disk-stopped: for {for_ms} ms"));
    let stopped = StoppedDisk::stop(&disk);
    let begun = Instant::now();
    loop {
        let round = rng.u64(1 << 40..1 << 41);
        let mut worker = audit::worker(world, round).await;
        audit::store(&mut worker, Prompt::fresh(round), "stopped").await;
        audit::read_back(world, &mut worker, Prompt::fresh(round), "stopped-read").await;
        worker.client.call(15, &[worker.id.into()]).await.value();
        if begun.elapsed() >= Duration::from_millis(for_ms) {
            break;
        }
    }
    assert!(
        begun.elapsed() < Duration::from_millis(for_ms) + crate::SERVED_WITHIN,
        "a client waited for a stopped disk"
    );
    victim.kill();
    drop(stopped);
}

async fn shm_full(world: &mut World, rng: &mut fastrand::Rng) {
    let ballast = "/dev/shm/ballast";
    let mut file = std::fs::File::create(ballast).unwrap();
    let block = vec![1_u8; 1 << 20];
    let mut blocks = 0;
    while file.write_all(&block).is_ok() {
        blocks += 1;
        assert!(blocks < 4096, "/dev/shm does not fill up");
    }
    world.note(format!("shm-full: after {blocks} MiB"));
    let round = rng.u64(1 << 40..1 << 41);
    let mut worker = audit::worker(world, round).await;
    audit::store(&mut worker, Prompt::fresh(round), "full").await;
    audit::read_back(world, &mut worker, Prompt::fresh(round), "full-read").await;
    worker.client.call(15, &[worker.id.into()]).await.value();
    if rng.u8(..4) == 0 {
        let (code, log) = world.try_another_server();
        assert!(
            code.is_some_and(|code| code != 0 && code != 124) && log.contains("/dev/shm"),
            "a server without room ended with {code:?}: {log}"
        );
        let left = "/dev/shm/stockade-chaos-another";
        assert!(!std::path::Path::new(left).exists(), "{left} is left");
    }
    std::fs::remove_file(ballast).unwrap();
}

async fn no_descriptors(world: &mut World, rng: &mut fastrand::Rng) {
    let round = rng.u64(1 << 40..1 << 41);
    let mut worker = audit::worker(world, round).await;
    let pid = rustix::process::Pid::from_raw(world.server.pid());
    let open = std::fs::read_dir(format!("/proc/{}/fd", world.server.pid()));
    let open = open.unwrap().count() as u64;
    let spare = rng.u64(..4);
    let before = rustix::process::prlimit(
        pid,
        Resource::Nofile,
        Rlimit {
            current: Some(open + spare),
            maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
        },
    );
    world.note(format!("no-descriptors: {open} open, {spare} more allowed"));
    let http = world.server.http.clone();
    let addresses = [world.server.addr.clone(), http];
    let crowd: Vec<_> = (0..24)
        .map(|number| TcpStream::connect(&addresses[number % 2]))
        .collect();
    // Who is connected goes on being served.
    audit::store(&mut worker, Prompt::fresh(round), "starved").await;
    audit::read_back(world, &mut worker, Prompt::fresh(round), "starved-read").await;
    worker.client.call(15, &[worker.id.into()]).await.value();
    if rng.bool() {
        drop(crowd);
        rustix::process::prlimit(pid, Resource::Nofile, before.unwrap()).unwrap();
    } else {
        rustix::process::prlimit(pid, Resource::Nofile, before.unwrap()).unwrap();
        drop(crowd);
    }
}

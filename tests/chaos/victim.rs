//! A client in a process of its own, which stops at a step of the protocol to be killed there.

use std::{
    io::{BufRead as _, Write as _},
    net::TcpStream,
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use rmpv::Value;
use rustix::process::{Pid, Signal};
use stockade_tests::{Client, Key, Reply, field, map, registration};

use crate::prompt::{MAX_CHUNKS, Prompt};

/// Where a victim stops, in the order of a client's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Connected, nothing sent.
    Connected,
    /// Half of the greeting sent.
    HalfGreeting,
    /// A frame announced and not sent.
    HalfMessage,
    /// The registration sent, its reply not read.
    RegisterSent,
    Registered,
    Subscribed,
    PrepareStoreSent,
    /// Slots are reserved.
    PreparedStore,
    /// Half of the slots are filled.
    MidCopyIn,
    CopiedIn,
    CommitStoreSent,
    Stored,
    LookupSent,
    /// Locks are held by the request.
    LookedUp,
    PrefetchQueried,
    PrepareRetrieveSent,
    /// Locks are held by the worker.
    PreparedRetrieve,
    MidCopyOut,
    CommitRetrieveSent,
    Retrieved,
    FreeLocksSent,
    EndSessionSent,
    UnregisterSent,
    /// Every kind of request sent at once, no reply read.
    Flooded,
    /// None: it works until it is killed.
    Never,
}

impl Step {
    /// All at which a victim can be killed.
    pub(crate) const ALL: [Self; 24] = [
        Self::Connected,
        Self::HalfGreeting,
        Self::HalfMessage,
        Self::RegisterSent,
        Self::Registered,
        Self::Subscribed,
        Self::PrepareStoreSent,
        Self::PreparedStore,
        Self::MidCopyIn,
        Self::CopiedIn,
        Self::CommitStoreSent,
        Self::Stored,
        Self::LookupSent,
        Self::LookedUp,
        Self::PrefetchQueried,
        Self::PrepareRetrieveSent,
        Self::PreparedRetrieve,
        Self::MidCopyOut,
        Self::CommitRetrieveSent,
        Self::Retrieved,
        Self::FreeLocksSent,
        Self::EndSessionSent,
        Self::UnregisterSent,
        Self::Flooded,
    ];

    fn from_name(name: &str) -> Self {
        let found = Self::ALL.into_iter().find(|it| format!("{it:?}") == name);
        found.unwrap_or(Self::Never)
    }
}

/// Exit code of a victim that has read what was never stored there.
const WRONG_BYTE: i32 = 86;

/// A victim as its murderer has it.
pub(crate) struct Victim {
    child: Child,
    input: ChildStdin,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Victim {
    /// Starts one that will stop at `step`.
    pub(crate) fn start(url: &str, seed: u64, step: Step) -> Self {
        Self::spawn(url, seed, step, Stdio::inherit())
    }

    /// Starts one that works until its server is killed, of which it need not complain.
    pub(crate) fn start_with_doomed_server(url: &str, seed: u64) -> Self {
        Self::spawn(url, seed, Step::Never, Stdio::null())
    }

    fn spawn(url: &str, seed: u64, step: Step, errors: Stdio) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["victim", url, &seed.to_string(), &format!("{step:?}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        Self {
            input: child.stdin.take().unwrap(),
            lines: output.lines(),
            child,
        }
    }

    /// Waits until it says `text`.
    pub(crate) fn await_line(&mut self, text: &str) -> String {
        loop {
            let line = self.lines.next();
            let line = line.unwrap_or_else(|| panic!("the client ended before it said {text:?}"));
            let line = line.unwrap();
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Lets it go on from where it stopped.
    pub(crate) fn go_on(&mut self) {
        self.input.write_all(b"go\n").unwrap();
    }

    /// Its end, which must not have come before.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait().unwrap();
        assert_eq!(
            status.code(),
            None,
            "a client ended by itself; its stderr says why"
        );
    }

    /// Its end, which the server's may have brought about before.
    pub(crate) fn kill_after_server(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait().unwrap();
        assert_ne!(
            status.code(),
            Some(WRONG_BYTE),
            "a client read a wrong byte"
        );
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The life of a victim; it ends the process.
pub(crate) fn main(arguments: &[String]) -> ! {
    let [url, seed, step] = arguments else {
        panic!("victim URL SEED STEP");
    };
    let mut life = Life {
        url: url.clone(),
        rng: fastrand::Rng::with_seed(seed.parse().unwrap()),
        stop: Step::from_name(step),
        requests: 0,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        life.raw_connections();
        loop {
            life.live().await;
        }
    })
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    output.write_all(format!("{line}\n").as_bytes()).unwrap();
    output.flush().unwrap();
}

/// Waits to be killed, or told to go on.
fn stand_still() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    if line.is_empty() {
        // Whoever started it is gone.
        std::process::exit(0);
    }
}

struct Life {
    url: String,
    rng: fastrand::Rng,
    stop: Step,
    requests: u64,
}

impl Life {
    fn reach(&self, step: Step) {
        if step == self.stop {
            say("stopped");
            stand_still();
        }
    }

    /// What the murderer compares when the victim may go on after its leases have ended.
    fn conclude(&self, step: Step, outcome: &str) {
        if step == self.stop {
            say(&format!("outcome {outcome}"));
            stand_still();
        }
    }

    fn raw_connections(&self) {
        let bytes: &[u8] = match self.stop {
            Step::Connected => b"",
            Step::HalfGreeting => b"\xff\0\0\0\0\0\0\0\0\x7f\x03",
            Step::HalfMessage => {
                b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x03\0\0\0\0\0\x10\0\0abc"
            }
            _ => return,
        };
        if let Some(path) = self.url.strip_prefix("ipc://") {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(bytes).unwrap();
            self.reach(self.stop);
            drop(stream);
        } else {
            let mut stream = TcpStream::connect(self.url.trim_start_matches("tcp://")).unwrap();
            stream.write_all(bytes).unwrap();
            self.reach(self.stop);
            drop(stream);
        }
    }

    fn request(&mut self) -> String {
        self.requests += 1;
        format!("victim-{}-{}", std::process::id(), self.requests)
    }

    async fn live(&mut self) {
        let id = self.rng.u64(1 << 40..1 << 50);
        let mut client = Client::connect(&self.url).await;
        let context = registration(id, crate::prompt::MODEL);
        if self.stop == Step::RegisterSent {
            client.post(&14.into(), &[context]).await;
            self.reach(Step::RegisterSent);
            return;
        }
        let Reply::Value(reply) = client.call(14, &[context]).await else {
            return;
        };
        let segment = Path::new("/dev/shm").join(field(&reply, "shm_name").as_str().unwrap());
        self.reach(Step::Registered);
        if self.stop == Step::Subscribed {
            let arguments = map(&[
                ("instance_id", id.into()),
                ("model_name", crate::prompt::MODEL.into()),
                ("cursor", Value::Nil),
                ("max_events", 16.into()),
            ]);
            client
                .post(&"subscribe_kv_events".into(), &[arguments])
                .await;
            self.reach(Step::Subscribed);
        }
        // Nothing waits for replies that must be read in order after a step of this kind.
        self.store(&mut client, id, &segment).await;
        self.retrieve(&mut client, id, &segment).await;
        client.post(&15.into(), &[id.into()]).await;
        self.reach(Step::UnregisterSent);
    }

    async fn store(&mut self, client: &mut Client, id: u64, segment: &Path) {
        let prompt = Prompt::shared(&mut self.rng);
        let key = prompt.key(Some(0), &self.request());
        if self.stop == Step::PrepareStoreSent {
            client.post(&16.into(), &[key.value(), id.into()]).await;
            self.reach(Step::PrepareStoreSent);
        }
        let Reply::Value(reply) = client.call(16, &[key.value(), id.into()]).await else {
            return;
        };
        self.reach(Step::PreparedStore);
        let context = field(&reply, "context");
        if context.as_map().is_none_or(Vec::is_empty) {
            return;
        }
        let indices = field(context, "chunk_indices").as_array().unwrap();
        let slots = slots(context);
        if slots.is_empty() {
            // All is there already; the next prompt will do.
            return;
        }
        let file = std::fs::File::options().write(true).open(segment).unwrap();
        for (place, (index, (offset, length))) in indices.iter().zip(&slots).enumerate() {
            let kv = prompt.kv(index.as_u64().unwrap(), *length);
            if place == slots.len() / 2 {
                file.write_all_at(&kv[..length / 2], *offset).unwrap();
                self.reach(Step::MidCopyIn);
            }
            file.write_all_at(&kv, *offset).unwrap();
        }
        self.reach(Step::CopiedIn);
        let commit = [key.value(), id.into(), Value::Binary(Vec::new())];
        if self.stop == Step::CommitStoreSent {
            client.post(&17.into(), &commit).await;
            self.reach(Step::CommitStoreSent);
        }
        let committed = client.call(17, &commit).await;
        let is_committed = committed == Reply::Value(true.into());
        self.conclude(
            Step::CopiedIn,
            if is_committed { "committed" } else { "refused" },
        );
        self.reach(Step::Stored);
        client
            .post(&13.into(), &[key.request_id.as_str().into()])
            .await;
        client.receive().await;
    }

    async fn retrieve(&mut self, client: &mut Client, id: u64, segment: &Path) {
        let prompt = Prompt {
            chunks: MAX_CHUNKS,
            ..Prompt::shared(&mut self.rng)
        };
        let request = self.request();
        let scheduler = prompt.key(None, &request);
        let lookup = [scheduler.value(), 1.into()];
        if self.stop == Step::LookupSent {
            client.post(&8.into(), &lookup).await;
            self.reach(Step::LookupSent);
        }
        client.call(8, &lookup).await;
        self.reach(Step::LookedUp);
        let Reply::Value(found) = client.call(9, &[request.as_str().into()]).await else {
            return;
        };
        self.reach(Step::PrefetchQueried);
        let found = usize::try_from(found.as_u64().unwrap_or(0)).unwrap();
        let hit = Prompt {
            chunks: found.min(MAX_CHUNKS),
            ..prompt
        };
        let key = hit.key(Some(0), &request);
        let arguments = [key.value(), id.into()];
        if found > 0 {
            self.read(client, hit, &arguments, segment).await;
        }
        self.conclude(Step::LookedUp, "done");
        if self.stop == Step::Flooded {
            self.flood(client, &key, id).await;
        }
        client.post(&12.into(), &lookup).await;
        self.reach(Step::FreeLocksSent);
        client.receive().await;
        client.post(&13.into(), &[request.as_str().into()]).await;
        self.reach(Step::EndSessionSent);
        client.receive().await;
    }

    async fn read(
        &mut self,
        client: &mut Client,
        hit: Prompt,
        arguments: &[Value],
        segment: &Path,
    ) {
        if self.stop == Step::PrepareRetrieveSent {
            client.post(&18.into(), arguments).await;
            self.reach(Step::PrepareRetrieveSent);
        }
        let Reply::Value(reply) = client.call(18, arguments).await else {
            return;
        };
        if field(&reply, "success") != &Value::from(true) {
            return;
        }
        self.reach(Step::PreparedRetrieve);
        let slots = slots(field(&reply, "context"));
        let file = std::fs::File::open(segment).unwrap();
        let mut chunks = Vec::new();
        for (place, (offset, length)) in slots.iter().enumerate() {
            if place == slots.len() / 2 {
                self.reach(Step::MidCopyOut);
            }
            let mut bytes = vec![0; *length];
            file.read_exact_at(&mut bytes, *offset).unwrap();
            chunks.push(bytes);
        }
        if self.stop == Step::CommitRetrieveSent {
            client.post(&19.into(), arguments).await;
            self.reach(Step::CommitRetrieveSent);
        }
        // Bytes count only after a commit that says they were held all the time.
        let is_valid = client.call(19, arguments).await == Reply::Value(true.into());
        if is_valid && std::panic::catch_unwind(|| hit.compare(&chunks)).is_err() {
            std::process::exit(WRONG_BYTE);
        }
        if let Step::PreparedRetrieve | Step::MidCopyOut = self.stop {
            self.conclude(self.stop, if is_valid { "committed" } else { "refused" });
        }
        self.reach(Step::Retrieved);
    }

    async fn flood(&mut self, client: &mut Client, key: &Key, id: u64) {
        for _ in 0..20 {
            for (operation, arguments) in [
                (16, vec![key.value(), id.into()]),
                (8, vec![key.value(), 1.into()]),
                (18, vec![key.value(), id.into()]),
                (17, vec![key.value(), id.into(), Value::Binary(Vec::new())]),
                (22, vec![id.into()]),
            ] {
                client.post(&Value::from(operation), &arguments).await;
            }
        }
        self.reach(Step::Flooded);
    }
}

/// Offset and length of each slot of a context.
pub(crate) fn slots(context: &Value) -> Vec<(u64, usize)> {
    let slots = field(context, "slots").as_array().unwrap();
    let number = |slot: &Value, name: &str| field(slot, name).as_u64().unwrap();
    slots
        .iter()
        .map(|slot| {
            (
                number(slot, "offset"),
                usize::try_from(number(slot, "length")).unwrap(),
            )
        })
        .collect()
}

/// Where the segment of a registration's reply is.
pub(crate) fn segment(reply: &Value) -> PathBuf {
    Path::new("/dev/shm").join(field(reply, "shm_name").as_str().unwrap())
}

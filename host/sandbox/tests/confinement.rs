//! What confined scripts can touch: exactly what is reported, on machines that give more or less.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use stockade_sandbox::{
    Access, Containment, Directory, Granted, Manifest, NativeConfig, NativePolicy, NativeScript,
    ProcessEnd, Protection, ScriptEnd, ScriptError, ScriptOutput,
};

/// What a run gets on a loaded machine before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of plugins that is nobody's temporary one.
struct Den(tempfile::TempDir);

impl Den {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // Also for scripts that run as another user.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(directory)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }
}

#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl ScriptOutput for Collected {
    async fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

fn config() -> NativeConfig {
    let mut config = NativeConfig::new(std::env::vars_os(), &[]);
    config.keeper_program = env!("CARGO_BIN_EXE_stockade-keeper").into();
    config
}

/// What a run came to: its end, its output and what it was held to.
struct Outcome {
    end: Result<ScriptEnd, ScriptError>,
    text: String,
    granted: Option<Granted>,
}

async fn run(
    path: &Path,
    config: NativeConfig,
    manifest: Manifest,
    variables: Vec<(OsString, OsString)>,
) -> Outcome {
    let script = NativeScript::new("test", path, config, manifest);
    let mut output = Collected::default();
    let collected = output.clone();
    let run = script.run_once(variables, &mut output, std::future::pending());
    let end = tokio::time::timeout(PATIENCE, run).await.expect("an end");
    let text = String::from_utf8_lossy(&collected.0.lock().unwrap()).into_owned();
    Outcome {
        end,
        text,
        granted: script.granted(),
    }
}

/// The containments that this machine gives this user; the weakest is always there.
async fn containments() -> Vec<Containment> {
    let den = Den::new();
    let script = den.file("probe.sh", "exit 0\n");
    let mut available = Vec::new();
    for containment in [
        Containment::PidNamespace,
        Containment::UserPidNamespace,
        Containment::Subreaper,
    ] {
        let mut config = config();
        config.containments = vec![containment];
        let outcome = run(&script, config, Manifest::default(), vec![]).await;
        match outcome.end {
            Ok(_) => available.push(containment),
            Err(ScriptError::NoContainment { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    available
}

/// A keeper on a kernel without some of its system calls, by number.
fn kernel_without(den: &Den, calls: &[i64]) -> PathBuf {
    let wrapper = format!(
        r#"#!/usr/bin/env python3
import ctypes, os, struct, sys
calls = {calls:?}
# Load the call's number; for each: if equal, ENOSYS; else allow.
code = [(0x20, 0, 0, 0)]
for call in calls:
    code += [(0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | 38)]
code.append((0x06, 0, 0, 0x7FFF0000))
filters = b"".join(struct.pack("HBBI", *step) for step in code)
buffer = ctypes.create_string_buffer(filters, len(filters))
program = struct.pack("HL", len(code), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
os.execv("{keeper}", sys.argv)
"#,
        keeper = env!("CARGO_BIN_EXE_stockade-keeper"),
    );
    let path = den.file("old-kernel", &wrapper);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What probe.py printed: attempt to whether it succeeded.
fn attempts(text: &str) -> BTreeMap<String, bool> {
    assert!(text.ends_with("done\n"), "{text}");
    text.lines()
        .filter_map(|line| line.rsplit_once(": "))
        .map(|(name, outcome)| (name.to_owned(), outcome == "ok"))
        .collect()
}

/// What a probe may do, besides what the machine decides.
struct Grant {
    network: bool,
    unix_sockets: bool,
    memory_mib: u32,
}

/// Runs the probe in every way that this machine offers and compares each attempt with what
/// was reported.
async fn probe(grant: Grant, lacking: &[i64]) {
    for containment in containments().await {
        let den = Den::new();
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests/probe.py");
        let script = den.file("plugins/probe.py", &fs::read_to_string(guest).unwrap());
        let outside = den.file("outside/secret", "s3cret");
        let readable = den.file("readable/file", "data");
        let writable = den.file("writable/file", "data");
        let shm = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = den.0.path().join("socket");
        let _unix = UnixListener::bind(&unix).unwrap();
        let targets = serde_json::json!({
            "server": std::process::id(),
            "outside": outside,
            "shadow": "/etc/shadow",
            "shm": shm.path(),
            "read grant": readable,
            "write grant": writable,
            "beside the script": script.with_file_name("new"),
            "into read grant": readable,
            "into write grant": writable,
            "tcp": tcp.local_addr().unwrap().port(),
            "unix": unix,
            "forks": 340,
        });
        let directory = |name: &str, file: &Path, access| {
            let host = file.parent().unwrap().to_owned();
            (name.to_owned(), Directory { host, access })
        };
        let mut manifest = Manifest {
            directories: BTreeMap::from([
                directory("/in", &readable, Access::ReadOnly),
                directory("/out", &writable, Access::ReadWrite),
            ]),
            ..Manifest::default()
        };
        manifest.process.network = grant.network;
        manifest.process.unix_sockets = grant.unix_sockets;
        manifest.process.memory_mib = Some(grant.memory_mib);
        manifest.process.processes = 20;
        let mut config = config();
        config.containments = vec![containment];
        if !lacking.is_empty() {
            config.keeper_program = kernel_without(&den, lacking);
        }
        let variables = vec![("PROBE".into(), targets.to_string().into())];
        let outcome = run(&script, config, manifest, variables).await;
        assert_eq!(
            outcome.end.unwrap().process,
            Some(ProcessEnd::Exited(0)),
            "{}",
            outcome.text
        );
        let granted = outcome.granted.unwrap();
        let holds = |protection| granted.protections.contains(&protection);
        let is_root = rustix::process::geteuid().is_root();
        let (files, calls) = (holds(Protection::Landlock), holds(Protection::Seccomp));
        let hidden = holds(Protection::PidNamespace);
        let is_read_only = holds(Protection::ReadOnlySystem);
        assert_eq!(is_read_only, hidden, "{granted}");
        let expected = [
            ("secret in the environment", false),
            (
                "environment of the server",
                !(hidden || files || is_root && holds(Protection::NoCapabilities)),
            ),
            (
                "signal to the server",
                !hidden && !holds(Protection::SignalScope),
            ),
            ("read of outside", !files),
            ("read of shadow", !files && is_root),
            // Under a mount namespace another file system lies there.
            ("read of shm", !files && !hidden),
            ("read of read grant", true),
            ("read of write grant", true),
            ("change of the mode of outside", !is_read_only),
            ("change of the mode of read grant", !is_read_only),
            ("change of the mode of write grant", true),
            ("write beside the script", !files && !is_read_only),
            ("write into read grant", !files && !is_read_only),
            ("write into write grant", true),
            ("temporary file", holds(Protection::PrivateTmp)),
            ("execution of a temporary file", !files && !hidden),
            (
                "connection by TCP",
                grant.network || !holds(Protection::NoNetwork),
            ),
            ("connection by UNIX socket", grant.unix_sockets || !calls),
            ("raw packets", !holds(Protection::NoCapabilities)),
            ("capability", !holds(Protection::NoCapabilities)),
            ("new user namespace", !calls),
            ("memory of 1 GiB", grant.memory_mib > 1024),
            ("fork bomb", !holds(Protection::ProcessLimit)),
        ];
        let expected: BTreeMap<String, bool> = expected
            .into_iter()
            .map(|(name, outcome)| (name.to_owned(), outcome))
            .collect();
        assert_eq!(
            attempts(&outcome.text),
            expected,
            "{containment:?}, held to {granted}"
        );
        assert_eq!(fs::read(&outside).unwrap(), b"s3cret");
        let no_network = !grant.network && (calls || hidden);
        assert_eq!(holds(Protection::NoNetwork), no_network, "{granted}");
    }
}

#[tokio::test]
async fn what_a_probe_can_do_is_what_is_reported() {
    probe(
        Grant {
            network: true,
            unix_sockets: false,
            memory_mib: 512,
        },
        &[],
    )
    .await;
}

#[tokio::test]
async fn a_probe_without_network_and_with_sockets_and_memory() {
    probe(
        Grant {
            network: false,
            unix_sockets: true,
            memory_mib: 4096,
        },
        &[],
    )
    .await;
}

#[tokio::test]
async fn an_old_kernel_is_reported_as_it_is() {
    let landlock_create_ruleset = libc::SYS_landlock_create_ruleset;
    for lacking in [
        &[landlock_create_ruleset][..],
        &[libc::SYS_seccomp],
        &[landlock_create_ruleset, libc::SYS_seccomp],
    ] {
        probe(
            Grant {
                network: false,
                unix_sockets: false,
                memory_mib: 512,
            },
            lacking,
        )
        .await;
    }
}

#[tokio::test]
async fn what_a_manifest_requires_is_there_or_the_script_is_refused() {
    let den = Den::new();
    let script = den.file("a.sh", "echo ran\n");
    let requiring = |protection| {
        let mut manifest = Manifest::default();
        manifest.process.required = vec![protection];
        manifest
    };
    for (protection, call) in [
        (Protection::Landlock, libc::SYS_landlock_create_ruleset),
        (Protection::Seccomp, libc::SYS_seccomp),
    ] {
        let mut old = config();
        old.keeper_program = kernel_without(&den, &[call]);
        let outcome = run(&script, old, requiring(protection), vec![]).await;
        let error = outcome.end.unwrap_err();
        assert!(matches!(error, ScriptError::Required { .. }), "{error:?}");
        assert!(error.to_string().contains(protection.name()), "{error}");
        assert_eq!(outcome.text, "", "nothing of it ran");

        let outcome = run(&script, config(), requiring(protection), vec![]).await;
        let is_here = match outcome.end {
            Ok(_) => outcome.text == "ran\n",
            Err(error) => !error.to_string().is_empty(),
        };
        assert!(is_here);
    }
    // An operator who confines nothing cannot satisfy a plugin that insists.
    let mut unconfined = config();
    unconfined.policy = NativePolicy::Allow;
    let outcome = run(&script, unconfined, requiring(Protection::Seccomp), vec![]).await;
    assert!(matches!(outcome.end, Err(ScriptError::Required { .. })));
}

#[tokio::test]
async fn what_cannot_be_granted_is_refused_by_name() {
    let den = Den::new();
    let script = den.file("a.sh", "echo ran\n");
    let directory = Directory {
        host: "/nowhere".into(),
        access: Access::ReadOnly,
    };
    let manifest = Manifest {
        directories: BTreeMap::from([("/data".to_owned(), directory)]),
        ..Manifest::default()
    };
    let end = run(&script, config(), manifest, vec![]).await.end;
    let error = end.unwrap_err();
    assert!(matches!(error, ScriptError::Directory { .. }), "{error:?}");
    assert!(error.to_string().contains("/nowhere"), "{error}");
    let mut manifest = Manifest::default();
    manifest.process.user = Some("no-such-user".to_owned());
    let error = run(&script, config(), manifest, vec![])
        .await
        .end
        .unwrap_err();
    assert!(error.to_string().contains("no-such-user"), "{error}");
}

#[tokio::test]
async fn a_script_can_run_as_another_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let den = Den::new();
    // Where the other user can read it; the target directory may lie in root's home.
    let place = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = place.path().join("a.sh");
    fs::write(
        &script,
        "id -u; id -g; id -G; mktemp > /dev/null && echo tmp\n",
    )
    .unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o644)).unwrap();
    let nobody = nix_user("nobody");
    for containment in containments().await {
        let mut config = config();
        config.containments = vec![containment];
        let mut manifest = Manifest::default();
        manifest.process.user = Some("nobody".to_owned());
        manifest.process.required = vec![Protection::ProcessLimit, Protection::NoCapabilities];
        let outcome = run(&script, config, manifest, vec![]).await;
        let expected = format!("{}\n{}\n{}\ntmp\n", nobody.0, nobody.1, nobody.1);
        assert_eq!(outcome.text, expected, "{containment:?} {:?}", outcome.end);
    }
    drop(den);
}

fn nix_user(name: &str) -> (String, String) {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd
        .lines()
        .find(|line| line.starts_with(&format!("{name}:")))
        .unwrap();
    let fields: Vec<&str> = line.split(':').collect();
    (fields[2].to_owned(), fields[3].to_owned())
}

#[tokio::test]
async fn ordinary_plugins_notice_nothing() {
    let bash = r#"
        set -eu
        cat <<< here-string > /dev/stderr
        cat <(echo substituted)
        echo piped | tr a-z A-Z
        t=$(mktemp); echo kept > "$t"; mv "$t" "$t.2"; cat "$t.2"; rm "$t.2"
        . "$(dirname "$0")/beside.sh"
        kill -0 $$ && (sleep 100 & kill $!) && echo signals
        ls /usr/bin > /dev/null && command -v python3 > /dev/null && echo programs
        cd "$(pwd)" && echo directory
    "#;
    let python = r#"
import asyncio, ctypes, hashlib, json, multiprocessing, os, select, signal, socket, sqlite3, ssl
import subprocess, sys, tempfile, threading, time, urllib.request, zoneinfo
import beside
print(beside.WORD)
print(subprocess.run(["sh", "-c", "echo child"], capture_output=True, text=True).stdout.strip())
ssl.create_default_context()
print(socket.getaddrinfo("localhost", 80)[0][4][0] in ("127.0.0.1", "::1"))
with tempfile.TemporaryDirectory() as directory:
    sqlite3.connect(os.path.join(directory, "a.db")).execute("create table t (x)")
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
if os.access("/dev/shm", os.W_OK) and "stockade" in open("/proc/mounts").read():
    print(multiprocessing.get_context("fork").Pool(2).map(abs, [-1, -2]))
else:
    print([1, 2])  # Semaphores lie in /dev/shm, which is the script's own in a namespace only.
asyncio.run(asyncio.sleep(0))
print(time.localtime().tm_year > 2000, os.cpu_count() > 0)
"#;
    for containment in containments().await {
        let den = Den::new();
        den.file("beside.sh", "echo sourced\n");
        den.file("beside.py", "WORD = 'imported'\n");
        let mut config = config();
        config.containments = vec![containment];
        let script = den.file("a.sh", bash);
        let outcome = run(&script, config.clone(), Manifest::default(), vec![]).await;
        assert_eq!(
            outcome.text,
            "here-string\nsubstituted\nPIPED\nkept\nsourced\nsignals\nprograms\ndirectory\n",
            "{containment:?}"
        );
        let script = den.file("p.py", python);
        let outcome = run(&script, config, Manifest::default(), vec![]).await;
        assert_eq!(
            outcome.text, "imported\nchild\nTrue\nthread\n[1, 2]\nTrue True\n",
            "{containment:?}"
        );
    }
}

#[tokio::test]
async fn temporary_files_go_with_the_script() {
    let name = format!("stockade-test-{}", std::process::id());
    for containment in containments().await {
        for place in [
            tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")),
            tempfile::tempdir(),
        ] {
            let place = place.unwrap();
            let script = place.path().join("a.sh");
            let body = format!(
                "t=${{TMPDIR:?}}/{name}; mkdir $t && touch $t/file && ln -s / $t/link && [ $XDG_CACHE_HOME = $TMPDIR ] && echo $TMPDIR\n"
            );
            fs::write(&script, body).unwrap();
            let mut config = config();
            config.containments = vec![containment];
            let outcome = run(&script, config, Manifest::default(), vec![]).await;
            let directory = outcome.text.trim_end();
            assert!(
                directory.starts_with('/'),
                "{outcome:?}",
                outcome = outcome.text
            );
            assert!(
                !Path::new(directory).join(&name).exists(),
                "{containment:?}"
            );
        }
    }
}

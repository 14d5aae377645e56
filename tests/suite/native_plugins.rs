//! Scripts beside a real server: how far they are trusted, and that none outlives it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use stockade_tests::{Server, root, wait_for};

/// What the product promises for the time after any end of the server.
const SURVIVAL_LIMIT: Duration = Duration::from_secs(2);

/// How often the server is killed; the promise was tried with 100.
const ROUNDS: &str = "STOCKADE_KILL_ROUNDS";

fn plugin(directory: &Path, name: &str, text: &str) {
    let directory_text = directory.to_str().unwrap();
    fs::write(directory.join(name), text.replace("$DIR", directory_text)).unwrap();
}

#[tokio::test]
async fn what_scripts_may_touch_is_the_operators_choice_and_is_told() {
    for (policy, state, is_confined) in [
        (None, "exited", true),
        (Some("confined"), "exited", true),
        (Some("allow"), "exited", false),
        (Some("deny"), "refused", false),
    ] {
        let plugins = tempfile::tempdir().unwrap();
        plugin(plugins.path(), "a.sh", "echo ran\n");
        plugin(
            plugins.path(),
            "b.wat",
            "(module (func (export \"_start\")))",
        );
        let mut flags = vec![
            "--runtime-plugin-locations",
            plugins.path().to_str().unwrap(),
        ];
        if let Some(policy) = policy {
            flags.extend(["--native-plugins", policy]);
        }
        let mut server = Server::start(&flags);
        server.wait_for_line("plugin `b` exited with code 0");
        server.wait_for_line(match state {
            "refused" => "plugin `a` is refused: this server runs no scripts",
            _ => "plugin `a` exited with code 0",
        });
        let status = server.json("/v1/plugins/a").await;
        assert_eq!(status["state"], state, "{policy:?}");
        if state == "refused" {
            assert!(status["granted"].is_null(), "{status}");
            continue;
        }
        let told = server.wait_for_line("held to");
        let granted = &status["granted"];
        let asked = |name: &str| {
            let holds = granted["protections"]
                .as_array()
                .unwrap()
                .contains(&name.into());
            holds || granted["missing"].get(name).is_some()
        };
        for protection in ["landlock", "seccomp", "no-capabilities", "private-tmp"] {
            assert_eq!(asked(protection), is_confined, "{policy:?} {granted}");
            assert_eq!(told.contains(protection), is_confined, "{told}");
        }
    }
}

#[test]
fn an_unknown_policy_is_named() {
    let output = std::process::Command::new(stockade_tests::binary())
        .args(["serve", "--l1-size-gb", "1", "--native-plugins", "maybe"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("--native-plugins maybe"), "{error}");
    assert!(error.contains("allow, confined or deny"), "{error}");
}

/// Twenty plugins of all kinds that want to stay; each script says `up` when it is ready to
/// be killed. `$DIR/nap` is `sleep` under a name that every process of theirs carries.
fn twenty_survivors(directory: &Path) -> usize {
    symlink("/bin/sleep", directory.join("nap")).unwrap();
    let scripts = [
        ("plain.sh", "echo up; $DIR/nap 1000\n"),
        ("waiting.sh", "$DIR/nap 1000 & echo up; wait\n"),
        (
            "deaf.sh",
            "trap '' TERM HUP INT; echo up; while :; do $DIR/nap 1000; done\n",
        ),
        ("session.sh", "setsid $DIR/nap 1000 & echo up; wait\n"),
        (
            "deaf_session.sh",
            "trap '' TERM; (setsid bash -c 'trap \"\" TERM HUP; $DIR/nap 1000' &); echo up; $DIR/nap 1001\n",
        ),
        (
            "double_fork.sh",
            "(setsid bash -c '($DIR/nap 1000 &)' >/dev/null 2>&1 &); echo up; $DIR/nap 1001\n",
        ),
        (
            "daemon.sh",
            "(setsid $DIR/nap 1000 >/dev/null 2>&1 &); echo up; exit 0\n",
        ),
        (
            "many.sh",
            "for i in 1 2 3 4 5 6; do setsid $DIR/nap 1000 & done; echo up; wait\n",
        ),
        ("quiet.sh", "echo up; exec >&- 2>&-; $DIR/nap 1000\n"),
        ("chatty.sh", "echo up; yes $DIR\n"),
    ];
    for (name, text) in scripts {
        plugin(directory, name, text);
    }
    let pythons = [
        (
            "plain.py",
            "import time\nprint('up')\ntime.sleep(1000)  # $DIR\n",
        ),
        (
            "deaf.py",
            "import signal, time\nfor number in (1, 2, 15):\n    signal.signal(number, signal.SIG_IGN)\nprint('up')\nwhile True:\n    time.sleep(1)\n",
        ),
        (
            "child.py",
            "import subprocess\nchild = subprocess.Popen(['$DIR/nap', '1000'], start_new_session=True)\nprint('up')\nchild.wait()\n",
        ),
        (
            "daemon.py",
            "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv('$DIR/nap', ['$DIR/nap', '1000'])\n    os._exit(0)\nprint('up')\n",
        ),
        ("busy.py", "print('up')\nwhile True:\n    pass\n"),
    ];
    for (name, text) in pythons {
        plugin(directory, name, text);
    }
    for guest in [
        "endless_loop",
        "sleeper",
        "waits_for_stop",
        "log_flood",
        "sleep_loop",
    ] {
        let file = format!("{guest}.wat");
        fs::copy(
            root().join("tests/guests").join(&file),
            directory.join(file),
        )
        .unwrap();
    }
    scripts.len() + pythons.len()
}

/// Processes other than servers whose command line has `mark`, and keepers' processes 1 whose
/// keeper is gone.
fn survivors(mark: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let status = || fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let is_orphan = line.contains("__keeper init") && status().contains("\nPPid:\t1\n");
        if (line.contains(mark) && !line.contains(" serve ")) || is_orphan {
            found.push((pid, line));
        }
    }
    found
}

/// Kills what a failed test leaves.
struct Cleanup(String);

impl Drop for Cleanup {
    fn drop(&mut self) {
        for (pid, _) in survivors(&self.0) {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
    }
}

#[test]
fn of_twenty_plugins_none_survives_a_killed_server() {
    let rounds = std::env::var(ROUNDS).map_or(2, |rounds| rounds.parse().unwrap());
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let plugins = tempfile::tempdir().unwrap();
        let directory = plugins.path().to_str().unwrap();
        let _cleanup = Cleanup(directory.to_owned());
        let scripts = twenty_survivors(plugins.path());
        let policy = if round % 2 == 0 { "confined" } else { "allow" };
        let mut server = Server::start(&[
            "--native-plugins",
            policy,
            "--runtime-plugin-locations",
            directory,
        ]);
        server.wait_for_line("[waits_for_stop] ready");
        wait_for("all scripts", || {
            let log = server.log();
            let up = log.iter().filter(|line| line.ends_with("] up")).count();
            (up == scripts).then_some(())
        });
        let living = survivors(directory).len();
        assert!(living >= 2 * scripts, "only {living} processes run");
        server.signal(Signal::KILL);
        let killed = Instant::now();
        server.wait();
        loop {
            let left = survivors(directory);
            if left.is_empty() {
                break;
            }
            assert!(
                killed.elapsed() < SURVIVAL_LIMIT,
                "round {round}, {policy}: {left:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        longest = longest.max(killed.elapsed());
    }
    eprintln!("{rounds} rounds, the last process went after at most {longest:?}");
}

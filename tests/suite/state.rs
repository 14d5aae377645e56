//! What `--state-dir` keeps over a restart, and what is said when it cannot.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use serde_json::{Value, json};
use stockade_tests::{Server, binary};

const FILE: &str = "[tenants.acme]\nsalts = ['a1', 'a2']\nfloor_gb = 0.01\ncap_gb = 0.03\n\
                    [tenants.beta]\nsalts = ['b']\ncap_gb = 0.02\n";
const MIB: u64 = 1 << 20;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        place.configure(FILE);
        place
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn configure(&self, text: &str) {
        fs::write(self.path("stockade.toml"), text).unwrap();
    }

    fn start(&self) -> Server {
        let (file, state) = (self.path("stockade.toml"), self.path("state"));
        Server::start(&["--config", &file, "--state-dir", &state])
    }

    /// What a check of the settings that must fail says.
    fn check(&self) -> String {
        let output = Command::new(binary())
            .args(["config", "check", "--l1-size-gb", "0.0625", "--config"])
            .arg(self.path("stockade.toml"))
            .args(["--state-dir", &self.path("state")])
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What a start that must fail says.
    fn refusal(&self) -> String {
        let output = Command::new(binary())
            .args([
                "serve",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--http-port",
                "0",
            ])
            .args(["--l1-size-gb", "0.0625", "--config"])
            .arg(self.path("stockade.toml"))
            .args(["--state-dir", &self.path("state"), "--plugin-cache-dir"])
            .arg(self.path("cache"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(69), "{text}");
        text
    }
}

async fn put(server: &Server, path: &str, body: &str) -> Value {
    let answer = server.request("PUT", path, &[], body).await;
    assert_eq!(answer.status, 200, "{path} {body}: {answer:?}");
    answer.json()
}

async fn tenant(server: &Server, name: &str) -> Value {
    let mut tenant = server.json(&format!("/v1/tenants/{name}")).await;
    let fields = ["floor_bytes", "weight", "cap_bytes", "set_over_http"];
    fields.iter().map(|field| tenant[*field].take()).collect()
}

fn kill(mut server: Server) {
    server.signal(rustix::process::Signal::KILL);
    assert_eq!(server.wait(), None);
}

#[tokio::test]
async fn budgets_set_over_http_survive_a_kill() {
    let place = Place::new();
    let server = place.start();
    let answer = put(&server, "/quota/made-by-http", "{\"limit_gb\": 0.015625}").await;
    assert_eq!(answer["survives_restart"], true);
    put(&server, "/quota/a2", "{\"limit_gb\": 0.0234375}").await;
    put(
        &server,
        "/v1/tenants/acme",
        "{\"floor_bytes\": 4194304, \"weight\": 7}",
    )
    .await;
    put(&server, "/quota/gone", "{\"limit_gb\": 1}").await;
    let removed = server.http("DELETE", "/quota/gone", "").await.1;
    assert!(removed.contains("removed"), "{removed}");
    server.http("DELETE", "/quota/b", "").await;
    kill(server);

    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.path("state")), 0o700);
    assert_eq!(mode(&place.path("state/tenant-budgets.json")), 0o600);

    let server = place.start();
    let acme = json!([4 * MIB, 7, 24 * MIB, true]);
    assert_eq!(tenant(&server, "acme").await, acme);
    assert_eq!(
        tenant(&server, "made-by-http").await,
        json!([0, 1, 16 * MIB, true])
    );
    // That a limit of the file was taken away is kept as well.
    assert_eq!(tenant(&server, "beta").await, json!([0, 1, null, true]));
    assert_eq!(server.http("GET", "/v1/tenants/gone", "").await.0, 404);
    kill(server);

    // The file says something new about acme: it was the last to speak.
    place.configure(&FILE.replace("cap_gb = 0.03", "cap_gb = 0.04"));
    let mut server = place.start();
    server.wait_for_line("the file says something new about tenant \"acme\"");
    let cap = tenant(&server, "acme").await[2].as_u64().unwrap();
    assert_eq!(cap, (0.04 * (1u64 << 30) as f64) as u64);
    assert_eq!(tenant(&server, "beta").await[3], true);
    kill(server);
    // And what it replaced does not come back with the old text.
    place.configure(FILE);
    let server = place.start();
    assert_eq!(tenant(&server, "acme").await[3], false);
}

#[tokio::test]
async fn without_a_directory_it_is_said_that_a_limit_ends_with_the_server() {
    let server = Server::start(&[]);
    let answer = put(&server, "/quota/t", "{\"limit_gb\": 1}").await;
    assert_eq!(answer["survives_restart"], false);
    for (arguments, expected) in [
        (&["limit", "t", "1"][..], "until the server ends"),
        (&["budget", "t", "--weight", "3"], "weight 3"),
        (&["budget", "t", "--cap-gb", "0.5"], "cap 512.0 MiB"),
        (&["budget", "t", "--no-cap"], "cap none"),
    ] {
        let output = Command::new(binary())
            .arg("tenant")
            .args(arguments)
            .env("STOCKADE_SERVER", format!("http://{}", server.http))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains(expected),
            "{output:?}"
        );
    }
    let answer = server.http("PUT", "/v1/tenants/t", "{\"weight\": 0}").await;
    assert_eq!(answer.0, 400, "{answer:?}");
    let floor = format!("{{\"floor_bytes\": {}}}", 65 * MIB);
    let answer = server.http("PUT", "/v1/tenants/t", &floor).await;
    assert!(answer.0 == 400 && answer.1.contains("floor"), "{answer:?}");
    let everybody = server
        .http("PUT", "/v1/tenants/everybody%20else", "{}")
        .await;
    assert_eq!(everybody.0, 400, "{everybody:?}");
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_stops_the_start_and_is_named() {
    let place = Place::new();
    let server = place.start();
    let in_use = place.refusal();
    assert!(in_use.contains("in use by another server"), "{in_use}");
    put(&server, "/quota/x", "{\"limit_gb\": 1}").await;
    kill(server);

    let path = place.path("state/tenant-budgets.json");
    let good = fs::read_to_string(&path).unwrap();
    let huge_floor = good.replace("\"floor_bytes\": 0", "\"floor_bytes\": 99999999999");
    for (text, why) in [
        (&good[..good.len() / 2], "EOF"),
        ("", "EOF"),
        ("{\"version\": 2, \"budgets\": []}", "of version 2"),
        (&good.replace("weight", "wait"), "unknown field `wait`"),
        (&huge_floor, "cap of"),
        (&good.replace("\"x\"", "\"x@y\""), "cache_salt"),
    ] {
        fs::write(&path, text).unwrap();
        let said = place.refusal();
        assert!(
            said.contains("tenant-budgets.json") && said.contains(why),
            "{text}: {said}"
        );
        // Whether the pool can keep it is found out with the pool; the rest before.
        if !["cap of", "cache_salt"].contains(&why) {
            let said = place.check();
            assert!(
                said.contains("tenant-budgets.json") && said.contains(why),
                "{said}"
            );
        }
    }
    fs::write(&path, good).unwrap();
    drop(place.start());
}

/// A limit that cannot be kept is not set: nobody finds out at the next start.
#[tokio::test]
async fn a_limit_that_cannot_be_kept_is_not_set() {
    let place = Place::new();
    let server = place.start();
    // Root writes anywhere, so the way is barred by something that is no file.
    let barred = Path::new(&place.path("state")).join(".tenant-budgets.json.tmp");
    fs::create_dir_all(barred.join("x")).unwrap();
    for (path, body) in [
        ("/quota/new", "{\"limit_gb\": 1}"),
        ("/quota/a1", "{\"limit_gb\": 0.02}"),
    ] {
        let answer = server.request("PUT", path, &[], body).await;
        assert_eq!(answer.status, 500, "{answer:?}");
        assert_eq!(answer.json()["code"], "state-not-written");
        // Neither the body nor the log of refusals may tell more than the operator needs.
        assert!(!answer.body.contains(&place.path("state")), "{answer:?}");
    }
    assert_eq!(server.http("GET", "/v1/tenants/new", "").await.0, 404);
    let acme = tenant(&server, "acme").await;
    assert_eq!(acme[3], false);
    assert_eq!(acme[2], (0.03 * (1u64 << 30) as f64) as u64);
}

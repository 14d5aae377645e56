//! The audit log: every kind of denial, each one of them.

use super::*;

const OPERATOR: &str = "operators-token-of-many-characters";
const TENANT: &str = "token-of-a-with-many-characters-too";

/// The lines of all files in the directory.
fn lines_in(directory: &Path) -> Vec<serde_json::Value> {
    let files = std::fs::read_dir(directory).unwrap();
    let text: String = files
        .map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap())
        .collect();
    // The last line may be under way.
    let lines = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn every_kind_of_denial_is_in_the_audit_log_one_line_each() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (audit, plugins, token_file) = (path("audit"), path("plugins"), path("tokens.toml"));
    std::fs::create_dir(&plugins).unwrap();
    let guest = stockade_tests::root().join("tests/guests/abi-v1/snoops.wat");
    std::fs::copy(guest, format!("{plugins}/snoops.wat")).unwrap();
    std::fs::write(
        format!("{plugins}/snoops.plugin.toml"),
        "restart = 'never'\ncache = ['keys', 'evict']\n",
    )
    .unwrap();
    let text = format!(
        "[[token]]\nname = 'ops'\nrole = 'operator'\ntoken = '{OPERATOR}'\n\
         [[token]]\nname = 'of a'\nrole = 'tenant'\ntenant = 'a'\ntoken = '{TENANT}'\n"
    );
    std::fs::write(&token_file, text).unwrap();
    std::fs::set_permissions(
        &token_file,
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    let uid = rustix::process::getuid().as_raw() + 1;
    let tables = format!(
        "[tenants.a]\nsalts = ['{SALT_A}']\nlisteners = ['a']\nplugins = ['snoops']\n\
         [tenants.b]\nsalts = ['{SALT_B}']\nlisteners = ['b']\nunsalted = 'refuse'\nmax_in_flight = 1\n\
         [tenants.slow]\nsalts = ['s']\nlisteners = ['slow']\nrequests_per_second = 0.02\nburst = 1\n\
         [tenants.other]\nsalts = ['o']\nlisteners = ['other']\nuids = [{uid}]\n"
    );
    let flags = [
        "--audit-log-dir",
        &audit,
        "--runtime-plugin-locations",
        &plugins,
        "--http-token-file",
        &token_file,
    ];
    let listeners = ["a", "b", "slow", "other"];
    let mut house = House::start(&listeners, &tables, &flags);

    let prompt = tokens_of(1);
    let mut a = Client::connect(&house.url("a")).await;
    // More than the log of the server has lines for.
    for _ in 0..20 {
        assert_eq!(lookup(&mut a, &salted(&prompt, SALT_B, "forged")).await, 0);
    }
    let mut b = Client::connect(&house.url("b")).await;
    assert_eq!(lookup(&mut b, &prompt).await, 0);
    // Large ones, all at once: some find the line of one request full.
    let large = Key::new("m", &tokens(80_000, 1), None, "large");
    for _ in 0..16 {
        b.post(
            &"lookup".into(),
            &[salted(&large, SALT_B, "l").value(), 1.into()],
        )
        .await;
    }
    for _ in 0..16 {
        b.receive().await;
    }
    let call = stockade_tests::map(&[
        ("method", "snoops.x".into()),
        ("payload", Value::Binary(Vec::new())),
    ]);
    b.call("server_module_call", &[call]).await.value();
    let mut stranger = Client::connect(&house.url("other")).await;
    assert_eq!(lookup(&mut stranger, &prompt).await, 0);
    stranger.call("clear", &[true.into()]).await.value();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let url = house.url("slow");
        calls.spawn(async move { Client::connect(&url).await.call(24, &[]).await });
    }
    calls.join_all().await;
    let http = async |token: Option<&str>, path: &str| {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = bearer
            .iter()
            .map(|it| ("Authorization", it.as_str()))
            .collect();
        house.server.request("GET", path, &headers, "").await.status
    };
    assert_eq!(http(None, "/v1/tenants").await, 401);
    assert_eq!(http(Some(TENANT), "/v1/tenants/b").await, 403);
    assert_eq!(http(Some(OPERATOR), "/v1/tenants/b").await, 200);

    // Reason, tenant, and what the line has besides.
    let expected = [
        ("foreign_salt", "a", "lookup"),
        ("unsalted", "b", "lookup"),
        ("in_flight", "b", "lookup"),
        ("stranger", "(stranger)", "lookup"),
        ("scope", "(stranger)", "clear"),
        ("over_rate", "slow", "noop"),
        ("plugin", "a", "keys"),
        ("plugin", "a", "cache_request"),
        ("plugin", "b", "server_module_call"),
        ("http_unauthenticated", "(none)", "GET /v1/tenants"),
        ("http_forbidden", "a", "GET /v1/tenants/b"),
    ];
    let count = |lines: &[serde_json::Value], (reason, tenant, operation)| {
        let is_it = |line: &&serde_json::Value| {
            line["event"] == "denied"
                && line["reason"] == reason
                && line["tenant"] == tenant
                && line["operation"] == operation
        };
        lines.iter().filter(is_it).count()
    };
    let lines = stockade_tests::wait_for("a line of each kind", || {
        let lines = lines_in(Path::new(&audit));
        let missing = expected.iter().find(|it| count(&lines, **it) == 0);
        missing.is_none().then_some(lines)
    });
    assert_eq!(count(&lines, expected[0]), 20, "each one has its line");
    let forged = lines
        .iter()
        .find(|it| it["reason"] == "foreign_salt")
        .unwrap();
    assert!(
        forged["origin"].as_str().unwrap().contains("listener a"),
        "{forged}"
    );
    assert_eq!(forged["salt_blake3"].as_str().unwrap().len(), 16);
    let logged = house.server.log();
    let in_log = |it: &&String| it.contains("denied: lookup") && it.contains("listener a");
    assert!(
        logged.iter().filter(in_log).count() < 20,
        "the log is spared"
    );

    // Nothing that the server was told is lost when it stops.
    let mut more = Client::connect(&house.url("a")).await;
    assert_eq!(
        lookup(&mut more, &salted(&prompt, "nobody's", "last")).await,
        0
    );
    house.server.signal(rustix::process::Signal::TERM);
    assert_eq!(house.server.wait(), Some(0));
    let lines = lines_in(Path::new(&audit));
    assert_eq!(count(&lines, expected[0]), 21);
    let text = serde_json::to_string(&lines).unwrap();
    assert!(
        !text.contains(SALT_A) && !text.contains(SALT_B),
        "salts are secrets"
    );
    use std::os::unix::fs::PermissionsExt as _;
    for file in std::fs::read_dir(&audit).unwrap() {
        let mode = file.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

fn tokens_of(seed: u64) -> Key {
    Key::new("m", &tokens(CHUNK, seed), None, "r")
}

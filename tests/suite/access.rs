//! Who may call the HTTP API, and what the outside never gets to see.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use stockade_tests::{Answer, Client, Server, exchange, root, wait_for};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    },
};

const OPERATOR: &str = "operator-0123456789abcdef01234567";
const READER: &str = "reader-0123456789abcdef0123456789";
const TENANT: &str = "tenant-0123456789abcdef0123456789";
const STRANGER: &str = "stranger-0123456789abcdef01234567";

fn write_tokens(directory: &std::path::Path, extra: &str) -> PathBuf {
    let path = directory.join("tokens.toml");
    let text = format!(
        "[[token]]\nname = 'ops'\nrole = 'operator'\ntoken = '{OPERATOR}'\n\
         [[token]]\nname = 'grafana'\nrole = 'read-only'\ntoken = '{READER}'\n\
         [[token]]\nname = 'acme'\nrole = 'tenant'\ntenant = 'acme'\ntoken = '{TENANT}'\n{extra}"
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

async fn as_caller(server: &Server, token: Option<&str>, method: &str, path: &str) -> Answer {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let headers: Vec<_> = bearer
        .as_deref()
        .map(|bearer| ("Authorization", bearer))
        .into_iter()
        .collect();
    server.request(method, path, &headers, "").await
}

/// Every endpoint of the router against every role. What an endpoint asks for comes from the
/// router's own document; what that means is said here once more.
#[tokio::test]
async fn each_role_reaches_what_it_may_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = write_tokens(directory.path(), "");
    let server = Server::start(&["--http-token-file", tokens.to_str().unwrap()]);
    let document = server.json("/v1/openapi.json").await;
    let mut seen = std::collections::BTreeMap::<String, usize>::new();
    for (template, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let access = operation["x-access"].as_str().unwrap();
            *seen.entry(access.to_owned()).or_default() += 1;
            let path = template
                .replace("tenants/{name}", "tenants/acme")
                .replace("{name}", "nobody")
                .replace("{action}", "restart")
                .replace("{cache_salt}", "acme");
            let method = method.to_uppercase();
            for (token, allowed) in [
                (None, ["public"].as_slice()),
                (Some(STRANGER), &["public"]),
                (Some(TENANT), &["public", "tenant"]),
                (Some(READER), &["public", "tenant", "read"]),
                (Some(OPERATOR), &["public", "tenant", "read", "operate"]),
            ] {
                let answer = as_caller(&server, token, &method, &path).await;
                let is_known = token.is_some_and(|token| token != STRANGER);
                let refusal = if is_known { 403 } else { 401 };
                let got_in = allowed.contains(&access);
                assert_eq!(
                    ![401, 403].contains(&answer.status),
                    got_in,
                    "{method} {path} ({access}) as {token:?}: {answer:?}"
                );
                if !got_in {
                    assert_eq!(answer.status, refusal, "{method} {path} as {token:?}");
                    assert!(
                        answer.head.contains("application/problem+json"),
                        "{answer:?}"
                    );
                }
            }
        }
    }
    for access in ["public", "tenant", "read", "operate"] {
        assert!(seen.contains_key(access), "{seen:?}");
    }
    // What changes things must not be open to those who may only look.
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            assert!(
                method == "get" || operation["x-access"] == "operate",
                "{method} {path} changes things for {}",
                operation["x-access"]
            );
        }
    }
}

#[tokio::test]
async fn a_tenant_sees_itself_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = write_tokens(directory.path(), "");
    let file = directory.path().join("stockade.toml");
    fs::write(
        &file,
        "[tenants.acme]\nsalts = ['a1', 'a2']\n[tenants.other]\nsalts = ['o']\n",
    )
    .unwrap();
    let flags = [
        "--config",
        file.to_str().unwrap(),
        "--http-token-file",
        tokens.to_str().unwrap(),
    ];
    let server = Server::start(&flags);
    for (path, status) in [
        ("/v1/tenants/acme", 200),
        ("/v1/tenants/other", 403),
        ("/v1/tenants/nobody", 403),
        ("/quota/a1", 200),
        ("/quota/o", 403),
        ("/quota/somebody", 403),
        ("/quota/_default", 403),
    ] {
        let answer = as_caller(&server, Some(TENANT), "GET", path).await;
        assert_eq!(answer.status, status, "{path}: {answer:?}");
    }
    let all = as_caller(&server, Some(TENANT), "GET", "/v1/tenants")
        .await
        .json();
    let names: Vec<_> = all["tenants"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tenant| tenant["name"].clone())
        .collect();
    assert_eq!(names, ["acme"]);
    let all = as_caller(&server, Some(READER), "GET", "/v1/tenants")
        .await
        .json();
    assert_eq!(all["tenants"].as_array().unwrap().len(), 3, "{all}");
}

#[tokio::test]
async fn tokens_are_read_again_when_the_file_changes() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = write_tokens(directory.path(), "");
    let server = Server::start(&["--http-token-file", tokens.to_str().unwrap()]);
    assert_eq!(
        as_caller(&server, Some(STRANGER), "GET", "/status")
            .await
            .status,
        401
    );
    let extra = format!("[[token]]\nname = 'new'\nrole = 'read-only'\ntoken = '{STRANGER}'\n");
    write_tokens(directory.path(), &extra);
    server.signal(rustix::process::Signal::HUP);
    for _ in 0..1000 {
        if as_caller(&server, Some(STRANGER), "GET", "/status")
            .await
            .status
            == 200
        {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the new token was not taken");
}

#[test]
fn an_open_api_needs_tokens_or_the_word() {
    use std::process::Command;
    let start = |flags: &[&str]| {
        let base = [
            "serve",
            "--l1-size-gb",
            "0.01",
            "--port",
            "0",
            "--http-port",
            "0",
        ];
        let mut command = Command::new(stockade_tests::binary());
        command.args(base).args(flags).output().unwrap()
    };
    let output = start(&["--http-host", "0.0.0.0"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(64), "{text}");
    assert!(
        text.contains("--http-token-file") && text.contains("--http-insecure"),
        "{text}"
    );
    let directory = tempfile::tempdir().unwrap();
    let tokens = write_tokens(directory.path(), "");
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o644)).unwrap();
    let output = start(&["--http-token-file", tokens.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(69), "{text}");
    assert!(
        text.contains("chmod 600") && !text.contains(OPERATOR),
        "{text}"
    );
}

#[tokio::test]
async fn foreign_names_and_pages_are_turned_away_without_tokens() {
    let server = Server::start(&[]);
    let foreign = server
        .request("GET", "/status", &[("Host", "evil.example")], "")
        .await;
    assert_eq!(foreign.status, 403, "{foreign:?}");
    let page = [("Origin", "https://evil.example")];
    assert_eq!(
        server
            .request("POST", "/cache/clear", &page, "")
            .await
            .status,
        403
    );
    let own = format!("http://{}", server.http);
    let own = [("Origin", own.as_str())];
    assert_eq!(
        server
            .request("POST", "/cache/clear", &own, "")
            .await
            .status,
        200
    );
    let text = server.http("GET", "/metrics", "").await.1;
    assert!(
        text.contains("stockade_http_denied_total{reason=\"cross_origin\"} 2"),
        "{text}"
    );
}

#[tokio::test]
async fn the_unix_socket_is_the_owners_and_needs_no_token() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = write_tokens(directory.path(), "");
    let path = directory.path().join("http.sock");
    let flags = [
        "--http-token-file",
        tokens.to_str().unwrap(),
        "--http-socket",
        path.to_str().unwrap(),
    ];
    let server = Server::start(&flags);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    let answer = exchange(stream, "socket", "POST", "/cache/clear", &[], "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    drop(server);
    assert!(!path.exists());
}

struct Pki {
    directory: tempfile::TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
        Self { directory, ca }
    }

    fn path(&self, name: &str) -> String {
        self.directory
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }

    /// Certificate and key of a name, as files `NAME.pem` and `NAME.key`.
    fn issue(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params =
            CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn connector(&self, client: Option<&str>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match client {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let chain =
                    CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap();
                let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
                builder.with_client_auth_cert(vec![chain], key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }
}

async fn over_tls(server: &Server, connector: &TlsConnector) -> Option<Answer> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let stream = tokio::net::TcpStream::connect(&server.http).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = connector.connect(name, stream).await.ok()?;
    let request = "GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = Vec::new();
    let read = stream.read_to_end(&mut text).await;
    let text = String::from_utf8_lossy(&text).into_owned();
    // TLS 1.3 tells a client only here that its certificate was not good enough.
    let (head, body) = text.split_once("\r\n\r\n").filter(|_| read.is_ok())?;
    Some(Answer {
        status: head.split(' ').nth(1)?.parse().ok()?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}

#[tokio::test]
async fn tls_is_spoken_and_client_certificates_are_asked_for() {
    let pki = Pki::new();
    pki.issue("server");
    pki.issue("client");
    let (cert, key, ca) = (
        pki.path("server.pem"),
        pki.path("server.key"),
        pki.path("ca.pem"),
    );
    let server = Server::start(&["--http-tls-cert", &cert, "--http-tls-key", &key]);
    let answer = over_tls(&server, &pki.connector(None)).await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let cli = std::process::Command::new(stockade_tests::binary())
        .args(["status", "--json", "--ca-file", &ca, "--server"])
        .arg(format!("https://{}", server.http))
        .output()
        .unwrap();
    assert!(
        cli.status.success(),
        "{}",
        String::from_utf8_lossy(&cli.stderr)
    );
    drop(server);
    let flags = [
        "--http-tls-cert",
        &cert,
        "--http-tls-key",
        &key,
        "--http-client-ca",
        &ca,
    ];
    let server = Server::start(&flags);
    assert!(over_tls(&server, &pki.connector(None)).await.is_none());
    let stranger = Pki::new();
    stranger.issue("client");
    for file in ["client.pem", "client.key"] {
        fs::copy(stranger.path(file), pki.path(&format!("stranger-{file}"))).unwrap();
    }
    assert!(
        over_tls(&server, &pki.connector(Some("stranger-client")))
            .await
            .is_none()
    );
    let answer = over_tls(&server, &pki.connector(Some("client")))
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// Secrets that are told apart from everything else, in each place that holds one.
#[tokio::test]
async fn secrets_stay_where_they_were_put() {
    const MARK: &str = "c4n4ry";
    let pki = Pki::new();
    pki.issue("server");
    let directory = tempfile::tempdir().unwrap();
    let secret = |name: &str| format!("{MARK}-{name}-0123456789abcdef0123");
    let token = secret("token");
    let extra = format!("[[token]]\nname = 'canary'\nrole = 'operator'\ntoken = '{token}'\n");
    let tokens = write_tokens(directory.path(), &extra);
    let script = directory.path().join("environment.sh");
    fs::write(&script, "env; echo done-env; sleep 1000\n").unwrap();
    // The key's body is a secret as well: take a line of it as a mark.
    let key_line = fs::read_to_string(pki.path("server.key")).unwrap();
    let key_line = key_line.lines().nth(1).unwrap().to_owned();
    let environment = [
        ("AWS_SECRET_ACCESS_KEY", secret("aws")),
        ("HF_TOKEN", secret("hf")),
        ("REDIS_PASSWORD", secret("redis")),
        ("STOCKADE_UNKNOWN_SECRET", secret("unknown")),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            format!("authorization={}", secret("otlp")),
        ),
    ];
    let environment: Vec<_> = environment
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let guest = root().join("tests/guests/print_environ.wat");
    let flags = [
        "--log-level",
        "trace",
        "--http-token-file",
        tokens.to_str().unwrap(),
        // Nobody listens there, so that what an exporter says of its failures is seen as well.
        "--enable-tracing",
        "--otlp-endpoint",
        "127.0.0.1:1",
        "--runtime-plugin-locations",
        script.to_str().unwrap(),
        guest.to_str().unwrap(),
    ];
    let mut server = Server::start_with_env(&flags, &environment);
    server.wait_for_line("[environment] done-env");
    server.wait_for_line("plugin `print_environ` exited");
    // A client may put a secret where it does not belong, too.
    let mut client = Client::connect(&server.url).await;
    let _ = client.call("noop", &[]).await;
    let wrong = secret("wrong");
    assert_eq!(
        as_caller(&server, Some(&wrong), "GET", "/status")
            .await
            .status,
        401
    );
    let document = server.json("/v1/openapi.json").await;
    for (template, operations) in document["paths"].as_object().unwrap() {
        if operations.get("get").is_none() {
            continue;
        }
        for name in ["environment", "print_environ"] {
            let path = template
                .replace("{name}", name)
                .replace("{cache_salt}", "acme");
            let answer = as_caller(&server, Some(&token), "GET", &path).await;
            for mark in [MARK, &key_line] {
                assert!(!answer.body.contains(mark), "{path}: {}", answer.body);
                assert!(!answer.head.contains(mark), "{path}: {}", answer.head);
            }
        }
    }
    server.wait_for_line("spans were not taken");
    wait_for("the log of the plugins", || {
        let log = server.log();
        log.iter()
            .any(|line| line.contains("[print_environ] LMCACHE_RUNTIME_PLUGIN_CONFIG="))
            .then_some(())
    });
    let log = server.log().join("\n");
    assert!(!log.contains(MARK) && !log.contains(&key_line), "{log}");
}

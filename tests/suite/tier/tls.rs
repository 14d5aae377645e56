//! Storage behind TLS: Redis and S3 with certificates of the test's own.

use std::{path::PathBuf, process::Command, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value as Json, json};
use stockade_tests::{Key, Server, Worker, exchange, tokens};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};

use super::{
    CHUNK, chunks, free_port, lookup, run,
    s3::{bucket_of, moto},
    store,
};

/// Files of a certificate for 127.0.0.1, and of who signed it.
struct Certificates {
    directory: tempfile::TempDir,
}

impl Certificates {
    fn make() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut parameters = CertificateParams::new(Vec::<String>::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &authority).unwrap();
        let made = Self { directory };
        for (name, text) in [
            ("ca.pem", authority.pem()),
            ("cert.pem", certificate.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            std::fs::write(made.file(name), text).unwrap();
        }
        made
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// What is written through TLS is read through it, and nothing is said to a stranger.
async fn is_shared_with_who_is_known(adapter: &Json, certificates: &Certificates) {
    let adapter = adapter.to_string();
    let flags = [
        "--l2-adapter",
        &*adapter,
        "--l2-lookup-deadline-seconds",
        "20",
    ];
    let authority = certificates.file("ca.pem");
    let trusting = [("SSL_CERT_FILE", authority.to_str().unwrap())];
    let prompt = tokens(3 * CHUNK, 95);
    drop({
        let server = Server::start_with_env(&flags, &trusting);
        store(&server, &prompt, 40).await;
        server
    });
    let key = Key::new("org/m", &prompt, Some(0), "r");
    // It knows other authorities only.
    let other = Certificates::make();
    let authority = other.file("ca.pem");
    let server = Server::start_with_env(&flags, &[("SSL_CERT_FILE", authority.to_str().unwrap())]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    assert_eq!(lookup(&mut worker.client, &key).await, 0);
    assert!(server.metric("stockade_l2_failures_total").await >= 1.0);
    drop(server);

    let server = Server::start_with_env(&flags, &trusting);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    assert_eq!(lookup(&mut worker.client, &key).await, 3);
    assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(40, 3));
}

#[tokio::test]
async fn redis_is_reached_through_tls_and_its_certificate_is_checked() {
    let certificates = Certificates::make();
    let port = free_port();
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--port", "0", "--save", ""])
        .args(["--tls-auth-clients", "no", "--tls-port", &port.to_string()]);
    for (flag, name) in [
        ("--tls-cert-file", "cert.pem"),
        ("--tls-key-file", "key.pem"),
        ("--tls-ca-cert-file", "ca.pem"),
    ] {
        command.arg(flag).arg(certificates.file(name));
    }
    let Some(_redis) = run(&mut command, certificates.directory.path(), port) else {
        return;
    };
    let adapter =
        json!({"type": "valkey", "startup_nodes": format!("127.0.0.1:{port}"), "tls_enable": true});
    is_shared_with_who_is_known(&adapter, &certificates).await;
}

#[tokio::test]
async fn s3_is_reached_through_tls_and_its_certificate_is_checked() {
    let certificates = Certificates::make();
    let port = free_port();
    let mut command = moto(port);
    command
        .arg("-s")
        .arg("-c")
        .arg(certificates.file("cert.pem"));
    command.arg("-k").arg(certificates.file("key.pem"));
    let Some(_moto) = run(&mut command, certificates.directory.path(), port) else {
        return;
    };
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(certificates.file("ca.pem")).unwrap())
        .unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(client));
    let host = format!("127.0.0.1:{port}");
    let stream = tokio::net::TcpStream::connect(&host).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    let made = exchange(stream, &host, "PUT", "/bucket", &[], "").await;
    assert_eq!(made.status, 200, "{made:?}");
    is_shared_with_who_is_known(&bucket_of(&host), &certificates).await;
}

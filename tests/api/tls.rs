//! TLS to PostgreSQL: the URL decides how authority and name of a certificate are checked.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;

use testkit::{Database, PostgresServer, TestServer, run};

/// A certificate authority created for this test.
struct Authority(TempDir);

impl Authority {
    fn new() -> Authority {
        let authority = Authority(tempfile::tempdir().unwrap());
        authority.openssl(&[
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
            "-subj",
            "/CN=Authority",
            "-addext",
            "basicConstraints=critical,CA:TRUE",
        ]);
        authority
    }

    /// Returns a certificate for a server of this name and its key.
    fn certificate(&self, name: &str) -> (String, String) {
        let named = format!("subjectAltName=DNS:{name}");
        let subject = [
            "-keyout",
            "server.key",
            "-out",
            "server.crt",
            "-subj",
            "/CN=server",
            "-addext",
            &named,
        ];
        let signed = [
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
        ];

        self.openssl(&[&subject[..], &signed].concat());
        let read = |name: &str| std::fs::read_to_string(self.0.path().join(name)).unwrap();
        (read("server.crt"), read("server.key"))
    }

    fn root(&self) -> String {
        self.0.path().join("ca.crt").display().to_string()
    }

    /// Runs OpenSSL, which Debian's PostgreSQL depends on.
    fn openssl(&self, arguments: &[&str]) {
        let mut openssl = Command::new("openssl");
        let of_all = [
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ];
        let output = openssl
            .args(of_all)
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("openssl is needed for the tests");

        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Returns the error for a rejected database, after asserting exit code 4.
#[track_caller]
fn refused(url: &str) -> String {
    let output = run(&[("DATABASE_URL", url)], &["keys", "list"], b"").with_code(4);
    assert_eq!(output.stdout, "");
    output.stderr
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_mode_in_url_controls_certificate_checks() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.certificate("localhost");
    // The server rejects connections without TLS.
    let files = [
        ("server.crt", certificate),
        ("server.key", key),
        (
            "pg_hba.conf",
            "hostssl all all 127.0.0.1/32 trust\n".to_owned(),
        ),
    ];
    let cluster = Arc::new(PostgresServer::start_durable("-c ssl=on", &files));
    let name = cluster.create_database();
    let url = |host: &str, mode: &str, root: Option<&str>| {
        let root = root
            .map(|root| format!("&sslrootcert={root}"))
            .unwrap_or_default();
        format!(
            "postgres://postgres@{host}:{}/{name}?sslmode={mode}{root}",
            cluster.port()
        )
    };
    let (root, other) = (authority.root(), stranger.root());
    assert!(Path::new(&root).exists() && Path::new(&other).exists());

    let right = [
        url("localhost", "verify-full", Some(&root)),
        url("127.0.0.1", "verify-ca", Some(&root)),
        url("127.0.0.1", "require", None),
    ];
    for right in right {
        let listed = run(&[("DATABASE_URL", &right)], &["keys", "list"], b"");
        assert_eq!(listed.code, 0, "{right}: {}", listed.stderr);
    }
    let error = refused(&url("localhost", "verify-full", Some(&other)));
    assert!(error.contains("certificate"), "another authority: {error}");
    let error = refused(&url("127.0.0.1", "verify-full", Some(&root)));
    assert!(
        error.contains("certificate") && error.contains("name"),
        "another name: {error}"
    );
    let error = refused(&url("localhost", "verify-full", Some("/no/such/file")));
    assert!(
        error.contains("/no/such/file") || error.contains("No such file"),
        "no authority: {error}"
    );
    let error = refused(&url("localhost", "disable", None));
    assert!(error.contains("no encryption"), "without TLS: {error}");

    let server = TestServer::on(
        Database::create_on(&cluster).with_url(|_| url("localhost", "verify-full", Some(&root))),
    )
    .await;
    server.store("a", "in_1").await.with_status(201);
    let paid = json!({"id": "evt_1", "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "data": {"object":
        {"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5, "amount_paid": 5, "amount_remaining": 0}}});
    server.deliver(&paid).await.with_status(200);
    assert_eq!(server.history("a").await.len(), 1);
    let encrypted = "select bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid) where application_name = 'stripe-reconciler'";
    assert_eq!(cluster.sql("postgres", encrypted), "t");
}

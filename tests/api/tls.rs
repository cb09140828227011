//! TLS to PostgreSQL, as the URL asks for it: a certificate is believed if its authority and its name are right.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;

use testkit::{Database, PostgresServer, TestServer, run};

/// Certificates, made for this test.
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

    /// A certificate for a server of this name, and its key.
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

    /// Comes with Debian's PostgreSQL.
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
        let ran = openssl
            .args(of_all)
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("openssl is needed for the tests");
        assert!(
            ran.status.success(),
            "{}",
            String::from_utf8_lossy(&ran.stderr)
        );
    }
}

/// Why a database is refused: code 4, and words.
#[track_caller]
fn refused(url: &str) -> String {
    let ran = run(&[("DATABASE_URL", url)], &["keys", "list"], b"").with_code(4);
    assert_eq!(ran.stdout, "");
    ran.stderr
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_believed_by_its_authority_and_its_name_as_the_url_asks() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.certificate("localhost");
    // Whoever comes without TLS finds no door.
    let files = [
        ("server.crt", certificate),
        ("server.key", key),
        (
            "pg_hba.conf",
            "hostssl all all 127.0.0.1/32 trust\n".to_owned(),
        ),
    ];
    let cluster = Arc::new(PostgresServer::of_its_own("-c ssl=on", &files));
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
    let told = refused(&url("localhost", "verify-full", Some(&other)));
    assert!(told.contains("certificate"), "another authority: {told}");
    let told = refused(&url("127.0.0.1", "verify-full", Some(&root)));
    assert!(
        told.contains("certificate") && told.contains("name"),
        "another name: {told}"
    );
    let told = refused(&url("localhost", "verify-full", Some("/no/such/file")));
    assert!(
        told.contains("/no/such/file") || told.contains("No such file"),
        "no authority: {told}"
    );
    let told = refused(&url("localhost", "disable", None));
    assert!(told.contains("no encryption"), "without TLS: {told}");

    let server = TestServer::on(
        Database::create_on(&cluster).by_way_of(|_| url("localhost", "verify-full", Some(&root))),
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

//! A temporary PgBouncer in transaction mode: each transaction may get another of a few
//! connections.

use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::postgres::{PostgresServer, as_nobody, give_to_nobody};

/// Connections to the server per database.
const CONNECTIONS: u32 = 3;
/// Path of the binary on Debian, which is not in the `PATH` of ordinary users.
const BINARY: &str = "/usr/sbin/pgbouncer";

/// Script that runs PgBouncer until standard input ends, which it does when this process dies in
/// any way, and then removes the folder.
const SERVE_SCRIPT: &str = r#"trap '' INT TERM HUP
"$1" -q "$2/pgbouncer.ini" >"$2/log" 2>&1 </dev/null & p=$!
cat >/dev/null; kill -KILL $p; wait $p 2>/dev/null; rm -rf "$2""#;

pub struct Pooler {
    address: String,
    folder: TempDir,
    shell: Child,
}

impl Pooler {
    /// Starts a pooler on its own port, which distinguishes it from the server.
    pub fn start(server: &PostgresServer) -> Pooler {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        Pooler::start_at("127.0.0.1", port, server)
    }

    /// Starts a pooler on the server's port at another address.
    pub fn start_on_same_port(server: &PostgresServer) -> Pooler {
        Pooler::start_at("127.0.0.2", server.port(), server)
    }

    fn start_at(host: &str, port: u16, server: &PostgresServer) -> Pooler {
        assert!(
            std::path::Path::new(BINARY).exists(),
            "PgBouncer is needed for the tests: apt-get install pgbouncer"
        );

        let folder = tempfile::Builder::new()
            .prefix("stripe-reconciler-pooler-")
            .tempdir()
            .unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            give_to_nobody(&path, 0o600);
            path.display().to_string()
        };
        let users = file("users.txt", "\"postgres\" \"\"\n");
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = {host}\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = trust\nauth_file = {users}\npool_mode = transaction\ndefault_pool_size = {CONNECTIONS}\n",
            server.port()
        );

        file("pgbouncer.ini", &settings);
        give_to_nobody(folder.path(), 0o700);
        let mut shell = as_nobody(Command::new("sh"));
        shell
            .args(["-c", SERVE_SCRIPT, "sh", BINARY])
            .arg(folder.path());
        let shell = shell
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let pooler = Pooler {
            address: format!("{host}:{port}"),
            folder,
            shell,
        };

        pooler.wait_until_ready();
        pooler
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }

    fn wait_until_ready(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&self.address).is_err() {
            let log =
                || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(
                Instant::now() < deadline,
                "PgBouncer does not start: {}",
                log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

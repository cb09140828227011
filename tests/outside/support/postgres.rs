//! A throw-away PostgreSQL, from the server's binaries alone: no server has to be there before, and none is left behind.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// `nobody`: the server refuses to run as root.
const NOBODY: u32 = 65534;

/// Runs the server until its standard input ends, which it does when we die, however we die; then removes the folder.
const UNTIL_WE_DIE: &str = r#"trap '' INT TERM HUP
"$1/postgres" -D "$2/d" -p "$3" -c listen_addresses=127.0.0.1 -c unix_socket_directories= $4 >"$2/log" 2>&1 </dev/null & p=$!
cat >/dev/null; kill -QUIT $p; wait $p; rm -rf "$2""#;

pub struct PostgresServer {
    binaries: PathBuf,
    folder: PathBuf,
    port: u16,
    databases: AtomicU32,
    /// Holds the pipe that keeps the server alive.
    _shell: Child,
}

impl PostgresServer {
    /// One for all tests of this process.
    pub fn shared() -> &'static PostgresServer {
        static SERVER: OnceLock<PostgresServer> = OnceLock::new();
        SERVER.get_or_init(|| PostgresServer::start("-c fsync=off -c max_connections=400"))
    }

    /// A server of its own, with these options; it ends with the process.
    pub fn start(options: &str) -> PostgresServer {
        let binaries = newest_binaries();
        let folder = tempfile::Builder::new().prefix("stripe-reconciler-pg-").tempdir().unwrap().keep();
        let is_root = std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
        if is_root {
            chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        let as_nobody = |command: &mut Command| {
            if is_root {
                command.uid(NOBODY).gid(NOBODY);
            }
            command.current_dir("/");
        };
        let mut initdb = Command::new(binaries.join("initdb"));
        initdb.arg("-D").arg(folder.join("d")).args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]);
        as_nobody(&mut initdb);
        let made = initdb.output().unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));

        let port = free_port();
        let mut shell = Command::new("sh");
        shell.args(["-c", UNTIL_WE_DIE, "sh"]).arg(&binaries).arg(&folder).arg(port.to_string()).arg(options);
        as_nobody(&mut shell);
        let shell = shell.stdin(Stdio::piped()).process_group(0).spawn().unwrap();
        let server = PostgresServer { binaries, folder, port, databases: AtomicU32::new(0), _shell: shell };
        server.wait_until_ready();
        server
    }

    /// The server's own process, whose children serve the connections.
    pub fn pid(&self) -> u32 {
        let text = std::fs::read_to_string(self.folder.join("d/postmaster.pid")).unwrap();
        text.lines().next().and_then(|line| line.parse().ok()).expect("its first line is the process")
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    pub fn create_database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.run("createdb", &["--template=template0", &name]);
        name
    }

    pub fn drop_database(&self, name: &str) {
        self.run("dropdb", &["--force", name]);
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(self.binaries.join(program));
        command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string()]).args(arguments);
        let ran = command.output().unwrap();
        assert!(ran.status.success(), "{program}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    fn wait_until_ready(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut ready = Command::new(self.binaries.join("pg_isready"));
        ready.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
        while !ready.status().unwrap().success() {
            let log = || std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "PostgreSQL does not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn newest_binaries() -> PathBuf {
    let version = |path: &Path| path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u32>().ok());
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path());
    let newest = versions.filter(|path| path.join("bin/initdb").exists()).max_by_key(|path| version(path));
    newest.expect("PostgreSQL's server is needed for the tests: apt-get install postgresql").join("bin")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

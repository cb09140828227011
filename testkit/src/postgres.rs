//! A temporary PostgreSQL started from the server's binaries. It needs no running server and leaves
//! none behind.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// User id of `nobody`, because the server refuses to run as root.
const NOBODY: u32 = 65534;
/// Maximum time for a server to start or to stop.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Script that starts the server for every line on standard input until that ends, which it does
/// when this process dies in any way.
///
/// Then it removes the folder, and tries a second time if a process was still writing into it.
const SERVE_SCRIPT: &str = r#"trap '' INT TERM HUP
while read -r _; do
    [ -z "$p" ] || wait $p
    "$1/postgres" -D "$2/d" -p "$3" -c listen_addresses=127.0.0.1 -c unix_socket_directories= $4 >>"$2/log" 2>&1 </dev/null & p=$!
done
{ kill -CONT $p; kill -QUIT $p; } 2>/dev/null; wait $p
rm -rf "$2" || { sleep 1; rm -rf "$2"; }"#;

pub struct PostgresServer {
    binaries: PathBuf,
    folder: PathBuf,
    port: u16,
    databases: AtomicU32,
    /// Shell that keeps the server alive as long as its standard input is open.
    shell: Child,
}

/// Stopped processes of a server. Dropping this lets them continue.
pub struct Paused(Vec<u32>);

impl PostgresServer {
    /// Returns the server for all tests of this process.
    ///
    /// The program refuses a server with `fsync = off`, and on a disk `fsync` makes each `dropdb`
    /// take two seconds. So the files are in memory, where `fsync` has nothing to do: both cost
    /// there what they cost on a disk without `fsync`.
    pub fn shared() -> &'static Arc<PostgresServer> {
        static SERVER: OnceLock<Arc<PostgresServer>> = OnceLock::new();
        let options = "-c fsync=on -c max_connections=400 -c max_wal_size=256MB";
        SERVER.get_or_init(|| Arc::new(PostgresServer::start(options)))
    }

    /// Starts a server with these options, in memory if there is room.
    ///
    /// It ends with the process.
    pub fn start(options: &str) -> PostgresServer {
        PostgresServer::start_in(&roomy_folder(), options, |binaries, data| {
            let mut initdb = as_nobody(Command::new(binaries.join("initdb")));
            initdb.arg("-D").arg(data).args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ]);
            run_to_success(&mut initdb);
            // A copy of the unused cluster, from which other servers start.
            run_to_success(
                as_nobody(Command::new("cp"))
                    .arg("-a")
                    .arg(data)
                    .arg(data.with_file_name("template")),
            );
        })
    }

    /// Starts a durable server for one test, with these options and files in its folder.
    ///
    /// Dropping it removes it.
    pub fn start_durable(options: &str, files: &[(&str, String)]) -> PostgresServer {
        let template = PostgresServer::shared().folder.join("template");
        PostgresServer::start_in(&std::env::temp_dir(), options, |_, data| {
            run_to_success(
                as_nobody(Command::new("cp"))
                    .arg("-a")
                    .arg(template)
                    .arg(data),
            );
            for (name, text) in files {
                let path = data.join(name);
                std::fs::write(&path, text).unwrap();
                give_to_nobody(&path, 0o600);
            }
        })
    }

    /// Starts a standby that follows another server until it is promoted.
    pub fn standby_of(primary: &PostgresServer) -> PostgresServer {
        let temporary = std::env::temp_dir();
        PostgresServer::start_in(&temporary, "-c fsync=on", |binaries, data| {
            let mut backup = as_nobody(Command::new(binaries.join("pg_basebackup")));
            backup.arg("-D").arg(data).args([
                "-R",
                "-X",
                "stream",
                "--checkpoint=fast",
                "--no-sync",
                "-d",
            ]);
            run_to_success(backup.arg(format!(
                "host=127.0.0.1 port={} user=postgres",
                primary.port
            )));
        })
    }

    /// Starts a server. `prepare` gets the folder of the binaries and the data folder to fill.
    fn start_in(
        parent: &Path,
        options: &str,
        prepare: impl FnOnce(&Path, &Path),
    ) -> PostgresServer {
        let binaries = newest_binaries();
        let folder = tempfile::Builder::new()
            .prefix("stripe-reconciler-pg-")
            .tempdir_in(parent)
            .unwrap()
            .keep();
        give_to_nobody(&folder, 0o700);
        let port = free_port();
        let mut shell = as_nobody(Command::new("sh"));

        shell
            .args(["-c", SERVE_SCRIPT, "sh"])
            .arg(&binaries)
            .arg(&folder)
            .arg(port.to_string())
            .arg(options);
        let shell = shell
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();

        // The shell runs already, so it also removes a half-prepared folder.
        prepare(&binaries, &folder.join("d"));
        let server = PostgresServer {
            binaries,
            folder,
            port,
            databases: AtomicU32::new(0),
            shell,
        };
        server.restart();
        server
    }

    /// Starts the stopped server again on the same folder and port.
    ///
    /// Returns when it accepts connections.
    pub fn restart(&self) {
        self.shell
            .stdin
            .as_ref()
            .expect("taken when it is dropped")
            .write_all(b"start\n")
            .unwrap();
        let mut ready = Command::new(self.binaries.join("pg_isready"));
        ready.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);

        self.wait_until("PostgreSQL does not start", || {
            ready.status().unwrap().success()
        });
    }

    /// Stops the server like `pg_ctl stop -m immediate`: it aborts all connections and recovers on
    /// the next start.
    pub fn stop_immediately(&self) {
        self.end("-QUIT");
    }

    /// Kills all processes of the server. It cannot be started again.
    pub fn sigkill(&self) {
        self.end("-KILL");
    }

    fn end(&self, with: &str) {
        let pid = self.pid();
        signal(with, &[pid]);
        self.wait_until("PostgreSQL does not end", || has_ended(pid));
    }

    /// Stops all processes of the server: connections stay open and get no answer.
    pub fn pause(&self) -> Paused {
        let mut paused = Paused(vec![self.pid()]);
        // The postmaster first, so that it starts no further process.
        signal("-STOP", &paused.0);
        let of_server = format!("PPid:\t{}\n", self.pid());
        let is_child = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/status"))
                .is_ok_and(|s| s.contains(&of_server))
        };
        let all = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let children: Vec<u32> = all.filter(is_child).collect();
        signal("-STOP", &children);
        paused.0.extend(children);

        paused
    }

    /// Returns the process id of the postmaster, whose children serve the connections.
    pub fn pid(&self) -> u32 {
        let text = std::fs::read_to_string(self.folder.join("d/postmaster.pid")).unwrap();
        text.lines()
            .next()
            .and_then(|line| line.parse().ok())
            .expect("its first line is the process")
    }

    pub fn port(&self) -> u16 {
        self.port
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

    /// Runs a statement and returns its result as plain text.
    pub fn sql(&self, database: &str, statement: &str) -> String {
        self.run(
            "psql",
            &[
                "-XAtq",
                "-v",
                "ON_ERROR_STOP=1",
                "-d",
                database,
                "-c",
                statement,
            ],
        )
    }

    /// Returns the number of sessions of a database that wait for a lock.
    pub fn waiting_for_locks(&self, database: &str) -> usize {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        self.sql(database, waiting).parse().expect("it is a number")
    }

    /// Dumps a database with `pg_dump`.
    pub fn dump(&self, database: &str, file: &Path) {
        self.run(
            "pg_dump",
            &[
                "--format=custom",
                "--file",
                file.to_str().expect("the paths of tests are UTF-8"),
                database,
            ],
        );
    }

    pub fn restore(&self, database: &str, file: &Path) {
        self.run(
            "pg_restore",
            &[
                "--exit-on-error",
                "--dbname",
                database,
                file.to_str().expect("the paths of tests are UTF-8"),
            ],
        );
    }

    /// Starts a process that executes a statement and keeps its transaction open until it is
    /// killed.
    pub fn hold_transaction(&self, database: &str, statement: &str) -> Child {
        let mut psql = Command::new(self.binaries.join("psql"));
        psql.args(["-XAtq", "-d", database])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut psql = psql.spawn().unwrap();

        writeln!(
            psql.stdin.as_ref().expect("it is piped"),
            "begin; {statement}; select 'done';"
        )
        .unwrap();
        let mut done = [0; 5];
        psql.stdout
            .as_mut()
            .expect("it is piped")
            .read_exact(&mut done)
            .unwrap();
        psql
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(self.binaries.join(program));
        run_to_success(
            command
                .args([
                    "-h",
                    "127.0.0.1",
                    "-U",
                    "postgres",
                    "-p",
                    &self.port.to_string(),
                ])
                .args(arguments),
        )
    }

    pub fn wait_until(&self, or_else: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        while !is_so() {
            let log = || std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "{or_else}: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal("-CONT", &self.0);
    }
}

fn signal(name: &str, pids: &[u32]) {
    // Some of them may have ended meanwhile.
    let _ = Command::new("kill")
        .arg(name)
        .args(pids.iter().map(u32::to_string))
        .stderr(Stdio::null())
        .status()
        .unwrap();
}

/// Returns whether a process has ended or is a zombie.
fn has_ended(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .map_or(true, |status| status.contains("State:\tZ"))
}

/// Runs a command that must succeed and returns its output.
fn run_to_success(command: &mut Command) -> String {
    let ran = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        ran.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&ran.stderr)
    );
    String::from_utf8(ran.stdout).unwrap().trim_end().to_owned()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

/// Runs the command as `nobody` if this process is root, because root cannot run a server.
pub fn as_nobody(mut command: Command) -> Command {
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.current_dir("/");
    command
}

pub fn give_to_nobody(path: &Path, mode: u32) {
    if is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn newest_binaries() -> PathBuf {
    let version = |path: &Path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse::<u32>().ok())
    };
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let newest = versions
        .filter(|path| path.join("bin/initdb").exists())
        .max_by_key(|path| version(path));

    newest
        .expect("PostgreSQL's server is needed for the tests: apt-get install postgresql")
        .join("bin")
}

/// Returns a folder in memory if it has room for a server, or the one for temporary files.
fn roomy_folder() -> PathBuf {
    const ROOM: u64 = 2 << 30;
    let memory = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
    if free > ROOM {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

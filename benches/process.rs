//! The measured processes: the program, the plain server and PostgreSQL, with their processor time
//! and memory from /proc.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A server that prints its address. Dropping it kills the process.
pub struct Served {
    process: Child,
    pub authority: String,
}

impl Served {
    pub fn product(database_url: &str) -> Served {
        let mut command = product(database_url);
        command
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("STRIPE_WEBHOOK_SECRET", crate::deliveries::SECRET)
            .arg("serve");
        Served::start(command)
    }

    pub fn plain(database_url: &str) -> Served {
        let mut command = Command::new(std::env::current_exe().expect("we run"));
        command.args(["--plain", database_url]);
        Served::start(command)
    }

    fn start(mut command: Command) -> Served {
        let mut process = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("it says where");
        let authority = line
            .trim()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();

        assert!(!authority.is_empty(), "it did not start");

        Served { process, authority }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns a command for the program's binary with only the required setting.
///
/// `BENCH_BINARY` names another binary, to compare two versions with the same load.
pub fn product(database_url: &str) -> Command {
    #[expect(clippy::disallowed_methods, reason = "a setting of the benchmark")]
    let other = std::env::var_os("BENCH_BINARY");
    let mut command = Command::new(other.map_or_else(testkit::binary_path, Into::into));
    command.env("DATABASE_URL", database_url);
    command
}

/// Returns the processor time of a process, its live children and the children it has waited for.
pub fn cpu(pid: u32) -> Duration {
    let ticks = |fields: &[String], range: std::ops::Range<usize>| -> u64 {
        fields[range]
            .iter()
            .map(|field| field.parse::<u64>().unwrap_or(0))
            .sum()
    };

    // The fields after the name start with the third: utime, stime, cutime and cstime are the 14th
    // to 17th.
    let own = stat(pid).map_or(0, |fields| ticks(&fields, 11..15));
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children = pids
        .filter_map(stat)
        .filter(|fields| fields[1] == pid.to_string());
    let total = own + children.map(|fields| ticks(&fields, 11..13)).sum::<u64>();
    Duration::from_millis(total * 10)
}

fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// Returns the memory of a process in MB: private memory plus its share of shared memory.
pub fn pss_mb(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text
        .lines()
        .find(|line| line.starts_with("Pss:"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|kb| kb.parse::<f64>().ok())
        .unwrap_or(0.0)
        / 1024.0
}

//! The process itself, by the names that all of Prometheus's clients use, from Linux's /proc; elsewhere all is 0.

use std::fs;
use std::sync::{Mutex, PoisonError};

use prometheus::{Counter, Gauge, Registry};

pub(super) struct Process {
    cpu_seconds: Counter,
    resident_bytes: Gauge,
    start_seconds: Gauge,
    threads: Gauge,
    open_fds: Gauge,
    max_fds: Gauge,
    looking: Mutex<()>,
}

/// What the kernel counts processor time and start times in: a hundredth of a second on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;
const RIGHT: &str = "names are well-formed and each is given once";

impl Process {
    pub fn register(registry: &Registry) -> Process {
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help).expect(RIGHT);
            registry.register(Box::new(gauge.clone())).expect(RIGHT);
            gauge
        };
        let cpu_seconds =
            Counter::new("process_cpu_seconds_total", "Processor time in seconds").expect(RIGHT);
        registry
            .register(Box::new(cpu_seconds.clone()))
            .expect(RIGHT);
        let process = Process {
            cpu_seconds,
            resident_bytes: gauge("process_resident_memory_bytes", "Memory in use"),
            start_seconds: gauge("process_start_time_seconds", "When the process started"),
            threads: gauge("process_threads", "Threads"),
            open_fds: gauge("process_open_fds", "Open file descriptors"),
            max_fds: gauge("process_max_fds", "File descriptors that may be open"),
            looking: Mutex::default(),
        };
        process.look();
        process
    }

    pub fn look(&self) {
        // Two at a time would count the same processor time twice.
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        self.look_at_stat();
        let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let files = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"));
        let soft = files
            .and_then(|line| line.split_whitespace().next())
            .and_then(|limit| limit.parse().ok());
        self.max_fds.set(soft.unwrap_or_default());
        self.open_fds
            .set(fs::read_dir("/proc/self/fd").map_or(0.0, |open| open.count() as f64));
    }

    /// The fields are numbered as in proc_pid_stat(5); the second, a name, may have blanks in it.
    fn look_at_stat(&self) {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let fields: Vec<f64> = match stat.rsplit_once(')') {
            Some((_, rest)) => rest
                .split_whitespace()
                .map(|field| field.parse().unwrap_or_default())
                .collect(),
            None => return,
        };
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
        let cpu_seconds = (field(14) + field(15)) / TICKS_PER_SECOND;
        self.cpu_seconds
            .inc_by((cpu_seconds - self.cpu_seconds.get()).max(0.0));
        self.threads.set(field(20));
        self.resident_bytes
            .set(field(24) * rustix::param::page_size() as f64);
        let booted = fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted = booted
            .lines()
            .find_map(|line| line.strip_prefix("btime "))
            .and_then(|text| text.trim().parse::<f64>().ok());
        self.start_seconds
            .set(booted.map_or(0.0, |seconds| seconds + field(22) / TICKS_PER_SECOND));
    }
}

//! What is counted and measured, and how Prometheus is told. Names and labels stand here and nowhere else; no label grows with
//! customers.
//!
//! Counting takes no lock that anybody waits for: counters and histograms are atomics. What needs the database is set from
//! `flows/monitor`, and never by a delivery.

mod process;
mod registry;

use std::time::Duration;

use prometheus::{
    Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder,
};

use crate::domain::stripe::signature::SignatureError;
use process::Process;
use registry::MetricRegistrar;

/// Seconds: from half a millisecond to ten seconds.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
const ROWS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
/// What a 2xx says happened.
const OUTCOMES: [&str; 4] = ["recorded", "duplicate", "no_payment_fact", "unreadable"];
const MODES: [&str; 2] = ["live", "test"];
/// A pass found that all agrees, or that something differs or was healed, or came to no end.
const RESULTS: [&str; 3] = ["agrees", "differs", "failed"];
/// Objects that thin events point to; payments whose invoice is to be asked for; invoices to be compared.
const BACKLOGS: [&str; 3] = ["objects", "links", "checks"];

/// Why a delivery was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// Not believed.
    Signature(SignatureError),
    TooLarge,
    /// The body ended early.
    Incomplete,
    /// Too many wait for the disk.
    QueueFull,
    /// The bodies of all requests together need too much memory.
    Overloaded,
    /// It waited too long for the disk.
    TimedOut,
    /// The database is away, locked or full, or refused it.
    Unavailable,
    ShuttingDown,
    /// The sender went away, or took too long, before there was an answer.
    Abandoned,
}

impl Rejection {
    pub const ALL: [Rejection; 14] = [
        Rejection::Signature(SignatureError::Missing),
        Rejection::Signature(SignatureError::Several),
        Rejection::Signature(SignatureError::Malformed),
        Rejection::Signature(SignatureError::Mismatch),
        Rejection::Signature(SignatureError::Stale),
        Rejection::Signature(SignatureError::Future),
        Rejection::TooLarge,
        Rejection::Incomplete,
        Rejection::QueueFull,
        Rejection::Overloaded,
        Rejection::TimedOut,
        Rejection::Unavailable,
        Rejection::ShuttingDown,
        Rejection::Abandoned,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Rejection::Signature(refusal) => refusal.as_str(),
            Rejection::TooLarge => "too_large",
            Rejection::Incomplete => "incomplete",
            Rejection::QueueFull => "queue_full",
            Rejection::Overloaded => "overloaded",
            Rejection::TimedOut => "timed_out",
            Rejection::Unavailable => "unavailable",
            Rejection::ShuttingDown => "shutting_down",
            Rejection::Abandoned => "abandoned",
        }
    }
}

/// All that one process counts and measures.
pub struct Metrics {
    registry: Registry,
    deliveries: IntCounterVec,
    rejected: IntCounterVec,
    ack_seconds: Histogram,
    commit_seconds: Histogram,
    commit_failures: IntCounter,
    batch_size: Histogram,
    reads: IntCounterVec,
    read_seconds: Histogram,
    pub queue_depth: IntGauge,
    pub queue_capacity: IntGauge,
    pub spans_dropped: IntGauge,
    pub database: Database,
    pub log: Log,
    pub reconcile: Reconcile,
    process: Process,
}

/// The database itself.
pub struct Database {
    pub up: IntGauge,
    /// By the name of the setting, `1` if it is off.
    pub unsafe_setting: IntGaugeVec,
    pub size_bytes: Gauge,
    pub wal_bytes: Gauge,
    pub disk_free_bytes: Gauge,
    pub disk_size_bytes: Gauge,
    /// When what the database says was last read.
    pub looked_timestamp_seconds: Gauge,
}

/// What the log says, whichever process wrote it.
pub struct Log {
    pub events_without_invoice: IntGauge,
    pub oldest_without_invoice_age_seconds: Gauge,
    pub unreadable_events: IntGauge,
    pub last_delivery_timestamp_seconds: GaugeVec,
    pub secret_last_used_timestamp_seconds: GaugeVec,
}

/// Passes against Stripe's API.
pub struct Reconcile {
    pub enabled: IntGauge,
    pub runs: IntCounterVec,
    pub healed: IntCounter,
    pub api_only_events: IntCounter,
    pub api_calls: IntCounter,
    pub backlog: IntGaugeVec,
    pub differing: IntGauge,
    pub unknown_at_stripe: IntGauge,
    pub unknown_here: IntGauge,
    pub endpoint_remarks: IntGauge,
    pub last_success_timestamp_seconds: Gauge,
    pub last_success_age_seconds: Gauge,
    pub last_duration_seconds: Gauge,
}

impl Default for Metrics {
    /// Every name is there from the start, with every value that its label may have.
    fn default() -> Metrics {
        let registry = Registry::new();
        let r = MetricRegistrar(&registry);
        let reasons = Rejection::ALL.map(Rejection::as_str);
        r.gauges(
            "build_info",
            "The version that runs",
            "version",
            &[env!("CARGO_PKG_VERSION")],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        Metrics {
            deliveries: r.counters(
                "deliveries_total",
                "Deliveries acknowledged, by what they came to",
                "outcome",
                &OUTCOMES,
            ),
            rejected: r.counters(
                "rejected_total",
                "Deliveries not acknowledged, by the reason",
                "reason",
                &reasons,
            ),
            ack_seconds: r.histogram(
                "ack_seconds",
                "From the whole body of a delivery to its 2xx",
                &SECONDS,
            ),
            commit_seconds: r.histogram(
                "commit_seconds",
                "How long a batch of deliveries took to become durable",
                &SECONDS,
            ),
            commit_failures: r.counter(
                "commit_failures_total",
                "Batches of deliveries that the database did not take",
            ),
            batch_size: r.histogram("batch_size", "Deliveries that shared a commit", &ROWS),
            reads: r.counter_family(
                "reads_total",
                "GET requests below /v1, by route and status",
                &["route", "status"],
            ),
            read_seconds: r.histogram(
                "read_seconds",
                "How long GET requests below /v1 took",
                &SECONDS,
            ),
            queue_depth: r.gauge("queue_depth", "Deliveries that wait for the disk"),
            queue_capacity: r.gauge("queue_capacity", "Deliveries that may wait for the disk"),
            spans_dropped: r.gauge(
                "spans_dropped",
                "Spans that no collector has got, since the start",
            ),
            database: Database::register(&r),
            log: Log::register(&r),
            reconcile: Reconcile::register(&r),
            process: Process::register(&registry),
            registry,
        }
    }
}

impl Database {
    fn register(r: &MetricRegistrar) -> Database {
        Database {
            up: r.gauge(
                "database_up",
                "1: the database can be reached and is migrated",
            ),
            unsafe_setting: r.gauges(
                "database_unsafe_setting",
                "1: PostgreSQL's server has this setting off, and can lose commits in a crash",
                "setting",
                &["fsync", "full_page_writes", "synchronous_commit"],
            ),
            size_bytes: r.float("database_size_bytes", "Size of the database"),
            wal_bytes: r.float("database_wal_bytes", "SQLite: size of its write-ahead log"),
            disk_free_bytes: r.float("disk_free_bytes", "SQLite: room left where the database is"),
            disk_size_bytes: r.float(
                "disk_size_bytes",
                "SQLite: size of the file system where the database is",
            ),
            looked_timestamp_seconds: r.float(
                "database_looked_timestamp_seconds",
                "When the database was last asked for all this",
            ),
        }
    }
}

impl Log {
    fn register(r: &MetricRegistrar) -> Log {
        let (delivered, used) = (
            "When the last webhook of a mode came; 0: none is known",
            "When a configured secret last matched; 0: never",
        );
        Log {
            events_without_invoice: r.gauge(
                "events_without_invoice",
                "Events of the last 30 days about invoices that nobody stored; of 10000 invoices at most",
            ),
            oldest_without_invoice_age_seconds: r.float(
                "oldest_event_without_invoice_age_seconds",
                "For how long the first of these events has waited; 0: none waits",
            ),
            unreadable_events: r
                .gauge("unreadable_events", "Events of the last 30 days that could not be read; counted up to 10000"),
            last_delivery_timestamp_seconds: r.floats("last_delivery_timestamp_seconds", delivered, "mode", &MODES),
            secret_last_used_timestamp_seconds: r.floats("secret_last_used_timestamp_seconds", used, "label", &[]),
        }
    }
}

impl Reconcile {
    fn register(r: &MetricRegistrar) -> Reconcile {
        Reconcile {
            enabled: r.gauge(
                "reconcile_enabled",
                "1: this process reconciles with Stripe's API",
            ),
            runs: r.counters(
                "reconcile_runs_total",
                "Passes that this process made, by how they ended",
                "result",
                &RESULTS,
            ),
            healed: r.counter("reconcile_healed_total", "Histories that passes changed"),
            api_only_events: r.counter(
                "reconcile_api_only_events_total",
                "Events that a pass found and a webhook should have brought",
            ),
            api_calls: r.counter(
                "reconcile_api_calls_total",
                "Calls to Stripe's API, retries among them",
            ),
            backlog: r.gauges(
                "reconcile_backlog",
                "What waits to be asked at Stripe; each counted up to 10000",
                "kind",
                &BACKLOGS,
            ),
            differing: r.gauge(
                "reconcile_differing",
                "Invoices that differ from Stripe's; counted up to 10000",
            ),
            unknown_at_stripe: r.gauge(
                "reconcile_unknown_at_stripe",
                "Invoices of the last pass that Stripe does not know",
            ),
            unknown_here: r.gauge(
                "reconcile_unknown_here",
                "Stripe's invoices of the last pass that nobody stored",
            ),
            endpoint_remarks: r.gauge(
                "reconcile_endpoint_remarks",
                "What the last pass found wrong with the webhook endpoint",
            ),
            last_success_timestamp_seconds: r.float(
                "reconcile_last_success_timestamp_seconds",
                "When the last pass ended; 0: never",
            ),
            last_success_age_seconds: r.float(
                "reconcile_last_success_age_seconds",
                "How long ago the last pass ended, or this process started",
            ),
            last_duration_seconds: r.float(
                "reconcile_last_duration_seconds",
                "How long the last pass took",
            ),
        }
    }
}

impl Metrics {
    pub fn acknowledged(&self, outcome: &'static str, took: Duration) {
        self.deliveries.with_label_values(&[outcome]).inc();
        self.ack_seconds.observe(took.as_secs_f64());
    }

    pub fn rejected(&self, why: Rejection) {
        self.rejected.with_label_values(&[why.as_str()]).inc();
    }

    /// How many deliveries were not acknowledged for this reason.
    pub fn count_rejected(&self, why: Rejection) -> u64 {
        self.rejected.with_label_values(&[why.as_str()]).get()
    }

    /// A batch of this many deliveries is durable.
    pub fn committed(&self, rows: usize, took: Duration) {
        self.commit_seconds.observe(took.as_secs_f64());
        self.batch_size.observe(rows as f64);
    }

    pub fn commit_failed(&self) {
        self.commit_failures.inc();
    }

    /// A GET below /v1. `route`: its pattern, never its path.
    pub fn read(&self, route: &str, status: &str, took: Duration) {
        self.reads.with_label_values(&[route, status]).inc();
        self.read_seconds.observe(took.as_secs_f64());
    }

    /// All of it, as Prometheus reads it.
    pub fn text(&self) -> String {
        self.process.look();
        // It fails on a family without a name only.
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }
}

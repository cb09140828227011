//! The metrics of this process, in Prometheus's format. Names and labels are defined only here. No
//! label has a value per customer.
//!
//! Counters and histograms are atomics, so counting never waits for a lock. `monitoring/monitor`
//! sets the gauges that need the database, so that no delivery has to. The metrics of the process
//! itself come from the `prometheus` crate, under the names that all clients use.

mod registry;

use std::time::Duration;

use prometheus::{
    Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder,
};

use crate::domain::stripe::signature::SignatureError;
use registry::MetricRegistrar;

/// Buckets in seconds, from half a millisecond to ten seconds.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Buckets in rows, up to the largest batch.
const ROWS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
/// Outcomes of acknowledged deliveries.
const OUTCOMES: [&str; 4] = ["recorded", "duplicate", "no_payment_fact", "unreadable"];
/// Modes of Stripe.
const MODES: [&str; 2] = ["live", "test"];
/// Results of a reconcile run: all invoices agree; an invoice differs or was healed; the run
/// failed.
const RESULTS: [&str; 3] = ["agrees", "differs", "failed"];
/// Kinds of backlog: objects that thin events name, payments without a known invoice, and invoices
/// to compare.
const BACKLOGS: [&str; 3] = ["objects", "links", "checks"];

/// The reason why a delivery was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The signature is missing or invalid.
    Signature(SignatureError),
    TooLarge,
    /// The body ended early.
    Incomplete,
    /// The event queue is full.
    QueueFull,
    /// The bodies of all requests together exceed the memory budget.
    Overloaded,
    /// The event was not durable within its deadline.
    TimedOut,
    /// The database is unreachable, locked or full, or rejected the event.
    Unavailable,
    ShuttingDown,
    /// The sender closed the connection or took too long.
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

    /// Returns the value of the label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Rejection::Signature(error) => error.as_str(),
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

/// The metrics of one process.
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
}

/// Metrics of the database.
pub struct Database {
    pub up: IntGauge,
    /// `1` if the setting is off, by its name.
    pub unsafe_setting: IntGaugeVec,
    pub size_bytes: Gauge,
    pub wal_bytes: Gauge,
    pub disk_free_bytes: Gauge,
    pub disk_size_bytes: Gauge,
    /// Unix seconds of the last refresh of the metrics that come from the database.
    pub looked_timestamp_seconds: Gauge,
}

/// Metrics of the event log, which several processes may write.
pub struct Log {
    pub events_without_invoice: IntGauge,
    pub oldest_without_invoice_age_seconds: Gauge,
    pub unreadable_events: IntGauge,
    pub last_delivery_timestamp_seconds: GaugeVec,
    pub secret_last_used_timestamp_seconds: GaugeVec,
}

/// Metrics of the reconcile runs against Stripe's API.
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
    /// Registers every metric, with every known label value, so that each series exists from the
    /// start.
    fn default() -> Metrics {
        let registry = Registry::new();
        let r = MetricRegistrar(&registry);
        r.process();
        r.gauges(
            "build_info",
            "Version of the running program",
            "version",
            &[env!("CARGO_PKG_VERSION")],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        let reasons = Rejection::ALL.map(Rejection::as_str);

        Metrics {
            deliveries: r.counters(
                "deliveries_total",
                "Acknowledged deliveries, by outcome",
                "outcome",
                &OUTCOMES,
            ),
            rejected: r.counters(
                "rejected_total",
                "Rejected deliveries, by reason",
                "reason",
                &reasons,
            ),
            ack_seconds: r.histogram(
                "ack_seconds",
                "Time from the complete body of a delivery to its 2xx",
                &SECONDS,
            ),
            commit_seconds: r.histogram(
                "commit_seconds",
                "Time until a batch of deliveries was durable",
                &SECONDS,
            ),
            commit_failures: r.counter(
                "commit_failures_total",
                "Batches of deliveries that the database rejected",
            ),
            batch_size: r.histogram("batch_size", "Deliveries per commit", &ROWS),
            reads: r.counter_family(
                "reads_total",
                "GET requests below /v1, by route and status",
                &["route", "status"],
            ),
            read_seconds: r.histogram(
                "read_seconds",
                "Duration of GET requests below /v1",
                &SECONDS,
            ),
            queue_depth: r.gauge("queue_depth", "Deliveries waiting for a commit"),
            queue_capacity: r.gauge(
                "queue_capacity",
                "Largest number of deliveries that may wait for a commit",
            ),
            spans_dropped: r.gauge(
                "spans_dropped",
                "Spans dropped since the start, because the queue was full or the collector failed",
            ),
            database: Database::register(&r),
            log: Log::register(&r),
            reconcile: Reconcile::register(&r),
            registry,
        }
    }
}

impl Database {
    fn register(r: &MetricRegistrar) -> Database {
        Database {
            up: r.gauge(
                "database_up",
                "1 if the database can be reached and is migrated",
            ),
            unsafe_setting: r.gauges(
                "database_unsafe_setting",
                "1 if the PostgreSQL server has this setting off and can lose commits in a crash",
                "setting",
                &["fsync", "full_page_writes", "synchronous_commit"],
            ),
            size_bytes: r.float("database_size_bytes", "Size of the database"),
            wal_bytes: r.float("database_wal_bytes", "Size of SQLite's write-ahead log"),
            disk_free_bytes: r.float(
                "disk_free_bytes",
                "Free space of the file system of the SQLite database",
            ),
            disk_size_bytes: r.float(
                "disk_size_bytes",
                "Size of the file system of the SQLite database",
            ),
            looked_timestamp_seconds: r.float(
                "database_looked_timestamp_seconds",
                "Unix time of the last refresh of the database metrics",
            ),
        }
    }
}

impl Log {
    fn register(r: &MetricRegistrar) -> Log {
        let (delivered, used) = (
            "Unix time of the last webhook of a mode; 0 if unknown",
            "Unix time when a configured secret last matched; 0 if never",
        );

        Log {
            events_without_invoice: r.gauge(
                "events_without_invoice",
                "Events of the last 30 days about invoices that are not stored; \
                 stops counting at 10000 invoices",
            ),
            oldest_without_invoice_age_seconds: r.float(
                "oldest_event_without_invoice_age_seconds",
                "Age of the oldest event about an invoice that is not stored; 0 if none",
            ),
            unreadable_events: r.gauge(
                "unreadable_events",
                "Unreadable events of the last 30 days; stops counting at 10000",
            ),
            last_delivery_timestamp_seconds: r.floats(
                "last_delivery_timestamp_seconds",
                delivered,
                "mode",
                &MODES,
            ),
            secret_last_used_timestamp_seconds: r.floats(
                "secret_last_used_timestamp_seconds",
                used,
                "label",
                &[],
            ),
        }
    }
}

impl Reconcile {
    fn register(r: &MetricRegistrar) -> Reconcile {
        Reconcile {
            enabled: r.gauge(
                "reconcile_enabled",
                "1 if this process reconciles with Stripe's API",
            ),
            runs: r.counters(
                "reconcile_runs_total",
                "Reconcile runs of this process, by result",
                "result",
                &RESULTS,
            ),
            healed: r.counter(
                "reconcile_healed_total",
                "Invoice histories that reconcile runs changed",
            ),
            api_only_events: r.counter(
                "reconcile_api_only_events_total",
                "Events that a reconcile run found and no webhook had delivered",
            ),
            api_calls: r.counter(
                "reconcile_api_calls_total",
                "Calls to Stripe's API, retries included",
            ),
            backlog: r.gauges(
                "reconcile_backlog",
                "Lookups that wait for Stripe's API; stops counting at 10000 objects, \
                 10000 checks, and 10000 links each of charges, payment intents and refunds",
                "kind",
                &BACKLOGS,
            ),
            differing: r.gauge(
                "reconcile_differing",
                "Invoices that differ from Stripe's; stops counting at 10000",
            ),
            unknown_at_stripe: r.gauge(
                "reconcile_unknown_at_stripe",
                "Invoices of the last run that do not exist at Stripe",
            ),
            unknown_here: r.gauge(
                "reconcile_unknown_here",
                "Stripe's invoices of the last run that are not stored",
            ),
            endpoint_remarks: r.gauge(
                "reconcile_endpoint_remarks",
                "Problems of the webhook endpoint found by the last run",
            ),
            last_success_timestamp_seconds: r.float(
                "reconcile_last_success_timestamp_seconds",
                "Unix time when the last run ended; 0 if never",
            ),
            last_success_age_seconds: r.float(
                "reconcile_last_success_age_seconds",
                "Time since the last run ended, or since this process started",
            ),
            last_duration_seconds: r.float(
                "reconcile_last_duration_seconds",
                "Duration of the last run",
            ),
        }
    }
}

impl Metrics {
    /// Counts a delivery that was answered 2xx.
    pub fn acknowledged(&self, outcome: &'static str, took: Duration) {
        self.deliveries.with_label_values(&[outcome]).inc();
        self.ack_seconds.observe(took.as_secs_f64());
    }

    /// Counts a delivery that was not acknowledged.
    pub fn rejected(&self, why: Rejection) {
        self.rejected.with_label_values(&[why.as_str()]).inc();
    }

    /// Returns how many deliveries were rejected for this reason.
    pub fn count_rejected(&self, why: Rejection) -> u64 {
        self.rejected.with_label_values(&[why.as_str()]).get()
    }

    /// Counts a durable batch of this many deliveries.
    pub fn committed(&self, rows: usize, took: Duration) {
        self.commit_seconds.observe(took.as_secs_f64());
        self.batch_size.observe(rows as f64);
    }

    /// Counts a batch that the database rejected.
    pub fn commit_failed(&self) {
        self.commit_failures.inc();
    }

    /// Counts a GET below /v1. `route` is the pattern, because paths have unbounded values.
    pub fn read(&self, route: &str, status: &str, took: Duration) {
        self.reads.with_label_values(&[route, status]).inc();
        self.read_seconds.observe(took.as_secs_f64());
    }

    /// Returns all metrics in Prometheus's text format.
    pub fn text(&self) -> String {
        // Encoding fails only on a family without a name.
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }
}

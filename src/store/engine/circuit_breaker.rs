//! Circuit breaker of a PostgreSQL server: while the server is unavailable, calls fail without
//! waiting.
//!
//! A failed statement or connection proves nothing about the server, because an idle timeout, a
//! load balancer or a firewall may have closed the connection. So only a probe on a new connection
//! opens the breaker. While it is open, every call fails at once and Stripe redelivers; another
//! probe runs five times a second and closes the breaker when the server accepts work.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::postgres_server::{Backend, Durability, ServerReport, ServerRole, ServerTarget};
use crate::store::{StoreError, StoreErrorClass, StoreErrorKind};

/// Longest duration of one statement, and of any other wait for the server.
pub(in crate::store) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest duration of a probe. Opening a connection takes some milliseconds, or a second on an
/// overloaded machine.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Duration of a statement after which the server is probed, because a paused server reports no
/// error. It is shorter than the wait for a free connection. So if all connections of the pool turn
/// silent at once, they are replaced before waiting callers time out.
const SUSPECT_AFTER: Duration = Duration::from_millis(500);
/// Pause before checking again a server process that executes a slow statement.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Pause between two probes while the breaker is open.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);
/// Pause between two checks of a server process that seems idle. The first check may have run just
/// before the statement arrived, or just after the answer was sent.
const SECOND_LOOK_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone, Debug)]
pub(in crate::store) struct CircuitBreaker(Arc<BreakerState>);

#[derive(Debug)]
struct BreakerState {
    target: ServerTarget,
    /// Reason why the breaker is open. `None` while it is closed.
    open: watch::Sender<Option<OpenReason>>,
    /// `true` while a probe that [`CircuitBreaker::suspect`] started is running.
    is_probing: AtomicBool,
    last_probe: watch::Sender<Probe>,
    /// Number of statements that the server has answered.
    answers: AtomicU64,
    /// The durability settings that the server last reported.
    durability: Mutex<Durability>,
    /// Connections opened before this time may lead to a server that no longer exists.
    current_since: Mutex<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum OpenReason {
    Unresponsive,
    Standby,
    /// The setting that makes commits unsafe.
    NotDurable(&'static str),
}

/// Reasons to probe the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Suspicion {
    /// A wait ended without an answer, or a connection broke.
    NoAnswer,
    /// The server rejected a write because it was made read-only or is no longer the primary.
    ReadOnly,
}

/// The last result of a probe.
#[derive(Clone, Debug)]
struct Probe {
    started: Instant,
    /// Processes that may be executing a statement. `None` if the probe failed, or a pooler hides
    /// them.
    busy_backends: Option<Arc<[i32]>>,
}

/// Reasons for abandoning a statement. The server may have executed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum StatementAbandoned {
    TimedOut,
    /// The breaker opened.
    Rejected,
    /// The server answers other statements and does not execute this one, because the connection
    /// lost the statement or its answer.
    ConnectionLost,
}

/// A statement that returned no result.
pub(in crate::store) enum StatementFailure {
    /// Only the connection failed. The server may have executed the statement.
    ConnectionLost(StoreError),
    Other(StoreError),
}

impl OpenReason {
    fn as_str(self) -> &'static str {
        match self {
            OpenReason::Unresponsive => "the server does not answer",
            OpenReason::Standby => "the server is a standby",
            OpenReason::NotDurable(setting) => setting,
        }
    }

    fn error(self) -> StoreError {
        let kind = match self {
            OpenReason::Unresponsive => StoreErrorKind::Unreachable,
            OpenReason::Standby => StoreErrorKind::Standby,
            OpenReason::NotDurable(_) => StoreErrorKind::UnsafeCommit,
        };
        StoreError::new(kind, self.as_str())
    }
}

/// Creates the error for a server whose `setting` makes commits unsafe.
pub(in crate::store) fn unsafe_commit(setting: &'static str) -> StoreError {
    OpenReason::NotDurable(setting).error()
}

impl CircuitBreaker {
    pub(in crate::store) fn new(target: ServerTarget) -> CircuitBreaker {
        let now = Instant::now();

        CircuitBreaker(Arc::new(BreakerState {
            target,
            open: watch::Sender::new(None),
            is_probing: AtomicBool::new(false),
            last_probe: watch::Sender::new(Probe {
                started: now,
                busy_backends: None,
            }),
            answers: AtomicU64::new(0),
            durability: Mutex::new(Durability::SAFE),
            current_since: Mutex::new(now),
        }))
    }

    pub(in crate::store) fn target(&self) -> &ServerTarget {
        &self.0.target
    }

    /// Returns the earliest time at which a usable connection was opened.
    pub(in crate::store) fn current_since(&self) -> Instant {
        *self.lock_current_since()
    }

    /// Returns an error if the breaker is open. Never waits.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        match *self.0.open.borrow() {
            Some(reason) => Err(reason.error()),
            None => Ok(()),
        }
    }

    /// Opens a connection. If that fails, probes the server and retries once.
    pub(in crate::store) async fn connect(&self) -> Result<Backend, StoreError> {
        let error = match self.connect_once().await {
            Err(error) if error.class() == StoreErrorClass::Away => error,
            ended => return ended,
        };
        self.probe_since(Instant::now()).await;
        if self.check().is_err() {
            return Err(error);
        }
        self.connect_once().await
    }

    async fn connect_once(&self) -> Result<Backend, StoreError> {
        let (backend, report) = self.0.target.connect().await?;
        self.verify(&report)?;
        Ok(backend)
    }

    /// Opens the breaker if the server answers but must not be used.
    pub(in crate::store) fn verify(&self, report: &ServerReport) -> Result<(), StoreError> {
        self.keep_durability(report.durability);
        if report.role == ServerRole::Standby {
            self.open(OpenReason::Standby);
        }
        self.verify_durability(report.durability)?;
        self.check()
    }

    /// Returns the settings that the server last reported.
    pub(in crate::store) fn durability(&self) -> Durability {
        let locked = self.0.durability.lock();
        *locked.unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_durability(&self, durability: Durability) {
        let locked = self.0.durability.lock();
        *locked.unwrap_or_else(PoisonError::into_inner) = durability;
    }

    /// Opens the breaker if acknowledged commits may be lost.
    pub(in crate::store) fn verify_durability(
        &self,
        durability: Durability,
    ) -> Result<(), StoreError> {
        match durability.violation() {
            Some(setting) => {
                self.keep_durability(durability);
                self.open(OpenReason::NotDurable(setting));
                Err(unsafe_commit(setting))
            }
            None => Ok(()),
        }
    }

    /// Waits for a statement until it times out, the breaker opens, or the connection to the server
    /// process `process_id` proves dead.
    pub(in crate::store) async fn run<T>(
        &self,
        process_id: Option<i32>,
        statement: impl Future<Output = T>,
    ) -> Result<T, StatementAbandoned> {
        let mut statement = pin!(statement);
        if let Ok(ended) = timeout(SUSPECT_AFTER, &mut statement).await {
            return Ok(ended);
        }

        tokio::select! {
            biased;
            ended = self.with_deadline(Duration::ZERO, statement) => ended,
            () = self.lost(process_id) => Err(StatementAbandoned::ConnectionLost),
        }
    }

    /// Waits for the server and probes it after `suspect_after`.
    pub(in crate::store) async fn with_deadline<T>(
        &self,
        suspect_after: Duration,
        waiting: impl Future<Output = T>,
    ) -> Result<T, StatementAbandoned> {
        let mut waiting = pin!(waiting);
        if let Ok(ended) = timeout(suspect_after, &mut waiting).await {
            return Ok(ended);
        }

        self.suspect(Suspicion::NoAnswer);
        let mut open = self.0.open.subscribe();
        tokio::select! {
            biased;
            ended = timeout(STATEMENT_TIMEOUT - SUSPECT_AFTER, waiting) => {
                ended.map_err(|_| StatementAbandoned::TimedOut)
            }
            _ = open.wait_for(Option::is_some) => Err(StatementAbandoned::Rejected),
        }
    }

    /// Returns once the server answers other clients but not the client of this server process.
    async fn lost(&self, process_id: Option<i32>) {
        let Some(process_id) = process_id else {
            return std::future::pending().await;
        };
        let mut was_idle = false;

        loop {
            let probe = self.probe_since(Instant::now()).await;
            let busy = probe.busy_backends;
            let is_idle = busy.is_some_and(|busy| !busy.contains(&process_id));
            if is_idle && was_idle {
                return;
            }
            was_idle = is_idle;
            sleep(if is_idle {
                SECOND_LOOK_AFTER
            } else {
                LOOK_AGAIN_AFTER
            })
            .await;
        }
    }

    /// Converts the end of a statement into its result, and probes the server if it may be
    /// unavailable.
    pub(in crate::store) fn record<T>(
        &self,
        ended: Result<Result<T, sqlx::Error>, StatementAbandoned>,
    ) -> Result<T, StatementFailure> {
        let error = match ended {
            Ok(Ok(value)) => {
                self.record_success();
                return Ok(value);
            }
            Ok(Err(error)) => error,
            Err(abandoned) => return Err(self.record_abandoned(abandoned)),
        };

        if is_connection_lost(&error) {
            self.suspect(Suspicion::NoAnswer);
            return Err(StatementFailure::ConnectionLost(error.into()));
        }
        let error = StoreError::from(error);
        match error.kind() {
            StoreErrorKind::ReadOnly | StoreErrorKind::Standby => {
                self.suspect(Suspicion::ReadOnly);
            }
            StoreErrorKind::Unreachable => self.suspect(Suspicion::NoAnswer),
            _ => {}
        }
        Err(StatementFailure::Other(error))
    }

    pub(in crate::store) fn record_abandoned(
        &self,
        abandoned: StatementAbandoned,
    ) -> StatementFailure {
        match abandoned {
            StatementAbandoned::TimedOut => {
                self.suspect(Suspicion::NoAnswer);
                let reason = "a statement did not end in time";
                StatementFailure::Other(StoreError::new(StoreErrorKind::Locked, reason))
            }
            StatementAbandoned::Rejected => {
                // The breaker may have closed again meanwhile.
                let open = self.check().err();
                StatementFailure::Other(open.unwrap_or_else(StoreError::unresponsive))
            }
            StatementAbandoned::ConnectionLost => {
                let reason = "the connection no longer answers";
                let error = StoreError::new(StoreErrorKind::Unreachable, reason);
                StatementFailure::ConnectionLost(error)
            }
        }
    }

    fn record_success(&self) {
        self.0.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Probes the server in the background and opens the breaker if the server is unavailable.
    ///
    /// The breaker stays closed if an overloaded machine does not accept the probe in time but
    /// still answers statements.
    pub(in crate::store) fn suspect(&self, why: Suspicion) {
        if self.0.open.borrow().is_some() || self.0.is_probing.swap(true, Ordering::AcqRel) {
            return;
        }
        let breaker = self.clone();
        tokio::spawn(async move {
            let started = Instant::now();
            let answers = || breaker.0.answers.load(Ordering::Relaxed);
            let answers_before = answers();

            let mut busy_backends = None;
            match breaker.probe().await {
                Ok((report, busy)) => {
                    busy_backends = busy;
                    // Older connections lead to the server that was the primary before.
                    if report.role == ServerRole::Primary && why == Suspicion::ReadOnly {
                        *breaker.lock_current_since() = Instant::now();
                    }
                    // `verify` has opened the breaker if the report is bad; there is nothing else
                    // to do here.
                    let _ = breaker.verify(&report);
                }
                Err(error)
                    if error.class() == StoreErrorClass::Away && answers() == answers_before =>
                {
                    breaker.open(OpenReason::Unresponsive);
                }
                Err(_) => {}
            }

            breaker.0.is_probing.store(false, Ordering::Release);
            breaker.0.last_probe.send_replace(Probe {
                started,
                busy_backends,
            });
        });
    }

    /// Returns the result of a probe that started after `since`.
    async fn probe_since(&self, since: Instant) -> Probe {
        let mut probes = self.0.last_probe.subscribe();

        loop {
            self.suspect(Suspicion::NoAnswer);
            let is_open = self.check().is_err();
            if is_open || probes.changed().await.is_err() {
                // No caller needs the details of an unavailable server.
                return Probe {
                    started: since,
                    busy_backends: None,
                };
            }
            let probe = probes.borrow_and_update().clone();
            if probe.started >= since {
                return probe;
            }
        }
    }

    fn open(&self, reason: OpenReason) {
        if self.0.open.send_replace(Some(reason)).is_some() {
            return;
        }
        tracing::warn!(
            reason = reason.as_str(),
            "database unavailable, rejecting requests until it recovers"
        );
        tokio::spawn(self.clone().probe_until_up());
    }

    async fn probe_until_up(self) {
        loop {
            if let Ok((report, _)) = self.probe().await {
                self.keep_durability(report.durability);
                let is_durable = report.durability.violation().is_none();
                if is_durable && report.role != ServerRole::Standby {
                    break;
                }
            }
            sleep(PROBE_INTERVAL).await;
        }

        *self.lock_current_since() = Instant::now();
        self.0.open.send_replace(None);
        tracing::warn!("database available again");
    }

    /// Opens a connection, and queries the report and the busy processes.
    async fn probe(&self) -> Result<(ServerReport, Option<Arc<[i32]>>), StoreError> {
        let probing = async {
            let (mut backend, report) = self.0.target.connect().await?;
            let busy = if self.0.target.is_pooled {
                None
            } else {
                Some(backend.busy_backends().await?.into())
            };
            super::pool::Poolable::close(backend).await;
            Ok((report, busy))
        };

        timeout(PROBE_TIMEOUT, probing)
            .await
            .unwrap_or_else(|_| Err(OpenReason::Unresponsive.error()))
    }

    fn lock_current_since(&self) -> MutexGuard<'_, Instant> {
        let locked = self.0.current_since.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether an error ends the connection. `FATAL` and `PANIC` do: `idle_session_timeout`
/// (57P05), `pg_terminate_backend` (57P01), a restart, and what a pooler reports when it gives up.
fn is_connection_lost(error: &sqlx::Error) -> bool {
    use sqlx::postgres::{PgDatabaseError, PgSeverity};

    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(error) => {
            error
                .try_downcast_ref::<PgDatabaseError>()
                .is_some_and(|error| {
                    matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic)
                        || error.code().starts_with("08")
                })
        }
        _ => false,
    }
}

//! Group commit: deliveries that wait at the same time share one durable transaction, and each caller is told its own outcome.
//!
//! The writer takes all that waits (nobody waits for a timer when the store is idle), appends it, and answers. While it writes,
//! the next batch gathers. The queue is bounded: what does not fit is refused, and Stripe delivers it again.
//!
//! One writer, on PostgreSQL too: with a second one the batches are half as large, and what each of them costs is paid twice
//! (measured on two cores with 64 connections: a sixth more processor time an acknowledgement).

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::{Instrument, Level, Span};
use uuid::Uuid;

use crate::metrics::Metrics;
use crate::store::{Appended, NewEvent, Store, StoreError, StoreErrorClass};

/// Deliveries that may wait.
const QUEUE: usize = 1024;
/// Deliveries that share one commit at most.
const BATCH: usize = 256;

/// The way in; cheap to clone.
#[derive(Clone)]
pub struct BatchWriter {
    queue: mpsc::Sender<Request>,
}

/// To be waited for when all [`BatchWriter`]es are gone.
pub struct Writer(JoinHandle<()>);

/// The delivery was not kept.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("too many deliveries wait for the disk")]
    Full,
    #[error("the writer has stopped")]
    Closed,
    #[error(transparent)]
    Store(#[from] StoreError),
}

enum Request {
    Append {
        event: NewEvent,
        caller: Caller,
    },
    /// Asks whether the next batch is committed. Appends nothing.
    Probe(oneshot::Sender<Result<(), AppendError>>),
}

struct Caller {
    answer: oneshot::Sender<Result<Appended, AppendError>>,
    /// What it is in the middle of. None where nobody follows single deliveries.
    span: Span,
}

/// What happens between two commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    AtOnce,
    Yielding,
}

impl BatchWriter {
    pub fn start(store: Store, metrics: Arc<Metrics>) -> (BatchWriter, Writer) {
        BatchWriter::start_with(store, metrics, Pace::AtOnce)
    }

    /// Like [`BatchWriter::start`], for a batch command: pauses after each commit, so that a
    /// serving process can commit in between.
    pub fn start_yielding(store: Store, metrics: Arc<Metrics>) -> (BatchWriter, Writer) {
        BatchWriter::start_with(store, metrics, Pace::Yielding)
    }

    fn start_with(store: Store, metrics: Arc<Metrics>, pace: Pace) -> (BatchWriter, Writer) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let writing = write(store, waiting, metrics, pace);
        (BatchWriter { queue }, Writer(tokio::spawn(writing)))
    }

    /// Returns when the event is durable. When the caller goes away before its batch is written, it is not kept.
    ///
    /// # Errors
    /// See [`AppendError`]: nothing is promised then.
    pub async fn append(&self, event: NewEvent) -> Result<Appended, AppendError> {
        let (answer, answered) = oneshot::channel();
        let span = if tracing::enabled!(Level::DEBUG) {
            Span::current()
        } else {
            Span::none()
        };
        self.send(Request::Append {
            event,
            caller: Caller { answer, span },
        })?;
        answered.await.unwrap_or(Err(AppendError::Closed))
    }

    /// Goes the way of an event without appending one: returns when the writer has committed the
    /// batch that it is in. Under load this costs nothing, because the batch is there anyway.
    ///
    /// # Errors
    /// See [`AppendError`]: an event would have failed in the same way.
    pub async fn probe(&self) -> Result<(), AppendError> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Probe(answer))?;
        answered.await.unwrap_or(Err(AppendError::Closed))
    }

    fn send(&self, request: Request) -> Result<(), AppendError> {
        self.queue.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => AppendError::Full,
            mpsc::error::TrySendError::Closed(_) => AppendError::Closed,
        })
    }

    /// How many wait, and how many may.
    pub fn depth(&self) -> (usize, usize) {
        (
            self.queue.max_capacity() - self.queue.capacity(),
            self.queue.max_capacity(),
        )
    }
}

impl Writer {
    /// Returns when all that was queued is written and answered. All [`BatchWriter`]es must be dropped, or it waits for them.
    pub async fn finish(self) {
        if let Err(error) = self.0.await {
            tracing::error!(%error, "the writer of the log ended badly");
        }
    }
}

async fn write(
    store: Store,
    mut queue: mpsc::Receiver<Request>,
    metrics: Arc<Metrics>,
    pace: Pace,
) {
    let mut batch = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        let (mut events, mut callers, mut probes) = (Vec::new(), Vec::new(), Vec::new());
        for request in batch.drain(..) {
            match request {
                // Skip callers that timed out: Stripe redelivers.
                Request::Append { caller, .. } if caller.answer.is_closed() => {}
                Request::Append { event, caller } => {
                    events.push(event);
                    callers.push(caller);
                }
                Request::Probe(answer) if answer.is_closed() => {}
                Request::Probe(answer) => probes.push(answer),
            }
        }
        if events.is_empty() && probes.is_empty() {
            continue;
        }
        let (started, span) = (Instant::now(), batch_span(&callers));
        let appended = store.append(&events).instrument(span.clone()).await;
        match &appended {
            _ if events.is_empty() => {}
            Ok(_) => metrics.committed(events.len(), started.elapsed()),
            Err(_) => metrics.commit_failed(),
        }
        span.in_scope(|| {
            tracing::debug!(
                duration_ms = started.elapsed().as_millis() as u64,
                ok = appended.is_ok(),
                "commit"
            )
        });
        for probe in probes {
            let answer = match &appended {
                // The database works, and rejects one of the events.
                Err(error) if error.class() == StoreErrorClass::Rejected && !events.is_empty() => {
                    Ok(())
                }
                Err(error) => Err(error.clone().into()),
                Ok(_) => Ok(()),
            };
            // A prober that went away needs no answer.
            let _ = probe.send(answer);
        }
        let answers = match appended {
            Ok(answers) => answers.into_iter().map(Ok).collect(),
            Err(error) if error.class() == StoreErrorClass::Rejected && events.len() > 1 => {
                one_by_one(&store, &events).await
            }
            Err(error) => events.iter().map(|_| Err(error.clone().into())).collect(),
        };
        let worked = started.elapsed();
        for (caller, answer) in callers.into_iter().zip(answers) {
            // A caller that went away does not mind.
            let _ = caller.answer.send(answer);
        }
        if pace == Pace::Yielding {
            store.pause_after_write(worked).await;
        }
    }
}

/// For who follows a delivery from its request to its commit: either names the other.
fn batch_span(callers: &[Caller]) -> Span {
    if !tracing::enabled!(Level::DEBUG) {
        return Span::none();
    }
    let id = Uuid::now_v7().to_string();
    let span =
        tracing::debug_span!(parent: None, "batch", batch.id = id, batch.size = callers.len());
    for caller in callers {
        caller.span.record("batch.id", &id);
        span.follows_from(&caller.span);
    }
    span
}

/// One that the database refuses must not take the others with it.
async fn one_by_one(store: &Store, events: &[NewEvent]) -> Vec<Result<Appended, AppendError>> {
    let mut answers = Vec::with_capacity(events.len());
    for event in events {
        let appended = store.append(std::slice::from_ref(event)).await;
        answers.push(
            appended
                .map(|answers| answers[0])
                .map_err(AppendError::from),
        );
    }
    answers
}

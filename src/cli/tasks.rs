//! Watches the background tasks of `serve`.
//!
//! If a task ends that deliveries depend on, the process ends. The supervisor (systemd, an
//! orchestrator) starts a new process, and `/readyz` answers 503 meanwhile. Any other task is
//! started again in place. Otherwise a Stripe object that makes a reconciliation panic would
//! prevent the process from receiving deliveries, because it would read the same object after each
//! restart.

use std::collections::HashMap;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Delay before the first restart.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// Longest delay before a restart. A task that ran for longer starts over with [`FIRST_DELAY`].
const MAX_DELAY: Duration = Duration::from_secs(300);

/// The end of an essential task before the stop, by its name.
#[derive(Debug, thiserror::Error)]
#[error("{0} ended before the server was stopped; restart it")]
pub struct TaskEnded(pub &'static str);

/// Named tasks that must run until the stop.
#[derive(Default)]
pub struct EssentialTasks {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl EssentialTasks {
    /// Starts a task.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits for the end of a task. Never returns if no task is left.
    pub async fn next_ended(&mut self) -> TaskEnded {
        let (id, result) = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => (id, Ok(())),
            Some(Err(error)) => (error.id(), Err(error)),
            None => std::future::pending().await,
        };
        let name = self.names.get(&id).copied().unwrap_or("a task");
        log_panic(name, &result);
        TaskEnded(name)
    }

    /// Waits until all tasks have ended. Call it only after the stop, which ends them.
    pub async fn finish(mut self) {
        while !self.tasks.is_empty() {
            self.next_ended().await;
        }
    }
}

/// Runs a task until the stop. Starts it again, after a growing delay, when it panics or ends.
pub async fn keep_running<F>(
    name: &'static str,
    mut start: impl FnMut() -> F,
    stopping: CancellationToken,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut delay = FIRST_DELAY;
    loop {
        let started = Instant::now();
        // A set aborts its task when this future is dropped, unlike a plain task handle.
        let mut task = JoinSet::new();
        task.spawn(start());
        let result = task.join_next().await.unwrap_or(Ok(()));

        log_panic(name, &result);
        if stopping.is_cancelled() {
            return;
        }

        if started.elapsed() > MAX_DELAY {
            delay = FIRST_DELAY;
        }
        let retry_s = delay.as_secs();
        tracing::error!(task = name, retry_s, "background task ended, restarting it");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stopping.cancelled() => return,
        }
        delay = (delay * 2).min(MAX_DELAY);
    }
}

fn log_panic(name: &'static str, result: &Result<(), JoinError>) {
    if let Err(error) = result {
        tracing::error!(task = name, %error, "background task panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn panicked_task_is_started_again() {
        let stopping = CancellationToken::new();
        let starts = Arc::new(AtomicUsize::new(0));
        let (counted, stop) = (starts.clone(), stopping.clone());
        let start = move || {
            let (number, stop) = (counted.fetch_add(1, Ordering::Relaxed), stop.clone());
            async move {
                assert_ne!(number, 0, "the first start panics");
                stop.cancel();
            }
        };
        let kept = keep_running("test", start, stopping.clone());
        tokio::time::timeout(Duration::from_secs(30), kept)
            .await
            .expect("the second start stops the loop");

        assert_eq!(starts.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn ended_essential_task_is_named() {
        let mut tasks = EssentialTasks::default();
        tasks.spawn("healthy", std::future::pending());
        tasks.spawn("faulty", async { panic!("a fault") });
        assert!(tasks.next_ended().await.to_string().starts_with("faulty "));
    }
}

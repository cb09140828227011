//! Folding off the async threads, so that one long history does not delay everybody's requests.

use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::sync::Semaphore;

/// Largest number of observations that is parsed and folded on an async thread.
///
/// Ordinary invoices have a few dozen. For them, moving the work to another thread and back would
/// cost more than it saves.
const MAX_INLINE: usize = 300;

/// Permits for concurrent long folds: half of the processors, so that deliveries always find a free
/// processor.
static LONG_FOLDS: LazyLock<Semaphore> = LazyLock::new(|| {
    let processors = available_parallelism().map_or(1, std::num::NonZero::get);
    Semaphore::new((processors / 2).max(1))
});

/// Runs `work` over this many observations, on a blocking thread if they are many.
///
/// If the caller is dropped, a fold that waits for a permit never starts, and a fold that has
/// started keeps its permit until it ends.
pub async fn run_fold<T: Send + 'static>(
    observations: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if observations <= MAX_INLINE {
        return work();
    }

    let permit = LONG_FOLDS
        .acquire()
        .await
        .expect("nothing closes this semaphore");
    let folding = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(permit);
        done
    });
    match folding
        .await
        .map_err(tokio::task::JoinError::try_into_panic)
    {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // Only a runtime that shuts down cancels a fold. Its result is not needed then.
        Err(Err(_)) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::{MAX_INLINE, run_fold};

    #[tokio::test]
    async fn long_folds_leave_the_async_thread() {
        let here = thread::current().id();
        let short = run_fold(MAX_INLINE, || thread::current().id()).await;
        let long = run_fold(MAX_INLINE + 1, || thread::current().id()).await;
        assert_eq!(short, here);
        assert_ne!(long, here);
    }

    #[tokio::test]
    #[should_panic(expected = "a broken fold")]
    async fn panics_reach_the_caller() {
        run_fold(MAX_INLINE + 1, || panic!("a broken fold")).await;
    }
}

//! Checks the database at every crash point as another process would, while the program stands
//! still. A violation there would remain after a crash.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rand::RngExt;
use rand::rngs::StdRng;
use stripe_reconciler::store::Store;
use tokio::runtime::Builder;

use super::durable::{Durable, Invariants};
use super::simulation::Simulation;

/// One in this many deliveries or runs is watched, because watching stops the program at each
/// point.
const WATCHED: u32 = 20;

/// Result of one check.
type CheckResult = Result<(), String>;

pub struct Watch {
    ask: Sender<()>,
    seen: Receiver<CheckResult>,
    /// First violation found.
    found: CheckResult,
    thread: JoinHandle<()>,
}

impl Watch {
    pub fn start(database_url: &str, invariants: Arc<Mutex<Invariants>>) -> Watch {
        let (url, (ask, asked), (trace_work, seen)) =
            (database_url.to_owned(), channel(), channel());

        // On its own thread, because the program's runtime is active and cannot run another future.
        let thread = std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let store = Store::connect(&url).await.unwrap();
                while asked.recv().is_ok() {
                    let durable = Durable::read(&store).await;
                    let check = invariants.lock().unwrap().check(&durable);
                    trace_work.send(check).expect("who asked waits for it");
                }
                store.close().await;
            });
        });

        Watch {
            ask,
            seen,
            found: Ok(()),
            thread,
        }
    }

    /// Checks the database once and waits for the result.
    pub fn check(&mut self) {
        if self.found.is_ok() {
            self.found = match self.ask.send(()) {
                Ok(()) => self
                    .seen
                    .recv()
                    .unwrap_or_else(|_| Err("nobody could look".to_owned())),
                Err(_) => Err("nobody could look".to_owned()),
            };
        }
    }

    /// Closes the database connection.
    pub fn end(self) -> CheckResult {
        drop(self.ask);
        self.thread
            .join()
            .map_err(|_| "nobody could look".to_owned())?;
        self.found
    }
}

impl Simulation {
    pub fn check_log(&mut self) {
        let durable = self.process().durable();
        self.ledger.check(&durable.log, &self.stripe);
        let wrong = self.invariants().check(&durable).err();
        assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
    }

    pub fn invariants(&self) -> MutexGuard<'_, Invariants> {
        self.invariants.lock().unwrap()
    }

    /// Draws whether the next delivery or run is watched.
    pub fn is_watched(&self, random: &mut StdRng) -> bool {
        // Drawn in any case, so that later draws stay the same.
        random.random_range(0..WATCHED) == 0 || self.all_is_watched
    }

    /// Checks the database at every crash point from now on.
    pub fn watch(&self) {
        self.process()
            .watch(Watch::start(&self.database.url, self.invariants.clone()));
    }
}

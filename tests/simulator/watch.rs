//! Looks at what is durable at every moment of something, as another process would, while the program stands still: whatever is not
//! true then would be so after a crash.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rand::RngExt;
use rand::rngs::StdRng;
use stripe_reconciler::store::Store;
use tokio::runtime::Builder;

use super::durable::{Durable, Invariants};
use super::world::World;

/// One delivery or pass of so many is watched at every moment, for which it stands still.
const WATCHED: u32 = 20;

/// One look, and what was seen.
type Look = Result<(), String>;

pub struct Watch {
    ask: Sender<()>,
    seen: Receiver<Look>,
    /// The first that is not true.
    found: Look,
    thread: JoinHandle<()>,
}

impl Watch {
    pub fn start(database_url: &str, invariants: Arc<Mutex<Invariants>>) -> Watch {
        let (url, (ask, asked), (tell, seen)) = (database_url.to_owned(), channel(), channel());
        // A thread of its own: the program's runtime is in the middle of something, and may run no other.
        let thread = std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let store = Store::connect(&url).await.unwrap();
                while asked.recv().is_ok() {
                    let durable = Durable::read(&store).await;
                    let look = invariants.lock().unwrap().check(&durable);
                    tell.send(look).expect("who asked waits for it");
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

    /// Returns when it has looked.
    pub fn look(&mut self) {
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

    /// Lets go of the database.
    pub fn end(self) -> Look {
        drop(self.ask);
        self.thread
            .join()
            .map_err(|_| "nobody could look".to_owned())?;
        self.found
    }
}

impl World {
    pub fn check_log(&mut self) {
        let durable = self.process().durable();
        self.ledger.check(&durable.log, &self.stripe);
        let wrong = self.invariants().check(&durable).err();
        assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
    }

    pub fn invariants(&self) -> MutexGuard<'_, Invariants> {
        self.invariants.lock().unwrap()
    }

    /// Whether the next delivery or pass is.
    pub fn is_watched(&self, random: &mut StdRng) -> bool {
        // Drawn in any case, so that what follows is the same.
        random.random_range(0..WATCHED) == 0 || self.all_is_watched
    }

    /// From now on, at every moment, what is durable is looked at.
    pub fn watch(&self) {
        self.process()
            .watch(Watch::start(&self.database.url, self.invariants.clone()));
    }
}

//! The program as a process that can crash: it runs on one runtime, and a crash drops the runtime
//! at any await point. A statement sent before may or may not be executed.

use std::cell::RefCell;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;
use stripe_reconciler::http::{self, AppState, MetricsAt, Ui};
use stripe_reconciler::ingest::batch_writer::{BatchWriter, Writer};
use stripe_reconciler::reconcile::ReconcileContext;
use stripe_reconciler::store::Store;
use stripe_reconciler::stripe_api::{RETRIES, StripeApi, StripeApiKey, StripeSettings};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use super::durable::Durable;
use super::watch::Watch;
use testkit::stripe::LIVE_KEY;
use testkit::{Answer, Database, Engine};

/// Maximum time for the database to notice that a client is gone.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Configuration of a process.
pub struct Setup<'s> {
    pub database_url: &'s str,
    pub clock: &'s Clock,
    /// Value of `STRIPE_WEBHOOK_SECRET`.
    pub secrets: &'s str,
    pub stripe_base: &'s str,
    /// Number of servers on the same database, which crash together.
    pub replicas: usize,
}

pub struct Process {
    runtime: Runtime,
    waits: Arc<Mutex<Waits>>,
    replicas: Vec<Replica>,
    writers: Vec<Writer>,
}

/// One server of a process. Cheap to clone.
#[derive(Clone)]
pub struct Replica {
    pub store: Store,
    pub inbox: BatchWriter,
    router: TowerToHyperService<axum::Router>,
    api: StripeApi,
    clock: Clock,
    stopping: CancellationToken,
}

/// Counts the points at which a crash makes a difference: whenever the runtime has nothing to do
/// but wait for I/O, and whenever the awaited result has arrived.
///
/// There may be none of the first kind if I/O is fast, and there is at least one of the second.
#[derive(Default)]
struct Waits {
    unanswered: Option<usize>,
    are_over: bool,
    waker: Option<Waker>,
    watch: Option<Watch>,
}

impl Waits {
    fn one_more(&mut self) {
        self.watch.iter_mut().for_each(Watch::check);
        match self.unanswered {
            Some(0) => {
                (self.unanswered, self.are_over) = (None, true);
                self.waker.take().into_iter().for_each(Waker::wake);
            }
            Some(unanswered) => self.unanswered = Some(unanswered - 1),
            None => {}
        }
    }
}

impl Process {
    pub fn start(setup: &Setup) -> Process {
        let waits: Arc<Mutex<Waits>> = Arc::default();
        let counted = waits.clone();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || locked(&counted).one_more())
            .build()
            .unwrap();
        let started = (0..setup.replicas).map(|_| runtime.block_on(Replica::start(setup)));
        let (replicas, writers) = started.unzip();

        Process {
            runtime,
            waits,
            replicas,
            writers,
        }
    }

    /// Returns one of the servers, chosen by the number.
    pub fn replica(&self, number: usize) -> Replica {
        self.replicas[number % self.replicas.len()].clone()
    }

    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.run_until(None, work).expect("nothing disturbs it")
    }

    /// Runs the work to its first crash point and then past this many more.
    ///
    /// Returns `None` if it was interrupted there.
    pub fn run_until<T>(&self, waits: Option<usize>, work: impl Future<Output = T>) -> Option<T> {
        {
            let mut counted = locked(&self.waits);
            *counted = Waits {
                unanswered: waits,
                watch: counted.watch.take(),
                ..Waits::default()
            };
        }

        self.runtime.block_on(async {
            let (mut work, mut has_begun) = (pin!(work), false);
            std::future::poll_fn(|context| {
                if std::mem::replace(&mut has_begun, true) {
                    locked(&self.waits).one_more();
                }
                if locked(&self.waits).are_over {
                    return Poll::Ready(None);
                }
                locked(&self.waits).waker = Some(context.waker().clone());
                work.as_mut().poll(context).map(Some)
            })
            .await
        })
    }

    /// Checks the database at every crash point from now on.
    pub fn watch(&self, watch: Watch) {
        locked(&self.waits).watch = Some(watch);
    }

    /// Stops checking. Returns `None` if the process was not watched.
    pub fn end_watch(&self) -> Option<Watch> {
        locked(&self.waits).watch.take()
    }

    pub fn durable(&self) -> Durable {
        let store = self.replica(0).store;
        self.run(Durable::read(&store))
    }

    /// Drops the process. Returns when the database has noticed.
    pub fn crash(self, database: &Database) {
        {
            let _inside = self.runtime.enter();
            drop((self.replicas, self.writers));
        }
        drop(self.runtime);
        wait_until_left(database);
    }

    /// Stops the process like SIGTERM, which finishes work in progress.
    pub fn stop(self) {
        let Process {
            runtime,
            replicas,
            writers,
            ..
        } = self;

        runtime.block_on(async {
            let stores: Vec<Store> = replicas
                .iter()
                .map(|replica| replica.store.clone())
                .collect();
            for replica in &replicas {
                replica.stopping.cancel();
            }
            drop(replicas);
            for writer in writers {
                writer.finish().await;
            }
            for store in stores {
                store.close().await;
            }
        });
    }
}

fn locked(waits: &Mutex<Waits>) -> MutexGuard<'_, Waits> {
    waits.lock().unwrap()
}

/// Waits until the last statement of every connection is executed or aborted.
fn wait_until_left(database: &Database) {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().unwrap();
        static ASKING: RefCell<Option<(String, PgConnection)>> = const { RefCell::new(None) };
    }
    let in_postgres = |asking: &mut Option<(String, PgConnection)>| {
        RUNTIME.with(|runtime| {
            runtime.block_on(async {
                if asking.as_ref().is_none_or(|(url, _)| *url != database.url) {
                    *asking = Some((database.url.clone(), PgConnection::connect(&database.url).await.unwrap()));
                }
                let (_, connection) = asking.as_mut().expect("it was just made");
                let others =
                    "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
                sqlx::query_scalar::<_, i64>(others).fetch_one(connection).await.unwrap() > 0
            })
        })
    };

    let deadline = Instant::now() + TIMEOUT;
    while match database.engine {
        Engine::Sqlite => is_open(database.url.trim_start_matches("sqlite://")),
        Engine::Postgres => ASKING.with(|asking| in_postgres(&mut asking.borrow_mut())),
    } {
        assert!(
            Instant::now() < deadline,
            "somebody still uses the database of a process that is gone"
        );
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Returns whether this process has the file open.
fn is_open(path: &str) -> bool {
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    open.into_iter()
        .any(|link| link.to_str().is_some_and(|link| link.starts_with(path)))
}

impl Replica {
    async fn start(setup: &Setup<'_>) -> (Replica, Writer) {
        let store = Store::connect(setup.database_url).await.unwrap();
        store.migrate().await.unwrap();
        let (inbox, writer) = BatchWriter::start(store.clone(), Arc::default());
        let key = StripeApiKey::parse(LIVE_KEY).unwrap();
        let api = StripeApi::new(StripeSettings {
            key,
            base: setup.stripe_base.to_owned(),
            rate: 1000,
            retries: RETRIES,
        });
        let (clock, stopping) = (setup.clock.clone(), CancellationToken::new());
        let secrets = SigningSecrets::parse(setup.secrets).unwrap();
        let state = AppState::new(
            store.clone(),
            inbox.clone(),
            secrets,
            clock.clone(),
            Arc::default(),
            stopping.clone(),
        );

        let router =
            TowerToHyperService::new(http::router(state, MetricsAt::MainListener, Ui::Absent));
        (
            Replica {
                store,
                inbox,
                router,
                api,
                clock,
                stopping,
            },
            writer,
        )
    }

    pub fn tools(&self) -> ReconcileContext {
        let (store, inbox, api, clock) = (
            self.store.clone(),
            self.inbox.clone(),
            self.api.clone(),
            self.clock.clone(),
        );

        ReconcileContext {
            store,
            inbox,
            api,
            clock,
            metrics: Arc::default(),
        }
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }

        let request: Request<Full<Bytes>> = request.body(Full::from(body)).unwrap();
        let (head, body) = self.router.call(request).await.unwrap().into_parts();
        Answer {
            status: head.status,
            headers: head.headers,
            body: body.collect().await.unwrap().to_bytes(),
        }
    }

    pub async fn deliver(&self, signature: &str, body: Vec<u8>) -> Answer {
        self.send(
            "POST",
            "/webhooks/stripe",
            &[("stripe-signature", signature)],
            body,
        )
        .await
    }

    pub async fn get(&self, path: &str, key: &str) -> Answer {
        self.send("GET", path, &[("apikey", key)], Vec::new()).await
    }

    pub async fn put(&self, path: &str, key: &str, document: &Value) -> Answer {
        self.send(
            "PUT",
            path,
            &[("apikey", key)],
            document.to_string().into_bytes(),
        )
        .await
    }
}

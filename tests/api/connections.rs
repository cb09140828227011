//! Connections to PostgreSQL break while the server is well: no delivery is refused, and the
//! circuit breaker stays closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::block_in_place;

use testkit::{Database, Engine, Load, Pooler, PostgresServer, TestServer, invoice_path};

/// Idle time after which the server asks a connection before it uses it, and some more.
const IDLE: Duration = Duration::from_millis(2500);
/// Longest time that one delivery may take while connections swallow everything.
const SWALLOWED: Duration = Duration::from_secs(4);

/// What a relay does to the connections that are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Resets them.
    Reset,
    /// Keeps them open and forwards nothing, as a firewall does that forgot them.
    Swallow,
}

/// An address in front of a server, as a load balancer or a firewall. It has the server's port, so
/// that it does not count as a pooler.
struct Relay {
    address: String,
    fault: watch::Sender<Fault>,
}

impl Relay {
    async fn start(server: &PostgresServer) -> Relay {
        static NEXT: AtomicU8 = AtomicU8::new(1);

        let host = format!("127.0.3.{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let address = format!("{host}:{}", server.port());
        let listener = TcpListener::bind(&address).await.unwrap();
        let (port, fault) = (server.port(), watch::Sender::new(Fault::None));
        let faults = fault.clone();

        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, port, faults.subscribe()));
            }
        });
        Relay { address, fault }
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }
}

async fn forward(mut client: TcpStream, port: u16, mut faults: watch::Receiver<Fault>) {
    faults.mark_unchanged();
    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();

    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        Ok(()) = faults.changed() => {
            if *faults.borrow() == Fault::Swallow {
                std::future::pending::<()>().await;
            }
            client.set_zero_linger().unwrap();
        }
    }
}

/// Deliveries that must all be acknowledged.
struct Deliveries<'s> {
    server: &'s TestServer,
    count: usize,
}

impl<'s> Deliveries<'s> {
    fn to(server: &'s TestServer) -> Deliveries<'s> {
        Deliveries { server, count: 0 }
    }

    /// Delivers one new event, and reads on as many connections as the pool has.
    async fn deliver(&mut self) -> Duration {
        self.count += 1;
        let event = json!({"id": format!("evt_connection_{}", self.count), "object": "event",
            "type": "customer.updated", "created": 1_769_850_000,
            "data": {"object": {"id": "cus_1", "object": "customer"}}});
        let path = invoice_path("inv-0");
        let started = Instant::now();
        let reads = join_all((0..20).map(|_| self.server.get(&path, &self.server.acme_key)));
        let (delivered, reads) = tokio::join!(self.server.deliver(&event), reads);
        let took = started.elapsed();
        delivered.with_status(200);
        for read in reads {
            read.with_status(200);
        }

        took
    }

    fn check(&self) {
        let logged = self.server.logged_ids();
        assert_eq!(logged.len(), self.count, "each delivery is stored once");
        check_breaker_stayed_closed(self.server);
    }
}

fn check_breaker_stayed_closed(server: &TestServer) {
    let log = server.process.log();
    assert!(!log.contains("database unavailable"), "{log}");
}

/// Breaks all connections twice: while they are in constant use, and after they were idle.
async fn survive(fault: Fault) -> Duration {
    let database = Database::create(Engine::Postgres);
    let relay = Relay::start(PostgresServer::shared()).await;
    let server = TestServer::on(database.with_url(|name| relay.url(name))).await;
    server.store("inv-0", "in_0").await.with_status(201);
    let mut deliveries = Deliveries::to(&server);

    let mut slowest = Duration::ZERO;
    for idle in [Duration::ZERO, IDLE, Duration::ZERO] {
        for _ in 0..3 {
            deliveries.deliver().await;
        }
        relay.fault.send_replace(fault);
        // The time without traffic is what is tested.
        tokio::time::sleep(idle).await;
        for _ in 0..3 {
            slowest = slowest.max(deliveries.deliver().await);
        }
    }
    deliveries.check();
    slowest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reset_connections_refuse_no_delivery() {
    survive(Fault::Reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_refuse_no_delivery() {
    let slowest = survive(Fault::Swallow).await;
    assert!(slowest < SWALLOWED, "a delivery took {slowest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_ended_by_server_refuse_no_delivery() {
    let cluster = PostgresServer::shared();
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap().to_owned();
    let set = format!("alter database {name} set idle_session_timeout = '300ms'");
    block_in_place(|| cluster.sql("postgres", &set));
    let server = TestServer::on(database).await;
    server.store("inv-0", "in_0").await.with_status(201);
    let mut deliveries = Deliveries::to(&server);

    let ours = "select count(*) from pg_stat_activity where datname = current_database() \
                and application_name = 'stripe-reconciler'";
    for _ in 0..4 {
        deliveries.deliver().await;
        block_in_place(|| {
            cluster.wait_until("sessions stay", || cluster.sql(&name, ours) == "0");
        });
    }
    deliveries.check();
}

/// Terminates one session after the other, whatever it is doing, under load.
async fn terminate_backends(server: &TestServer, name: &str) {
    let cluster = PostgresServer::shared();
    let one = "select pg_terminate_backend(pid) from pg_stat_activity \
               where datname = current_database() and pid <> pg_backend_pid() \
               order by random() limit 1";
    let load = Load::start(server);
    for _ in 0..30 {
        load.acknowledge(10).await;
        block_in_place(|| cluster.sql(name, one));
    }
    let acknowledged = load.acknowledged();
    let told = load.finish().await;
    assert!(told.refused_by().is_empty(), "{:?}", told.refused_by());

    let mut logged = server.logged_ids();
    assert!(acknowledged.iter().all(|id| logged.contains(id)));
    logged.sort();
    logged.dedup();
    assert_eq!(logged.len(), told.events(), "each delivery is stored once");
    check_breaker_stayed_closed(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_backends_refuse_no_delivery() {
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap().to_owned();
    terminate_backends(&TestServer::on(database).await, &name).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_backends_of_pooler_refuse_no_delivery() {
    let pooler = Pooler::start(PostgresServer::shared());
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap().to_owned();
    let server = TestServer::on(database.with_url(|name| pooler.url(name))).await;
    terminate_backends(&server, &name).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_statement_does_not_open_breaker() {
    let cluster = PostgresServer::shared();
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap().to_owned();
    let server = Arc::new(TestServer::on(database).await);
    server.store("inv-0", "in_0").await.with_status(201);
    let lock = server.database.lock().await;

    let event = json!({"id": "evt_1", "object": "event", "type": "customer.updated",
        "created": 1_769_850_000, "data": {"object": {"id": "cus_1", "object": "customer"}}});
    let delivering = tokio::spawn({
        let (server, event) = (server.clone(), event.clone());
        async move { server.deliver(&event).await }
    });
    // As `statement_timeout` does: 57014.
    let cancel = "select count(pg_cancel_backend(pid)) from pg_stat_activity \
                  where datname = current_database() and wait_event_type = 'Lock'";
    block_in_place(|| {
        cluster.wait_until("nobody waits", || cluster.sql(&name, cancel) == "1");
    });
    let refused = delivering.await.unwrap();
    refused.with_error(503, "Unavailable");
    let path = invoice_path("inv-0");
    server.get(&path, &server.acme_key).await.with_status(200);
    lock.release().await;
    server.deliver(&event).await.with_status(200);
    check_breaker_stayed_closed(&server);
}

//! Denial of service: idle, slow and unread connections, and floods of forged deliveries.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use stripe_reconciler::clock::Clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use testkit::each_database;
use testkit::{
    OLD_SECRET, SECRET, Server, TestServer, Wire, binary, client, invoice_path, send, signature,
};

const MIB: usize = 1024 * 1024;

fn event(id: &str, bytes: usize) -> Vec<u8> {
    let object = json!({"id": "cus_1", "object": "customer", "description": "x".repeat(bytes)});
    let event = json!({"id": id, "object": "event", "type": "customer.updated", "created": 100, "data": {"object": object}});
    event.to_string().into_bytes()
}

/// Returns a well-formed signature that is wrong.
fn forged() -> String {
    format!("t={},v1={}", Clock::system().now_s(), "0".repeat(64))
}

/// Returns the head of a delivery.
fn head(signature: &str, framing: &str) -> Vec<u8> {
    format!("POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nStripe-Signature: {signature}\r\n{framing}\r\n\r\n").into_bytes()
}

/// Delivers a new event on its own connection.
async fn deliver(server: &Server, id: &str, bytes: usize) -> u16 {
    let body = event(id, bytes);
    let signature = signature(SECRET, Clock::system().now_s(), &body);
    let url = format!("{}/webhooks/stripe", server.base);

    send(
        &client(),
        "POST",
        &url,
        &[("Stripe-Signature", &signature)],
        body,
    )
    .await
    .status
    .as_u16()
}

async fn connections(server: &TestServer, count: usize, bytes: &[u8]) -> Vec<Wire> {
    join_all((0..count).map(async |_| {
        let mut wire = Wire::connect(server.process.authority()).await;
        wire.write(bytes).await;
        wire
    }))
    .await
}

/// An endless flood of forged deliveries of one kind on several connections.
struct Flood {
    connections: usize,
    /// Bytes sent on one connection.
    bytes: Arc<Vec<u8>>,
    /// Whether each connection waits for an answer rather than for its end.
    answered: bool,
}

impl Flood {
    fn new(connections: usize, parts: &[&[u8]], answered: bool) -> Flood {
        Flood {
            connections,
            bytes: Arc::new(parts.concat()),
            answered,
        }
    }

    async fn run(&self, authority: &str, stop: &AtomicBool, refused: &AtomicUsize) {
        join_all((0..self.connections).map(async |_| {
            while !stop.load(Ordering::Relaxed) {
                // The next round follows whatever the result.
                let _ = tokio::time::timeout(Duration::from_secs(1), self.once(authority, refused))
                    .await;
            }
        }))
        .await;
    }

    async fn once(&self, authority: &str, refused: &AtomicUsize) -> std::io::Result<()> {
        let mut socket = TcpStream::connect(authority).await?;
        loop {
            socket.write_all(&self.bytes).await?;
            let mut answer = [0; 4096];
            let read = socket.read(&mut answer).await?;
            if !self.answered || read == 0 {
                return Ok(());
            }
            // While all compete for the processor, some readers get 503.
            let is_refused =
                answer.starts_with(b"HTTP/1.1 4") || answer.starts_with(b"HTTP/1.1 503 ");
            assert!(is_refused, "{}", String::from_utf8_lossy(&answer[..read]));
            refused.fetch_add(1, Ordering::Relaxed);
        }
    }
}

each_database! {
    async fn idle_connections_shut_nobody_out(server: TestServer) {
        let server = server.with_server(&[("MAX_CONNECTIONS", "16")]);
        let kinds: [&[u8]; 4] = [
            b"",
            b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nStripe-Signature: t=1",
            &head(&forged(), "Content-Length: 1000"),
            &[
                &head(&forged(), "Transfer-Encoding: chunked")[..],
                b"10\r\n0123",
            ]
            .concat(),
        ];

        for (kind, bytes) in kinds.into_iter().enumerate() {
            let idle = connections(&server, 40, bytes).await;
            for n in 0..20 {
                let started = Instant::now();
                assert_eq!(
                    deliver(&server.process, &format!("evt_{kind}_{n}"), 10).await,
                    200
                );
                assert!(
                    started.elapsed() < Duration::from_secs(2),
                    "{kind}: {:?}",
                    started.elapsed()
                );
            }
            drop(idle);
        }

        assert_eq!(server.logged_ids().len(), 80);
    }

    async fn unread_answers_shut_nobody_out(server: TestServer) {
        let server = server.with_server(&[("MAX_CONNECTIONS", "16")]);
        let long =
            json!({"status": {"stripeInvoiceId": "in_1"}, "spec": {"note": "x".repeat(900_000)}});
        server
            .put(&invoice_path("long"), &long)
            .await
            .with_status(201);
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: x\r\nApiKey: {}\r\n\r\n",
            invoice_path("long"),
            server.acme_key
        );
        let _held = connections(&server, 40, request.repeat(20).as_bytes()).await;
        for n in 0..20 {
            assert_eq!(deliver(&server.process, &format!("evt_{n}"), 10).await, 200);
        }

        assert!(
            server.process.memory_mb() < 120,
            "{} MB",
            server.process.memory_mb()
        );
    }

    async fn busy_connection_outlives_idle_ones(server: TestServer) {
        let server = server.with_server(&[("MAX_CONNECTIONS", "16")]);
        let (mut used, mut others) = (Wire::connect(server.process.authority()).await, Vec::new());

        for n in 0..60 {
            let body = event(&format!("evt_{n}"), 10);
            let head = head(
                &signature(SECRET, Clock::system().now_s(), &body),
                &format!("Content-Length: {}", body.len()),
            );
            used.write(&[head, body].concat()).await;
            let answer = used.read_answer().await;
            assert!(answer.starts_with("http/1.1 200 "), "{answer}");
            // An idle connection arrives between any two requests.
            others.extend(connections(&server, 1, b"").await);
        }
    }

    async fn forgery_flood_does_not_block_authentic_deliveries(server: TestServer) {
        let stop = AtomicBool::new(false);
        let refused = AtomicUsize::new(0);
        let (small, large) = (event("evt_forged", 2000), event("evt_forged", MIB - 1000));
        let length = |body: &[u8]| format!("Content-Length: {}", body.len());
        let chunk = [b"4000\r\n".to_vec(), vec![b' '; 0x4000], b"\r\n".to_vec()].concat();
        let floods = [
            Flood::new(30, &[&head(&forged(), &length(&small)), &small], true),
            Flood::new(30, &[&head("nonsense", &length(&small)), &small], true),
            Flood::new(12, &[&head(&forged(), &length(&large)), &large], true),
            Flood::new(60, &[&head("nonsense", &length(&large)), &large], false),
            Flood::new(100, &[&head(&forged(), &length(&large)), &large[..MIB / 2]], false),
            Flood::new(60, &[&head(&forged(), "Transfer-Encoding: chunked"), &chunk.repeat(63)], false),
            Flood::new(30, &[b"POST /webhooks/stripe HTTP/1.1\r\n", "X-Header: y\r\n".repeat(90).as_bytes()], false),
            Flood::new(30, &[&[0xff; 100]], false),
            Flood::new(60, &[b"GET /v1/tenants/acme/invoices/a HTTP/1.1\r\nHost: x\r\nApiKey: forged\r\n\r\n"], true),
        ];

        let authority = server.process.authority();
        let flooding = join_all(
            floods
                .iter()
                .map(|flood| flood.run(authority, &stop, &refused)),
        );
        let delivering = async {
            let (mut most_mb, mut slowest) = (0, Duration::ZERO);
            for n in 0..30 {
                // Most events are small; an invoice with many lines is not.
                let bytes = if n % 10 == 9 { 60_000 } else { 4000 };
                let started = Instant::now();
                assert_eq!(
                    deliver(&server.process, &format!("evt_{n}"), bytes).await,
                    200
                );
                slowest = slowest.max(started.elapsed());
                most_mb = most_mb.max(server.process.memory_mb());
            }
            stop.store(true, Ordering::Relaxed);
            (most_mb, slowest)
        };

        let (_, (most_mb, slowest)) = tokio::join!(flooding, delivering);
        let log = server.process.log();
        println!(
            "refused {refused:?}, {most_mb} MB, slowest {slowest:?}, log {} lines",
            log.lines().count()
        );
        assert!(
            refused.load(Ordering::Relaxed) > 500,
            "it is a flood: {refused:?}"
        );
        assert!(most_mb < 250, "{most_mb} MB");
        assert!(log.lines().count() < 200, "{} lines", log.lines().count());
        assert_eq!(server.logged_ids().len(), 30);
    }
}

#[tokio::test]
async fn slow_head_and_slow_body_time_out() {
    let server = TestServer::start(testkit::Engine::Sqlite).await;
    let authority = server.process.authority();
    let slow_head = async {
        let mut wire = Wire::connect(authority).await;
        wire.write(b"GET /healthz HTTP/1.1\r\n").await;
        // Each byte arrives soon after the last, but the whole head takes too long.
        while wire.try_write(b"X").await {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let slow_body = async {
        let mut wire = Wire::connect(authority).await;
        wire.write(&head(&forged(), "Content-Length: 1000")).await;
        wire.read_to_end().await
    };

    let started = Instant::now();
    let (took, answer) = tokio::join!(
        async {
            slow_head.await;
            started.elapsed()
        },
        slow_body
    );
    assert!((9..14).contains(&took.as_secs()), "{took:?}");
    assert!(
        answer.starts_with("HTTP/1.1 408 ") && answer.contains(r#""code":"RequestTimeout""#),
        "{answer}"
    );
    assert!(
        !server.process.log().contains("took too long"),
        "who comes slowly is no failure of ours: {}",
        server.process.log()
    );
}

#[tokio::test]
async fn low_open_file_limit_lowers_connection_limit() {
    let server = TestServer::start(testkit::Engine::Sqlite).await;
    let secrets = format!("live={SECRET},old={OLD_SECRET}");
    let limited = |script: &str| {
        let inner = binary(&[]);
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script])
            .arg(inner.get_program())
            .env_clear();
        command.envs([
            ("DATABASE_URL", server.database.url.as_str()),
            ("STRIPE_WEBHOOK_SECRET", &secrets),
        ]);
        Server::start_command(command)
    };

    let soft = limited(r#"ulimit -Sn 120; exec "$0" "$@""#);
    assert!(
        !soft.log().contains("fewer connections"),
        "the soft limit is raised: {}",
        soft.log()
    );

    let hard = limited(r#"ulimit -n 120; exec "$0" "$@""#);
    assert!(hard.log().contains("fewer connections"), "{}", hard.log());

    for server in [soft, hard] {
        let idle = join_all((0..300).map(|_| Wire::connect(server.authority()))).await;
        for n in 0..20 {
            assert_eq!(
                deliver(&server, &format!("evt_{}_{n}", server.pid()), 10).await,
                200
            );
        }
        assert!(
            !server.log().contains("failed to accept connection"),
            "{}",
            server.log()
        );
        drop(idle);
    }
}

#[tokio::test]
async fn client_rejected_before_its_body_reads_the_answer() {
    let server = TestServer::start(testkit::Engine::Sqlite).await;
    let kinds = [
        (head("nonsense", &format!("Content-Length: {MIB}")), 400),
        (
            head(&forged(), &format!("Content-Length: {}", MIB + 1)),
            413,
        ),
    ];

    for (head, status) in kinds {
        for _ in 0..30 {
            let mut wire = Wire::connect(server.process.authority()).await;
            wire.write(&head).await;
            for _ in 0..16 {
                wire.write(&[b' '; MIB / 16]).await;
            }
            let answer = wire.read_to_end().await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer:?}"
            );
        }
    }

    let endless = async {
        let mut wire = Wire::connect(server.process.authority()).await;
        wire.write(&head("nonsense", "Content-Length: 1000000000"))
            .await;
        while wire.try_write(&[b' '; 1000]).await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };

    tokio::time::timeout(Duration::from_secs(6), endless)
        .await
        .expect("it may not go on for ever");
}

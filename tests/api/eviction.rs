//! Connections that compete for a full server: who is closed, who is told to come again, and who is
//! served although the server stops.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use stripe_reconciler::clock::Clock;

use testkit::each_database;
use testkit::{Engine, SECRET, TestServer, Wire, signature};

const MIB: usize = 1024 * 1024;
/// The default of `--max-connections`.
const MAX_CONNECTIONS: usize = 1024;
const KEPT: usize = 64;

fn event(id: &str) -> Vec<u8> {
    let object = json!({"id": "cus_1", "object": "customer"});
    let event = json!({"id": id, "object": "event", "type": "customer.updated", "created": 100,
        "data": {"object": object}});
    event.to_string().into_bytes()
}

/// A delivery with a valid signature, head and body.
fn delivery(id: &str) -> Vec<u8> {
    let body = event(id);
    let signature = signature(SECRET, Clock::system().now_s(), &body);
    [head(&signature, body.len()), body].concat()
}

fn head(signature: &str, length: usize) -> Vec<u8> {
    format!(
        "POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nStripe-Signature: {signature}\r\n\
         Content-Length: {length}\r\n\r\n"
    )
    .into_bytes()
}

fn forged_signature() -> String {
    format!("t={},v1={}", Clock::system().now_s(), "0".repeat(64))
}

async fn connect(server: &TestServer, count: usize) -> Vec<Wire> {
    join_all((0..count).map(|_| Wire::connect(server.process.authority()))).await
}

/// Delivers once on each connection, and expects 200.
async fn deliver_on_each(wires: &mut [Wire], round: usize) {
    join_all(wires.iter_mut().enumerate().map(async |(n, wire)| {
        assert!(
            wire.try_write(&delivery(&format!("evt_{round}_{n}"))).await,
            "kept connection {n} was closed before round {round}"
        );
        let answer = wire.read_answer().await;
        assert!(
            answer.starts_with("http/1.1 200 "),
            "{round}, {n}: {answer}"
        );
    }))
    .await;
}

each_database! {
    async fn unfinished_heads_close_no_authentic_connection(server: TestServer) {
        let mut kept = connect(&server, KEPT).await;
        deliver_on_each(&mut kept, 0).await;

        // A head that never ends on each of as many connections as there may be at all: old and
        // young ones, while more come.
        let mut heads = Vec::new();
        for round in 1..=4 {
            for mut wire in connect(&server, MAX_CONNECTIONS / 4).await {
                wire.try_write(b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nX: ").await;
                heads.push(wire);
            }
            deliver_on_each(&mut kept, round).await;
        }
        heads.extend(connect(&server, KEPT).await);
        deliver_on_each(&mut kept, 5).await;
    }

    async fn body_over_memory_budget_is_answered_503(server: TestServer) {
        // 100 bodies of almost a mebibyte, whose last byte does not come: more than 64 MiB.
        let mut wires = connect(&server, 100).await;
        let (head, body) = (head(&forged_signature(), MIB), vec![b' '; MIB - 1]);
        let answers = join_all(wires.iter_mut().map(async |wire| {
            let _ = wire.try_write(&head).await && wire.try_write(&body).await;
            tokio::time::timeout(Duration::from_secs(5), wire.read_answer()).await.ok()
        }))
        .await;
        let answered: Vec<String> = answers.into_iter().flatten().collect();
        assert!((30..=60).contains(&answered.len()), "{} of 100 are told", answered.len());
        for answer in answered {
            assert!(answer.starts_with("http/1.1 503 ") && answer.contains("\r\nretry-after: "), "{answer}");
            assert!(answer.contains(r#""code":"Unavailable""#), "{answer}");
        }

        // Those within the budget go on waiting for their last byte.
        let mut one = Wire::connect(server.process.authority()).await;
        one.write(&delivery("evt_1")).await;
        assert!(one.read_answer().await.starts_with("http/1.1 200 "));
    }

    async fn accept_queue_is_served_when_server_stops(server: TestServer) {
        let mut server = server;
        let signal = |name: &str| {
            let pid = server.process.pid().to_string();
            assert!(std::process::Command::new("kill").args([name, &pid]).status().unwrap().success());
        };
        // While the process stands still, the kernel completes the connections.
        signal("-STOP");
        let mut wires = connect(&server, 50).await;
        for (n, wire) in wires.iter_mut().enumerate() {
            wire.write(&delivery(&format!("evt_{n}"))).await;
        }
        signal("-TERM");
        signal("-CONT");
        let answers = join_all(wires.iter_mut().map(Wire::read_to_end)).await;
        let mut stored = 0;
        for (n, answer) in answers.iter().enumerate() {
            // A request that was in progress at the very moment of the stop may be told to come again.
            let is_retry = answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: ");
            let is_stored = answer.starts_with("HTTP/1.1 200 ");
            assert!(is_stored || is_retry, "{n} is not reset: {answer:?}");
            stored += usize::from(is_stored);
        }
        assert_eq!(server.process.exit_code(), Some(0));
        assert!(stored > 0, "those that waited are stored");
        assert_eq!(server.logged_ids().len(), stored);
    }
}

#[tokio::test]
async fn request_without_exactly_one_host_is_400() {
    let server = TestServer::start(Engine::Sqlite).await;
    let cases = [
        ("HTTP/1.1", "", 400),
        ("HTTP/1.1", "Host: a\r\nHost: b\r\n", 400),
        ("HTTP/1.1", "Host: a\r\n", 200),
        ("HTTP/1.0", "", 200),
        ("HTTP/1.0", "Host: a\r\nHost: b\r\n", 400),
    ];
    for (version, host, status) in cases {
        let request = format!("GET /healthz {version}\r\n{host}Connection: close\r\n\r\n");
        let answer = server.send_raw(request.as_bytes()).await;
        let status_line = format!("{version} {status} ");
        assert!(answer.starts_with(&status_line), "{request:?}: {answer}");
        let names_host = answer.contains(r#""code":"InvalidHost""#);
        assert_eq!(names_host, status == 400, "{answer}");
    }
}

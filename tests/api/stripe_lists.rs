//! A Stripe whose lists or answers never end: a run ends with an error in words.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;

use testkit::{Engine, TestServer, run};

/// How the API misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Each page has a new event, and says that more follow.
    EndlessList,
    /// `starting_after` is ignored: each page is the first.
    StuckCursor,
    /// The body of an answer goes on for ever.
    EndlessBody,
}

/// Serves `/v1/events` with a fault, and returns its base address.
async fn faulty_stripe(fault: Fault) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(socket, fault));
        }
    });
    base
}

/// Answers the requests of one connection, until the client closes it.
async fn serve(mut socket: TcpStream, fault: Fault) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        if fault == Fault::EndlessBody {
            return endless_body(socket).await;
        }

        let body = page(&head, fault).to_string();
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
        socket.write_all(answer.as_bytes()).await?;
    }
}

async fn endless_body(mut socket: TcpStream) -> std::io::Result<()> {
    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    socket.write_all(head).await?;
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    loop {
        socket.write_all(&chunk).await?;
    }
}

/// A page with one event, as old as the window reaches back.
fn page(head: &str, fault: Fault) -> serde_json::Value {
    let parameter = |name: &str| {
        let (_, rest) = head.split_once(&format!("{name}="))?;
        rest.split(['&', ' ']).next()
    };
    let created: i64 = parameter("created%5Bgte%5D")
        .unwrap_or("0")
        .parse()
        .unwrap();
    let number: u64 = match (fault, parameter("starting_after")) {
        (Fault::EndlessList, Some(id)) => id["evt_".len()..].parse::<u64>().unwrap() + 1,
        _ => 1,
    };
    let event = json!({"id": format!("evt_{number}"), "object": "event", "type": "customer.updated",
        "created": created, "data": {"object": {"id": "cus_1", "object": "customer"}}});
    json!({"object": "list", "data": [event], "has_more": true, "url": "/v1/events"})
}

/// Runs `reconcile` against the fault, and returns what it reports.
async fn reconcile(fault: Fault) -> String {
    let server = TestServer::start(Engine::Sqlite).await;
    let base = faulty_stripe(fault).await;
    let url = server.database.url.clone();
    let command = spawn_blocking(move || {
        let environment = [
            ("DATABASE_URL", url.as_str()),
            ("STRIPE_API_KEY", "sk_live_1"),
            ("STRIPE_API_BASE", &base),
            ("STRIPE_API_RATE", "1000"),
            ("RUST_LOG", "warn"),
        ];
        run(&environment, &["reconcile"], b"").with_code(4).stderr
    });
    tokio::time::timeout(Duration::from_secs(300), command)
        .await
        .expect("it ends")
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_page_of_stripe_ends_run() {
    let said = reconcile(Fault::StuckCursor).await;
    assert!(
        said.contains("/v1/events") && said.contains("does not advance"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_list_of_stripe_ends_run() {
    let said = reconcile(Fault::EndlessList).await;
    assert!(
        said.contains("the list does not end: 10000 pages"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_body_of_stripe_ends_run() {
    let said = reconcile(Fault::EndlessBody).await;
    assert!(
        said.contains("/v1/events") && said.contains("larger than 100 MiB"),
        "{said}"
    );
}

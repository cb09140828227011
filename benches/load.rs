//! The load generator: signed deliveries over keep-alive connections. It waits for each answer and
//! times it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Requests as bytes, built and signed in advance: during the measurement they are only written.
pub type Requests = Arc<Vec<Vec<u8>>>;

/// Sorted times from the first byte of a request (or from the time it was due) to its answer.
pub struct Timings {
    pub sorted: Vec<Duration>,
    pub not_2xx: usize,
    pub took: Duration,
}

impl Timings {
    pub fn per_second(&self) -> f64 {
        self.sorted.len() as f64 / self.took.as_secs_f64()
    }

    /// Returns a quantile in milliseconds.
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        let last = self.sorted.len().saturating_sub(1);
        self.sorted
            .get((last as f64 * quantile).round() as usize)
            .map_or(0.0, |d| d.as_secs_f64() * 1e3)
    }
}

/// Sends all requests. Each connection sends its next request as soon as the last one is answered.
pub async fn closed_loop(authority: &str, connections: usize, requests: &Requests) -> Timings {
    send_all(authority, connections, requests, None, Arc::default()).await
}

/// Sends requests at a fixed rate. A late request is timed from when it was due.
pub async fn open_loop(
    authority: &str,
    connections: usize,
    requests: &Requests,
    per_second: f64,
) -> Timings {
    send_all(
        authority,
        connections,
        requests,
        Some(per_second),
        Arc::default(),
    )
    .await
}

/// Sends requests at a fixed rate until `ended` resolves, or all are sent, and returns its value.
pub async fn open_loop_until<T>(
    authority: &str,
    connections: usize,
    requests: &Requests,
    per_second: f64,
    ended: impl Future<Output = T>,
) -> (Timings, T) {
    let next = Arc::new(AtomicUsize::new(0));
    let sent = send_all(
        authority,
        connections,
        requests,
        Some(per_second),
        next.clone(),
    );

    let stopped = async {
        let value = ended.await;
        next.store(requests.len(), Ordering::Relaxed);
        value
    };
    tokio::join!(sent, stopped)
}

async fn send_all(
    authority: &str,
    connections: usize,
    requests: &Requests,
    per_second: Option<f64>,
    next: Arc<AtomicUsize>,
) -> Timings {
    let mut sockets = Vec::new();
    for _ in 0..connections {
        let socket = TcpStream::connect(authority)
            .await
            .expect("the server listens");
        socket
            .set_nodelay(true)
            .expect("a socket takes its options");
        sockets.push(socket);
    }

    let started = Instant::now();
    let mut workers = JoinSet::new();
    for socket in sockets {
        workers.spawn(worker(
            socket,
            requests.clone(),
            next.clone(),
            started,
            per_second,
        ));
    }

    let mut timings = Timings {
        sorted: Vec::with_capacity(requests.len()),
        not_2xx: 0,
        took: Duration::ZERO,
    };
    while let Some(done) = workers.join_next().await {
        let (times, not_2xx) = done.expect("a worker does not panic");
        timings.sorted.extend(times);
        timings.not_2xx += not_2xx;
    }

    timings.took = started.elapsed();
    timings.sorted.sort_unstable();
    timings
}

async fn worker(
    mut socket: TcpStream,
    requests: Requests,
    next: Arc<AtomicUsize>,
    started: Instant,
    per_second: Option<f64>,
) -> (Vec<Duration>, usize) {
    let (mut times, mut not_2xx, mut buffer) = (Vec::new(), 0, vec![0; 64 * 1024]);
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(request) = requests.get(index) else {
            return (times, not_2xx);
        };
        let due = match per_second {
            Some(rate) => {
                let due = started + Duration::from_secs_f64(index as f64 / rate);
                tokio::time::sleep_until(due.into()).await;
                due
            }
            None => Instant::now(),
        };
        socket
            .write_all(request)
            .await
            .expect("the server takes a request");
        let status = answer(&mut socket, &mut buffer).await;
        times.push(due.elapsed());
        not_2xx += usize::from(!(200..300).contains(&status) && status != 304);
    }
}

/// Reads one answer, with `content-length` or without a body (304), and returns its status.
async fn answer(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> u16 {
    let mut filled = 0;
    loop {
        if filled == buffer.len() {
            buffer.resize(filled * 2, 0);
        }
        let read = socket
            .read(&mut buffer[filled..])
            .await
            .expect("the server answers");
        assert!(
            read > 0,
            "the server closed the connection: {}",
            String::from_utf8_lossy(&buffer[..filled])
        );
        filled += read;
        let Some(head) = buffer[..filled]
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
        else {
            continue;
        };
        let text = std::str::from_utf8(&buffer[..head]).expect("a head is text");
        let length = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |n| n.parse().unwrap_or(0));
        if filled >= head + 4 + length {
            return text[9..12].parse().expect("a status line has a status");
        }
    }
}

//! The accept loop: admits connections, serves them, and drains them when the server stops.
//!
//! `admission` limits the number of connections and enforces their timeouts. `connection` holds the
//! state of one connection; the socket and body in `watched` report to it.

mod admission;
mod body_buffer;
pub(in crate::http) mod connection;
pub(in crate::http) mod watched;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, rt};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use admission::{ConnectionLimiter, Permit};
use body_buffer::BodyBuffer;
use connection::{CloseRequest, ConnectionState};
use watched::{WatchedBody, WatchedSocket};

/// Largest request head, in bytes. Also the largest read and write buffer of a connection.
const HEAD_LIMIT: usize = 64 * 1024;
/// Length of the accept queue. The system may have a lower limit (`net.core.somaxconn`).
const BACKLOG: u32 = 4096;
/// Interval of the timeout checks.
const TICK: Duration = Duration::from_secs(1);
/// Pause after a failed accept, which only succeeds after another connection has closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest time for requests in progress to finish after the stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Interval at which connections check, while the server drains, whether they can close.
const DRAIN_TICK: Duration = Duration::from_millis(100);
/// Time after the stop for a new connection to send its first request, in milliseconds. Closing
/// sooner would reset a client that has just connected.
const NEW_GRACE_MS: u64 = 1000;

/// Listens on an address. If the accept queue overflows, the system refuses connections of any
/// peer.
///
/// # Errors
/// The address is in use, or does not belong to this machine.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // After a restart, connections of the previous process may still be closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves up to `connections` connections at a time until `stop`, then drains: serves the
/// connections that wait in the accept queue, and lets requests in progress finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: usize,
    stop: CancellationToken,
) {
    let mut http = http1::Builder::new();
    http.max_buf_size(HEAD_LIMIT);
    let server = Server {
        http,
        router,
        limiter: ConnectionLimiter::new(connections),
        tasks: TaskTracker::new(),
        stop,
    };

    let unserved = server.accept_until_stop(&listener).await;
    server.limiter.wake_all();
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, server.drain(listener, unserved)).await;
    if drained.is_err() {
        tracing::warn!("requests did not finish within the drain timeout");
    }
}

/// A listener's settings and the resources that its connections share.
struct Server {
    http: http1::Builder,
    router: Router,
    limiter: ConnectionLimiter,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Server {
    /// Accepts connections until the stop. Returns the connection that was accepted but not
    /// admitted when the stop came, or `None` if there was no such connection.
    async fn accept_until_stop(&self, listener: &TcpListener) -> Option<TcpStream> {
        let mut tick = tokio::time::interval(TICK);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = tick.tick() => {
                    self.limiter.close_overdue();
                    continue;
                }
                () = self.stop.cancelled() => return None,
            };
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    // Most likely the process is out of file descriptors.
                    tracing::warn!(%error, "failed to accept connection, evicting another");
                    self.limiter.evict_one();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };

            tokio::select! {
                permit = self.limiter.acquire() => self.spawn(socket, permit),
                () = self.stop.cancelled() => return Some(socket),
            }
        }
    }

    /// Serves the rest of the accept queue, closes the listener, and waits for all connections to
    /// end.
    async fn drain(&self, listener: TcpListener, unserved: Option<TcpStream>) {
        if let Some(socket) = unserved {
            self.serve_queued(socket).await;
        }
        if let Err(error) = self.accept_queued(listener).await {
            tracing::warn!(%error, "failed to serve the accept queue");
        }
        self.tasks.close();

        let mut tick = tokio::time::interval(DRAIN_TICK);
        loop {
            tokio::select! {
                () = self.tasks.wait() => return,
                _ = tick.tick() => {
                    self.limiter.close_overdue();
                    self.limiter.wake_all();
                }
            }
        }
    }

    /// Accepts the queued connections without waiting for more, and closes the listener. The count
    /// is bounded, because newcomers may join the queue at any time.
    async fn accept_queued(&self, listener: TcpListener) -> io::Result<()> {
        // Use the system call directly: tokio would first wait for its driver to report the queue.
        let listener = listener.into_std()?;
        for _ in 0..BACKLOG {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if is_gone(&error) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            socket.set_nonblocking(true)?;
            self.serve_queued(TcpStream::from_std(socket)?).await;
        }

        Ok(())
    }

    async fn serve_queued(&self, socket: TcpStream) {
        let permit = self.limiter.acquire().await;
        self.spawn(socket, permit);
    }

    fn spawn(&self, socket: TcpStream, permit: Permit) {
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "failed to set TCP_NODELAY");
        }
        let io = TokioIo::new(WatchedSocket::new(socket, permit.connection.clone()));
        let (router, state) = (self.router.clone(), permit.connection.clone());
        let service = service(router, state, self.stop.clone());
        let connection = self.http.serve_connection(io, service);
        self.tasks
            .spawn(attend(connection, permit, self.stop.clone()));
    }
}

/// Returns whether the peer closed the connection before it was accepted.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}

/// Serves one connection until it closes.
async fn attend<I, S>(connection: http1::Connection<I, S>, permit: Permit, stop: CancellationToken)
where
    I: rt::Read + rt::Write + Unpin,
    S: Service<Request<Incoming>, Response = Response, Error = Infallible>,
{
    let state = &permit.connection;
    let mut connection = pin!(connection);
    let mut is_shutting_down = false;

    let ended = poll_fn(|cx| {
        state.register_waker(cx.waker());
        // Read the bytes that have arrived before deciding to close.
        if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }

        let close_request = state.close_request();
        if close_request == CloseRequest::Abort {
            return Poll::Ready(None);
        }

        let is_stopped = stop.is_cancelled() && !state.is_new_within(NEW_GRACE_MS);
        if !is_shutting_down && (close_request == CloseRequest::Close || is_stopped) {
            is_shutting_down = true;
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx).map(Some);
        }

        Poll::Pending
    });

    match ended.await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::debug!(%error, "connection failed"),
        None => tracing::debug!("connection evicted or timed out"),
    }
}

/// Returns the router as a service that reports the progress of each request to its connection.
fn service(
    router: Router,
    connection: Arc<ConnectionState>,
    stop: CancellationToken,
) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send> {
    let router = TowerToHyperService::new(router);
    service_fn(move |mut request: Request<Incoming>| {
        let connection = connection.clone();
        connection.begin_request(stop.is_cancelled());
        if request.body().is_end_stream() {
            connection.set_busy();
        } else {
            connection.set_reading_body();
        }
        request.extensions_mut().insert(connection.clone());
        let response = router.call(request.map(|body| WatchedBody {
            body,
            buffer: BodyBuffer::default(),
            connection: connection.clone(),
        }));

        async move {
            let mut response = response.await;
            connection.set_responded();
            if let (true, Ok(response)) = (connection.is_lingering(), &mut response) {
                // The rest of this body would be read as the start of the next request.
                response
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    })
}

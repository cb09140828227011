//! Accepts connections, and lets them drain. How many there may be and how long they may take is in `places`.

mod admission;
mod body_buffer;
pub(in crate::http) mod connection;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, rt};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::BODY_LIMIT;
use admission::{ConnectionLimiter, Permit};
use body_buffer::BodyBuffer;
use connection::{CloseRequest, ConnectionState};

/// The largest head of a request, in bytes; also what a connection may keep in memory of what it reads and writes.
const HEAD_LIMIT: usize = 64 * 1024;
/// What a peer may go on sending after its answer, in bytes.
const UNREAD_LIMIT: usize = 2 * 1024 * 1024;
/// Connections that are made, and wait to be accepted. The system may have a lower limit (`net.core.somaxconn`).
const BACKLOG: u32 = 4096;
/// How often it is looked for connections whose time is over.
const TICK: Duration = Duration::from_secs(1);
/// After a failure that only others can end, by closing.
const PAUSE: Duration = Duration::from_millis(50);
/// How long requests under way may take to finish after the stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Listens. When more connections are made at once than `BACKLOG`, the system refuses some, whoever they are from.
///
/// # Errors
/// The address is taken, or not one of this machine's.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // After a restart, connections of the last process may still be ending.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves up to so many connections at a time until `stop`, then lets the requests under way finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: usize,
    stop: CancellationToken,
) {
    let mut http = http1::Builder::new();
    http.max_buf_size(HEAD_LIMIT);
    let places = ConnectionLimiter::new(connections);
    let tasks = TaskTracker::new();
    let mut tick = tokio::time::interval(TICK);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = tick.tick() => {
                places.end_overdue();
                continue;
            }
            () = stop.cancelled() => break,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            // It was gone before we looked.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                ) =>
            {
                continue;
            }
            Err(error) => {
                // Out of file descriptors, most likely.
                tracing::warn!(%error, "a connection could not be accepted: another has to give way");
                places.free_one();
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "a socket kept its delay");
        }
        let held = tokio::select! {
            held = places.take() => held,
            () = stop.cancelled() => break,
        };
        let io = TokioIo::new(WatchedSocket {
            socket,
            place: held.place.clone(),
            unread: 0,
        });
        let connection = http.serve_connection(io, service(router.clone(), held.place.clone()));
        tasks.spawn(attend(connection, held, stop.clone()));
    }
    drop(listener);
    places.wake_all();
    tasks.close();
    let drained = async {
        loop {
            tokio::select! {
                () = tasks.wait() => return,
                _ = tick.tick() => places.end_overdue(),
            }
        }
    };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        tracing::warn!("some requests did not finish in time");
    }
}

/// One connection, to its end.
async fn attend<I, S>(connection: http1::Connection<I, S>, held: Permit, stop: CancellationToken)
where
    I: rt::Read + rt::Write + Unpin,
    S: Service<Request<Incoming>, Response = Response, Error = Infallible>,
{
    let mut connection = pin!(connection);
    let mut is_closing = false;
    let ended = poll_fn(|cx| {
        held.place.wakes(cx.waker());
        // What has arrived is looked at before the place is given up.
        if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }
        let asked = held.place.asked();
        if asked == CloseRequest::Abort {
            return Poll::Ready(None);
        }
        if !is_closing && (asked == CloseRequest::Close || stop.is_cancelled()) {
            is_closing = true;
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx).map(Some);
        }
        Poll::Pending
    });
    match ended.await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::debug!(%error, "a connection ended badly"),
        None => tracing::debug!("a connection gave way, or its time was over"),
    }
}

/// The router, whose requests tell their place how far they are.
fn service(
    router: Router,
    place: Arc<ConnectionState>,
) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send> {
    let router = TowerToHyperService::new(router);
    service_fn(move |mut request: Request<Incoming>| {
        let place = place.clone();
        if request.body().is_end_stream() {
            place.works()
        } else {
            place.reads_body()
        }
        request.extensions_mut().insert(place.clone());
        let answer = router.call(request.map(|body| WatchedBody {
            body,
            buffer: BodyBuffer::default(),
            place: place.clone(),
        }));
        async move {
            let mut answer = answer.await;
            place.answers();
            if let (true, Ok(answer)) = (place.is_leaving(), &mut answer) {
                // Where the next request would begin, this one's body still comes.
                answer
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            answer
        }
    })
}

/// A request body that arrives in one piece, whatever its chunks, and is counted while it does.
struct WatchedBody {
    body: Incoming,
    /// Chunks that have arrived.
    buffer: BodyBuffer,
    place: Arc<ConnectionState>,
}

impl WatchedBody {
    /// Returns everything that has arrived as one frame, or `None` if that is nothing.
    fn take_frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        (!self.buffer.is_empty()).then(|| Ok(Frame::data(self.buffer.take())))
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        loop {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)?);
            let Some(frame) = frame else {
                self.place.works();
                return Poll::Ready(self.take_frame());
            };
            // Trailers: no handler reads them.
            let Ok(chunk) = frame.into_data() else {
                continue;
            };

            let is_last = self.body.is_end_stream();
            if is_last {
                self.place.works();
            }
            if is_last && self.buffer.is_empty() {
                // The usual delivery: one chunk, which need not be copied.
                self.place.holds(chunk.len());
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            let expected = self.body.size_hint().lower();
            let grown = self.buffer.push(&chunk, expected);
            self.place.holds(grown);
            // A body above the limit is handed over as it is: the handler refuses it by its size.
            if is_last || self.buffer.len() > BODY_LIMIT {
                return Poll::Ready(self.take_frame());
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.buffer.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, buffered) = (self.body.size_hint(), self.buffer.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + buffered);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + buffered);
        }
        hint
    }
}

struct WatchedSocket {
    socket: TcpStream,
    place: Arc<ConnectionState>,
    /// Bytes that came when the connection was over.
    unread: usize,
}

impl WatchedSocket {
    fn noting_stalls<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_pending() {
            self.place.stalls();
        }
        written
    }
}

impl AsyncRead for WatchedSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buffer);
        if read.is_pending() {
            self.place.set_idle();
        } else if buffer.filled().len() > before {
            self.place.heard();
        }
        read
    }
}

impl AsyncWrite for WatchedSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.noting_stalls(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, slices);
        self.noting_stalls(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// Closing while the peer is sending would reset the connection, and the answer might be lost on its way.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
        let mut space = [0; 16 * 1024];
        while self.place.is_leaving() && self.unread < UNREAD_LIMIT {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => self.unread += buffer.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

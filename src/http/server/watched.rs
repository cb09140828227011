//! The socket and the request body of a connection, which report to its [`ConnectionState`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::body_buffer::BodyBuffer;
use super::connection::ConnectionState;
use crate::http::BODY_LIMIT;

/// Bytes that the server reads and discards after a response, before it stops reading.
const UNREAD_LIMIT: usize = 2 * 1024 * 1024;

/// The reason why a request body is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The body was dropped to free memory for others.
    #[error("too many request bodies are in memory")]
    Shed,
    /// The peer closed the connection or sent an invalid body.
    #[error(transparent)]
    Receive(#[from] hyper::Error),
}

/// A request body that is handed over in one piece, whatever its chunks.
///
/// Its bytes are counted as they arrive, and it can be shed.
pub struct WatchedBody {
    pub body: Incoming,
    /// Chunks that have arrived.
    pub buffer: BodyBuffer,
    pub connection: Arc<ConnectionState>,
}

impl WatchedBody {
    /// Returns all bytes that have arrived as one frame, or `None` if no byte has arrived.
    fn take_frame(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        (!self.buffer.is_empty()).then(|| Ok(Frame::data(self.buffer.take())))
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if self.connection.is_body_shed() {
                drop(self.buffer.take());
                return Poll::Ready(Some(Err(BodyError::Shed)));
            }

            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)?);
            let Some(frame) = frame else {
                self.connection.set_busy();
                return Poll::Ready(self.take_frame());
            };
            // Skip trailers, because no handler reads them.
            let Ok(chunk) = frame.into_data() else {
                continue;
            };

            let is_last = self.body.is_end_stream();
            if is_last {
                self.connection.set_busy();
            }
            if is_last && self.buffer.is_empty() {
                // The usual delivery is one chunk, which need not be copied.
                self.connection.add_buffered(chunk.len());
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }

            let expected = self.body.size_hint().lower();
            let grown = self.buffer.push(&chunk, expected);
            self.connection.add_buffered(grown);
            // Hand over a body above the limit as it is: the handler rejects it by its size.
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

/// A socket that reports reads and blocked writes.
pub struct WatchedSocket {
    socket: TcpStream,
    connection: Arc<ConnectionState>,
    /// Bytes read and discarded after the response.
    unread: usize,
}

impl WatchedSocket {
    pub fn new(socket: TcpStream, connection: Arc<ConnectionState>) -> WatchedSocket {
        WatchedSocket {
            socket,
            connection,
            unread: 0,
        }
    }

    fn report_write<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_pending() {
            self.connection.set_write_blocked();
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
            self.connection.set_idle();
        } else if buffer.filled().len() > before {
            self.connection.set_receiving();
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
        self.report_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, slices);
        self.report_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// Closes the sending side, then reads what a lingering peer still sends. Closing a socket with
    /// unread bytes resets the connection, and the peer might lose its response.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;

        let mut space = [0; 16 * 1024];
        while self.connection.is_lingering() && self.unread < UNREAD_LIMIT {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => self.unread += buffer.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

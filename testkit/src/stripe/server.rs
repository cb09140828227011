//! The server of the fake: connections, counters, and the faults of a network and a busy Stripe.

use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use stripe_reconciler::clock::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::api::{self, ApiRequest};
use super::{Call, State, chance};

/// Share of calls per fault, chosen by the seed.
///
/// Unless `lasting` is set, no URL fails more than twice in a row, so retries succeed.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub seed: u64,
    /// Share answered 429.
    pub rate_limited: f64,
    /// Share answered 500, or 502 by a proxy without JSON.
    pub failing: f64,
    /// Share whose connection is reset before the answer.
    pub resets: f64,
    /// Share whose connection ends in the middle of the answer.
    pub truncated: f64,
    /// Share whose second half of the answer is late.
    pub slow: f64,
    /// Share of events not listed yet, and of objects shown in their previous state.
    pub lagging: f64,
    pub lasting: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    RateLimited,
    Failing,
    BadGateway,
    Reset,
    Truncated,
    Slow,
}

/// Delay of the second half of a slow answer.
const SLOW_DELAY: Duration = Duration::from_millis(60);
const MAX_CONSECUTIVE: usize = 2;
/// Poll interval while answers are held back.
const HOLD_POLL: Duration = Duration::from_millis(5);

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl Faults {
    pub fn all(seed: u64) -> Faults {
        Faults {
            seed,
            rate_limited: 0.06,
            failing: 0.06,
            resets: 0.05,
            truncated: 0.05,
            slow: 0.05,
            ..Faults::default()
        }
    }

    /// Returns true if this call is refused or breaks off.
    pub fn hit(&self, call: usize) -> bool {
        self.draw(call).is_some_and(|fault| fault != Fault::Slow)
    }

    fn draw(&self, call: usize) -> Option<Fault> {
        let failing = if call.is_multiple_of(2) {
            Fault::Failing
        } else {
            Fault::BadGateway
        };
        let shares = [
            (Fault::RateLimited, self.rate_limited),
            (failing, self.failing),
            (Fault::Reset, self.resets),
            (Fault::Truncated, self.truncated),
            (Fault::Slow, self.slow),
        ];
        let mut drawn = chance(self.seed, &call);

        shares.into_iter().find_map(|(fault, share)| {
            let hit = drawn < share;
            drawn -= share;
            hit.then_some(fault)
        })
    }
}

/// Serves until `end` is signalled.
pub fn serve(listener: TcpListener, state: Arc<Mutex<State>>, end: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        tokio::select! {
            _ = end => {}
            () = accept(listener, state) => {}
        }
    });
}

async fn accept(listener: tokio::net::TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        state.lock().unwrap().connections += 1;
        tokio::spawn(connection(stream, state.clone()));
    }
}

async fn connection(stream: TcpStream, state: Arc<Mutex<State>>) {
    let doomed: Arc<AtomicBool> = Arc::default();
    let connection_io = Connection {
        stream,
        doomed: doomed.clone(),
    };
    let service = service_fn(|request: Request<Incoming>| {
        let (state, doomed) = (state.clone(), doomed.clone());
        async move {
            let answer = answer(&mut state.lock().unwrap(), &request.into_parts().0);
            while state.lock().unwrap().is_held {
                tokio::time::sleep(HOLD_POLL).await;
            }
            answer.inspect_err(|_| doomed.store(true, Ordering::Relaxed))
        }
    });

    // The connection ends when the client closes it, or with an error that this server causes.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(connection_io), service)
        .await;
}

/// # Errors
/// The connection must be reset.
fn answer(state: &mut State, head: &Parts) -> Result<Response<Body>, io::Error> {
    let (endpoint, url) = api::call_names(head);
    let consecutive_failures = state.consecutive_failures.entry(url.clone()).or_default();
    let fault = state
        .faults
        .draw(state.calls.len())
        .filter(|_| state.faults.lasting || *consecutive_failures < MAX_CONSECUTIVE);

    *consecutive_failures = if fault.is_some_and(|fault| fault != Fault::Slow) {
        *consecutive_failures + 1
    } else {
        0
    };
    let (status, body) = match fault {
        Some(Fault::RateLimited) => error_parts(api::rate_limited()),
        Some(Fault::Failing) => error_parts(api::failing()),
        Some(Fault::BadGateway) => (
            502,
            "<html><head><title>502 Bad Gateway</title></head></html>".to_owned(),
        ),
        _ => {
            let mut violations = Vec::new();
            let answered =
                ApiRequest::read(head, &mut violations).and_then(|request| state.answer(&request));
            state.violations.extend(violations);
            answered.map_or_else(error_parts, |value| {
                (200, serde_json::to_string_pretty(&value).unwrap())
            })
        }
    };

    let whole = !matches!(fault, Some(Fault::Reset | Fault::Truncated));
    let at_ms = Clock::system().now_ms();
    let key = api::header(head, "authorization")
        .unwrap_or_default()
        .trim_start_matches("Bearer ")
        .to_owned();

    state.calls.push(Call {
        at_ms,
        key,
        endpoint,
        url,
        status: whole.then_some(status),
    });
    if fault == Some(Fault::Reset) {
        return Err(io::ErrorKind::ConnectionReset.into());
    }

    let content_type = if status == 502 {
        "text/html"
    } else {
        "application/json"
    };
    let date = jiff::Timestamp::from_second(state.clock.now_s())
        .unwrap()
        .strftime("%a, %d %b %Y %H:%M:%S GMT");
    let response = Response::builder()
        .header("date", date.to_string())
        .status(status)
        .header("content-type", content_type)
        .header("request-id", "req_Fake");

    Ok(response
        .header("content-length", body.len())
        .body(in_pieces(body, fault))
        .unwrap())
}

fn error_parts(error: api::ErrorAnswer) -> (u16, String) {
    (error.status, error.body.to_string())
}

fn in_pieces(text: String, fault: Option<Fault>) -> Body {
    let text = Bytes::from(text);
    let half = text.len() / 2;
    let (first, second) = (text.slice(..half), text.slice(half..));
    let second = match fault {
        Some(Fault::Truncated) => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        Some(Fault::Slow) => Ok(second),
        _ => {
            return Full::new(text)
                .map_err(|never| match never {})
                .boxed_unsync();
        }
    };
    let pieces = stream::unfold(0, move |piece| {
        let (first, second) = (
            first.clone(),
            second
                .as_ref()
                .map(Bytes::clone)
                .map_err(|error| io::Error::from(error.kind())),
        );
        async move {
            match piece {
                0 => Some((Ok(Frame::data(first)), 1)),
                1 => {
                    if second.is_ok() {
                        tokio::time::sleep(SLOW_DELAY).await;
                    }
                    Some((second.map(Frame::data), 2))
                }
                _ => None,
            }
        }
    });

    StreamBody::new(pieces).boxed_unsync()
}

/// A connection that is reset on close if it is doomed.
struct Connection {
    stream: TcpStream,
    doomed: Arc<AtomicBool>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.doomed.load(Ordering::Relaxed) {
            self.stream.set_zero_linger().unwrap();
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

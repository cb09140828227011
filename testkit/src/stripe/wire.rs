//! The server: connections, counting, and the troubles that a network and a busy Stripe make.

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

use super::api::{self, Ask};
use super::{Call, State, chance};

/// What goes wrong: shares of the calls, by a seed. No call goes wrong more than twice in a row, so patience pays, unless it is lasting.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    pub seed: u64,
    /// 429.
    pub rate_limited: f64,
    /// 500, and 502 from a machine in between that knows no JSON.
    pub failing: f64,
    /// The connection is reset before there is an answer.
    pub resets: f64,
    /// The connection ends in the middle of an answer.
    pub truncated: f64,
    /// The second half of the answer comes later.
    pub slow: f64,
    /// This share of events is not listed yet, and of objects shown as they were before they last changed.
    pub lagging: f64,
    pub lasting: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    RateLimited,
    Failing,
    BadGateway,
    Reset,
    Truncated,
    Slow,
}

/// How late the second half of a slow answer is.
const SLOW: Duration = Duration::from_millis(60);
const IN_A_ROW: usize = 2;
/// How often it is looked whether answers are held.
const A_MOMENT: Duration = Duration::from_millis(5);

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl Troubles {
    pub fn all(seed: u64) -> Troubles {
        Troubles {
            seed,
            rate_limited: 0.06,
            failing: 0.06,
            resets: 0.05,
            truncated: 0.05,
            slow: 0.05,
            ..Troubles::default()
        }
    }

    /// Returns true if this call is refused or breaks off.
    pub fn hit(&self, call: usize) -> bool {
        self.draw(call)
            .is_some_and(|trouble| trouble != Trouble::Slow)
    }

    fn draw(&self, call: usize) -> Option<Trouble> {
        let failing = if call.is_multiple_of(2) {
            Trouble::Failing
        } else {
            Trouble::BadGateway
        };
        let shares = [
            (Trouble::RateLimited, self.rate_limited),
            (failing, self.failing),
            (Trouble::Reset, self.resets),
            (Trouble::Truncated, self.truncated),
            (Trouble::Slow, self.slow),
        ];
        let mut drawn = chance(self.seed, &call);
        shares.into_iter().find_map(|(trouble, share)| {
            let hit = drawn < share;
            drawn -= share;
            hit.then_some(trouble)
        })
    }
}

/// Runs until it is told to end.
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
    let wire = Wire {
        stream,
        doomed: doomed.clone(),
    };
    let service = service_fn(|request: Request<Incoming>| {
        let (state, doomed) = (state.clone(), doomed.clone());
        async move {
            let answer = answer(&mut state.lock().unwrap(), &request.into_parts().0);
            while state.lock().unwrap().held {
                tokio::time::sleep(A_MOMENT).await;
            }
            answer.inspect_err(|_| doomed.store(true, Ordering::Relaxed))
        }
    });
    // It ends when the client has enough, or badly, by our own will.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(wire), service)
        .await;
}

/// # Errors
/// The connection is to be reset.
fn answer(state: &mut State, head: &Parts) -> Result<Response<Body>, io::Error> {
    let (endpoint, url) = api::names_of(head);
    let in_a_row = state.in_a_row.entry(url.clone()).or_default();
    let trouble = state
        .troubles
        .draw(state.calls.len())
        .filter(|_| state.troubles.lasting || *in_a_row < IN_A_ROW);
    *in_a_row = if trouble.is_some_and(|trouble| trouble != Trouble::Slow) {
        *in_a_row + 1
    } else {
        0
    };
    let (status, body) = match trouble {
        Some(Trouble::RateLimited) => of_refusal(api::rate_limited()),
        Some(Trouble::Failing) => of_refusal(api::failing()),
        Some(Trouble::BadGateway) => (
            502,
            "<html><head><title>502 Bad Gateway</title></head></html>".to_owned(),
        ),
        _ => {
            let mut faults = Vec::new();
            let told = Ask::read(head, &mut faults).and_then(|ask| state.answer(&ask));
            state.faults.extend(faults);
            told.map_or_else(of_refusal, |value| {
                (200, serde_json::to_string_pretty(&value).unwrap())
            })
        }
    };
    let whole = !matches!(trouble, Some(Trouble::Reset | Trouble::Truncated));
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
    if trouble == Some(Trouble::Reset) {
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
        .body(in_pieces(body, trouble))
        .unwrap())
}

fn of_refusal(refusal: api::Refusal) -> (u16, String) {
    (refusal.status, refusal.body.to_string())
}

fn in_pieces(text: String, trouble: Option<Trouble>) -> Body {
    let text = Bytes::from(text);
    let half = text.len() / 2;
    let (first, second) = (text.slice(..half), text.slice(half..));
    let second = match trouble {
        Some(Trouble::Truncated) => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        Some(Trouble::Slow) => Ok(second),
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
                        tokio::time::sleep(SLOW).await;
                    }
                    Some((second.map(Frame::data), 2))
                }
                _ => None,
            }
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// A connection that is reset instead of closed, when it is doomed.
struct Wire {
    stream: TcpStream,
    doomed: Arc<AtomicBool>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.doomed.load(Ordering::Relaxed) {
            self.stream.set_zero_linger().unwrap();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
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

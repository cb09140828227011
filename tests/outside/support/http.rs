//! Requests: well-formed ones through a client, odd ones byte for byte.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{HeaderMap, Request, StatusCode};
use serde_json::Value;
use stripe_reconciler::transport::Transport;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// A header's value; empty when there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Checks the status, and shows the answer when it is another.
    #[track_caller]
    pub fn with_status(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

pub fn client() -> Transport {
    Transport::new(Duration::from_secs(30), 64 << 20)
}

pub async fn send(client: &Transport, method: &str, url: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
    let mut request = Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (head, body) = client.send(request.body(Full::from(body)).unwrap()).await.unwrap().into_parts();
    Answer { status: head.status, headers: head.headers, body }
}

/// Sends these bytes, and reads until the server closes the connection: ask it to with `Connection: close`.
pub async fn send_raw(authority: &str, request: &[u8]) -> String {
    let mut socket = TcpStream::connect(authority).await.unwrap();
    socket.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is an end too.
    let _ = socket.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

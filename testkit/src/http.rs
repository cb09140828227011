//! HTTP requests: well-formed ones through a client, malformed ones byte for byte.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{HeaderMap, Request, StatusCode};
use serde_json::Value;
use stripe_reconciler::http_client::{HttpClient, HttpClientError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// Returns a header's value, empty if it is absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Returns the body after checking it against the schema of an invoice.
    #[track_caller]
    pub fn invoice(&self) -> Value {
        super::invoice_schema::assert_is_invoice(std::str::from_utf8(&self.body).unwrap())
    }

    /// Asserts an error answer: JSON with exactly four fields, one of which is the request id.
    #[track_caller]
    pub fn with_error(self, status: u16, code: &str) -> Answer {
        let answer = self.with_status(status);
        assert_eq!(
            answer.header("content-type"),
            "application/json",
            "{answer:?}"
        );

        let body = answer.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["ref"], answer.header("x-request-id"), "{body}");
        assert!(
            body["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty())
                && body["details"].is_object(),
            "{body}"
        );
        assert_eq!(body.as_object().unwrap().len(), 4, "{body}");

        answer
    }

    /// Asserts the status. Shows the answer if it differs.
    #[track_caller]
    pub fn with_status(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

pub fn client() -> HttpClient {
    HttpClient::new(Duration::from_secs(30), 64 << 20)
}

pub async fn send(
    client: &HttpClient,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Answer {
    let answer = try_send(client, method, url, headers, body).await.unwrap();
    assert!(
        !answer.header("x-request-id").is_empty(),
        "every answer names its request: {answer:?}"
    );
    answer
}

/// Sends a request to a server that may disappear meanwhile.
pub async fn try_send(
    client: &HttpClient,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<Answer, HttpClientError> {
    let mut request = Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }

    let (head, body) = client
        .send(request.body(Full::from(body)).unwrap())
        .await?
        .into_parts();
    Ok(Answer {
        status: head.status,
        headers: head.headers,
        body,
    })
}

/// Sends these bytes and reads until the server closes the connection, so they should contain
/// `Connection: close`.
pub async fn send_raw(authority: &str, request: &[u8]) -> String {
    let mut wire = Wire::connect(authority).await;
    wire.write(request).await;
    wire.read_to_end().await
}

/// A connection that is written and read byte for byte.
pub struct Wire(TcpStream);

impl Wire {
    pub async fn connect(authority: &str) -> Wire {
        Wire(TcpStream::connect(authority).await.unwrap())
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Writes bytes. Returns whether the server still accepts them.
    pub async fn try_write(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).await.is_ok()
    }

    /// Shuts down the sending side.
    pub async fn hang_up(&mut self) {
        self.0.shutdown().await.unwrap();
    }

    /// Reads a head and the body of the length it states.
    pub async fn read_answer(&mut self) -> String {
        let head = self.read_head().await.to_lowercase();
        let length = head
            .split_once("content-length: ")
            .map_or("0", |(_, rest)| rest.split("\r\n").next().unwrap());
        let mut body = vec![0; length.parse().unwrap()];
        self.0.read_exact(&mut body).await.unwrap();
        head + std::str::from_utf8(&body).unwrap()
    }

    /// Reads up to the next empty line, which ends the head of an answer.
    pub async fn read_head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(
                self.0
                    .read_u8()
                    .await
                    .expect("a head ends with an empty line"),
            );
        }
        String::from_utf8(head).unwrap()
    }

    /// Reads until the server closes the connection.
    pub async fn read_to_end(&mut self) -> String {
        let mut answer = Vec::new();
        // A reset after the answer counts as an end too.
        let _ = self.0.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }
}

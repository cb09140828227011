//! A collector of trace spans: receives OTLP over HTTP and stores it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
pub use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

/// Maximum wait for an expected span.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
pub struct Collector {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    received: Arc<Mutex<Received>>,
}

#[derive(Default)]
struct Received {
    /// Headers and bodies as received.
    raw: Vec<(HeaderMap, Bytes)>,
    spans: Vec<Span>,
    service_names: Vec<String>,
}

impl Collector {
    pub fn start() -> Collector {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        let collector = Collector {
            base,
            received: Arc::default(),
        };
        let router = Router::new()
            .route("/v1/traces", post(receive))
            .with_state(collector.clone());

        // On its own thread until the process ends: it receives spans while a test blocks on a
        // command.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), router).await
            })
        });
        collector
    }

    pub fn spans(&self) -> Vec<Span> {
        self.received.lock().unwrap().spans.clone()
    }

    /// Returns the first span that matches, waiting for it if necessary.
    pub async fn wait_for(&self, matches: impl Fn(&Span) -> bool) -> Span {
        let found = async {
            loop {
                if let Some(span) = self.spans().into_iter().find(&matches) {
                    return span;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };

        tokio::time::timeout(TIMEOUT, found)
            .await
            .unwrap_or_else(|_| panic!("no such span in {:#?}", self.spans()))
    }

    /// Returns the names of the services that sent spans.
    pub fn service_names(&self) -> Vec<String> {
        self.received.lock().unwrap().service_names.clone()
    }

    pub fn raw(&self) -> Vec<(HeaderMap, Bytes)> {
        self.received.lock().unwrap().raw.clone()
    }
}

async fn receive(
    State(collector): State<Collector>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
    let mut received = collector.received.lock().unwrap();
    received.raw.push((headers, body));
    for resource in request.resource_spans {
        let attributes = resource.resource.unwrap().attributes;
        received
            .service_names
            .push(value(&attributes, "service.name"));
        received.spans.extend(
            resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans),
        );
    }

    StatusCode::OK
}

/// Returns an attribute as text, empty if it is absent.
pub fn attribute(span: &Span, name: &str) -> String {
    value(&span.attributes, name)
}

fn value(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == name);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        None => String::new(),
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(other) => format!("{other:?}"),
    }
}

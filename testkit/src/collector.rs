//! A collector of spans: takes what OTLP over HTTP brings, and keeps it.

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

/// How long to wait for what has to come.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
pub struct Collector {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Default)]
struct Taken {
    /// As it came: headers and body.
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
            taken: Arc::default(),
        };
        let router = Router::new()
            .route("/v1/traces", post(take))
            .with_state(collector.clone());
        // A thread of its own, to the end of all tests: it takes spans also while a test waits for a command to end.
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
        self.taken.lock().unwrap().spans.clone()
    }

    /// Returns when there is such a span.
    pub async fn wait_for(&self, is_it: impl Fn(&Span) -> bool) -> Span {
        let found = async {
            loop {
                if let Some(span) = self.spans().into_iter().find(&is_it) {
                    return span;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(TIMEOUT, found)
            .await
            .unwrap_or_else(|_| panic!("no such span in {:#?}", self.spans()))
    }

    /// The names of the services that sent anything.
    pub fn service_names(&self) -> Vec<String> {
        self.taken.lock().unwrap().service_names.clone()
    }

    pub fn raw(&self) -> Vec<(HeaderMap, Bytes)> {
        self.taken.lock().unwrap().raw.clone()
    }
}

async fn take(State(collector): State<Collector>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
    let mut taken = collector.taken.lock().unwrap();
    taken.raw.push((headers, body));
    for resource in request.resource_spans {
        let attributes = resource.resource.unwrap().attributes;
        taken.service_names.push(value(&attributes, "service.name"));
        taken.spans.extend(
            resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans),
        );
    }
    StatusCode::OK
}

/// An attribute as text; empty when there is none.
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

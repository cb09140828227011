//! The program's router on its own database in a temporary folder, with a key of each kind, the
//! invoices of the fixtures and some of their events.

use std::path::Path;

use axum::response::Response;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::service::Service;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::service::TowerToHyperService;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::api_key;
use stripe_reconciler::domain::stripe::signature::sign;
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;
use stripe_reconciler::http::session_token;
use stripe_reconciler::http::{AppState, MetricsAt, Ui, router};
use stripe_reconciler::ingest::batch_writer::{BatchWriter, Writer};
use stripe_reconciler::ingest::{Delivery, prepare};
use stripe_reconciler::metrics::Metrics;
use stripe_reconciler::queries::invoices::new_invoice;
use stripe_reconciler::store::{ApiKey, NewInvoice, Scope, Source, Store};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

pub const SECRET: &str = "whsec_of_this_world";
pub const OPERATOR_KEY: &str = "operator-key";
pub const ACME_KEY: &str = "acme-key";
const NOW_MS: i64 = 1_780_000_000_000;

const INVOICES: &str = include_str!("../../fixtures/invoices.jsonl");
const STORIES: [&str; 2] = [
    include_str!("../../fixtures/stories/refunded.2025-11-17.clover.jsonl"),
    include_str!("../../fixtures/stories/thin-and-snapshot-twins.jsonl"),
];

/// Stripe invoices of these stories, and one that no event names.
const STRIPE_INVOICES: [&str; 3] = ["in_1Q021Fx", "in_1Q035Fx", "in_1Q001Fx"];

/// A request.
pub struct RawRequest {
    pub method: Method,
    pub target: Uri,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// An answer.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

pub struct Program {
    runtime: Runtime,
    folder: TempDir,
    running: Option<Running>,
}

struct Running {
    service: TowerToHyperService<axum::Router>,
    store: Store,
    writer: Writer,
}

impl Program {
    pub fn start() -> Program {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let folder = tempfile::tempdir().expect("a folder can be made");
        runtime.block_on(fill(&folder.path().join("template.db")));

        Program {
            runtime,
            folder,
            running: None,
        }
    }

    pub fn send(&mut self, request: RawRequest) -> Answer {
        let Program {
            runtime,
            folder,
            running,
        } = self;
        runtime.block_on(async {
            let running = match running {
                Some(running) => running,
                none => none.insert(Running::start(folder.path()).await),
            };
            let mut sent = Request::new(Full::new(request.body));
            *sent.method_mut() = request.method;
            *sent.uri_mut() = request.target;
            *sent.headers_mut() = request.headers;
            // HTTP clients always send a host. Without this line, every input would have to.
            sent.headers_mut()
                .entry(HOST)
                .or_insert(HeaderValue::from_static("localhost"));

            let answer: Response = running
                .service
                .call(sent)
                .await
                .expect("a router cannot fail");
            let (parts, body) = answer.into_parts();
            let body = body
                .collect()
                .await
                .expect("a complete body can be read")
                .to_bytes();
            Answer {
                status: parts.status,
                headers: parts.headers,
                body,
            }
        })
    }

    /// Restores the initial state, so that no input depends on those before it.
    pub fn renew(&mut self) {
        if let Some(Running {
            service,
            store,
            writer,
        }) = self.running.take()
        {
            drop(service);
            self.runtime.block_on(async {
                writer.finish().await;
                store.close().await;
            });
        }
    }

    pub fn signature(&self, body: &[u8]) -> String {
        sign(secrets().first(), NOW_MS / 1000, body)
    }

    /// Returns the cookie of a visitor who signed in with this key.
    pub fn session(&self, key: &str) -> String {
        session_token::issue(
            &secrets(),
            key,
            &api_key::hash(key.as_bytes()),
            NOW_MS / 1000,
        )
    }
}

fn secrets() -> SigningSecrets {
    SigningSecrets::parse(SECRET).expect("it is a secret")
}

fn url(file: &Path) -> String {
    format!("sqlite://{}", file.display())
}

impl Running {
    async fn start(folder: &Path) -> Running {
        let file = folder.join("world.db");
        // The WAL of the previous file does not belong to this one.
        for name in ["world.db", "world.db-wal", "world.db-shm"] {
            let _ = std::fs::remove_file(folder.join(name));
        }

        std::fs::copy(folder.join("template.db"), &file).expect("a file can be copied");
        let store = Store::connect(&url(&file))
            .await
            .expect("a database can be opened");
        let metrics = std::sync::Arc::<Metrics>::default();
        let (inbox, writer) = BatchWriter::start(store.clone(), metrics.clone());
        let (clock, stopping) = (Clock::fixed(NOW_MS), CancellationToken::new());
        let state = AppState::new(store.clone(), inbox, secrets(), clock, metrics, stopping);
        let service = TowerToHyperService::new(router(state, MetricsAt::MainListener, Ui::Shown));

        Running {
            service,
            store,
            writer,
        }
    }
}

/// Fills the database. The id of each key is the key itself.
async fn fill(file: &Path) {
    let store = Store::connect(&url(file))
        .await
        .expect("a database can be made");
    store.migrate().await.expect("it can be migrated");

    for (key, scope) in [
        (OPERATOR_KEY, Scope::Operator),
        (ACME_KEY, Scope::Tenant("acme".to_owned())),
    ] {
        let row = ApiKey {
            id: key.to_owned(),
            scope,
            created_ms: NOW_MS,
            expires_ms: None,
            revoked_ms: None,
        };
        store
            .insert_key(&row, &api_key::hash(key.as_bytes()))
            .await
            .expect("a key can be kept");
    }

    let stored = INVOICES.lines().filter(|line| {
        STRIPE_INVOICES
            .iter()
            .any(|id| line.contains(&format!("{id}\"")))
    });
    let parsed = stored.map(|line| serde_json::from_str(line).expect("a fixture is JSON"));
    let mut invoices: Vec<NewInvoice> = parsed
        .map(|json| new_invoice("acme", None, json).expect("a fixture is valid"))
        .collect();
    invoices
        .push(new_invoice("other", Some("inv-other"), serde_json::json!({})).expect("it is valid"));
    store
        .put_invoices(&invoices, NOW_MS)
        .await
        .expect("invoices can be stored");

    let bodies = STORIES
        .iter()
        .flat_map(|story| story.lines())
        .chain(["no JSON"]);
    let delivered = |body: &'static str| {
        let (source, secret_label) = (Source::Webhook, Some("secret-1".to_owned()));
        prepare(Delivery {
            body: Bytes::from_static(body.as_bytes()),
            source,
            secret_label,
            received_ms: NOW_MS,
        })
    };
    store
        .append(&bodies.map(delivered).collect::<Vec<_>>())
        .await
        .expect("events can be kept");

    store.close().await;
}

/// Parses a request as it is written on the wire. Returns `None` if no client could send it.
pub fn parse(input: &[u8], program: &Program) -> Option<RawRequest> {
    let (head, body) = match input.windows(2).position(|two| two == b"\n\n") {
        Some(at) => (&input[..at], &input[at + 2..]),
        None => (input, &[][..]),
    };
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let blank = first.iter().position(|byte| *byte == b' ')?;
    let method = Method::from_bytes(&first[..blank]).ok()?;
    let target = Uri::try_from(&first[blank + 1..]).ok()?;
    let mut headers = HeaderMap::new();

    for line in lines.filter(|line| !line.is_empty()).take(100) {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        headers.append(
            name,
            HeaderValue::from_bytes(&fill_in(line[colon + 1..].trim_ascii(), body, program))
                .ok()?,
        );
    }

    Some(RawRequest {
        method,
        target,
        headers,
        body: Bytes::copy_from_slice(body),
    })
}

/// Replaces `$signature`, `$operator` and `$acme`, which no mutation can guess, by a signature and
/// by the sessions of the keys.
fn fill_in(value: &[u8], body: &[u8], program: &Program) -> Vec<u8> {
    let Some(at) = value.iter().position(|byte| *byte == b'$') else {
        return value.to_vec();
    };
    let (before, named) = value.split_at(at);
    let words = [
        ("$signature", program.signature(body)),
        ("$operator", program.session(OPERATOR_KEY)),
        ("$acme", program.session(ACME_KEY)),
    ];
    let known = words
        .iter()
        .find_map(|(word, with)| Some((with, named.strip_prefix(word.as_bytes())?)));

    match known {
        Some((with, after)) => [before, with.as_bytes(), after].concat(),
        None => value.to_vec(),
    }
}

//! `serve`: runs the webhook endpoint and the read API until SIGTERM or SIGINT.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::output;
use super::reconcile::StripeFlags;
use super::tasks::{EssentialTasks, TaskEnded, keep_running};
use super::{Access, Exit, GlobalArgs, open};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::http::{self, AppState, MetricsAt, Ui};
use crate::ingest::batch_writer::{BatchWriter, Writer};
use crate::metrics::Metrics;
use crate::reconcile::{self, ReconcileContext};
use crate::store::Store;
use crate::stripe_api::StripeApi;

/// Limit on the connections of the listener for `/metrics`.
const METRICS_CONNECTIONS: usize = 32;
/// Number of files and sockets other than connections: metrics, database, Stripe's API, log output.
const OTHER_FILES: usize = 100;
/// Name of the task that stores deliveries.
const EVENT_WRITER: &str = "event writer";
/// Longest time for the last deliveries to become durable.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// Migrate the database, then receive webhooks and answer reads until SIGTERM or SIGINT
#[derive(Args)]
#[command(after_help = "Examples:
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve
  STRIPE_WEBHOOK_SECRET='live=whsec_...,old=whsec_...' stripe-reconciler serve
  STRIPE_WEBHOOK_SECRET_FILE=/run/secrets/stripe stripe-reconciler serve --listen-addr 0.0.0.0:8080
  STRIPE_API_KEY=rk_live_... STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve
      also reconciles with Stripe
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve --metrics-addr 10.0.0.5:9464
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve --ui
      also serves pages at /ui

When the server is ready, the first line on standard output names its address. Logs go to standard
error.")]
pub struct Serve {
    /// Address to listen on; port 0 picks a free port [env: LISTEN_ADDR] [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT")]
    listen_addr: Option<String>,

    /// Maximum number of connections; beyond it, a connection that waits for its client is closed
    /// [env: MAX_CONNECTIONS] [default: 1024]
    #[arg(long, value_name = "N")]
    max_connections: Option<String>,

    /// Separate listener for /metrics, without a key: bind it to a private address
    /// [env: METRICS_ADDR] [default: on the main listener, with an operator's key]
    #[arg(long, value_name = "ADDR:PORT")]
    metrics_addr: Option<String>,

    /// Signing secrets, separated by commas or blanks, each with or without a label:
    /// live=whsec_...,old=whsec_... [env: STRIPE_WEBHOOK_SECRET, preferred: flags show in process
    /// lists]
    #[arg(long, value_name = "SECRETS")]
    stripe_webhook_secret: Option<String>,

    /// Serve pages at /ui, signed in with an API key [env: UI=on] [default: off]
    #[arg(long)]
    ui: bool,
    #[command(flatten)]
    stripe: StripeFlags,
}

impl Serve {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let mut config = Config::load(&self.into_flags(&settings), Purpose::Signatures)?;
        let secrets = config
            .secrets
            .take()
            .context("checked with the configuration")?;
        let api = config.stripe_api.take().map(StripeApi::new);
        let (address, metrics_address) = (config.listen_addr, config.metrics_addr);
        let max_connections = config.max_connections;
        let ui = if config.ui { Ui::Shown } else { Ui::Absent };
        let signals = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );

        let store = open(config, Access::Writes).await?;
        if store.keys().await?.is_empty() {
            tracing::warn!(
                "database has no API key: it is new, or not the expected one (see `doctor`)"
            );
        }
        let connections = allowed_connections(max_connections);
        let listener = listen(address)?;
        let metrics = metrics_address.map(listen).transpose()?;

        let metrics_at = metrics
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        let reconciles = api.is_some();
        tracing::info!(?secrets, reconciles, ?metrics_at, "starting");
        output::line(format!("listening on http://{}", listener.local_addr()?))?;

        let stopping = CancellationToken::new();
        tokio::spawn(stop_on_signal(signals, stopping.clone()));
        let service = Service {
            listener,
            connections,
            metrics,
            store,
            secrets,
            api,
            ui,
        };
        serve(service, stopping).await?;
        tracing::info!("stopped");
        Ok(Exit::Done)
    }

    fn into_flags(self, settings: &GlobalArgs) -> Flags {
        Flags {
            listen_addr: self.listen_addr,
            max_connections: self.max_connections,
            metrics_addr: self.metrics_addr,
            stripe_webhook_secret: self.stripe_webhook_secret,
            ui: self.ui.then(|| "on".to_owned()),
            ..self.stripe.fill(settings.flags())
        }
    }
}

/// Stops the server on the first signal, and the process on the second.
async fn stop_on_signal(
    (mut terminate, mut interrupt): (Signal, Signal),
    stopping: CancellationToken,
) {
    received(&mut terminate, &mut interrupt).await;
    tracing::info!("stopping, finishing requests in progress");
    stopping.cancel();
    received(&mut terminate, &mut interrupt).await;
    tracing::warn!("stopping at once");
    std::process::exit(130);
}

/// Waits for either signal.
async fn received(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Raises the limit of open files for `wanted` connections, each of which is an open file. Returns
/// the number of connections that the limit allows.
fn allowed_connections(wanted: usize) -> usize {
    let needed = (wanted + OTHER_FILES) as u64;
    let limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current.filter(|current| *current < needed) else {
        return wanted;
    };

    let maximum = limit.maximum.unwrap_or(needed);
    let raised = maximum.min(needed).max(current);
    let new = Rlimit {
        current: Some(raised),
        ..limit
    };
    let files = match setrlimit(Resource::Nofile, new) {
        Ok(()) => raised,
        Err(_) => current,
    };
    if files == needed {
        return wanted;
    }

    let connections = (files as usize).saturating_sub(OTHER_FILES).max(1);
    tracing::warn!(
        files,
        wanted,
        connections,
        "fewer connections than configured: limit of open files is too low"
    );
    connections
}

fn listen(address: SocketAddr) -> Result<TcpListener, ConfigErrors> {
    http::listen(address)
        .map_err(|error| ConfigErrors(vec![format!("cannot listen on {address}: {error}")]))
}

/// The parts of a server.
pub(super) struct Service {
    pub listener: TcpListener,
    /// Limit on the connections of the listener.
    pub connections: usize,
    /// Separate listener for `/metrics`, or `None` if the main listener serves the metrics.
    pub metrics: Option<TcpListener>,
    pub store: Store,
    pub secrets: SigningSecrets,
    /// Access to Stripe's API, or `None` if this process does not reconcile.
    pub api: Option<StripeApi>,
    pub ui: Ui,
}

/// Runs the whole server until `stopping`, then drains it and closes the store.
///
/// # Errors
/// Returns an error if a task that deliveries or scrapes depend on ended before the stop. The
/// server drains its connections in this case, too.
pub(super) async fn serve(service: Service, stopping: CancellationToken) -> Result<(), TaskEnded> {
    let metrics: Arc<Metrics> = Arc::default();
    let (inbox, writer) = BatchWriter::start(service.store.clone(), metrics.clone());
    serve_with(service, metrics, inbox, writer, stopping).await
}

async fn serve_with(
    service: Service,
    metrics: Arc<Metrics>,
    inbox: BatchWriter,
    mut writer: Writer,
    stopping: CancellationToken,
) -> Result<(), TaskEnded> {
    let store = service.store;
    let mut tasks = EssentialTasks::default();
    metrics
        .reconcile
        .enabled
        .set(i64::from(service.api.is_some()));
    if let Some(api) = service.api {
        let context = ReconcileContext {
            store: store.clone(),
            inbox: inbox.clone(),
            api,
            clock: Clock::system(),
            metrics: metrics.clone(),
        };
        let token = stopping.clone();
        let name = "reconciliation worker";
        let start = move || reconcile::work(context.clone(), token.clone());
        tasks.spawn(name, keep_running(name, start, stopping.clone()));
    }

    let state = AppState::new(
        store.clone(),
        inbox,
        service.secrets,
        Clock::system(),
        metrics,
        stopping.clone(),
    );
    let (monitor, token) = (state.monitor.clone(), stopping.clone());
    let name = "health monitor";
    let start = move || monitor.clone().run(token.clone());
    tasks.spawn(name, keep_running(name, start, stopping.clone()));

    let metrics_at = match service.metrics {
        Some(listener) => {
            let router = http::metrics_router(state.clone());
            let served = http::serve(listener, router, METRICS_CONNECTIONS, stopping.clone());
            tasks.spawn("listener for metrics", served);
            MetricsAt::ListenerOfItsOwn
        }
        None => MetricsAt::MainListener,
    };

    let router = http::router(state, metrics_at, service.ui);
    let listening = http::serve(
        service.listener,
        router,
        service.connections,
        stopping.clone(),
    );
    let result = supervise(listening, &mut tasks, &mut writer, &stopping).await;

    tasks.finish().await;
    finish(writer).await;
    store.close().await;
    result
}

/// Waits until the listener has drained. If an essential task ends first, stops the server.
async fn supervise(
    listening: impl Future<Output = ()>,
    tasks: &mut EssentialTasks,
    writer: &mut Writer,
    stopping: &CancellationToken,
) -> Result<(), TaskEnded> {
    let mut listening = pin!(listening);
    let ended = tokio::select! {
        () = &mut listening => return Ok(()),
        ended = tasks.next_ended() => ended,
        () = writer.ended() => TaskEnded(EVENT_WRITER),
    };
    // After the stop, the tasks end normally while the listener is still draining.
    if stopping.is_cancelled() {
        listening.await;
        return Ok(());
    }

    tracing::error!(error = %ended, "stopping, because a task ended");
    stopping.cancel();
    listening.await;
    Err(ended)
}

/// Waits until the last deliveries are durable, up to [`FINISH_TIMEOUT`].
async fn finish(writer: Writer) {
    let finished = tokio::time::timeout(FINISH_TIMEOUT, writer.finish()).await;
    if finished.is_err() {
        tracing::error!("last deliveries did not become durable in time; none was acknowledged");
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::Request;

    use super::*;
    use crate::domain::stripe::signature::sign;
    use crate::http_client::HttpClient;

    #[tokio::test]
    async fn dead_writer_ends_server_with_error() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();
        let listener = http::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let secrets = SigningSecrets::parse("whsec_a").unwrap();
        let body = Bytes::from_static(b"{}");
        let signature = sign(secrets.first(), Clock::system().now_s(), &body);
        let service = Service {
            listener,
            connections: 10,
            metrics: None,
            store,
            secrets,
            api: None,
            ui: Ui::Absent,
        };
        let (inbox, writer) = Writer::start_panicking();
        let stopping = CancellationToken::new();
        let serving = serve_with(service, Arc::default(), inbox, writer, stopping.clone());

        let client = HttpClient::new(Duration::from_secs(10), 1 << 20);
        let deliver = async {
            let request = Request::post(format!("{base}/webhooks/stripe"))
                .header("stripe-signature", signature)
                .body(Full::new(body))
                .unwrap();
            client.send(request).await.unwrap().status()
        };
        let (ended, status) = tokio::time::timeout(
            Duration::from_secs(20),
            futures_util::future::join(serving, deliver),
        )
        .await
        .expect("the server ends by itself");
        assert_eq!(status, 503, "nothing was stored");
        assert!(matches!(ended, Err(TaskEnded(EVENT_WRITER))), "{ended:?}");
        assert!(stopping.is_cancelled());
    }
}

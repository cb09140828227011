//! `serve`: the webhook endpoint and the read API, until SIGTERM or SIGINT.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::output;
use super::reconcile::StripeFlags;
use super::{Access, Exit, GlobalArgs, open};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::http::{self, AppState, MetricsAt, Ui};
use crate::ingest::batch_writer::BatchWriter;
use crate::metrics::Metrics;
use crate::reconcile::{self, ReconcileContext};
use crate::store::Store;
use crate::stripe_api::StripeApi;

/// Of the listener for `/metrics`, at a time.
const METRICS_CONNECTIONS: usize = 32;
/// Files and sockets beside the connections: metrics, database, Stripe's API, log.
const OTHER_FILES: usize = 100;
/// How long the last deliveries may take to reach the disk.
const FINISH: Duration = Duration::from_secs(10);

/// Migrate the database, then receive webhooks and answer reads until SIGTERM or SIGINT
#[derive(Args)]
#[command(after_help = "Examples:
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve
  STRIPE_WEBHOOK_SECRET='live=whsec_...,old=whsec_...' stripe-reconciler serve --listen-addr 0.0.0.0:8080
  STRIPE_WEBHOOK_SECRET_FILE=/run/secrets/stripe stripe-reconciler serve
  STRIPE_API_KEY=rk_live_... STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve     and finds what no webhook told
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve --metrics-addr 10.0.0.5:9464
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve --ui                           and shows pages at /ui

The first line on standard output says where it listens, once it is ready. Logs go to standard error.")]
pub struct Serve {
    /// Where to listen; port 0 picks a free one [env: LISTEN_ADDR] [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT")]
    listen_addr: Option<String>,
    /// Connections at a time; when there are more, the one that has waited longest gives way [env: MAX_CONNECTIONS] [default: 1024]
    #[arg(long, value_name = "N")]
    max_connections: Option<String>,
    /// A listener of its own for /metrics, then without a key: bind it to a private address [env: METRICS_ADDR] [default: on the
    /// main listener, with the operator's key]
    #[arg(long, value_name = "ADDR:PORT")]
    metrics_addr: Option<String>,
    /// Signing secrets, separated by commas or blanks, each with a label or without: live=whsec_...,old=whsec_...
    /// [env: STRIPE_WEBHOOK_SECRET, better: a flag can be seen in the list of processes]
    #[arg(long, value_name = "SECRETS")]
    stripe_webhook_secret: Option<String>,
    /// Show pages for a person at /ui, signed in with an API key [env: UI=on] [default: off]
    #[arg(long)]
    ui: bool,
    #[command(flatten)]
    stripe: StripeFlags,
}

impl Serve {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let Serve {
            listen_addr,
            max_connections,
            metrics_addr,
            stripe_webhook_secret,
            ui,
            stripe,
        } = self;
        let ui = ui.then(|| "on".to_owned());
        let flags = Flags {
            listen_addr,
            max_connections,
            metrics_addr,
            stripe_webhook_secret,
            ui,
            ..stripe.fill(settings.flags())
        };
        let mut config = Config::load(&flags, Purpose::Signatures)?;
        let secrets = config
            .secrets
            .take()
            .context("checked with the configuration")?;
        let api = config.stripe_api.take().map(StripeApi::new);
        let (address, metrics_address, max_connections) = (
            config.listen_addr,
            config.metrics_addr,
            config.max_connections,
        );
        let ui = if config.ui { Ui::Shown } else { Ui::Absent };
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let store = open(config, Access::Writes).await?;
        if store.keys().await?.is_empty() {
            tracing::warn!(
                "the database holds no API key: it is new, or not the one that it was (`stripe-reconciler doctor`)"
            );
        }
        let connections = allowed_connections(max_connections);
        let listener = listen(address)?;
        let metrics = metrics_address.map(listen).transpose()?;

        let metrics_at = metrics
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        tracing::info!(
            ?secrets,
            reconciles = api.is_some(),
            ?metrics_at,
            "starting"
        );
        output::line(format!("listening on http://{}", listener.local_addr()?))?;
        let stopping = CancellationToken::new();
        let stop = stopping.clone();
        tokio::spawn(async move {
            asked_to_stop(&mut terminate, &mut interrupt).await;
            tracing::info!("stopping: requests under way may finish");
            stop.cancel();
            asked_to_stop(&mut terminate, &mut interrupt).await;
            tracing::warn!("stopping at once");
            std::process::exit(130);
        });
        serve(
            Service {
                listener,
                connections,
                metrics,
                store,
                secrets,
                api,
                ui,
            },
            stopping,
        )
        .await;
        tracing::info!("stopped");
        Ok(Exit::Done)
    }
}

/// Each connection is an open file: allows this process as many as it needs, or takes as many connections as it may have.
fn allowed_connections(wanted: usize) -> usize {
    let needed = (wanted + OTHER_FILES) as u64;
    let limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current.filter(|current| *current < needed) else {
        return wanted;
    };
    let raised = limit
        .maximum
        .map_or(needed, |maximum| maximum.min(needed))
        .max(current);
    let files = match setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(raised),
            ..limit
        },
    ) {
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
        "fewer connections than configured: this process may not open more files"
    );
    connections
}

fn listen(address: SocketAddr) -> Result<TcpListener, ConfigErrors> {
    http::listen(address)
        .map_err(|error| ConfigErrors(vec![format!("cannot listen on {address}: {error}")]))
}

/// What a service is made of.
pub(super) struct Service {
    pub listener: TcpListener,
    /// Of the listener, at a time.
    pub connections: usize,
    /// A listener of its own for `/metrics`.
    pub metrics: Option<TcpListener>,
    pub store: Store,
    pub secrets: SigningSecrets,
    /// None: it does not reconcile.
    pub api: Option<StripeApi>,
    pub ui: Ui,
}

/// The whole service, until it is told to stop: then it drains, and closes the store.
pub(super) async fn serve(service: Service, stopping: CancellationToken) {
    let Service {
        listener,
        connections,
        metrics: metrics_listener,
        store,
        secrets,
        api,
        ui,
    } = service;
    let metrics: Arc<Metrics> = Arc::default();
    let (inbox, writer) = BatchWriter::start(store.clone(), metrics.clone());
    metrics.reconcile.enabled.set(i64::from(api.is_some()));
    let mut beside = JoinSet::new();
    if let Some(api) = api {
        let (inbox, metrics) = (inbox.clone(), metrics.clone());
        let tools = ReconcileContext {
            store: store.clone(),
            inbox,
            api,
            clock: Clock::system(),
            metrics,
        };
        beside.spawn(reconcile::work(tools, stopping.clone()));
    }
    let state = AppState::new(
        store.clone(),
        inbox,
        secrets,
        Clock::system(),
        metrics,
        stopping.clone(),
    );
    beside.spawn(state.monitor.clone().run(stopping.clone()));
    let metrics_at = match metrics_listener {
        Some(listener) => {
            beside.spawn(http::serve(
                listener,
                http::metrics_router(state.clone()),
                METRICS_CONNECTIONS,
                stopping.clone(),
            ));
            MetricsAt::ListenerOfItsOwn
        }
        None => MetricsAt::MainListener,
    };
    http::serve(
        listener,
        http::router(state, metrics_at, ui),
        connections,
        stopping,
    )
    .await;
    while let Some(ended) = beside.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a worker ended badly");
        }
    }
    if tokio::time::timeout(FINISH, writer.finish()).await.is_err() {
        tracing::error!(
            "the disk did not take the last deliveries in time; none of them was acknowledged"
        );
    }
    store.close().await;
}

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

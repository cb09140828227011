//! `serve`: the webhook endpoint and the read API, until SIGTERM or SIGINT.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::reconcile::StripeFlags;
use super::{Access, Exit, Settings, open, output};
use crate::clock::Clock;
use crate::config::{Config, Flags, Mistakes, Purpose};
use crate::domain::signature::SigningSecrets;
use crate::flows::reconcile::{self, Tools};
use crate::http::{self, AppState};
use crate::inbox::Inbox;
use crate::store::Store;
use crate::stripe_api::StripeApi;

/// How long the last deliveries may take to reach the disk.
const FINISH: Duration = Duration::from_secs(10);

/// Migrate the database, then receive webhooks and answer reads until SIGTERM or SIGINT
#[derive(Args)]
#[command(after_help = "Examples:
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve
  STRIPE_WEBHOOK_SECRET='live=whsec_...,old=whsec_...' stripe-reconciler serve --listen-addr 0.0.0.0:8080
  STRIPE_WEBHOOK_SECRET_FILE=/run/secrets/stripe stripe-reconciler serve
  STRIPE_API_KEY=rk_live_... STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve     and finds what no webhook told

The first line on standard output says where it listens, once it is ready. Logs go to standard error.")]
pub struct Serve {
    /// Where to listen; port 0 picks a free one [env: LISTEN_ADDR] [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT")]
    listen_addr: Option<String>,
    /// Signing secrets, separated by commas or blanks, each with a label or without: live=whsec_...,old=whsec_...
    /// [env: STRIPE_WEBHOOK_SECRET, better: a flag can be seen in the list of processes]
    #[arg(long, value_name = "SECRETS")]
    stripe_webhook_secret: Option<String>,
    #[command(flatten)]
    stripe: StripeFlags,
}

impl Serve {
    pub(super) async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        let (listen_addr, stripe_webhook_secret) = (self.listen_addr, self.stripe_webhook_secret);
        let flags = Flags { listen_addr, stripe_webhook_secret, ..self.stripe.fill(settings.flags()) };
        let mut config = Config::load(&flags, Purpose::Signatures)?;
        let secrets = config.secrets.take().context("checked with the configuration")?;
        let api = config.stripe_api.take().map(StripeApi::new);
        let address = config.listen_addr;
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let store = open(config, Access::Writes).await?;
        let listener =
            TcpListener::bind(address).await.map_err(|e| Mistakes(vec![format!("cannot listen on {address}: {e}")]))?;

        tracing::info!(?secrets, reconciles = api.is_some(), "starting");
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
        serve(listener, store, secrets, api, stopping).await;
        tracing::info!("stopped");
        Ok(Exit::Done)
    }
}

/// The whole service, until it is told to stop: then it drains, and closes the store. Without `api`, it does not reconcile.
pub(super) async fn serve(
    listener: TcpListener,
    store: Store,
    secrets: SigningSecrets,
    api: Option<StripeApi>,
    stopping: CancellationToken,
) {
    let (inbox, writer) = Inbox::start(store.clone());
    let worker = api.map(|api| {
        let tools = Tools { store: store.clone(), inbox: inbox.clone(), api, clock: Clock::system() };
        tokio::spawn(reconcile::work(tools, stopping.clone()))
    });
    let state =
        AppState { store: store.clone(), inbox, secrets: Arc::new(secrets), clock: Clock::system(), stopping: stopping.clone() };
    http::serve(listener, http::router(state), stopping).await;
    if let Some(Err(error)) = match worker {
        Some(worker) => Some(worker.await),
        None => None,
    } {
        tracing::error!(%error, "the worker ended badly");
    }
    if tokio::time::timeout(FINISH, writer.finish()).await.is_err() {
        tracing::error!("the disk did not take the last deliveries in time; none of them was acknowledged");
    }
    store.close().await;
}

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

//! `demo`: shows the main job without configuration.
//!
//! A real server with its own database receives full-size payloads, signed and delivered over HTTP
//! like Stripe's: some twice, some out of order, some before their invoice is stored.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};
use http_body_util::Full;
use hyper::Request;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::keys;
use super::output;
use super::serve::{Service, serve};
use super::tasks::TaskEnded;
use super::{Exit, GlobalArgs};
use crate::clock::Clock;
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::http::{self, Ui};
use crate::http_client::HttpClient;
use crate::ingest::Outcome;
use crate::jobs::replay::Endpoint;
use crate::queries::invoices::new_invoice;
use crate::store::{Scope, Store};

const TENANT: &str = "acme";
/// Connections of the server. Only the demo itself connects to it.
const CONNECTIONS: usize = 64;
/// Concurrent deliveries. Stripe also sends several at a time.
const CONCURRENT_DELIVERIES: usize = 8;

/// The events of one invoice at Stripe, and the order of their delivery.
struct Sample {
    title: &'static str,
    events: &'static str,
    arrival: Arrival,
}

/// The order in which the invoice and its events arrive.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arrival {
    InOrder,
    EachTwice,
    LastFirst,
    BeforeTheInvoice,
}

impl Arrival {
    fn describe(self) -> &'static str {
        match self {
            Arrival::InOrder => "delivered in order",
            Arrival::EachTwice => "each event delivered twice",
            Arrival::LastFirst => "delivered last event first",
            Arrival::BeforeTheInvoice => "delivered before the invoice was stored",
        }
    }
}

macro_rules! sample {
    ($title:literal, $story:literal, $arrival:ident) => {
        Sample {
            title: $title,
            events: include_str!(concat!("../../fixtures/stories/", $story, ".jsonl")),
            arrival: Arrival::$arrival,
        }
    };
}

const SAMPLES: [Sample; 12] = [
    sample!(
        "A card pays at once",
        "card-paid-at-once.2025-11-17.clover",
        InOrder
    ),
    sample!(
        "Declined twice, then paid",
        "declined-twice-then-paid.2022-11-15",
        LastFirst
    ),
    sample!(
        "A bank debit takes days",
        "bank-debit.2025-11-17.clover",
        EachTwice
    ),
    sample!(
        "The customer must authenticate (3D Secure)",
        "three-d-secure.2022-11-15",
        EachTwice
    ),
    sample!("Paid in parts", "partial-payments", LastFirst),
    sample!(
        "Paid by wire, outside Stripe",
        "paid-outside-stripe-by-amount",
        InOrder
    ),
    sample!(
        "Voided after a failed attempt",
        "voided.2025-11-17.clover",
        LastFirst
    ),
    sample!(
        "Written off, then paid after all",
        "written-off-then-paid.2022-11-15",
        InOrder
    ),
    sample!(
        "Paid, then partly refunded",
        "refunded.2025-11-17.clover",
        EachTwice
    ),
    sample!("Paid, then disputed", "disputed.2022-11-15", LastFirst),
    sample!(
        "Stripe was faster than the billing run",
        "events-before-the-invoice",
        BeforeTheInvoice
    ),
    sample!("Collected outside Stripe", "collected-elsewhere", InOrder),
];

/// The invoice documents, one per line. Each names its Stripe invoice.
const INVOICES: &str = include_str!("../../fixtures/invoices.jsonl");

/// Show the main job without configuration
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler demo
  stripe-reconciler demo --keep      keep it running, and print commands to try")]
pub struct Demo {
    /// Keep it running until Ctrl-C, and print commands to try
    #[arg(long)]
    keep: bool,
}

impl Demo {
    pub(super) async fn run(self, _settings: GlobalArgs) -> anyhow::Result<Exit> {
        let stage = Stage::build().await?;
        output::line(format!(
            "A server listens on {}, with an empty SQLite database in {}.",
            stage.base,
            stage.folder.path().display()
        ))?;

        let mut counts = Counts::default();
        for sample in &SAMPLES {
            stage.play(sample, &mut counts).await?;
        }

        output::line(counts.describe())?;
        for sample in &SAMPLES {
            stage.print(sample).await?;
        }

        if self.keep {
            stage.explain()?;
            tokio::signal::ctrl_c().await?;
        }
        stage.tear_down().await?;
        Ok(Exit::Done)
    }
}

#[derive(Default)]
struct Counts {
    recorded: usize,
    duplicate: usize,
    no_payment_fact: usize,
    invoices: usize,
}

impl Counts {
    fn describe(&self) -> String {
        let Counts {
            recorded,
            duplicate,
            no_payment_fact,
            invoices,
        } = self;
        let delivered = recorded + duplicate + no_payment_fact;
        format!(
            "{invoices} invoices stored. {delivered} deliveries signed, sent and answered 2xx: \
             {recorded} recorded, {duplicate} duplicate, \
             {no_payment_fact} without a payment fact.\n\n\
             The history of each invoice:"
        )
    }
}

/// The running server, and the keys and clients to use it.
struct Stage {
    folder: TempDir,
    base: String,
    store: Store,
    endpoint: Endpoint,
    client: HttpClient,
    operator_key: String,
    tenant_key: String,
    signing_secret: String,
    stop: CancellationToken,
    server: JoinHandle<Result<(), TaskEnded>>,
}

impl Stage {
    async fn build() -> anyhow::Result<Stage> {
        let folder = tempfile::Builder::new()
            .prefix("stripe-reconciler-demo-")
            .tempdir()?;
        let store = Store::connect(&database_url(&folder)).await?;
        store.migrate().await?;
        let now_ms = Clock::system().now_ms();
        let (_, operator_key) = keys::make(&store, Scope::Operator, now_ms, None).await?;
        let (_, tenant_key) =
            keys::make(&store, Scope::Tenant(TENANT.to_owned()), now_ms, None).await?;
        let mut random = [0; 24];
        rand::fill(&mut random[..]);
        let signing_secret = format!("whsec_{}", hex::encode(random));
        let secrets = || {
            SigningSecrets::parse(&signing_secret)
                .map_err(|mistakes| anyhow::anyhow!(mistakes.join("; ")))
        };

        let listener = http::listen(([127, 0, 0, 1], 0).into())?;
        let base = format!("http://{}", listener.local_addr()?);

        let stop = CancellationToken::new();
        let service = Service {
            listener,
            connections: CONNECTIONS,
            metrics: None,
            store: store.clone(),
            secrets: secrets()?,
            api: None,
            ui: Ui::Shown,
        };
        let server = tokio::spawn(serve(service, stop.clone()));
        let endpoint = Endpoint::new(
            format!("{base}/webhooks/stripe"),
            secrets()?,
            Clock::system(),
        );
        let client = HttpClient::new(Duration::from_secs(10), 1024 * 1024);

        Ok(Stage {
            folder,
            base,
            store,
            endpoint,
            client,
            operator_key,
            tenant_key,
            signing_secret,
            stop,
            server,
        })
    }

    /// Stores the invoice and delivers its events, in the order that the sample names.
    async fn play(&self, sample: &Sample, counts: &mut Counts) -> anyhow::Result<()> {
        let mut events: Vec<Bytes> = sample
            .events
            .lines()
            .map(|line| Bytes::from_static(line.as_bytes()))
            .collect();
        let (document, _) = sample.invoice()?;
        match sample.arrival {
            Arrival::InOrder | Arrival::BeforeTheInvoice => {}
            Arrival::EachTwice => {
                events = events
                    .iter()
                    .flat_map(|event| [event.clone(), event.clone()])
                    .collect();
            }
            Arrival::LastFirst => events.reverse(),
        }

        if sample.arrival == Arrival::BeforeTheInvoice {
            self.deliver(events, counts).await?;
            self.store_invoice(document).await?;
        } else {
            self.store_invoice(document).await?;
            self.deliver(events, counts).await?;
        }

        counts.invoices += 1;

        Ok(())
    }

    async fn store_invoice(&self, document: Value) -> anyhow::Result<()> {
        let invoice = new_invoice(TENANT, None, document)
            .map_err(|faults| anyhow::anyhow!("a sample is invalid: {faults:?}"))?;

        self.store
            .put_invoices(&[invoice], Clock::system().now_ms())
            .await?;
        Ok(())
    }

    async fn deliver(&self, events: Vec<Bytes>, counts: &mut Counts) -> anyhow::Result<()> {
        let mut answers = stream::iter(events)
            .map(|event| self.endpoint.post(event))
            .buffered(CONCURRENT_DELIVERIES);
        while let Some(answer) = answers.try_next().await? {
            match answer.map_err(anyhow::Error::msg)? {
                Outcome::Recorded => counts.recorded += 1,
                Outcome::Duplicate => counts.duplicate += 1,
                Outcome::NoPaymentFact => counts.no_payment_fact += 1,
                Outcome::Unreadable => anyhow::bail!("a sample is unreadable"),
            }
        }
        Ok(())
    }

    /// Reads the invoice with the tenant's key and prints its history.
    async fn print(&self, sample: &Sample) -> anyhow::Result<()> {
        let (_, uid) = sample.invoice()?;
        let request = Request::get(self.invoice_url(&uid))
            .header("apikey", &self.tenant_key)
            .body(Full::default())?;
        let answer = self.client.send(request).await?;
        ensure!(
            answer.status().is_success(),
            "the server answered {} for {uid}",
            answer.status()
        );
        let invoice: Value = serde_json::from_slice(answer.body())?;
        let states = invoice
            .pointer("/status/states")
            .and_then(Value::as_array)
            .context("the response has no states")?;

        output::line(format!(
            "\n{uid}  {} ({})",
            output::bold(sample.title),
            sample.arrival.describe()
        ))?;
        let cell =
            |state: &Value, field: &str| state[field].as_str().unwrap_or_default().to_owned();
        let rows = states
            .iter()
            .map(|s| {
                vec![
                    cell(s, "timestamp"),
                    cell(s, "state"),
                    cell(s, "paymentMsg"),
                ]
            })
            .collect();

        output::table(&[], rows)
            .lines()
            .try_for_each(|line| output::line(format!("  {line}")))
    }

    fn invoice_url(&self, uid: &str) -> String {
        format!("{}/v1/tenants/{TENANT}/invoices/{uid}", self.base)
    }

    fn explain(&self) -> anyhow::Result<()> {
        let Stage {
            base,
            operator_key,
            tenant_key,
            signing_secret,
            ..
        } = self;
        let (_, uid) = SAMPLES[0].invoice()?;
        let url = self.invoice_url(&uid);
        let database = database_url(&self.folder);
        output::line(format!(
            "
The server runs until Ctrl-C. Pages for your browser: {base}/ui
  sign in with the operator's key  {operator_key}
  or with the key of tenant {TENANT}  {tenant_key}

Commands to try in another terminal:

  export DATABASE_URL={database}
  curl -H 'ApiKey: {tenant_key}' {url}
  curl -H 'ApiKey: {operator_key}' '{base}/v1/tenants/{TENANT}/invoices?state=PaymentFailed'
  stripe-reconciler why {TENANT} {uid}
  stripe-reconciler invoices list
  stripe-reconciler events list
  STRIPE_WEBHOOK_SECRET={signing_secret} stripe-reconciler replay \\
    --to {base}/webhooks/stripe EVENT.json"
        ))
    }

    async fn tear_down(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.server.await??;
        self.folder.close()?;
        Ok(())
    }
}

fn database_url(folder: &TempDir) -> String {
    format!("sqlite://{}/demo.db", folder.path().display())
}

impl Sample {
    /// Returns the document of the invoice, and its uid.
    fn invoice(&self) -> anyhow::Result<(Value, String)> {
        for line in INVOICES.lines() {
            let document: Value = serde_json::from_str(line)?;
            let names = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
            if let (Some(stripe_id), Some(uid)) =
                (names("/status/stripeInvoiceId"), names("/metadata/uid"))
                && self.events.contains(&format!("\"{stripe_id}\""))
            {
                let uid = uid.to_owned();
                return Ok((document, uid));
            }
        }
        anyhow::bail!("the sample `{}` has no invoice", self.title)
    }
}

//! `/ui/invoice?tenant=&uid=&at=`: the payment state of an invoice, and its history with the proof
//! of every entry.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Given};
use axum::response::Html;
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::Value;

use super::layout::{self, CurrentPage, badge};
use super::text::{self, address, duration, encoded, id, quoted, sentence, time, time_s};
use super::visitor::Visitor;
use crate::domain::invoice::schema::validate_uid;
use crate::domain::money;
use crate::domain::payment_state::PaymentState;
use crate::domain::time::timestamp;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::queries::evidence::{self, Evidence, Missing, Proven};
use crate::queries::payment_summary::summarise;

/// Number of proofs of an entry that are visible at first. The visitor can unfold the others.
const VISIBLE_PROOFS: usize = 3;

#[derive(Deserialize)]
pub struct InvoicePageParams {
    tenant: String,
    uid: String,
    at: Option<String>,
}

/// Answers `GET /ui/invoice`.
pub async fn show(
    Given(state): Given<AppState>,
    visitor: Visitor,
    params: Result<Query<InvoicePageParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    // An invalid id and another tenant's invoice get the same response: not found.
    let Ok(Query(InvoicePageParams { tenant, uid, at })) = params else {
        return Err(ApiError::NotFound);
    };
    let is_valid = validate_uid(&tenant).is_ok() && validate_uid(&uid).is_ok();
    if !is_valid || !visitor.0.reads(&tenant) {
        return Err(ApiError::NotFound);
    }

    let at = at.filter(|at| !at.trim().is_empty());
    let as_of_ms = at
        .map(|text| evidence::as_of(&as_time(&text), state.clock.now_ms()))
        .transpose()
        .map_err(|reason| ApiError::InvalidQuery(format!("The time {reason}")))?;

    let invoice = state
        .store
        .invoice(&tenant, &uid)
        .await?
        .ok_or(ApiError::NotFound)?;
    let document = serde_json::from_str(&invoice.document).unwrap_or_default();
    let evidence = evidence::of(&state.store, invoice, as_of_ms).await?;

    let content = html! {
        nav.back aria-label="Back" { a href="/ui" { "Invoices" } }
        (answer(&evidence))
        div.columns {
            section.history aria-labelledby="history" {
                h2 #history { "How we know" }
                @for missing in &evidence.missing { (open(missing, &visitor)) }
                (line(&evidence, &visitor))
            }
            aside aria-label="About this invoice" {
                (facts(&evidence, &document))
                (at_a_time(&evidence))
            }
        }
    };
    let title = format!("Invoice {}", text::visible(&evidence.invoice_uid));

    Ok(layout::page(
        &title,
        CurrentPage::Invoices,
        Some(&visitor),
        content,
    ))
}

/// Completes the value of a browser's date and time field, which has no offset and sometimes no
/// seconds. The label of the field asks for UTC.
fn as_time(text: &str) -> String {
    let text = text.trim().replace(' ', "+");
    match text.len() {
        16 => format!("{text}:00Z"),
        19 => format!("{text}Z"),
        _ => text,
    }
}

fn answer(evidence: &Evidence) -> Markup {
    let summary = summarise(evidence);

    html! {
        section.answer.(layout::tone(summary.state)) aria-labelledby="invoice" {
            p.answer-state { (badge(summary.state)) @if let Some(ms) = evidence.as_of_ms { span.then { "as known at " (time(ms)) } } }
            h1 #invoice { "Invoice " (quoted(&evidence.invoice_uid)) }
            p.lead { (sentence(&summary.answer)) }
            @if summary.is_doubtful { p.mistake role="alert" { (sentence(&summary.grounds)) } }
            p.grounds { @if !summary.is_doubtful { (sentence(&summary.grounds)) " " } (summary.waits) }
            div.last { @for message in latest_messages(&evidence.entries) { p { (quoted(message)) } } }
        }
    }
}

/// Returns the messages below the answer: those from the first payment on, because later entries
/// explain what happened to the money, or only the latest if there is no payment.
fn latest_messages(entries: &[Proven]) -> impl Iterator<Item = &str> {
    let paid = entries
        .iter()
        .position(|entry| entry.state == PaymentState::Paid);
    let from = paid.unwrap_or(entries.len().saturating_sub(1));
    entries[from..]
        .iter()
        .filter_map(|entry| entry.message.as_deref())
}

fn open(missing: &Missing, visitor: &Visitor) -> Markup {
    html! {
        p.open {
            (quoted(&missing.message))
            @if let Some(event) = &missing.event { " " (layout::event_id(event, visitor.is_operator())) }
        }
    }
}

/// Renders the timeline: a point for each entry, and the time between two entries.
fn line(evidence: &Evidence, visitor: &Visitor) -> Markup {
    let entries = &evidence.entries;

    html! {
        @if entries.is_empty() { p.empty { "There is no entry yet." } }
        ol.line {
            @for (at, entry) in entries.iter().enumerate() {
                @let before = at.checked_sub(1).map(|before| entries[before].timestamp_ms);
                li.(layout::tone(Some(entry.state))) {
                    @if let Some(passed) = before.map(|ms| entry.timestamp_ms - ms).filter(|passed| *passed >= 1000) {
                        p.passed { (duration(passed)) " later" }
                    }
                    span.point { (layout::icon(Some(entry.state))) }
                    (proven(entry, visitor))
                }
            }
        }
    }
}

fn proven(entry: &Proven, visitor: &Visitor) -> Markup {
    let links = visitor.is_operator();
    let (first, more) = entry
        .proofs
        .split_at(entry.proofs.len().min(VISIBLE_PROOFS));

    html! {
        article {
            p.entry-head { strong { (layout::name(Some(entry.state))) } " " (time(entry.timestamp_ms)) }
            @if let Some(message) = &entry.message { p.said { (quoted(message)) } }
            @if entry.is_imported {
                p.proof-head { "Imported with the stored invoice; no event proves it." }
            } @else {
                p.proof-head { @if entry.proof_count() == 1 { "Proved by" } @else { "Proved by " (entry.proof_count()) " events" } }
                @for event in first { (layout::event(event, links)) }
                @if !more.is_empty() {
                    details {
                        summary { (more.len() + entry.more_proofs) " more" }
                        @for event in more { (layout::event(event, links)) }
                        @if entry.more_proofs > 0 { p.hint { "and " (entry.more_proofs) " more" } }
                    }
                }
            }
        }
    }
}

fn facts(evidence: &Evidence, document: &Value) -> Markup {
    let at_stripe = &evidence.at_stripe;
    let currency = at_stripe.currency.as_deref();
    let amount = |minor_units: i64| money::amount(minor_units, currency);
    let named = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
    let billed = document
        .pointer("/status/billableAmount")
        .and_then(Value::as_number)
        .map(|number| {
            let unit = named("/spec/paymentUnit")
                .unwrap_or_default()
                .to_ascii_uppercase();
            format!("{} {unit}", text::amount(number))
                .trim_end()
                .to_owned()
        });
    let period = named("/spec/billingPeriod/start").zip(named("/spec/billingPeriod/end"));

    html! {
        section.about aria-labelledby="about" {
            h2 #about { "The invoice" }
            dl.facts.tall {
                @if let Some(name) = named("/metadata/name") { div { dt { "Name" } dd { (quoted(name)) } } }
                div { dt { "Tenant" } dd { (quoted(&evidence.tenant_uid)) } }
                @if let Some(billed) = &billed { div { dt { "Billed, as stored" } dd.amount { (quoted(billed)) } } }
                @if let Some((start, end)) = period { div { dt { "Billing period" } dd { (quoted(day(start))) " to " (quoted(day(end))) } } }
                @if let Some(due) = at_stripe.amount_due { div { dt { "Due at Stripe" } dd.amount { (quoted(&amount(due))) } } }
                @if let Some(paid) = at_stripe.amount_paid { div { dt { "Paid at Stripe" } dd.amount { (quoted(&amount(paid))) } } }
                @if let Some(due_s) = at_stripe.due_s { div { dt { "Due by" } dd { (time_s(due_s)) } } }
                @if let Some(number) = &at_stripe.number { div { dt { "Number" } dd { (quoted(number)) } } }
                div {
                    dt { "At Stripe" }
                    dd {
                        @match &evidence.stripe_invoice_id {
                            Some(stripe_id) => {
                                a href=(dashboard(evidence, stripe_id)) rel="noopener noreferrer" { (id(stripe_id)) }
                                @if at_stripe.livemode == Some(false) { " (test mode)" }
                            }
                            None => "no Stripe invoice",
                        }
                    }
                }
                @if let Some(account) = &at_stripe.account { div { dt { "Connected account" } dd { (id(account)) } } }
                div { dt { "Stored" } dd { (time(evidence.stored_ms)) } }
                @if let Some(ms) = evidence.last_event_ms { div { dt { "Last event received" } dd { (time(ms)) } } }
                div {
                    dt { "Confirmed with Stripe" }
                    dd {
                        @match (evidence.confirmed_ms, evidence.differs_since_ms) {
                            (Some(ms), _) => (time(ms)),
                            (None, Some(_)) => "never: Stripe differs",
                            (None, None) if evidence.as_of_ms.is_some() => "not known",
                            (None, None) => "not compared",
                        }
                    }
                }
            }
        }
    }
}

/// Returns the date of a time in a document.
fn day(time: &str) -> &str {
    time.split('T').next().unwrap_or(time)
}

/// Returns the address of the invoice in Stripe's Dashboard.
fn dashboard(evidence: &Evidence, stripe_id: &str) -> String {
    let account = evidence
        .at_stripe
        .account
        .as_deref()
        .map_or(String::new(), |account| format!("{}/", encoded(account)));
    let mode = if evidence.at_stripe.livemode == Some(false) {
        "test/"
    } else {
        ""
    };

    format!(
        "https://dashboard.stripe.com/{account}{mode}invoices/{}",
        encoded(stripe_id)
    )
}

fn at_a_time(evidence: &Evidence) -> Markup {
    let Evidence {
        tenant_uid,
        invoice_uid,
        as_of_ms,
        ..
    } = evidence;
    let value = as_of_ms.map(|ms| timestamp(ms)[..19].to_owned());

    html! {
        section.as-of aria-labelledby="as-of" {
            h2 #as-of { "History at an earlier time" }
            form method="get" action="/ui/invoice" {
                input type="hidden" name="tenant" value=(tenant_uid);
                input type="hidden" name="uid" value=(invoice_uid);
                label for="at" { "Date and time, UTC" }
                div {
                    input #at type="datetime-local" name="at" step="1" value=[value] required;
                    button type="submit" { "Show" }
                }
            }
            @if as_of_ms.is_some() {
                p { a href=(address("/ui/invoice", &[("tenant", tenant_uid), ("uid", invoice_uid)])) { "Show the current history" } }
            } @else {
                p.hint { "Uses only events received by then, as an auditor would have seen them." }
            }
        }
    }
}

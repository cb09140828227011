//! `/ui/waiting`, `/ui/reconciliation` and `/ui/alarms`: how the service is, for the operator.

use axum::extract::State as Given;
use axum::response::Html;
use maud::{Markup, html};
use serde_json::Value;

use super::layout::{self, CurrentPage};
use super::session::{Operator, Visitor};
use super::text::{address, duration, id, marked, quoted, time};
use crate::doctor::{self, Check, CheckStatus, DoctorInput};
use crate::domain::time::parse_time;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::store::{Run, Scope};

/// Invoices that are awaited, and passes, that are shown at most.
const AWAITED: u32 = 200;
const PASSES: u32 = 12;
const OPERATOR: Visitor = Visitor(Scope::Operator);

pub async fn waiting(Given(state): Given<AppState>, _: Operator) -> Result<Html<String>, ApiError> {
    let awaited = state.store.awaited(AWAITED + 1).await?;
    let now_ms = state.clock.now_ms();
    let content = html! {
        h1 { "Waiting for their invoice" }
        p.intro {
            "Events came that name these invoices of Stripe's, and nobody stored one that holds them. They show the moment it is stored. "
            "What waits for long was never stored, or stored without its " code { "stripeInvoiceId" } "."
        }
        @if awaited.is_empty() { p.empty { "Nothing waits." } } @else {
            table.cards {
                thead { tr { th scope="col" { "Stripe's invoice" } th scope="col" { "Events" } th scope="col" { "Waits for" } th scope="col" { "Since" } } }
                tbody {
                    @for awaited in awaited.iter().take(AWAITED as usize) {
                        tr {
                            th scope="row" { a href=(address("/ui/events", &[("invoice", &awaited.stripe_invoice_id)])) { (id(&awaited.stripe_invoice_id)) } }
                            td.said { (awaited.events) @if awaited.events == 1 { " event" } @else { " events" } }
                            td.said data-label="Waits for" { (duration(now_ms - awaited.received_ms)) }
                            td.when data-label="Since" { (time(awaited.received_ms)) }
                        }
                    }
                }
            }
            @if awaited.len() > AWAITED as usize { p.hint { "There are more: these wait longest." } }
        }
    };
    Ok(layout::page(
        "Waiting",
        CurrentPage::Waiting,
        Some(&OPERATOR),
        content,
    ))
}

pub async fn alarms(Given(state): Given<AppState>, _: Operator) -> Html<String> {
    let patient = DoctorInput {
        store: Ok(state.store.clone()),
        // Looking at a page costs no call to Stripe: what the last pass saw of it is told.
        api: None,
        reconciles: state.metrics.reconcile.enabled.get() == 1,
        secrets: Some(state.secrets.names()),
        clock: state.clock.clone(),
    };
    let mut checks = doctor::examine(&patient).await;
    let wrong = checks
        .iter()
        .filter(|check| check.state >= CheckStatus::Warning)
        .count();
    let unknown = checks
        .iter()
        .filter(|check| check.state == CheckStatus::Unknown)
        .count();
    checks.sort_by_key(|check| std::cmp::Reverse(check.state));
    let content = html! {
        h1 { "Alarms" }
        p.intro {
            @match wrong { 0 => "Nothing is wrong.", 1 => "One thing is wrong.", _ => { (wrong) " things are wrong." } }
            @match unknown { 0 => {}, 1 => " One thing cannot be told.", _ => { " " (unknown) " things cannot be told." } }
            " The same is said by " code { "stripe-reconciler doctor" } ". Looked at " (time(state.clock.now_ms())) "."
        }
        ul.checks { @for check in &checks { (check_up(check)) } }
    };
    layout::page("Alarms", CurrentPage::Alarms, Some(&OPERATOR), content)
}

fn check_up(check: &Check) -> Markup {
    use crate::domain::payment_state::PaymentState as Payment;
    // The signs of the states of a payment serve here, too: done, not known, wrong.
    let (tone, word, sign) = match check.state {
        CheckStatus::Ok => ("good", "Ok", Some(Payment::Paid)),
        CheckStatus::Unknown => ("unknown", "Unknown", None),
        CheckStatus::Warning => ("waiting", "Warning", Some(Payment::PaymentPending)),
        CheckStatus::Failing => ("bad", "Failing", Some(Payment::PaymentFailed)),
    };
    html! {
        li.(tone) {
            h2 { (check.name) span.badge.(tone) { (layout::sign(sign)) (word) } }
            p { (marked(&check.finding)) }
            @if let Some(remedy) = &check.remedy { p.remedy { strong { "What to do: " } (marked(remedy)) } }
        }
    }
}

pub async fn reconciliation(
    Given(state): Given<AppState>,
    _: Operator,
) -> Result<Html<String>, ApiError> {
    let runs = state.store.last_runs(PASSES, i64::MAX).await?;
    let content = html! {
        h1 { "Reconciliation" }
        p.intro { "The last passes against Stripe's API: what agrees, what was healed, what differs." }
        @if runs.is_empty() {
            p.empty { "No pass was made yet. Set STRIPE_API_KEY for " code { "serve" } ", or run " code { "stripe-reconciler reconcile" } "." }
        }
        @for run in &runs { (pass(run)) }
    };
    Ok(layout::page(
        "Reconciliation",
        CurrentPage::Reconciliation,
        Some(&OPERATOR),
        content,
    ))
}

/// The lists of a report, in the order of what matters.
const LISTS: [(&str, &str); 8] = [
    ("differing", "Differ"),
    ("unknownAtStripe", "Not at Stripe"),
    ("endpointRemarks", "About the endpoint"),
    ("healed", "Healed"),
    ("apiOnlyEvents", "Events no webhook brought"),
    ("unknownHere", "Not stored here"),
    ("stripeLags", "Stripe's API lags"),
    ("agreeing", "Agree"),
];

fn pass(run: &Run) -> Markup {
    let report: Value = serde_json::from_str(run.report.get()).unwrap_or_default();
    let count = |name: &str| report["counts"][name].as_i64().unwrap_or_default();
    let bad: i64 = ["differing", "unknownAtStripe", "endpointRemarks"]
        .map(count)
        .iter()
        .sum();
    let (tone, word) = match bad {
        0 if count("healed") > 0 => ("moving", "Healed"),
        0 => ("good", "Agrees"),
        _ => ("bad", "Differs"),
    };
    html! {
        section.pass {
            h2 { (time(run.started_ms)) span.badge.(tone) { (word) } }
            p.hint {
                "Took " (run.ended_ms.saturating_sub(run.started_ms)) " ms, " (count("calls")) " calls to Stripe."
                @if report["dryRun"] == true { " Dry run: nothing was changed." }
            }
            dl.counts { @for (name, title) in LISTS { div.none[count(name) == 0] { dt { (title) } dd { (count(name)) } } } }
            @for (name, title) in LISTS.iter().filter(|(name, _)| *name != "agreeing") {
                @let items = report[*name].as_array().map(Vec::as_slice).unwrap_or_default();
                @if !items.is_empty() {
                    details open[["differing", "endpointRemarks"].contains(name)] {
                        summary { (title) " (" (count(name)) ")" }
                        ul.items { @for item in items { li { (told(name, item)) } } }
                    }
                }
            }
        }
    }
}

/// An item of a list, in words.
fn told(list: &str, item: &Value) -> Markup {
    let text = |name: &str| item[name].as_str().unwrap_or_default();
    let invoice = || {
        html! {
            a href=(address("/ui/invoice", &[("tenant", text("tenantUid")), ("uid", text("invoiceUid"))])) { (quoted(text("invoiceUid"))) }
            " of " (quoted(text("tenantUid"))) " " (id(text("stripeInvoiceId")))
        }
    };
    let at = |name: &str| html! { @match parse_time(text(name)) { Ok(ms) => (time(ms)), Err(_) => (quoted(text(name))) } };
    html! {
        @match list {
            "differing" => {
                (invoice()) ": " (quoted(text("field"))) " is " strong { (quoted(text("ours"))) } " here and "
                strong { (quoted(text("stripes"))) } " at Stripe, seen since " (at("since"))
            }
            "healed" => {
                (invoice())
                ul { @for change in item["added"].as_array().into_iter().flatten() {
                    li { "added: " (quoted(change["paymentMsg"].as_str().unwrap_or_default())) }
                } }
            }
            "unknownHere" => {
                (id(text("stripeInvoiceId"))) " " (quoted(text("number"))) " " (quoted(text("status"))) " " (quoted(text("amount")))
                ", made " (at("created"))
            }
            "apiOnlyEvents" => {
                a href=(address("/ui/event", &[("id", text("eventId"))])) { (id(text("eventId"))) } " " (quoted(text("type"))) ", " (at("created"))
            }
            "endpointRemarks" => (quoted(item.as_str().unwrap_or_default())),
            _ => (invoice()),
        }
    }
}

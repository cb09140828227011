//! `/ui/waiting`, `/ui/reconciliation` and `/ui/alarms`: the state of the service, for operators.

use axum::extract::State as Given;
use axum::response::Html;
use maud::{Markup, html};
use serde_json::Value;

use super::layout::{self, CurrentPage};
use super::text::{address, duration, id, marked, quoted, time};
use super::visitor::{Operator, Visitor};
use crate::doctor::{self, Check, CheckStatus, DoctorInput};
use crate::domain::time::parse_time;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::store::{Run, Scope};

/// Largest number of unmatched invoices on the page.
const MAX_UNMATCHED: u32 = 200;
/// Largest number of reconcile runs on the page.
const MAX_RUNS: u32 = 12;
const OPERATOR: Visitor = Visitor(Scope::Operator);

/// Answers `GET /ui/waiting`: the Stripe invoices that have events but are not stored.
pub async fn unmatched(
    Given(state): Given<AppState>,
    _: Operator,
) -> Result<Html<String>, ApiError> {
    let unmatched = state.store.unmatched_invoices(MAX_UNMATCHED + 1).await?;
    let now_ms = state.clock.now_ms();

    let content = html! {
        h1 { "Unmatched events" }
        p.intro {
            "These Stripe invoices have events, but no stored invoice names them. Their history appears as soon as one does. "
            "Events that stay unmatched belong to an invoice that was never stored, or was stored without its " code { "stripeInvoiceId" } "."
        }
        @if unmatched.is_empty() { p.empty { "No unmatched events." } } @else {
            table.cards {
                thead {
                    tr {
                        th scope="col" { "Stripe invoice" }
                        th scope="col" { "Events" }
                        th scope="col" { "Waits for" }
                        th scope="col" { "Since" }
                    }
                }
                tbody {
                    @for invoice in unmatched.iter().take(MAX_UNMATCHED as usize) {
                        tr {
                            th scope="row" { a href=(address("/ui/events", &[("invoice", &invoice.stripe_invoice_id)])) { (id(&invoice.stripe_invoice_id)) } }
                            td.said { (invoice.events) @if invoice.events == 1 { " event" } @else { " events" } }
                            td.said data-label="Waits for" { (duration(now_ms - invoice.received_ms)) }
                            td.when data-label="Since" { (time(invoice.received_ms)) }
                        }
                    }
                }
            }
            @if unmatched.len() > MAX_UNMATCHED as usize { p.hint { "There are more. These are the oldest." } }
        }
    };

    Ok(layout::page(
        "Unmatched",
        CurrentPage::Unmatched,
        Some(&OPERATOR),
        content,
    ))
}

/// Answers `GET /ui/alarms`: the checks of `doctor`, worst first.
pub async fn alarms(Given(state): Given<AppState>, _: Operator) -> Html<String> {
    let input = DoctorInput {
        store: Ok(state.store.clone()),
        // A page view must not cost a call to Stripe, so the page shows the results of the last
        // run.
        api: None,
        reconciles: state.metrics.reconcile.enabled.get() == 1,
        secrets: Some(state.secrets.names()),
        clock: state.clock.clone(),
    };
    let mut checks = doctor::examine(&input).await;
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
            @match wrong { 0 => "No problems.", 1 => "One problem.", _ => { (wrong) " problems." } }
            @match unknown { 0 => {}, 1 => " One check could not be made.", _ => { " " (unknown) " checks could not be made." } }
            " " code { "stripe-reconciler doctor" } " reports the same. Checked " (time(state.clock.now_ms())) "."
        }
        ul.checks { @for check in &checks { (check_item(check)) } }
    };
    layout::page("Alarms", CurrentPage::Alarms, Some(&OPERATOR), content)
}

fn check_item(check: &Check) -> Markup {
    use crate::domain::payment_state::PaymentState as Payment;
    // The icons of payment states also fit the status of a check.
    let (tone, word, icon) = match check.state {
        CheckStatus::Ok => ("good", "Ok", Some(Payment::Paid)),
        CheckStatus::Unknown => ("unknown", "Unknown", None),
        CheckStatus::Warning => ("waiting", "Warning", Some(Payment::PaymentPending)),
        CheckStatus::Failing => ("bad", "Failing", Some(Payment::PaymentFailed)),
    };

    html! {
        li.(tone) {
            h2 { (check.id.as_str()) span.badge.(tone) { (layout::icon(icon)) (word) } }
            p { (marked(&check.finding)) }
            @if let Some(remedy) = &check.remedy { p.remedy { strong { "What to do: " } (marked(remedy)) } }
        }
    }
}

/// Answers `GET /ui/reconciliation`: the last reconcile runs.
pub async fn reconciliation(
    Given(state): Given<AppState>,
    _: Operator,
) -> Result<Html<String>, ApiError> {
    let runs = state.store.last_runs(MAX_RUNS, i64::MAX).await?;
    let content = html! {
        h1 { "Reconciliation" }
        p.intro { "The last reconcile runs against Stripe's API: which invoices agree, were healed, or differ." }
        @if runs.is_empty() {
            p.empty { "No run yet. Set STRIPE_API_KEY for " code { "serve" } ", or run " code { "stripe-reconciler reconcile" } "." }
        }
        @for run in &runs { (run_section(run)) }
    };

    Ok(layout::page(
        "Reconciliation",
        CurrentPage::Reconciliation,
        Some(&OPERATOR),
        content,
    ))
}

/// The lists of a run report with their titles, most important first.
const LISTS: [(&str, &str); 8] = [
    ("differing", "Differ"),
    ("unknownAtStripe", "Not at Stripe"),
    ("endpointRemarks", "About the endpoint"),
    ("healed", "Healed"),
    ("apiOnlyEvents", "Events without a webhook"),
    ("unknownHere", "Not stored here"),
    ("stripeLags", "Stripe's API lags"),
    ("agreeing", "Agree"),
];

fn run_section(run: &Run) -> Markup {
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
                        ul.items { @for item in items { li { (item_text(name, item)) } } }
                    }
                }
            }
        }
    }
}

/// Renders an item of a list of a run report.
fn item_text(list: &str, item: &Value) -> Markup {
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
                ", created " (at("created"))
            }
            "apiOnlyEvents" => {
                a href=(address("/ui/event", &[("id", text("eventId"))])) { (id(text("eventId"))) } " " (quoted(text("type"))) ", " (at("created"))
            }
            "endpointRemarks" => (quoted(item.as_str().unwrap_or_default())),
            _ => (invoice()),
        }
    }
}

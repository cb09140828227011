//! `/ui/events`, `/ui/unreadable` and `/ui/event?id=`: what was received, for the operator.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Html;
use maud::{Markup, html};
use serde::Deserialize;

use super::layout::{self, CurrentPage, came_by, event_address, pager};
use super::session::{Operator, Visitor};
use super::text::{address, id, marked, quoted, time, time_s, visible_lines};
use crate::domain::invoice::schema::validate_uid;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::pagination;
use crate::queries::events::{self, Cursor, OutcomeFilter, Page, PageRequest};
use crate::store::{LoggedEvent, Outcome, Scope, StoredBody};

const IN_A_PAGE: usize = 50;
/// Bytes of a body that are shown.
const SHOWN: usize = 64 * 1024;
/// Bytes in a row of those that are no text.
const IN_A_ROW: usize = 16;
const ROWS: usize = 256;
const OPERATOR: Visitor = Visitor(Scope::Operator);

#[derive(Deserialize)]
pub struct EventListParams {
    invoice: Option<String>,
    cursor: Option<String>,
}

pub async fn list(
    State(state): State<AppState>,
    _: Operator,
    asked: Result<Query<EventListParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Query(asked) = asked?;
    let invoice = asked.invoice.filter(|invoice| !invoice.trim().is_empty());
    let named = pagination::sought("invoice", invoice.map(|invoice| invoice.trim().to_owned()))?;
    let page = page(
        &state,
        named.clone(),
        OutcomeFilter::Any,
        asked.cursor.as_deref(),
    )
    .await?;
    let named = named.unwrap_or_default();
    let content = html! {
        h1 { "Events" }
        p.intro { "What was received, the latest first." }
        form.search role="search" method="get" action="/ui/events" {
            label for="invoice" { "Those that name a Stripe invoice" }
            div {
                input #invoice type="search" name="invoice" value=(named) placeholder="in_1Q…" autocomplete="off" spellcheck="false"
                    maxlength="255";
                button type="submit" { "Find" }
            }
        }
        (table(&page, "/ui/events", &named, asked.cursor.is_some()))
    };
    Ok(layout::page(
        "Events",
        CurrentPage::Events,
        Some(&OPERATOR),
        content,
    ))
}

pub async fn unreadable(
    State(state): State<AppState>,
    _: Operator,
    asked: Result<Query<EventListParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Query(asked) = asked?;
    let page = page(
        &state,
        None,
        OutcomeFilter::Is(Outcome::Unreadable),
        asked.cursor.as_deref(),
    )
    .await?;
    let content = html! {
        h1 { "Unreadable" }
        p.intro {
            "Deliveries that Stripe signed, and that are no event as this version of the program knows them. Their bytes are kept; "
            "after an upgrade, " code { "stripe-reconciler rebuild" } " reads them again."
        }
        (table(&page, "/ui/unreadable", "", asked.cursor.is_some()))
    };
    Ok(layout::page(
        "Unreadable",
        CurrentPage::Unreadable,
        Some(&OPERATOR),
        content,
    ))
}

async fn page(
    state: &AppState,
    stripe_invoice_id: Option<String>,
    outcome: OutcomeFilter,
    cursor: Option<&str>,
) -> Result<Page, ApiError> {
    let after = pagination::cursor(cursor, Cursor::parse)?;
    let request = PageRequest {
        event_type: None,
        stripe_invoice_id,
        outcome,
        limit: IN_A_PAGE,
        after,
    };
    Ok(events::page(&state.store, &request).await?)
}

fn table(page: &Page, path: &str, invoice: &str, goes_on: bool) -> Markup {
    let next = page
        .next
        .map(|cursor| address(path, &[("invoice", invoice), ("cursor", &cursor.to_text())]));
    html! {
        @if page.events.is_empty() { p.empty { "There are none." } } @else {
            table.cards {
                thead { tr { th scope="col" { "Event" } th scope="col" { "Says" } th scope="col" { "Happened" } th scope="col" { "Received" } } }
                tbody { @for event in &page.events { (row(event)) } }
            }
        }
        (pager(goes_on.then(|| address(path, &[("invoice", invoice)])), next))
    }
}

fn row(event: &LoggedEvent) -> Markup {
    html! {
        tr {
            th scope="row" {
                a href=(event_address(event)) {
                    @match &event.event_type { Some(kind) => (quoted(kind)), None => "Unreadable" }
                }
                @if let Some(event_id) = &event.id { span.sub { (id(event_id)) } }
                @if let Some(object_id) = &event.object_id { span.sub { "about " (id(object_id)) } }
            }
            td.said { (outcome(event)) }
            td.when data-label="Happened" { @if let Some(created_s) = event.created_s { (time_s(created_s)) } @else { "unknown" } }
            td.when data-label="Received" { (time(event.received_ms)) span.sub { "by " (came_by(event)) } }
        }
    }
}

fn outcome(event: &LoggedEvent) -> Markup {
    html! {
        @match event.outcome {
            Outcome::Recorded => "Something about a payment",
            Outcome::NoPaymentFact => "Nothing about a payment",
            Outcome::Unreadable => { @match &event.unreadable_reason { Some(reason) => (marked(reason)), None => "Unreadable" } }
        }
    }
}

#[derive(Deserialize)]
pub struct EventPageParams {
    id: String,
    cursor: Option<String>,
}

pub async fn show(
    State(state): State<AppState>,
    _: Operator,
    asked: Result<Query<EventPageParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Ok(Query(EventPageParams {
        id: event_id,
        cursor,
    })) = asked
    else {
        return Err(ApiError::NotFound);
    };
    validate_uid(&event_id).map_err(|_| ApiError::NotFound)?;
    let after = pagination::cursor(cursor.as_deref(), Cursor::parse)?;
    let found = events::renderings(&state.store, &event_id, after).await?;
    if found.renderings.is_empty() && after.is_none() {
        return Err(ApiError::NotFound);
    }
    let next = found.next.map(|cursor| {
        address(
            "/ui/event",
            &[("id", &event_id), ("cursor", &cursor.to_text())],
        )
    });
    let content = html! {
        nav.back aria-label="Back" { a href="/ui/events" { "Events" } }
        h1 { "Event " (id(&event_id)) }
        @if found.renderings.len() > 1 {
            p.intro { "It was received in " (found.renderings.len()) " renderings; all are kept, the oldest receipt first." }
        }
        @for stored in &found.renderings { (rendering(stored)) }
        (pager(after.map(|_| address("/ui/event", &[("id", &event_id)])), next))
    };
    Ok(layout::page(
        "Event",
        CurrentPage::Events,
        Some(&OPERATOR),
        content,
    ))
}

fn rendering(stored: &StoredBody) -> Markup {
    let event = &stored.logged;
    html! {
        section.rendering {
            h2 { @match &event.event_type { Some(kind) => (quoted(kind)), None => "Unreadable" } }
            dl.facts.tall {
                div { dt { "Says" } dd { (outcome(event)) } }
                @if let Some(object_id) = &event.object_id { div { dt { "About" } dd { (id(object_id)) } } }
                @if let Some(version) = &event.api_version { div { dt { "API version" } dd { (quoted(version)) } } }
                @if let Some(created_s) = event.created_s { div { dt { "Happened" } dd { (time_s(created_s)) } } }
                div { dt { "Received" } dd { (time(event.received_ms)) } }
                div { dt { "By" } dd { (came_by(event)) } }
                div { dt { "Key" } dd { (id(&hex::encode(event.key.0))) } }
            }
            @match &stored.body {
                None => p.hint { "Its bytes were pruned; what they told is kept." },
                Some(body) => (bytes(body)),
            }
        }
    }
}

/// As text where it is text, else as bytes.
fn bytes(body: &[u8]) -> Markup {
    let text = std::str::from_utf8(body)
        .ok()
        .filter(|text| !text.contains('\0'));
    let (form, shown) = match text {
        Some(text) => (
            "as received",
            visible_lines(&text[..text.floor_char_boundary(SHOWN)]),
        ),
        None => ("no text", dump(body)),
    };
    let limit = if text.is_some() {
        SHOWN
    } else {
        IN_A_ROW * ROWS
    };
    html! {
        details open[text.is_none() || body.len() < 16 * 1024] {
            summary { (body.len()) " bytes, " (form) }
            @if body.len() > limit {
                p.hint { "The first " (limit) " bytes. " code { "stripe-reconciler events show" } " prints all." }
            }
            pre tabindex="0" role="region" aria-label="The bytes of the delivery" { bdi { (shown) } }
        }
    }
}

/// Rows of hexadecimal digits, and beside them what is ASCII.
fn dump(body: &[u8]) -> String {
    let ascii = |byte: &u8| {
        if byte.is_ascii_graphic() || *byte == b' ' {
            char::from(*byte)
        } else {
            '.'
        }
    };
    let row = |(at, row): (usize, &[u8])| {
        let digits: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = row.iter().map(ascii).collect();
        format!("{:06x}  {:<47}  {text}", at * IN_A_ROW, digits.join(" "))
    };
    body.chunks(IN_A_ROW)
        .take(ROWS)
        .enumerate()
        .map(row)
        .collect::<Vec<_>>()
        .join("\n")
}

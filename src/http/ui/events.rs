//! `/ui/events`, `/ui/unreadable` and `/ui/event?id=`: received events, for the operator.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Html;
use maud::{Markup, html};
use serde::Deserialize;

use super::layout::{self, CurrentPage, came_by, event_address, pager};
use super::text::{address, id, marked, quoted, time, time_s, visible_lines};
use super::visitor::{Operator, Visitor};
use crate::domain::invoice::schema::validate_uid;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::pagination;
use crate::queries::events::{self, Cursor, OutcomeFilter, Page, PageRequest};
use crate::store::{LoggedEvent, Outcome, Scope, StoredBody};

/// Number of events on one page.
const PAGE_SIZE: usize = 50;
/// Largest number of bytes of a text that the page shows.
const MAX_SHOWN: usize = 64 * 1024;
/// Number of bytes in a row of a hexadecimal dump.
const DUMP_ROW_BYTES: usize = 16;
/// Largest number of rows of a hexadecimal dump.
const DUMP_ROWS: usize = 256;
const OPERATOR: Visitor = Visitor(Scope::Operator);

#[derive(Deserialize)]
pub struct EventListParams {
    invoice: Option<String>,
    cursor: Option<String>,
}

/// Answers `GET /ui/events`: a page of events, latest received first.
pub async fn list(
    State(state): State<AppState>,
    _: Operator,
    params: Result<Query<EventListParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Query(params) = params?;
    let invoice = params.invoice.filter(|invoice| !invoice.trim().is_empty());
    let named = pagination::sought("invoice", invoice.map(|invoice| invoice.trim().to_owned()))?;
    let page = page(
        &state,
        named.clone(),
        OutcomeFilter::Any,
        params.cursor.as_deref(),
    )
    .await?;

    let named = named.unwrap_or_default();
    let content = html! {
        h1 { "Events" }
        p.intro { "Received events, latest first." }
        form.search role="search" method="get" action="/ui/events" {
            label for="invoice" { "Events that name a Stripe invoice" }
            div {
                input #invoice type="search" name="invoice" value=(named) placeholder="in_1Q…" autocomplete="off" spellcheck="false"
                    maxlength="255";
                button type="submit" { "Find" }
            }
        }
        (table(&page, "/ui/events", &named, params.cursor.is_some()))
    };

    Ok(layout::page(
        "Events",
        CurrentPage::Events,
        Some(&OPERATOR),
        content,
    ))
}

/// Answers `GET /ui/unreadable`: the deliveries that this version cannot read.
pub async fn unreadable(
    State(state): State<AppState>,
    _: Operator,
    params: Result<Query<EventListParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Query(params) = params?;
    let page = page(
        &state,
        None,
        OutcomeFilter::Is(Outcome::Unreadable),
        params.cursor.as_deref(),
    )
    .await?;

    let content = html! {
        h1 { "Unreadable" }
        p.intro {
            "Deliveries that Stripe signed, but that this version cannot read as an event. Their bytes are stored. "
            "After an upgrade, " code { "stripe-reconciler rebuild" } " reads them again."
        }
        (table(&page, "/ui/unreadable", "", params.cursor.is_some()))
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
        limit: PAGE_SIZE,
        after,
    };

    Ok(events::page(&state.store, &request).await?)
}

fn table(page: &Page, path: &str, invoice: &str, goes_on: bool) -> Markup {
    let next = page
        .next
        .map(|cursor| address(path, &[("invoice", invoice), ("cursor", &cursor.to_text())]));

    html! {
        @if page.events.is_empty() { p.empty { "No events." } } @else {
            table.cards {
                thead {
                    tr {
                        th scope="col" { "Event" }
                        th scope="col" { "Content" }
                        th scope="col" { "Happened" }
                        th scope="col" { "Received" }
                    }
                }
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
            Outcome::Recorded => "Payment fact",
            Outcome::NoPaymentFact => "No payment fact",
            Outcome::Unreadable => { @match &event.unreadable_reason { Some(reason) => (marked(reason)), None => "Unreadable" } }
        }
    }
}

#[derive(Deserialize)]
pub struct EventPageParams {
    id: String,
    cursor: Option<String>,
}

/// Answers `GET /ui/event`: the renderings of an event.
pub async fn show(
    State(state): State<AppState>,
    _: Operator,
    params: Result<Query<EventPageParams>, QueryRejection>,
) -> Result<Html<String>, ApiError> {
    let Ok(Query(EventPageParams {
        id: event_id,
        cursor,
    })) = params
    else {
        return Err(ApiError::NotFound);
    };

    validate_uid(&event_id).map_err(|_| ApiError::NotFound)?;
    let after = pagination::cursor(cursor.as_deref(), Cursor::parse)?;
    let found =
        events::renderings(&state.store, &event_id, after, |stored| rendering(&stored)).await?;
    if found.items.is_empty() && after.is_none() {
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
        @if found.items.len() > 1 {
            p.intro { "Received in " (found.items.len()) " renderings, oldest receipt first." }
        }
        @for rendering in &found.items { (rendering) }
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
                div { dt { "Content" } dd { (outcome(event)) } }
                @if let Some(object_id) = &event.object_id { div { dt { "About" } dd { (id(object_id)) } } }
                @if let Some(version) = &event.api_version { div { dt { "API version" } dd { (quoted(version)) } } }
                @if let Some(created_s) = event.created_s { div { dt { "Happened" } dd { (time_s(created_s)) } } }
                div { dt { "Received" } dd { (time(event.received_ms)) } }
                div { dt { "By" } dd { (came_by(event)) } }
                div { dt { "Key" } dd { (id(&hex::encode(event.key.0))) } }
            }
            @match &stored.body {
                None => p.hint { "Its bytes were pruned; its facts remain stored." },
                Some(body) => (bytes(body)),
            }
        }
    }
}

/// Renders a body as text if it is UTF-8 without NUL, otherwise as a hexadecimal dump.
fn bytes(body: &[u8]) -> Markup {
    let text = std::str::from_utf8(body)
        .ok()
        .filter(|text| !text.contains('\0'));
    let (form, shown) = match text {
        Some(text) => (
            "as received",
            visible_lines(&text[..text.floor_char_boundary(MAX_SHOWN)]),
        ),
        None => ("not text", dump(body)),
    };
    let limit = if text.is_some() {
        MAX_SHOWN
    } else {
        DUMP_ROW_BYTES * DUMP_ROWS
    };

    html! {
        details open[text.is_none() || body.len() < 16 * 1024] {
            summary { (body.len()) " bytes, " (form) }
            @if body.len() > limit {
                p.hint { "The first " (limit) " bytes. " code { "stripe-reconciler events show" } " prints the rest." }
            }
            pre tabindex="0" role="region" aria-label="The bytes of the delivery" { bdi { (shown) } }
        }
    }
}

/// Formats the first [`DUMP_ROWS`] rows as hexadecimal digits with their ASCII characters.
fn dump(body: &[u8]) -> String {
    body.chunks(DUMP_ROW_BYTES)
        .take(DUMP_ROWS)
        .enumerate()
        .map(|(index, row)| {
            let digits: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
            let text: String = row.iter().map(|byte| ascii(*byte)).collect();
            format!(
                "{:06x}  {:<47}  {text}",
                index * DUMP_ROW_BYTES,
                digits.join(" ")
            )
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// Returns the ASCII character of a byte, or `.` if it is not printable.
fn ascii(byte: u8) -> char {
    if byte.is_ascii_graphic() || byte == b' ' {
        char::from(byte)
    } else {
        '.'
    }
}

//! `/ui`: the list of invoices with their states, newest first, and the search.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Given};
use axum::response::{IntoResponse, Redirect, Response};
use maud::{Markup, html};
use serde::Deserialize;

use super::layout::{self, CurrentPage, badge, pager};
use super::text::{address, id, quoted, time};
use super::visitor::Visitor;
use crate::domain::history::Entry;
use crate::domain::payment_state::PaymentState;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::pagination;
use crate::queries::invoices::{self as queries, Cursor, Page, PageRequest, StateFilter};
use crate::store::{StoreError, StoredInvoice};

/// Number of invoices on one page.
const PAGE_SIZE: usize = 50;

#[derive(Deserialize)]
pub struct InvoiceListParams {
    q: Option<String>,
    state: Option<String>,
    cursor: Option<String>,
}

/// Answers `GET /ui`: a page of invoices, or the results of a search.
pub async fn list(
    Given(state): Given<AppState>,
    visitor: Visitor,
    params: Result<Query<InvoiceListParams>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let sought = params.q.as_deref().unwrap_or_default().trim();
    let filter = params.state.as_deref().unwrap_or_default();
    if !sought.is_empty() {
        return find(&state, &visitor, sought).await;
    }

    let request = PageRequest {
        tenant_uid: visitor.tenant().map(str::to_owned),
        stripe_invoice_id: None,
        state: if filter.is_empty() {
            StateFilter::Any
        } else {
            StateFilter::parse(filter).map_err(ApiError::InvalidQuery)?
        },
        limit: PAGE_SIZE,
        after: pagination::cursor(params.cursor.as_deref(), Cursor::parse)?,
    };

    let is_first = request.after.is_none();
    let Page { items: rows, next } = queries::page(&state.store, &request, row).await?;

    // A full page needs no hint: its link to the next page is enough.
    let looked_back_to_ms = next
        .as_ref()
        .filter(|_| rows.len() < PAGE_SIZE && request.state != StateFilter::Any)
        .map(Cursor::stored_ms);
    let next =
        next.map(|cursor| address("/ui", &[("state", filter), ("cursor", &cursor.to_text())]));
    let first = (!is_first).then(|| address("/ui", &[("state", filter)]));

    let content = html! {
        h1 { "Invoices" }
        (search(""))
        (filters(filter))
        @if rows.is_empty() {
            p.empty { @if next.is_some() { "None found so far." } @else { "No invoices." } }
        } @else { (table(&rows, &visitor)) }
        @if let Some(ms) = looked_back_to_ms {
            p.hint.looked { "Searched the invoices stored since " (time(ms)) ". Older invoices may also be in this state." }
        }
        (pager(first, next))
    };

    Ok(layout::page("Invoices", CurrentPage::Invoices, Some(&visitor), content).into_response())
}

/// Renders the results of a search, or redirects to the only invoice whose uid or Stripe id matches
/// exactly.
async fn find(state: &AppState, visitor: &Visitor, sought: &str) -> Result<Response, ApiError> {
    let found = queries::find(&state.store, visitor.tenant(), sought, PAGE_SIZE, row).await?;
    if let [only] = &found.items[..]
        && (only.invoice_uid == sought || only.stripe_invoice_id.as_deref() == Some(sought))
    {
        return Ok(Redirect::to(&invoice_address(only)).into_response());
    }

    let rows = found.items;
    let content = html! {
        h1 { "Invoices" }
        (search(sought))
        p.filters { a href="/ui" { "All invoices" } }
        @if rows.is_empty() {
            div.empty {
                p { "No invoice has the Stripe id " strong { (quoted(sought)) } ", and no uid starts with it." }
                p.hint { "Search for a uid or its beginning, or for a Stripe id, which starts with " code { "in_" } "." }
            }
        } @else {
            (table(&rows, visitor))
            @if found.has_more { p.hint { "More invoices match: enter more of the uid." } }
        }
    };

    Ok(layout::page("Search", CurrentPage::Invoices, Some(visitor), content).into_response())
}

/// A row of the table: the fields of an invoice that the page shows, without its document.
struct Row {
    tenant_uid: String,
    invoice_uid: String,
    stripe_invoice_id: Option<String>,
    /// The last entry of its history.
    last: Option<Entry>,
}

fn row(invoice: &StoredInvoice, mut history: Vec<Entry>) -> Result<Row, StoreError> {
    Ok(Row {
        tenant_uid: invoice.tenant_uid.clone(),
        invoice_uid: invoice.invoice_uid.clone(),
        stripe_invoice_id: invoice.stripe_invoice_id.clone(),
        last: history.pop(),
    })
}

fn invoice_address(row: &Row) -> String {
    address(
        "/ui/invoice",
        &[("tenant", &row.tenant_uid), ("uid", &row.invoice_uid)],
    )
}

/// Renders the search form.
pub fn search(sought: &str) -> Markup {
    html! {
        form.search role="search" method="get" action="/ui" {
            label for="q" { "Find an invoice by its uid or Stripe id" }
            div {
                input #q type="search" name="q" value=(sought) placeholder="inv-2026-01-001 or in_1Q…" autocomplete="off"
                    autocapitalize="none" spellcheck="false" maxlength="255";
                button type="submit" { "Find" }
            }
        }
    }
}

fn filters(chosen: &str) -> Markup {
    let names = PaymentState::ALL.map(|state| (state.as_str(), layout::name(Some(state))));
    let all = [("", "All")]
        .into_iter()
        .chain(names)
        .chain([("none", layout::name(None))]);

    html! {
        nav.filters aria-label="By state" {
            ul {
                @for (value, name) in all {
                    li { a href=(address("/ui", &[("state", value)])) aria-current=[(value == chosen).then_some("true")] { (name) } }
                }
            }
        }
    }
}

fn table(rows: &[Row], visitor: &Visitor) -> Markup {
    html! {
        table.cards {
            thead {
                tr {
                    th scope="col" { "Invoice" }
                    th scope="col" { "State" }
                    th scope="col" { "Last entry" }
                    th scope="col" { "When" }
                }
            }
            tbody {
                @for row in rows {
                    tr {
                        th scope="row" {
                            a href=(invoice_address(row)) { (quoted(&row.invoice_uid)) }
                            @if visitor.is_operator() { span.sub { "Tenant " (quoted(&row.tenant_uid)) } }
                            @if let Some(stripe_id) = &row.stripe_invoice_id { span.sub { (id(stripe_id)) } }
                        }
                        td { (badge(row.last.as_ref().map(|entry| entry.state))) }
                        td.said {
                            @match row.last.as_ref().map(|entry| entry.message.as_deref().unwrap_or_default()) {
                                Some(message) => (quoted(message)),
                                None => span.hint { "Nothing received from Stripe yet." },
                            }
                        }
                        td.when { @if let Some(entry) = &row.last { (time(entry.timestamp_ms)) } }
                    }
                }
            }
        }
    }
}

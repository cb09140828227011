//! The frame around every page, and the parts that several pages share.

use axum::response::Html;
use maud::{DOCTYPE, Markup, html};

use super::text::{address, id, quoted, time, time_s};
use super::visitor::Visitor;
use crate::domain::invoice::schema::validate_uid;
use crate::domain::payment_state::PaymentState;
use crate::store::{LoggedEvent, Source};

/// The entry of the navigation that a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurrentPage {
    Outside,
    Invoices,
    Unmatched,
    Unreadable,
    Reconciliation,
    Alarms,
    Events,
}

/// Pages that only operators may open: the entry, its path and its name.
const FOR_OPERATORS: [(CurrentPage, &str, &str); 5] = [
    (CurrentPage::Unmatched, "/ui/waiting", "Unmatched"),
    (CurrentPage::Unreadable, "/ui/unreadable", "Unreadable"),
    (CurrentPage::Events, "/ui/events", "Events"),
    (
        CurrentPage::Reconciliation,
        "/ui/reconciliation",
        "Reconciliation",
    ),
    (CurrentPage::Alarms, "/ui/alarms", "Alarms"),
];

/// Renders a page with its frame. `visitor` is `None` if nobody is signed in.
pub fn page(
    title: &str,
    here: CurrentPage,
    visitor: Option<&Visitor>,
    content: Markup,
) -> Html<String> {
    let link = |part: CurrentPage, to: &str, name: &str| {
        html! { li { a href=(to) aria-current=[(part == here).then_some("page")] { (name) } } }
    };

    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="robots" content="noindex";
                title { (title) " · stripe-reconciler" }
                link rel="icon" href="data:,";
                link rel="stylesheet" href=(super::STYLE.path);
            }
            body {
                a.skip href="#content" { "Skip to the content" }
                header.top {
                    a.brand href="/ui" { (mark()) "stripe-reconciler" }
                    @if let Some(visitor) = visitor {
                        nav aria-label="Pages" {
                            ul {
                                (link(CurrentPage::Invoices, "/ui", "Invoices"))
                                @if visitor.is_operator() {
                                    @for (part, to, name) in FOR_OPERATORS { (link(part, to, name)) }
                                }
                            }
                        }
                        form.who method="post" action="/ui/sign-out" {
                            span { @match visitor.tenant() { Some(tenant) => { "Tenant " (quoted(tenant)) }, None => "Operator" } }
                            button type="submit" { "Sign out" }
                        }
                    }
                }
                main #content tabindex="-1" { (content) }
            }
        }
    };

    Html(markup.into_string())
}

/// Renders a page with one message.
pub fn notice(title: &str, text: &str) -> Html<String> {
    page(
        title,
        CurrentPage::Outside,
        None,
        html! {
            section.notice {
                h1 { (title) }
                p { (text) }
                p { a href="/ui" { "Invoices" } }
            }
        },
    )
}

/// Renders a state as text with an icon, so that no reader depends on colour.
pub fn badge(state: Option<PaymentState>) -> Markup {
    html! { span.badge.(tone(state)) { (icon(state)) (name(state)) } }
}

/// Returns the short name of a state.
pub fn name(state: Option<PaymentState>) -> &'static str {
    match state {
        Some(PaymentState::Paid) => "Paid",
        Some(PaymentState::PaymentPending) => "Pending",
        Some(PaymentState::PaymentInProgress) => "In progress",
        Some(PaymentState::PaymentFailed) => "Failed",
        None => "Nothing known",
    }
}

/// Returns the CSS class that colours a state.
pub fn tone(state: Option<PaymentState>) -> &'static str {
    match state {
        Some(PaymentState::Paid) => "good",
        Some(PaymentState::PaymentPending) => "waiting",
        Some(PaymentState::PaymentInProgress) => "moving",
        Some(PaymentState::PaymentFailed) => "bad",
        None => "unknown",
    }
}

/// Renders the icon of a state, in the colour of the text around it.
pub fn icon(state: Option<PaymentState>) -> Markup {
    let path = match state {
        Some(PaymentState::Paid) => "M3.5 8.5l3 3 6-7",
        Some(PaymentState::PaymentPending) => {
            "M8 2.5a5.5 5.5 0 1 1 0 11a5.5 5.5 0 1 1 0-11M8 5.2v3l1.9 1.2"
        }
        Some(PaymentState::PaymentInProgress) => "M3 8h9M8.5 4.5L12 8l-3.5 3.5",
        Some(PaymentState::PaymentFailed) => "M4.5 4.5l7 7M11.5 4.5l-7 7",
        None => "M4 8h8",
    };

    html! {
        svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true" focusable="false" {
            path d=(path) fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" stroke-linejoin="round" {}
        }
    }
}

/// Renders the logo.
fn mark() -> Markup {
    html! {
        svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true" focusable="false" {
            path d="M6 3v18M6 6h.01M6 18h.01" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" {}
            circle cx="6" cy="7" r="3" fill="currentColor" {}
            circle cx="6" cy="17" r="3" fill="currentColor" {}
            path d="M13 7h8M13 12h5M13 17h8" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" {}
        }
    }
}

/// Renders the id of an event, or its key if it has no id. `links` adds a link to its page, which
/// only operators may open.
pub fn event_id(event: &LoggedEvent, links: bool) -> Markup {
    let shown = event.id.clone().unwrap_or_else(|| hex::encode(event.key.0));
    html! { @if links { a href=(event_address(event)) { (id(&shown)) } } @else { (id(&shown)) } }
}

/// Returns the address of an event's page. It contains the id, which all renderings share, or the
/// key if there is no valid id.
pub fn event_address(event: &LoggedEvent) -> String {
    let by_id = event.id.clone().filter(|id| validate_uid(id).is_ok());
    address(
        "/ui/event",
        &[("id", &by_id.unwrap_or_else(|| hex::encode(event.key.0)))],
    )
}

/// Renders an event: its type, when it happened, and when and how it was received. `links` adds a
/// link to its page, which only operators may open.
pub fn event(event: &LoggedEvent, links: bool) -> Markup {
    let kind = event.event_type.as_deref().unwrap_or("unreadable");

    html! {
        div.event {
            p.event-name {
                strong { (quoted(kind)) } " "
                (event_id(event, links))
            }
            dl.facts {
                @if let Some(created_s) = event.created_s { div { dt { "Happened" } dd { (time_s(created_s)) } } }
                div { dt { "Received" } dd { (time(event.received_ms)) } }
                div { dt { "By" } dd { (came_by(event)) } }
            }
        }
    }
}

/// Renders the source of an event, and the label of the secret that signed it.
pub fn came_by(event: &LoggedEvent) -> Markup {
    let source = match event.source {
        Source::Webhook => "webhook",
        Source::Replay => "replay",
        Source::Api => "Stripe's API",
    };
    html! {
        (source)
        @if let Some(label) = &event.secret_label { ", signed with secret " (id(label)) }
    }
}

/// Renders links to the first and the next page.
pub fn pager(first: Option<String>, next: Option<String>) -> Markup {
    html! {
        @if first.is_some() || next.is_some() {
            nav.pager aria-label="More" {
                @if let Some(first) = first { a href=(first) { "First page" } }
                @if let Some(next) = next { a.next href=(next) rel="next" { "Older" } }
            }
        }
    }
}

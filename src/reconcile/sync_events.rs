//! Stripe's list of events, from where the last pass ended, with an overlap: what was made in the same second, or came into the
//! list late, is not lost, and what is known costs nothing.
//!
//! The list comes newest first, so it is read in windows of time, the oldest window first. When a window is durable, so is
//! everything older, and the next pass begins there. All types are asked for in one list: two lists of twenty types each would
//! cost more calls wherever at least half of the events are about payments.
//!
//! A pass on request looks further back than its overlap, as far as some calls reach: for what came into the list very late.

use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{EVENTS_KEPT_S, Extent, ReconcileError, RunContext, believed};
use crate::stripe_api::Scope;

/// How much of what is known is read again.
const OVERLAP_S: i64 = 3600;
const FIRST_WINDOW_S: i64 = 24 * 3600;
/// Pages that a window should have: as many are read again at most, when a pass is killed.
const PAGES: i64 = 20;
/// Pages that a pass on request reads of what was read before.
const PAGES_BACK: usize = 500;
/// Pages that a window may have: more than Stripe can make events in a second.
const MAX_PAGES: usize = 10_000;

pub async fn run(pass: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    for scope in pass.scopes() {
        of_account(pass, &scope).await?;
    }
    Ok(())
}

async fn of_account(pass: &mut RunContext<'_>, scope: &Scope) -> Result<(), ReconcileError> {
    let name = match scope {
        Scope::Account(account) => format!("events of {account}"),
        _ => "events".to_owned(),
    };
    let until = pass.tools.clock.now_s() + 1;
    let known = believed(pass.progress(&name).await?, until, OVERLAP_S);
    let wanted = match (pass.plan.since_s, known) {
        (Some(since_s), _) => until - since_s,
        (None, Some(known)) => known - OVERLAP_S,
        (None, None) => until - EVENTS_KEPT_S,
    };
    let mut from = wanted.max(until - EVENTS_KEPT_S);
    let start = from;
    let mut span = FIRST_WINDOW_S;
    while from < until {
        let to = until.min(from.saturating_add(span));
        match window(pass, scope, from, to).await? {
            Window::Read { pages } => {
                let done = to.min(pass.safe_upper_bound_s());
                if known.is_none_or(|known| known < done) {
                    pass.set_progress(&name, done).await?;
                }
                from = to;
                span = if pages <= PAGES / 4 {
                    span.saturating_mul(2)
                } else {
                    span
                };
            }
            Window::TooLarge { better_span } => span = better_span,
        }
    }
    if pass.plan.extent == Extent::All && pass.plan.since_s.is_none() {
        pages(pass, scope, until - EVENTS_KEPT_S, start, PAGES_BACK).await?;
    }
    Ok(())
}

enum Window {
    Read {
        pages: i64,
    },
    /// It holds many more pages than it should.
    TooLarge {
        better_span: i64,
    },
}

/// Reads the events from `from` until before `to`, in seconds; or only the newest of them, when they are many more than a
/// window should have.
async fn window(
    pass: &mut RunContext<'_>,
    scope: &Scope,
    from: i64,
    to: i64,
) -> Result<Window, ReconcileError> {
    let read = pages(pass, scope, from, to, 1).await?;
    let Some(oldest) = read.goes_on_after else {
        return Ok(Window::Read { pages: 1 });
    };
    let (covered, span) = ((to - oldest.created).max(1), to - from);
    if span / covered > 2 * PAGES && span > 60 {
        return Ok(Window::TooLarge {
            better_span: (covered * PAGES).clamp(1, span / 2),
        });
    }
    let rest = pages_after(pass, scope, from, to, Some(oldest.id), MAX_PAGES).await?;
    Ok(Window::Read {
        pages: 1 + rest.pages,
    })
}

struct Pages {
    pages: i64,
    /// The last event that was read, when more follow.
    goes_on_after: Option<About>,
}

async fn pages(
    pass: &mut RunContext<'_>,
    scope: &Scope,
    from: i64,
    to: i64,
    most: usize,
) -> Result<Pages, ReconcileError> {
    pages_after(pass, scope, from, to, None, most).await
}

async fn pages_after(
    pass: &mut RunContext<'_>,
    scope: &Scope,
    from: i64,
    to: i64,
    mut after: Option<String>,
    most: usize,
) -> Result<Pages, ReconcileError> {
    let (gte, lt) = (from.to_string(), to.to_string());
    let mut oldest = None;
    let mut pages = 0;
    while from < to && (pages as usize) < most {
        let mut query = vec![("created[gte]", &*gte), ("created[lt]", &*lt)];
        if let Some(id) = &after {
            query.push(("starting_after", id));
        }
        let page = pass.tools.api.list("/v1/events", &query, scope).await?;
        pages += 1;
        keep(pass, &page.data, scope).await?;
        oldest = page
            .data
            .last()
            .filter(|_| page.has_more)
            .map(|event| about(event));
        let Some(oldest) = &oldest else { break };
        after = Some(oldest.id.clone());
    }
    Ok(Pages {
        pages,
        goes_on_after: oldest,
    })
}

struct About {
    id: String,
    created: i64,
}

fn about(event: &RawValue) -> About {
    let event: Value = serde_json::from_str(event.get()).unwrap_or_default();
    About {
        id: event["id"].as_str().unwrap_or_default().to_owned(),
        created: event["created"].as_i64().unwrap_or_default(),
    }
}

/// Keeps the events whose object is of a kind that says anything about a payment.
async fn keep(
    pass: &mut RunContext<'_>,
    page: &[Box<RawValue>],
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let mut events = Vec::with_capacity(page.len());
    for event in page {
        let event = pass.keeper.read(with_account(event, scope));
        if event.telling.is_some() {
            events.push(event);
        }
    }
    pass.keeper.keep(events).await
}

/// Asked for on behalf of a connected account, an event does not say whose it is; the webhook's does.
fn with_account(event: &RawValue, scope: &Scope) -> Bytes {
    let unchanged = || Bytes::copy_from_slice(event.get().as_bytes());
    let Scope::Account(account) = scope else {
        return unchanged();
    };
    match serde_json::from_str::<Value>(event.get()) {
        Ok(Value::Object(mut fields)) if !fields.contains_key("account") => {
            fields.insert("account".to_owned(), account.as_str().into());
            Value::Object(fields).to_string().into()
        }
        _ => unchanged(),
    }
}

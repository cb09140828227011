//! Reads Stripe's list of events from where the last run ended, with an overlap.
//!
//! The overlap finds events of the same second and events that Stripe listed late. Known events
//! cost nothing. Stripe's list is newest first, so a run reads it in windows of time, the oldest
//! window first. When a window is durable, everything older is durable too, and the next run begins
//! there. One list has all types: two lists of twenty types each would cost more calls if at least
//! half of the events are about payments.
//!
//! A run on request looks further back than the overlap, up to 500 pages, for events that Stripe
//! listed very late.

use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{EVENT_RETENTION_S, Extent, ReconcileError, RunContext, saved_unless_future};
use crate::store::ProgressKey;
use crate::stripe_api::{ListCursor, Scope};

/// Overlap in which known events are read again.
const OVERLAP_S: i64 = 3600;
/// Length of the first window. Later windows adapt to [`WINDOW_PAGES`].
const FIRST_WINDOW_S: i64 = 24 * 3600;
/// Number of pages that a window should have. After a kill, at most as many are read again.
const WINDOW_PAGES: i64 = 20;
/// Limit on the pages of known events that a run on request reads again.
const MAX_PAGES_BACK: usize = 500;
/// Limit on the pages of a window: more than the events that Stripe can create in a second. A
/// longer list is an error, because the run would otherwise skip the rest of the window.
const MAX_WINDOW_PAGES: usize = 10_000;

/// Reads the events of all accounts.
pub async fn sync_events(run: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    for scope in run.scopes() {
        sync_account(run, &scope).await?;
    }
    Ok(())
}

async fn sync_account(run: &mut RunContext<'_>, scope: &Scope) -> Result<(), ReconcileError> {
    let key = match scope {
        Scope::Account(account) => ProgressKey::AccountEvents(account.clone()),
        Scope::Own | Scope::Context(_) => ProgressKey::Events,
    };
    let until_s = run.context.clock.now_s() + 1;
    let known_s = saved_unless_future(run.progress(&key).await?, until_s, OVERLAP_S);
    let wanted_s = match (run.plan.since_s, known_s) {
        (Some(since_s), _) => until_s - since_s,
        (None, Some(known_s)) => known_s - OVERLAP_S,
        (None, None) => until_s - EVENT_RETENTION_S,
    };
    let start_s = wanted_s.max(until_s - EVENT_RETENTION_S);

    let mut from_s = start_s;
    let mut span_s = FIRST_WINDOW_S;
    while from_s < until_s {
        let to_s = until_s.min(from_s.saturating_add(span_s));
        match read_window(run, scope, from_s, to_s).await? {
            Window::Read { pages } => {
                let done_s = to_s.min(run.safe_upper_bound_s());
                if known_s.is_none_or(|known_s| known_s < done_s) {
                    run.set_progress(&key, done_s).await?;
                }
                from_s = to_s;
                if pages <= WINDOW_PAGES / 4 {
                    span_s = span_s.saturating_mul(2);
                }
            }
            Window::TooLarge { better_span_s } => span_s = better_span_s,
        }
    }

    if run.plan.extent == Extent::All && run.plan.since_s.is_none() {
        let range = (until_s - EVENT_RETENTION_S, start_s);
        read_pages(run, scope, range, None, MAX_PAGES_BACK).await?;
    }
    Ok(())
}

/// The result of reading a window.
enum Window {
    Read {
        pages: i64,
    },
    /// The window has many more pages than it should.
    TooLarge {
        better_span_s: i64,
    },
}

/// Reads the events from `from_s` until before `to_s`, or only the newest page if the window has
/// many more pages than it should.
async fn read_window(
    run: &mut RunContext<'_>,
    scope: &Scope,
    from_s: i64,
    to_s: i64,
) -> Result<Window, ReconcileError> {
    let range = (from_s, to_s);
    let first = read_pages(run, scope, range, None, 1).await?;
    let Some(oldest) = first.continues_after else {
        return Ok(Window::Read { pages: 1 });
    };

    let (covered_s, span_s) = ((to_s - oldest.created_s).max(1), to_s - from_s);
    if span_s / covered_s > 2 * WINDOW_PAGES && span_s > 60 {
        return Ok(Window::TooLarge {
            better_span_s: (covered_s * WINDOW_PAGES).clamp(1, span_s / 2),
        });
    }
    let rest = read_pages(run, scope, range, Some(oldest.id), MAX_WINDOW_PAGES).await?;
    Ok(Window::Read {
        pages: 1 + rest.pages,
    })
}

/// The result of reading some pages.
struct Pages {
    pages: i64,
    /// The last event of the last page, if more events follow.
    continues_after: Option<ListedEvent>,
}

/// Reads up to `max_pages` of a range of seconds, from the start or after an event.
async fn read_pages(
    run: &mut RunContext<'_>,
    scope: &Scope,
    (from_s, to_s): (i64, i64),
    after: Option<String>,
    max_pages: usize,
) -> Result<Pages, ReconcileError> {
    let (gte, lt) = (from_s.to_string(), to_s.to_string());
    let start = ListCursor::new("/v1/events", MAX_WINDOW_PAGES);
    let mut cursor = match after {
        Some(id) => start.starting_at(id),
        None => start,
    };
    let mut continues_after = None;
    let mut pages = 0;
    while from_s < to_s && (pages as usize) < max_pages {
        let mut query = vec![("created[gte]", &*gte), ("created[lt]", &*lt)];
        if let Some(id) = cursor.starting_after() {
            query.push(("starting_after", id));
        }
        let page = run.context.api.list("/v1/events", &query, scope).await?;
        pages += 1;
        record_events(run, &page.data, scope).await?;

        let has_more = cursor.advance(&page)?;
        continues_after = page
            .data
            .last()
            .filter(|_| has_more)
            .map(|event| listed_event(event));
        if continues_after.is_none() {
            break;
        }
    }
    Ok(Pages {
        pages,
        continues_after,
    })
}

/// The position of an event in Stripe's list.
struct ListedEvent {
    id: String,
    created_s: i64,
}

fn listed_event(event: &RawValue) -> ListedEvent {
    let event: Value = serde_json::from_str(event.get()).unwrap_or_default();
    ListedEvent {
        id: event["id"].as_str().unwrap_or_default().to_owned(),
        created_s: event["created"].as_i64().unwrap_or_default(),
    }
}

/// Records the events that have an observation.
async fn record_events(
    run: &mut RunContext<'_>,
    page: &[Box<RawValue>],
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let events = page
        .iter()
        .map(|event| run.recorder.prepare_body(with_account(event, scope)))
        .filter(|event| event.observation.is_some())
        .collect();
    run.recorder.record(events).await
}

/// Adds the account to an event. The list of a connected account leaves the account out, unlike a
/// webhook.
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

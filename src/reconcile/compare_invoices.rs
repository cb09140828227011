//! Compares stored invoices with Stripe's present data. Only this comparison finds changes for
//! which Stripe created no event.
//!
//! A run reads Stripe's list of invoices newest first. It reads back to the start of the window in
//! which it searches invoices that are not stored, and further while a page has more of the wanted
//! invoices than single requests would return. It requests the rest one by one.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt;
use futures_util::stream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use serde_json::value::RawValue;

use super::judge_invoice::{Checked, account_of_invoice, compare, unknown_at_stripe};
use super::report::UnknownHere;
use super::{
    EVENT_RETENTION_S, Extent, ReconcileError, RunContext, WriteMode, saved_unless_future,
};
use crate::domain::history::invoice_observations::InvoiceObservations;
use crate::domain::invoice::comparison::StripeStatus;
use crate::domain::money;
use crate::domain::time::timestamp;
use crate::queries::invoices::known;
use crate::store::{CheckCandidate, ProgressKey};
use crate::stripe_api::{ListCursor, Scope, StripeApi, StripeApiError};

/// Invoices read from the store in one query.
const PAGE_ROWS: u32 = 500;
/// Limit on the due invoices that one run compares.
const MAX_DUE: u32 = 5_000;
/// Number of settled invoices that are compared each day.
const DAILY_SAMPLE: u32 = 200;
const DAY_MS: i64 = 24 * 3600 * 1000;
/// Age from which stored invoices are compared. Stripe may not have younger ones yet, and their
/// events may not have been received.
const MIN_STORED_AGE_MS: i64 = 10 * 60_000;
/// Overlap in which the list of invoices is read again, to find invoices that are not stored.
const OVERLAP_S: i64 = 3600;
/// Largest number of wanted invoices that are requested one by one without reading the list.
const FEW_INVOICES: usize = 10;
/// Consecutive pages that return no more than single requests would. After them, reading ends.
const MAX_POOR_PAGES: usize = 2;
/// Limit on the pages of one account: more than any window has. A longer list is an error.
const MAX_PAGES: usize = 20_000;
const MAX_CONCURRENT_CALLS: usize = 8;
/// Limit on the accounts in which an invoice is searched if no event names its account.
const MAX_SEARCHED_ACCOUNTS: usize = 10;

/// The invoices to compare, and the results so far.
struct Comparison {
    wanted: HashMap<String, CheckCandidate>,
    done: HashSet<String>,
    checked: Checked,
}

/// Compares the wanted invoices, and finds invoices at Stripe that are not stored.
pub async fn compare_invoices(run: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    let mut comparison = Comparison {
        wanted: wanted_invoices(run).await?,
        done: HashSet::new(),
        checked: Checked::default(),
    };

    let now_s = run.started_ms / 1000;
    let listed_until_s = saved_unless_future(
        run.progress(&ProgressKey::InvoiceList).await?,
        now_s,
        OVERLAP_S,
    );
    let window_start_s = match (run.plan.since_s, run.plan.extent, listed_until_s) {
        (Some(since_s), ..) => now_s - since_s,
        (None, Extent::Due, Some(listed_until_s)) => listed_until_s - OVERLAP_S,
        _ => now_s - EVENT_RETENTION_S,
    };
    for scope in run.scopes() {
        read_list(run, &mut comparison, &scope, window_start_s).await?;
    }
    run.set_progress(
        &ProgressKey::InvoiceList,
        now_s.min(run.safe_upper_bound_s()),
    )
    .await?;

    request_rest(run, &mut comparison).await?;
    save_results(run, &mut comparison).await?;
    if run.plan.extent == Extent::Due {
        run.set_progress(&ProgressKey::InvoiceSample, run.started_ms)
            .await?;
    }
    Ok(())
}

/// Returns the invoices that this run compares, by Stripe id.
async fn wanted_invoices(
    run: &RunContext<'_>,
) -> Result<HashMap<String, CheckCandidate>, ReconcileError> {
    let found = match run.plan.extent {
        Extent::All => all_candidates(run).await?,
        Extent::Due => due_candidates(run).await?,
    };
    Ok(found
        .into_iter()
        .map(|candidate| (candidate.stripe_invoice_id.clone(), candidate))
        .collect())
}

async fn all_candidates(run: &RunContext<'_>) -> Result<Vec<CheckCandidate>, ReconcileError> {
    let mut found: Vec<CheckCandidate> = Vec::new();
    loop {
        let after = found
            .last()
            .map_or("", |candidate| candidate.stripe_invoice_id.as_str());
        let page = run
            .context
            .store
            .check_candidates_after(after, PAGE_ROWS)
            .await?;
        if page.is_empty() {
            return Ok(found);
        }
        found.extend(page);
    }
}

async fn due_candidates(run: &RunContext<'_>) -> Result<Vec<CheckCandidate>, ReconcileError> {
    let (store, now_ms) = (&run.context.store, run.started_ms);
    let mut found = store
        .due_check_candidates(now_ms, now_ms - MIN_STORED_AGE_MS, MAX_DUE)
        .await?;

    let sampled_ms = saved_unless_future(
        run.progress(&ProgressKey::InvoiceSample).await?,
        now_ms,
        DAY_MS,
    )
    .unwrap_or_default();
    // The share of the daily sample is proportional to the time since the last sample.
    let share = (now_ms - sampled_ms).clamp(0, DAY_MS) * i64::from(DAILY_SAMPLE) / DAY_MS;
    if share > 0 {
        found.extend(
            store
                .sampled_check_candidates(now_ms - DAY_MS, share as u32)
                .await?,
        );
    }
    Ok(found)
}

/// Reads Stripe's list back to `window_start_s`, and further while that saves calls.
async fn read_list(
    run: &mut RunContext<'_>,
    comparison: &mut Comparison,
    scope: &Scope,
    window_start_s: i64,
) -> Result<(), ReconcileError> {
    let mut cursor = ListCursor::new("/v1/invoices", MAX_PAGES);
    let mut poor_pages = 0;
    let mut is_inside_window = true;
    loop {
        let start = window_start_s.to_string();
        let mut query = Vec::new();
        // Without a bound the list continues beyond the window. A bound saves the extra page.
        if comparison.wanted.len() <= FEW_INVOICES {
            query.push(("created[gte]", &*start));
        }
        if let Some(id) = cursor.starting_after() {
            query.push(("starting_after", id));
        }
        let page = run.context.api.list("/v1/invoices", &query, scope).await?;
        let invoices: Vec<Value> = page
            .data
            .iter()
            .filter_map(|raw| serde_json::from_str(raw.get()).ok())
            .collect();

        let wanted_before = comparison.wanted.len();
        compare_page(run, comparison, &invoices, scope, window_start_s).await?;
        let found = wanted_before - comparison.wanted.len();

        let Some(oldest) = invoices.last() else {
            return Ok(());
        };
        is_inside_window =
            is_inside_window && oldest["created"].as_i64().unwrap_or_default() >= window_start_s;
        poor_pages = if found > 1 { 0 } else { poor_pages + 1 };
        let saves_calls = poor_pages < MAX_POOR_PAGES && comparison.wanted.len() > FEW_INVOICES;
        if !(is_inside_window || saves_calls) || !cursor.advance(&page)? {
            return Ok(());
        }
    }
}

/// Compares the stored invoices of a page, and reports those that are not stored.
async fn compare_page(
    run: &mut RunContext<'_>,
    comparison: &mut Comparison,
    invoices: &[Value],
    scope: &Scope,
    window_start_s: i64,
) -> Result<(), ReconcileError> {
    let ids: Vec<&str> = invoices
        .iter()
        .filter_map(|invoice| invoice["id"].as_str())
        .collect();

    let stored = run.context.store.check_candidates(&ids).await?;
    let stored: HashMap<&str, &CheckCandidate> = stored
        .iter()
        .map(|candidate| (candidate.stripe_invoice_id.as_str(), candidate))
        .collect();

    for stripe_invoice in invoices {
        let id = stripe_invoice["id"].as_str().unwrap_or_default();
        match stored.get(id) {
            Some(_) if comparison.done.contains(id) => {}
            Some(candidate) => {
                compare(
                    run,
                    &mut comparison.checked,
                    candidate,
                    stripe_invoice,
                    scope,
                )
                .await?;
                comparison.mark_done(id);
            }
            None => {
                let created_s = stripe_invoice["created"].as_i64().unwrap_or_default();
                // A draft owes nothing yet, and may still be stored.
                let is_draft = StripeStatus::of(stripe_invoice) == Some(StripeStatus::Draft);
                if created_s >= window_start_s && !is_draft {
                    run.report.unknown_here.push(unknown_here(stripe_invoice));
                }
            }
        }
    }
    save_results(run, comparison).await
}

impl Comparison {
    fn mark_done(&mut self, stripe_invoice_id: &str) {
        self.wanted.remove(stripe_invoice_id);
        self.done.insert(stripe_invoice_id.to_owned());
    }
}

fn unknown_here(stripe_invoice: &Value) -> UnknownHere {
    let text = |name: &str| stripe_invoice[name].as_str().map(str::to_owned);
    let created_s = stripe_invoice["created"].as_i64().unwrap_or_default();
    UnknownHere {
        stripe_invoice_id: text("id").unwrap_or_default(),
        number: text("number"),
        status: text("status"),
        amount: stripe_invoice["amount_due"]
            .as_i64()
            .map(|amount| money::amount(amount, stripe_invoice["currency"].as_str())),
        created: timestamp(created_s.saturating_mul(1000)),
    }
}

/// Requests the invoices that no list had: older invoices, and those under a test clock, which
/// lists leave out.
async fn request_rest(
    run: &mut RunContext<'_>,
    comparison: &mut Comparison,
) -> Result<(), ReconcileError> {
    let mut rest: Vec<CheckCandidate> = comparison.wanted.values().cloned().collect();
    rest.sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));

    for chunk in rest.chunks(PAGE_ROWS as usize) {
        let mut searches = Vec::with_capacity(chunk.len());
        for candidate in chunk {
            let scopes = scopes_of(run, candidate).await?;
            searches.push(search(run.context.api.clone(), candidate.clone(), scopes));
        }
        let answers: Vec<_> = stream::iter(searches)
            .buffer_unordered(MAX_CONCURRENT_CALLS)
            .collect()
            .await;

        for answer in answers {
            let (candidate, found) = answer?;
            match found {
                Some((stripe_invoice, scope)) => {
                    compare(
                        run,
                        &mut comparison.checked,
                        &candidate,
                        &stripe_invoice,
                        &scope,
                    )
                    .await?;
                }
                None => unknown_at_stripe(run, &mut comparison.checked, &candidate),
            }
            comparison.mark_done(&candidate.stripe_invoice_id);
        }
        save_results(run, comparison).await?;
    }
    Ok(())
}

/// Searches an invoice in these scopes. Returns it with the scope, or `None` if no scope has it.
async fn search(
    api: StripeApi,
    candidate: CheckCandidate,
    scopes: Vec<Scope>,
) -> Result<(CheckCandidate, Option<(Value, Scope)>), ReconcileError> {
    for scope in scopes {
        let found = request_invoice(&api, &candidate.stripe_invoice_id, &scope).await?;
        if let Some(invoice) = found {
            return Ok((candidate, Some((invoice, scope))));
        }
    }
    Ok((candidate, None))
}

async fn request_invoice(
    api: &StripeApi,
    id: &str,
    scope: &Scope,
) -> Result<Option<Value>, ReconcileError> {
    const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_');
    let path = format!("/v1/invoices/{}", utf8_percent_encode(id, RESERVED));
    let found: Option<Box<RawValue>> = match api.get(&path, &[], scope).await {
        // The key may no longer read the account, or Stripe cannot have this id.
        Err(StripeApiError::Refused { .. }) => None,
        found => found?,
    };
    let invoice = found.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok());

    Ok(invoice.filter(|invoice| invoice["deleted"] != true))
}

/// Returns the scopes in which to search an invoice: the account that its events name, or else all
/// known accounts.
async fn scopes_of(
    run: &mut RunContext<'_>,
    candidate: &CheckCandidate,
) -> Result<Vec<Scope>, ReconcileError> {
    let stored = run
        .context
        .store
        .invoice(&candidate.tenant_uid, &candidate.invoice_uid)
        .await?;
    let observations = stored.as_ref().map(known).transpose()?.unwrap_or_default();
    if let Some(account) = account_of_invoice(&candidate.stripe_invoice_id, &observations) {
        run.add_account(&account).await?;
        return Ok(vec![Scope::Account(account)]);
    }

    // Events that name no account belong to the key's own account.
    let mut scopes = run.scopes();
    let counted = InvoiceObservations::select(&candidate.stripe_invoice_id, &observations);
    scopes.truncate(if counted.counted().is_empty() {
        MAX_SEARCHED_ACCOUNTS
    } else {
        1
    });
    Ok(scopes)
}

/// Saves and removes the results so far, unless this is a dry run.
async fn save_results(
    run: &RunContext<'_>,
    comparison: &mut Comparison,
) -> Result<(), ReconcileError> {
    let results = comparison.checked.take();
    if run.plan.mode == WriteMode::Save && !results.is_empty() {
        run.context.store.save_check_results(&results).await?;
    }
    Ok(())
}

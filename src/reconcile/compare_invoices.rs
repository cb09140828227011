//! Invoice by invoice: what Stripe says now beside what is stored. Events that were never made show only here.
//!
//! Stripe's list of invoices is read newest first: as far as a pass has to look for invoices that we do not have, and further
//! as long as a page brings more of the wanted invoices than asking for them one by one would. The rest is asked for one by one.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt;
use futures_util::stream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use serde_json::value::RawValue;

use super::link_payments;
use super::recorder::as_known;
use super::report::{Differing, Invoice, UnknownHere};
use super::{EVENTS_KEPT_S, Extent, ReconcileError, RunContext, WriteMode, believed};
use crate::domain::history::{Entry, StoredObservation, fold, lacks_reason};
use crate::domain::invoice::comparison::{
    Field, FieldDifference, StripeStatus, differences, next_check_ms, same_facts,
};
use crate::domain::money;
use crate::domain::payment_state::PaymentState;
use crate::domain::time::timestamp;
use crate::queries::invoices::{imported_states, known};
use crate::store::{CheckCandidate, CheckResult, StoredInvoice};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// Invoices read from the store at a time.
const READ: u32 = 500;
/// Invoices that one pass compares at most because their time has come.
const DUE: u32 = 5_000;
/// Settled invoices that are compared each day.
const SAMPLE: u32 = 200;
const DAY_MS: i64 = 24 * 3600 * 1000;
/// What was stored just now may not be at Stripe yet, and its events are on their way.
const SETTLING_IN_MS: i64 = 10 * 60_000;
/// How much of the list of invoices is read again for those that we do not have.
const OVERLAP_S: i64 = 3600;
/// Wanted invoices that are asked for one by one without looking at the list.
const FEW: usize = 10;
/// Pages in a row that bring no more than asking one by one: then the list is left.
const POOR_PAGES: usize = 2;
const MAX_PAGES: usize = 100_000;
const AT_ONCE: usize = 8;
/// Accounts in which an invoice is sought that no event says the account of.
const MAX_SOUGHT: usize = 10;
/// How long Stripe's API may lag behind its own events.
const LAG_MS: i64 = DAY_MS;
/// When an invoice is looked at again where Stripe's API lags.
const LAGGING_MS: i64 = 10 * 60_000;
const LISTED: &str = "invoices listed";
const SAMPLED: &str = "invoices sampled";

/// The invoices that are to be compared, and what was done.
struct Check {
    wanted: HashMap<String, CheckCandidate>,
    done: HashSet<String>,
    checked: Vec<CheckResult>,
}

pub async fn run(pass: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    let wanted = wanted(pass).await?;
    let mut check = Check {
        wanted,
        done: HashSet::new(),
        checked: Vec::new(),
    };
    let now_s = pass.started_ms / 1000;
    let listed = believed(pass.progress(LISTED).await?, now_s, OVERLAP_S);
    let window_start = match (pass.plan.since_s, pass.plan.extent, listed) {
        (Some(since_s), ..) => now_s - since_s,
        (None, Extent::Due, Some(listed)) => listed - OVERLAP_S,
        _ => now_s - EVENTS_KEPT_S,
    };
    for scope in pass.scopes() {
        list(pass, &mut check, &scope, window_start).await?;
    }
    pass.set_progress(LISTED, now_s.min(pass.safe_upper_bound_s()))
        .await?;
    one_by_one(pass, &mut check).await?;
    note(pass, &mut check).await?;
    if pass.plan.extent == Extent::Due {
        pass.set_progress(SAMPLED, pass.started_ms).await?;
    }
    Ok(())
}

async fn wanted(pass: &RunContext<'_>) -> Result<HashMap<String, CheckCandidate>, ReconcileError> {
    let store = &pass.tools.store;
    let mut wanted = HashMap::new();
    let mut add = |found: Vec<CheckCandidate>| {
        wanted.extend(found.into_iter().map(|c| (c.stripe_invoice_id.clone(), c)))
    };
    match pass.plan.extent {
        Extent::All => {
            let mut after = String::new();
            loop {
                let page = store.all_to_check(&after, READ).await?;
                let Some(last) = page.last() else { break };
                after = last.stripe_invoice_id.clone();
                add(page);
            }
        }
        Extent::Due => {
            add(store
                .due_to_check(pass.started_ms, pass.started_ms - SETTLING_IN_MS, DUE)
                .await?);
            let sampled_ms = believed(pass.progress(SAMPLED).await?, pass.started_ms, DAY_MS)
                .unwrap_or_default();
            // A share of the day's sample for the time that has gone by.
            let share =
                (pass.started_ms - sampled_ms).clamp(0, DAY_MS) * i64::from(SAMPLE) / DAY_MS;
            if share > 0 {
                add(store
                    .sample_to_check(pass.started_ms - DAY_MS, share as u32)
                    .await?);
            }
        }
    }
    Ok(wanted)
}

/// Reads the list back to `window_start`, and further while that pays.
async fn list(
    pass: &mut RunContext<'_>,
    check: &mut Check,
    scope: &Scope,
    window_start: i64,
) -> Result<(), ReconcileError> {
    let mut last_id: Option<String> = None;
    let mut poor_pages = 0;
    let mut is_inside = true;
    for _ in 0..MAX_PAGES {
        let start = window_start.to_string();
        let mut query = Vec::new();
        // Without a bound, the list goes on where the window ends; with one, it costs no page more than it needs.
        if check.wanted.len() <= FEW {
            query.push(("created[gte]", &*start));
        }
        if let Some(id) = &last_id {
            query.push(("starting_after", id));
        }
        let page = pass.tools.api.list("/v1/invoices", &query, scope).await?;
        let invoices: Vec<Value> = page
            .data
            .iter()
            .filter_map(|raw| serde_json::from_str(raw.get()).ok())
            .collect();
        let wanted_before = check.wanted.len();
        compare_page(pass, check, &invoices, scope, window_start).await?;
        let found = wanted_before - check.wanted.len();
        let Some(oldest) = invoices.last() else {
            return Ok(());
        };
        is_inside = is_inside && oldest["created"].as_i64().unwrap_or_default() >= window_start;
        poor_pages = if found > 1 { 0 } else { poor_pages + 1 };
        let pays = poor_pages < POOR_PAGES && check.wanted.len() > FEW;
        if !page.has_more || !(is_inside || pays) {
            return Ok(());
        }
        last_id = oldest["id"].as_str().map(str::to_owned);
    }
    Ok(())
}

async fn compare_page(
    pass: &mut RunContext<'_>,
    check: &mut Check,
    invoices: &[Value],
    scope: &Scope,
    window_start: i64,
) -> Result<(), ReconcileError> {
    let ids: Vec<&str> = invoices
        .iter()
        .filter_map(|invoice| invoice["id"].as_str())
        .collect();
    let held = pass.tools.store.to_check(&ids).await?;
    let held: HashMap<&str, &CheckCandidate> = held
        .iter()
        .map(|c| (c.stripe_invoice_id.as_str(), c))
        .collect();
    for stripes in invoices {
        let id = stripes["id"].as_str().unwrap_or_default();
        match held.get(id) {
            Some(_) if check.done.contains(id) => {}
            Some(to_check) => compare(pass, check, to_check, stripes, scope).await?,
            None => {
                let created = stripes["created"].as_i64().unwrap_or_default();
                // Nothing is owed on a draft, and it may yet be stored.
                if created >= window_start && StripeStatus::of(stripes) != Some(StripeStatus::Draft)
                {
                    pass.report.unknown_here.push(unknown_here(stripes));
                }
            }
        }
    }
    note(pass, check).await
}

fn unknown_here(stripes: &Value) -> UnknownHere {
    let text = |name: &str| stripes[name].as_str().map(str::to_owned);
    UnknownHere {
        stripe_invoice_id: text("id").unwrap_or_default(),
        number: text("number"),
        status: text("status"),
        amount: stripes["amount_due"]
            .as_i64()
            .map(|amount| money::amount(amount, stripes["currency"].as_str())),
        created: timestamp(
            stripes["created"]
                .as_i64()
                .unwrap_or_default()
                .saturating_mul(1000),
        ),
    }
}

/// Those that no list showed: older ones, and those under a test clock, which lists leave out.
async fn one_by_one(pass: &mut RunContext<'_>, check: &mut Check) -> Result<(), ReconcileError> {
    let mut rest: Vec<CheckCandidate> = check.wanted.values().cloned().collect();
    rest.sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));
    for some in rest.chunks(READ as usize) {
        let mut calls = Vec::with_capacity(some.len());
        for to_check in some {
            let scopes = accounts_of(pass, to_check).await?;
            calls.push(seek(pass.tools.api.clone(), to_check.clone(), scopes));
        }
        let answers: Vec<_> = stream::iter(calls)
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for answer in answers {
            match answer? {
                (to_check, Some((stripes, scope))) => {
                    compare(pass, check, &to_check, &stripes, &scope).await?
                }
                (to_check, None) => unknown_at_stripe(pass, check, &to_check),
            }
        }
        note(pass, check).await?;
    }
    Ok(())
}

/// An invoice that is to be compared, and where it was found; None: nowhere.
type Sought = (CheckCandidate, Option<(Value, Scope)>);

async fn seek(
    api: StripeApi,
    to_check: CheckCandidate,
    scopes: Vec<Scope>,
) -> Result<Sought, ReconcileError> {
    for scope in scopes {
        if let Some(found) = ask(&api, &to_check.stripe_invoice_id, &scope).await? {
            return Ok((to_check, Some((found, scope))));
        }
    }
    Ok((to_check, None))
}

async fn ask(api: &StripeApi, id: &str, scope: &Scope) -> Result<Option<Value>, ReconcileError> {
    const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_');
    let path = format!("/v1/invoices/{}", utf8_percent_encode(id, RESERVED));
    let found: Option<Box<RawValue>> = match api.get(&path, &[], scope).await {
        // An account that the key may no longer see, or an id that can be none of Stripe's.
        Err(StripeApiError::Refused { .. }) => None,
        found => found?,
    };
    let invoice = found.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok());
    Ok(invoice.filter(|invoice| invoice["deleted"] != true))
}

/// Where an invoice is sought: in the account that its events name, else in all that are known.
async fn accounts_of(
    pass: &mut RunContext<'_>,
    to_check: &CheckCandidate,
) -> Result<Vec<Scope>, ReconcileError> {
    let stored = pass
        .tools
        .store
        .invoice(&to_check.tenant_uid, &to_check.invoice_uid)
        .await?;
    let observations = stored.as_ref().map(known).transpose()?.unwrap_or_default();
    if let Some(account) = observations.iter().find_map(|k| k.telling.account.clone()) {
        pass.note_account(&account).await?;
        return Ok(vec![Scope::Account(account)]);
    }
    let mut scopes = pass.scopes();
    scopes.truncate(if observations.is_empty() {
        MAX_SOUGHT
    } else {
        1
    });
    Ok(scopes)
}

fn unknown_at_stripe(pass: &mut RunContext<'_>, check: &mut Check, to_check: &CheckCandidate) {
    pass.report.unknown_at_stripe.push(invoice(to_check));
    let due = Some(pass.started_ms + DAY_MS);
    done(pass, check, to_check, due, Verdict::Differs);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Agrees,
    Differs,
    /// Stripe's API lags behind what Stripe's own events told.
    Lags,
}

async fn compare(
    pass: &mut RunContext<'_>,
    check: &mut Check,
    to_check: &CheckCandidate,
    stripes: &Value,
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let Some(stored) = pass
        .tools
        .store
        .invoice(&to_check.tenant_uid, &to_check.invoice_uid)
        .await?
    else {
        return Ok(());
    };
    let mut known = pass.keeper.known_about(&stored).await?;
    if let Some(account) = known.iter().find_map(|k| k.telling.account.clone()) {
        pass.note_account(&account).await?;
    }
    let mut history = history(&stored, &known)?;
    let account = super::fetch_objects::account_of(scope);
    let snapshot = pass.keeper.read_object(stripes, account);
    if let Some(shown) = as_known(&snapshot) {
        known.push(shown);
        let with_snapshot = self::history(&stored, &known)?;
        if same_facts(&history, &with_snapshot) {
            known.pop();
        } else {
            // What Stripe says and no event told.
            history = with_snapshot;
            pass.keeper.keep(vec![snapshot]).await?;
        }
    }
    let status = StripeStatus::of(stripes);
    if status.is_some_and(|s| !s.is_settled()) && lacks_reason(&to_check.stripe_invoice_id, &known)
    {
        link_payments::reason(pass, &to_check.stripe_invoice_id, scope).await?;
    }
    let document: Value = serde_json::from_str(&stored.document).unwrap_or_default();
    let mut found = differences(&document, &known, &history, stripes);
    let lags = found.iter().any(|d| d.field == Field::PaymentState) && lags(pass, &history).await?;
    found.retain(|d| !(lags && d.field == Field::PaymentState));
    let verdict = match (found.is_empty(), lags) {
        (false, _) => Verdict::Differs,
        (true, true) => Verdict::Lags,
        (true, false) => Verdict::Agrees,
    };
    report(pass, to_check, found, verdict);
    let created_s = stripes["created"]
        .as_i64()
        .unwrap_or(stored.stored_ms / 1000);
    let due = match status {
        _ if verdict == Verdict::Lags => Some(pass.started_ms + LAGGING_MS),
        Some(status) if status.is_settled() => None,
        _ => Some(next_check_ms(created_s, pass.started_ms)),
    };
    done(pass, check, to_check, due, verdict);
    Ok(())
}

fn history(
    stored: &StoredInvoice,
    known: &[StoredObservation],
) -> Result<Vec<Entry>, ReconcileError> {
    Ok(fold(
        stored.stripe_invoice_id.as_deref(),
        &imported_states(stored)?,
        known,
    ))
}

/// Nothing leads out of Paid at Stripe: where its own event, received lately, says Paid and its API does not, the API lags.
async fn lags(pass: &RunContext<'_>, history: &[Entry]) -> Result<bool, ReconcileError> {
    let Some(paid) = history
        .iter()
        .find(|entry| entry.state == PaymentState::Paid)
    else {
        return Ok(false);
    };
    let proofs = pass.tools.store.events_by_keys(&paid.proofs).await?;
    let newest_ms = proofs.iter().map(|event| event.received_ms).max();
    // What a dry run found is in no log yet: it is as new as can be.
    let is_beside = proofs.len() < paid.proofs.len();
    Ok(is_beside || newest_ms.is_some_and(|received_ms| pass.started_ms - received_ms < LAG_MS))
}

fn report(
    pass: &mut RunContext<'_>,
    to_check: &CheckCandidate,
    found: Vec<FieldDifference>,
    verdict: Verdict,
) {
    let since = timestamp(to_check.differs_since_ms.unwrap_or(pass.started_ms));
    for FieldDifference {
        field,
        ours,
        stripes,
    } in found
    {
        let (invoice, since) = (invoice(to_check), since.clone());
        pass.report.differing.push(Differing {
            invoice,
            field: field.as_str(),
            ours,
            stripes,
            since,
        });
    }
    match verdict {
        Verdict::Agrees => pass.report.agreeing.push(invoice(to_check)),
        Verdict::Lags => pass.report.stripe_lags.push(invoice(to_check)),
        Verdict::Differs => {}
    }
}

fn invoice(to_check: &CheckCandidate) -> Invoice {
    Invoice {
        stripe_invoice_id: to_check.stripe_invoice_id.clone(),
        tenant_uid: to_check.tenant_uid.clone(),
        invoice_uid: to_check.invoice_uid.clone(),
    }
}

fn done(
    pass: &RunContext<'_>,
    check: &mut Check,
    to_check: &CheckCandidate,
    check_due_ms: Option<i64>,
    verdict: Verdict,
) {
    let since_ms = to_check.differs_since_ms.or(Some(pass.started_ms));
    check.wanted.remove(&to_check.stripe_invoice_id);
    check.done.insert(to_check.stripe_invoice_id.clone());
    check.checked.push(CheckResult {
        stripe_invoice_id: to_check.stripe_invoice_id.clone(),
        checked_ms: pass.started_ms,
        check_due_ms,
        differs_since_ms: since_ms.filter(|_| verdict == Verdict::Differs),
        agrees: verdict == Verdict::Agrees,
    });
}

async fn note(pass: &RunContext<'_>, check: &mut Check) -> Result<(), ReconcileError> {
    let checked = std::mem::take(&mut check.checked);
    if pass.plan.mode == WriteMode::Save && !checked.is_empty() {
        pass.tools.store.note_checked(&checked).await?;
    }
    Ok(())
}

//! Compares one stored invoice with Stripe's, in three steps: observe, judge, record.
//!
//! [`observe`] makes all reads, [`judge`] is a pure function, [`record`] appends, reports and
//! schedules. A dry run writes nothing.

use serde_json::Value;

use super::link_payments;
use super::recorder::as_stored;
use super::report::{Differing, Invoice};
use super::{ReconcileError, RunContext};
use crate::domain::history::invoice_observations::InvoiceObservations;
use crate::domain::history::{Entry, StoredObservation, lacks_reason};
use crate::domain::invoice::comparison::{
    Field, FieldDifference, StripeStatus, differences, next_check_ms, same_facts,
};
use crate::domain::payment_state::PaymentState;
use crate::domain::time::timestamp;
use crate::queries::invoices::fold_known;
use crate::store::{CheckCandidate, CheckResult, NewEvent};
use crate::stripe_api::Scope;

const DAY_MS: i64 = 24 * 3600 * 1000;
/// Longest time that Stripe's API may lag behind its own events.
const MAX_LAG_MS: i64 = DAY_MS;
/// Delay before an invoice is compared again while Stripe's API lags.
const LAG_RECHECK_MS: i64 = 10 * 60_000;

/// Results of comparisons that are not saved yet.
#[derive(Default)]
pub struct Checked(Vec<CheckResult>);

impl Checked {
    /// Returns the results and empties the list.
    pub fn take(&mut self) -> Vec<CheckResult> {
        std::mem::take(&mut self.0)
    }
}

/// The values of an invoice in the store and at Stripe.
struct Observed {
    differences: Vec<FieldDifference>,
    status: Option<StripeStatus>,
    /// Unix seconds of the creation at Stripe.
    created_s: i64,
    /// Stripe's invoice as an event, if it asserts something that no event asserted.
    new_snapshot: Option<NewEvent>,
    /// Unix milliseconds of the receipt of the newest proof that the invoice is paid.
    paid_proof_ms: Option<i64>,
    /// `true` if no event has the reason of the last failed attempt.
    lacks_reason: bool,
}

/// The result of comparing one invoice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Agrees,
    Differs,
    /// Stripe's API lags behind Stripe's own events.
    Lags,
}

/// The decision about an invoice.
#[derive(Debug, PartialEq, Eq)]
struct Judgement {
    differences: Vec<FieldDifference>,
    outcome: Verdict,
    /// Unix milliseconds of the next comparison; `None` if the invoice is settled.
    next_check_ms: Option<i64>,
}

/// Compares a stored invoice with Stripe's. Does nothing if it was deleted meanwhile.
pub async fn compare(
    run: &mut RunContext<'_>,
    checked: &mut Checked,
    candidate: &CheckCandidate,
    stripe_invoice: &Value,
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let Some(mut observed) = observe(run, candidate, stripe_invoice, scope).await? else {
        return Ok(());
    };
    let snapshot = observed.new_snapshot.take();
    let judgement = judge(&observed, run.started_ms);

    if let Some(snapshot) = snapshot {
        run.recorder.record(vec![snapshot]).await?;
    }
    if observed.lacks_reason {
        link_payments::fetch_reason(run, &candidate.stripe_invoice_id, scope).await?;
    }
    record(run, checked, candidate, judgement);
    Ok(())
}

/// Reads everything that the judgement needs. Returns `None` if the invoice was deleted meanwhile.
async fn observe(
    run: &mut RunContext<'_>,
    candidate: &CheckCandidate,
    stripe_invoice: &Value,
    scope: &Scope,
) -> Result<Option<Observed>, ReconcileError> {
    let stored = run
        .context
        .store
        .invoice(&candidate.tenant_uid, &candidate.invoice_uid)
        .await?;
    let Some(stored) = stored else {
        return Ok(None);
    };
    let observations = run.recorder.observations_of(&stored).await?;
    if let Some(account) = account_of_invoice(&candidate.stripe_invoice_id, &observations) {
        run.add_account(&account).await?;
    }

    let (mut observations, mut history) = fold_known(&stored, observations).await?;
    let snapshot = run.recorder.prepare_object(stripe_invoice, scope.account());
    let mut new_snapshot = None;
    if let Some(shown) = as_stored(&snapshot)? {
        observations.push(shown);
        let with_snapshot;
        (observations, with_snapshot) = fold_known(&stored, observations).await?;
        if same_facts(&history, &with_snapshot) {
            observations.pop();
        } else {
            history = with_snapshot;
            new_snapshot = Some(snapshot);
        }
    }

    let document: Value = serde_json::from_str(&stored.document).unwrap_or_default();
    let differences = differences(&document, &observations, &history, stripe_invoice);
    let state_differs = differences
        .iter()
        .any(|difference| difference.field == Field::PaymentState);
    let status = StripeStatus::of(stripe_invoice);
    Ok(Some(Observed {
        differences,
        status,
        created_s: stripe_invoice["created"]
            .as_i64()
            .unwrap_or(stored.stored_ms / 1000),
        new_snapshot,
        paid_proof_ms: if state_differs {
            newest_paid_proof_ms(run, &history).await?
        } else {
            None
        },
        lacks_reason: status.is_some_and(|status| !status.is_settled())
            && lacks_reason(&candidate.stripe_invoice_id, &observations),
    }))
}

/// Returns the connected account of an invoice. A foreign account that refers to the invoice does
/// not count (rule 3.6.4), because a search there would not find the invoice.
pub(super) fn account_of_invoice(
    stripe_invoice_id: &str,
    observations: &[StoredObservation],
) -> Option<String> {
    let observations = InvoiceObservations::select(stripe_invoice_id, observations);
    observations.connected_account().map(str::to_owned)
}

/// Returns the Unix milliseconds of the receipt of the newest proof that the invoice is paid.
async fn newest_paid_proof_ms(
    run: &RunContext<'_>,
    history: &[Entry],
) -> Result<Option<i64>, ReconcileError> {
    let paid = history
        .iter()
        .find(|entry| entry.state == PaymentState::Paid);
    let Some(paid) = paid else {
        return Ok(None);
    };

    let proofs = run.context.store.events_by_keys(&paid.proofs).await?;
    if proofs.len() < paid.proofs.len() {
        // This run found the proof that is not in the log.
        return Ok(Some(run.started_ms));
    }
    Ok(proofs.iter().map(|event| event.received_ms).max())
}

/// Decides whether the differences count, and when to compare again.
///
/// No invoice at Stripe leaves the state Paid. So if a recent event asserts Paid and Stripe's API
/// does not, the API lags, and the state does not count as a difference.
fn judge(observed: &Observed, now_ms: i64) -> Judgement {
    let lags = observed
        .paid_proof_ms
        .is_some_and(|received_ms| now_ms - received_ms < MAX_LAG_MS);
    let differences: Vec<FieldDifference> = observed
        .differences
        .iter()
        .filter(|difference| !(lags && difference.field == Field::PaymentState))
        .cloned()
        .collect();

    let outcome = if !differences.is_empty() {
        Verdict::Differs
    } else if lags {
        Verdict::Lags
    } else {
        Verdict::Agrees
    };
    let is_settled = observed.status.is_some_and(StripeStatus::is_settled);
    let next_check_ms = if outcome == Verdict::Lags {
        Some(now_ms + LAG_RECHECK_MS)
    } else if is_settled {
        None
    } else {
        Some(next_check_ms(observed.created_s, now_ms))
    };
    Judgement {
        differences,
        outcome,
        next_check_ms,
    }
}

/// Reports an invoice that Stripe does not have, and schedules the next search.
pub fn unknown_at_stripe(
    run: &mut RunContext<'_>,
    checked: &mut Checked,
    candidate: &CheckCandidate,
) {
    run.report.unknown_at_stripe.push(invoice_of(candidate));
    let judgement = Judgement {
        differences: Vec::new(),
        outcome: Verdict::Differs,
        next_check_ms: Some(run.started_ms + DAY_MS),
    };
    record(run, checked, candidate, judgement);
}

/// Adds the judgement to the report and to the results to save.
fn record(
    run: &mut RunContext<'_>,
    checked: &mut Checked,
    candidate: &CheckCandidate,
    judgement: Judgement,
) {
    let differs_since_ms = candidate.differs_since_ms.unwrap_or(run.started_ms);
    for difference in judgement.differences {
        run.report.differing.push(Differing {
            invoice: invoice_of(candidate),
            field: difference.field.as_str(),
            ours: difference.ours,
            stripes: difference.stripes,
            since: timestamp(differs_since_ms),
        });
    }
    match judgement.outcome {
        Verdict::Agrees => run.report.agreeing.push(invoice_of(candidate)),
        Verdict::Lags => run.report.stripe_lags.push(invoice_of(candidate)),
        Verdict::Differs => {}
    }

    let differs = judgement.outcome == Verdict::Differs;
    checked.0.push(CheckResult {
        stripe_invoice_id: candidate.stripe_invoice_id.clone(),
        checked_ms: run.started_ms,
        check_due_ms: judgement.next_check_ms,
        differs_since_ms: differs.then_some(differs_since_ms),
        agrees: judgement.outcome == Verdict::Agrees,
    });
}

fn invoice_of(candidate: &CheckCandidate) -> Invoice {
    Invoice {
        stripe_invoice_id: candidate.stripe_invoice_id.clone(),
        tenant_uid: candidate.tenant_uid.clone(),
        invoice_uid: candidate.invoice_uid.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_000 * DAY_MS;

    fn difference(field: Field) -> FieldDifference {
        FieldDifference {
            field,
            ours: "Paid".to_owned(),
            stripes: "open".to_owned(),
        }
    }

    fn observed(differences: Vec<FieldDifference>, status: StripeStatus) -> Observed {
        Observed {
            differences,
            status: Some(status),
            created_s: NOW_MS / 1000,
            new_snapshot: None,
            paid_proof_ms: None,
            lacks_reason: false,
        }
    }

    #[test]
    fn settled_invoice_that_agrees_is_not_scheduled() {
        let settled = judge(&observed(vec![], StripeStatus::Paid), NOW_MS);
        assert_eq!(
            (settled.outcome, settled.next_check_ms),
            (Verdict::Agrees, None)
        );

        let open = judge(&observed(vec![], StripeStatus::Open), NOW_MS);
        assert_eq!(open.outcome, Verdict::Agrees);
        assert_eq!(open.next_check_ms, Some(NOW_MS + 10 * 60_000));
    }

    #[test]
    fn difference_is_kept_and_scheduled_by_status() {
        let differs = judge(
            &observed(vec![difference(Field::Amount)], StripeStatus::Paid),
            NOW_MS,
        );
        assert_eq!(
            (differs.outcome, differs.next_check_ms),
            (Verdict::Differs, None)
        );
        assert_eq!(differs.differences, [difference(Field::Amount)]);
    }

    #[test]
    fn recent_paid_proof_means_stripe_lags() {
        let state_differs = |paid_proof_ms| Observed {
            paid_proof_ms,
            ..observed(vec![difference(Field::PaymentState)], StripeStatus::Open)
        };
        let lags = judge(&state_differs(Some(NOW_MS - MAX_LAG_MS + 1)), NOW_MS);
        assert_eq!((lags.outcome, lags.differences.len()), (Verdict::Lags, 0));
        assert_eq!(lags.next_check_ms, Some(NOW_MS + LAG_RECHECK_MS));

        let old_proof = judge(&state_differs(Some(NOW_MS - MAX_LAG_MS)), NOW_MS);
        assert_eq!(old_proof.outcome, Verdict::Differs);
        assert_eq!(old_proof.differences.len(), 1);

        let no_proof = judge(&state_differs(None), NOW_MS);
        assert_eq!(no_proof.outcome, Verdict::Differs);
    }

    #[test]
    fn other_differences_count_while_stripe_lags() {
        let judgement = judge(
            &Observed {
                paid_proof_ms: Some(NOW_MS),
                ..observed(
                    vec![difference(Field::Amount), difference(Field::PaymentState)],
                    StripeStatus::Open,
                )
            },
            NOW_MS,
        );
        assert_eq!(judgement.outcome, Verdict::Differs);
        assert_eq!(judgement.differences, [difference(Field::Amount)]);
    }
}

//! The invoice document: `v1Invoice` of Spectro Cloud's Palette API.
//!
//! It is validated and normalised when it is stored, and rendered with its payment states when it
//! is read. `schema` lists its fields. Unknown fields are kept unchanged.

use serde_json::{Map, Value, json};

use super::schema::{self, InvalidField};
use crate::domain::history::Entry;
use crate::domain::payment_state::{ImportedState, PaymentState};
use crate::domain::time::{parse_time, timestamp};

/// A document that may be stored.
#[derive(Clone, Debug)]
pub struct ValidInvoice {
    /// Normalised, without `status.states`.
    pub document: Value,
    pub stripe_invoice_id: Option<String>,
    pub imported_states: Vec<ImportedState>,
}

/// Validates a document and normalises it: times in UTC with milliseconds, whole numbers as
/// integers, and no `null` in known fields.
///
/// # Errors
/// Returns every invalid field with its JSON pointer.
pub fn validate(mut document: Value) -> Result<ValidInvoice, Vec<InvalidField>> {
    let mut faults = Vec::new();
    schema::check_invoice(&mut document, &mut faults);

    let states = document
        .get_mut("status")
        .and_then(Value::as_object_mut)
        .and_then(|status| status.shift_remove("states"));
    let imported_states = imported(states, &mut faults);
    if !faults.is_empty() {
        return Err(faults);
    }

    let stripe_invoice_id = document
        .pointer("/status/stripeInvoiceId")
        .and_then(Value::as_str)
        .map(str::to_owned);

    Ok(ValidInvoice {
        document,
        stripe_invoice_id,
        imported_states,
    })
}

/// Returns the document with its payment states.
pub fn render(document: &Value, entries: &[Entry]) -> Value {
    let mut rendered = document.clone();
    if !rendered.is_object() {
        rendered = json!({});
    }
    if !rendered.get("status").is_some_and(Value::is_object) {
        rendered["status"] = json!({});
    }
    rendered["status"]["states"] = entries.iter().map(render_state).collect();

    rendered
}

fn render_state(entry: &Entry) -> Value {
    let mut state = Map::new();
    state.insert("state".to_owned(), entry.state.as_str().into());
    state.insert("timestamp".to_owned(), timestamp(entry.timestamp_ms).into());
    if let Some(message) = &entry.message {
        state.insert("paymentMsg".to_owned(), message.as_str().into());
    }
    Value::Object(state)
}

/// Returns the valid states. The schema check has already reported the malformed ones.
fn imported(states: Option<Value>, faults: &mut Vec<InvalidField>) -> Vec<ImportedState> {
    let Some(Value::Array(states)) = states else {
        return Vec::new();
    };

    let mut imported: Vec<ImportedState> = Vec::new();
    for (index, state) in states.iter().enumerate() {
        let text = |name: &str| state.get(name).and_then(Value::as_str);
        let (Some(known), Some(Ok(timestamp_ms))) = (
            text("state").and_then(PaymentState::parse),
            text("timestamp").map(parse_time),
        ) else {
            continue;
        };

        if imported
            .iter()
            .any(|i| i.state == known && i.timestamp_ms == timestamp_ms)
        {
            let reason = format!(
                "repeats the state {} at {}",
                known.as_str(),
                timestamp(timestamp_ms)
            );
            faults.push(InvalidField {
                pointer: format!("/status/states/{index}"),
                reason,
            });
            continue;
        }

        imported.push(ImportedState {
            state: known,
            timestamp_ms,
            message: text("paymentMsg").map(str::to_owned),
        });
    }
    imported
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_invalid_field_is_reported_with_pointer() {
        let document = json!({
            "metadata": {"uid": 1, "labels": {"a/b": 2}, "annotations": []},
            "spec": {"month": "2026-01-31", "paymentUnit": "eur", "plan": {"freeCredits": [{"planCredit": {"cpuCoreHours": 1.5}}], "slaCredits": {}}},
            "status": {
                "billableAmount": "1", "stripeInvoiceId": "", "productInvoice": {"pure": {"overageLimitPercentage": 128}},
                "states": [{"state": "Paid"}, {"state": "paid", "timestamp": "2026-01-31T09:15:00Z"}],
            },
        });
        let faults = validate(document).unwrap_err();
        let pointers: Vec<&str> = faults.iter().map(|f| f.pointer.as_str()).collect();
        assert_eq!(
            pointers,
            [
                "/metadata/annotations",
                "/metadata/labels/a~1b",
                "/metadata/uid",
                "/spec/month",
                "/spec/paymentUnit",
                "/spec/plan/freeCredits/0/planCredit/cpuCoreHours",
                "/spec/plan/freeCredits/0/planCredit/type",
                "/spec/plan/slaCredits",
                "/status/billableAmount",
                "/status/productInvoice/pure/overageLimitPercentage",
                "/status/states/0/timestamp",
                "/status/states/1/state",
                "/status/stripeInvoiceId",
            ]
        );

        for root in [json!(null), json!([]), json!("x")] {
            assert_eq!(validate(root).unwrap_err()[0].pointer, "");
        }
    }

    #[test]
    fn document_is_normalised_and_unknown_fields_kept() {
        let document = json!({
            "extra": {"x": null, "n": 1.0},
            "spec": {"month": "2026-01-31T10:15:00.1239+01:00", "address": null, "credits": {"pureFreeCredits": 2500.0}},
            "status": {"billableAmount": 10.5, "projects": null, "states": [], "stripeInvoiceId": "in_1"},
        });
        let valid = validate(document).unwrap();
        let kept = json!({
            "extra": {"x": null, "n": 1.0},
            "spec": {"month": "2026-01-31T09:15:00.123Z", "credits": {"pureFreeCredits": 2500}},
            "status": {"billableAmount": 10.5, "stripeInvoiceId": "in_1"},
        });
        assert_eq!(valid.document.to_string(), kept.to_string());

        assert_eq!(valid.stripe_invoice_id.as_deref(), Some("in_1"));
    }

    #[test]
    fn repeated_state_and_time_is_invalid() {
        let state = |time: &str| json!({"state": "Paid", "timestamp": time});
        let document = |states| json!({"status": {"states": states}});
        let twice = validate(document([
            state("2026-01-31T09:15:00.0001Z"),
            state("2026-01-31T10:15:00+01:00"),
        ]))
        .unwrap_err();
        assert_eq!(twice[0].pointer, "/status/states/1");
        let valid = validate(document([
            state("2026-01-31T09:15:01Z"),
            state("2026-01-31T09:15:00Z"),
        ]))
        .unwrap();

        assert_eq!(
            valid.imported_states[0].timestamp_ms - valid.imported_states[1].timestamp_ms,
            1000
        );
    }

    #[test]
    fn rendered_invoice_always_has_states() {
        let entry = Entry {
            state: PaymentState::Paid,
            timestamp_ms: 1_769_850_900_000,
            message: Some("Paid.".into()),
            proofs: Vec::new(),
        };
        assert_eq!(render(&json!({}), &[]), json!({"status": {"states": []}}));
        assert_eq!(
            render(&json!({"status": {"billableAmount": 1}}), &[entry]),
            json!({"status": {"billableAmount": 1, "states": [{"state": "Paid", "timestamp": "2026-01-31T09:15:00.000Z", "paymentMsg": "Paid."}]}})
        );
    }
}

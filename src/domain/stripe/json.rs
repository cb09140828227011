//! JSON, cut down while it is parsed: of a payload of several KB we read a few dozen fields, and only these are built.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Parses a payload, leaving out the fields that nothing here reads, wherever they stand.
///
/// # Errors
/// As `serde_json`, for what is no JSON, and for what is no UTF-8.
pub fn parse(body: &[u8]) -> Result<Value, serde_json::Error> {
    // What is left out is not looked at closely, so that it is text is checked first.
    match std::str::from_utf8(body) {
        Ok(text) => serde_json::from_str::<Kept>(text).map(|kept| kept.0),
        Err(_) => serde_json::from_slice::<Value>(body),
    }
}

/// The names of all fields that `event` and `object` read.
fn is_read(name: &str) -> bool {
    matches!(
        name,
        "account"
            | "action"
            | "amount"
            | "amount_due"
            | "amount_overpaid"
            | "amount_paid"
            | "amount_paid_off_stripe"
            | "amount_received"
            | "amount_refunded"
            | "amount_remaining"
            | "api_version"
            | "attempt_count"
            | "attempted"
            | "billing"
            | "charge"
            | "code"
            | "collection_method"
            | "created"
            | "currency"
            | "data"
            | "date"
            | "decline_code"
            | "display_bank_transfer_instructions"
            | "due_date"
            | "failure_code"
            | "failure_message"
            | "failure_reason"
            | "fetched_at"
            | "finalized_at"
            | "from_invoice"
            | "id"
            | "invoice"
            | "last_finalization_error"
            | "last_payment_error"
            | "latest_charge"
            | "latest_revision"
            | "livemode"
            | "marked_uncollectible_at"
            | "message"
            | "next_action"
            | "next_payment_attempt"
            | "number"
            | "object"
            | "order_reference"
            | "outcome"
            | "paid"
            | "paid_at"
            | "paid_out_of_band"
            | "payment"
            | "payment_details"
            | "payment_intent"
            | "payments"
            | "post_payment_amount"
            | "previous_attributes"
            | "reason"
            | "related_object"
            | "snapshot_event"
            | "status"
            | "status_transitions"
            | "test_clock"
            | "type"
            | "voided_at"
    )
}

struct Kept(Value);

impl<'de> Deserialize<'de> for Kept {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Kept, D::Error> {
        deserializer.deserialize_any(Keep).map(Kept)
    }
}

struct Keep;

impl<'de> Visitor<'de> for Keep {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut kept = Map::new();
        while let Some(name) = fields.next_key::<std::borrow::Cow<'de, str>>()? {
            if is_read(&name) {
                let Kept(value) = fields.next_value()?;
                kept.insert(name.into_owned(), value);
            } else {
                fields.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Value::Object(kept))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut kept = Vec::new();
        while let Some(Kept(item)) = items.next_element()? {
            kept.push(item);
        }
        Ok(Value::Array(kept))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names in quotation marks, as calls such as `text(json, "number")` and `pointer("/data/object")` have them.
    fn names_in(source: &str) -> Vec<&str> {
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        let calls = code.lines().filter(|line| {
            let line = line.trim_start();
            !line.starts_with("//")
                && (line.contains("(json")
                    || line.contains(".get(")
                    || line.contains("pointer(")
                    || line.contains(", \""))
        });
        let quoted = calls
            .flat_map(|line| line.split('"').skip(1).step_by(2))
            .flat_map(|text| text.split('/'));
        quoted
            .filter(|name| {
                !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
            })
            .collect()
    }

    #[test]
    fn every_field_that_is_read_is_kept() {
        let names = [
            names_in(include_str!("event.rs")),
            names_in(include_str!("object.rs")),
        ]
        .concat();
        assert!(names.len() > 60, "{names:?}");
        let not_fields = ["event", "unreadable", "revision"];
        let forgotten: Vec<_> = names
            .into_iter()
            .filter(|name| !is_read(name) && !not_fields.contains(name))
            .collect();
        assert!(
            forgotten.is_empty(),
            "add these to `is_read`: {forgotten:?}"
        );
    }

    #[test]
    fn what_is_left_out_changes_nothing_else() {
        let body = br#"{"id": "x", "lines": {"data": [{"id": 1}]}, "data": {"object": {"metadata": {}, "paid": true, "amount": -1.5e3}}, "id": "y"}"#;
        let expected =
            serde_json::json!({"id": "y", "data": {"object": {"paid": true, "amount": -1.5e3}}});
        assert_eq!(parse(body).unwrap(), expected);
    }

    #[test]
    fn what_is_no_json_is_refused_wherever_it_stands() {
        for body in [
            &b"{\"lines\": [1,}"[..],
            b"{\"lines\": \"\xff\"}",
            b"{\"lines\": 01}",
            b"{} x",
            b"",
            b"{\"id\": \"\n\"}",
        ] {
            assert!(parse(body).is_err(), "{:?}", String::from_utf8_lossy(body));
        }
    }
}

//! Checks of a document to be stored: an accepted document stays the same and a strict client can
//! read it. A rejected document gets the path of every error.

use serde::Deserialize;
use serde_json::Value;
use stripe_reconciler::domain::history::fold;
use stripe_reconciler::domain::invoice::document::{ValidInvoice, render, validate};
use stripe_reconciler::domain::invoice::schema::InvalidField;
use stripe_reconciler::queries::invoices::new_invoice;

/// Limit on the documents checked per input: JSON values one after another.
const DOCUMENTS: usize = 32;

pub fn check(input: &[u8]) {
    let documents = serde_json::Deserializer::from_slice(input).into_iter::<Value>();
    for document in documents.map_while(Result::ok).take(DOCUMENTS) {
        match validate(document.clone()) {
            Ok(valid) => check_accepted(&valid),
            Err(faults) => check_refused(&document, &faults),
        }
        check_name(document);
    }
}

fn check_accepted(valid: &ValidInvoice) {
    let stored: Value = serde_json::from_str(&valid.document.to_string())
        .unwrap_or_else(|error| panic!("{error} in what is stored"));
    assert_eq!(stored, valid.document, "it is read as it was written");

    let entries = fold(None, &valid.imported_states, &[]);
    let rendered = render(&valid.document, &entries);
    let text = rendered.to_string();
    let read: V1Invoice = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("a strict client says {error} of {text}"));

    assert_eq!(
        read.status.states.map(|states| states.len()),
        Some(valid.imported_states.len())
    );

    let again = validate(rendered).unwrap_or_else(|faults| panic!("{faults:?} in {text}"));
    assert_eq!(again.imported_states, valid.imported_states);
    assert_eq!(again.stripe_invoice_id, valid.stripe_invoice_id);
    assert_eq!(render(&again.document, &entries).to_string(), text);

    let kept = validate(valid.document.clone())
        .unwrap_or_else(|faults| panic!("{faults:?} in {}", valid.document));
    assert_eq!(
        kept.document.to_string(),
        valid.document.to_string(),
        "its normal form is its normal form"
    );
}

/// Checks that each path is a JSON pointer (RFC 6901) to an error, and that the document is valid
/// once all of them are removed.
///
/// So no error hides another.
fn check_refused(document: &Value, faults: &[InvalidField]) {
    assert!(!faults.is_empty());

    let mut mended = document.clone();
    let mut pointers: Vec<&str> = faults
        .iter()
        .map(|fault| removable_path(document, fault))
        .collect();

    if pointers.contains(&"") {
        assert!(!document.is_object(), "{faults:?} in {document}");
        return;
    }

    // From the last item of a list to the first, because removing an item shifts those after it.
    pointers.sort_by_key(|pointer| std::cmp::Reverse(document_order(pointer)));
    pointers.dedup();
    for pointer in pointers {
        remove(&mut mended, pointer);
    }

    assert!(
        validate(mended.clone()).is_ok(),
        "{faults:?} in {document} hid {:?} in {mended}",
        validate(mended.clone()).err()
    );
}

/// Returns the pointer to remove so that the error disappears.
///
/// For a missing required field that is the object that requires it.
fn removable_path<'f>(document: &Value, fault: &'f InvalidField) -> &'f str {
    let pointer = &fault.pointer;
    let escapes = pointer
        .match_indices('~')
        .all(|(at, _)| matches!(pointer.as_bytes().get(at + 1), Some(b'0' | b'1')));
    assert!(
        escapes && (pointer.is_empty() || pointer.starts_with('/')),
        "{fault:?} is at no pointer"
    );
    assert!(
        !fault.reason.is_empty() && fault.reason.is_ascii(),
        "{fault:?}"
    );

    let Some((parent, name)) = pointer.rsplit_once('/') else {
        return pointer;
    };
    let is_required = match name {
        "state" | "timestamp" => parent.starts_with("/status/states/"),
        "type" => parent.ends_with("/planCredit"),
        _ => false,
    };
    let there = if is_required { parent } else { pointer };
    assert!(
        document.pointer(there).is_some(),
        "{fault:?} leads nowhere in {document}"
    );

    there
}

/// Returns a key that sorts pointers by their position in a document.
fn document_order(pointer: &str) -> Vec<Result<usize, &str>> {
    pointer
        .split('/')
        .map(|part| part.parse().map_err(|_| part))
        .collect()
}

fn remove(document: &mut Value, pointer: &str) {
    let Some((parent, name)) = pointer.rsplit_once('/') else {
        return;
    };

    match document.pointer_mut(parent) {
        Some(Value::Object(fields)) => {
            drop(fields.shift_remove(&name.replace("~1", "/").replace("~0", "~")))
        }
        Some(Value::Array(items)) => {
            let index: usize = name.parse().expect("an item is named by its index");
            if index < items.len() {
                items.remove(index);
            }
        }
        // Removed together with its parent.
        _ => {}
    }
}

/// Checks which uids the path and the document may have.
fn check_name(document: Value) {
    let own = document
        .pointer("/metadata/uid")
        .and_then(Value::as_str)
        .map(str::to_owned);
    let is_valid = validate(document.clone()).is_ok();

    match new_invoice("acme", None, document.clone()) {
        Ok(new) => assert!(is_valid && Some(&new.invoice_uid) == own.as_ref()),
        Err(faults) => assert!(
            !faults.is_empty()
                && (!is_valid || faults.iter().all(|f| f.pointer == "/metadata/uid"))
        ),
    }

    let named = new_invoice("acme", Some("inv-1"), document);
    assert_eq!(
        named.is_ok(),
        is_valid && own.is_none_or(|own| own == "inv-1")
    );
}

/// A client that decodes as strictly as possible: integers are written as integers, and nothing is
/// null.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "that it can be read is all that is asked")]
struct V1Invoice {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    status: Status,
}

/// Reads a present value. `null` is an error.
fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Defines structs whose fields may all be absent.
macro_rules! strict {
    ($($name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[derive(Deserialize, Default)]
            #[serde(rename_all = "camelCase")]
            #[allow(dead_code, reason = "that it can be read is all that is asked")]
            struct $name {
                $(#[serde(default, deserialize_with = "present")] $field: Option<$type>,)*
            }
        )*
    };
}

strict! {
    Metadata {
        annotations: std::collections::HashMap<String, String>,
        creation_timestamp: Time,
        deletion_timestamp: Time,
        labels: std::collections::HashMap<String, String>,
        last_modified_timestamp: Time,
        name: String,
        uid: String,
    }
    Spec {
        address: Address,
        billing_period: BillingPeriod,
        credits: Credits,
        env_type: String,
        month: Time,
        payment_unit: PaymentUnit,
        plan: Plan,
    }
    Address { address_line1: String, address_line2: String, city: String, country: String, pincode: String, state: String, }
    BillingPeriod { end: Time, start: Time, }
    Credits { alloy_free_credits: i64, pure_free_credits: i64, }
    Plan { free_credits: Vec<PlanCreditUse>, plantype: PlanType, sla_credits: Vec<PlanCreditUse>, }
    PlanCreditUse { plan_credit: PlanCredit, total_cpu_core_hours: i64, }
    Status {
        billable_amount: f64,
        product_invoice: Products,
        projects: Vec<Project>,
        states: Vec<PaymentState>,
        stripe_invoice_id: String,
    }
    Products { alloy: Product, pure: Product, }
    Product {
        allocated_credits: i64,
        amount: f64,
        billable_credits: f64,
        breached_credits: f64,
        discount: i64,
        free_credits: i64,
        overage_limit_percentage: i8,
        tier_name: String,
        tier_price: f64,
        total_used_credits: f64,
        used_credits: f64,
    }
    Project { amount: f64, project_name: String, project_uid: String, usage: ProjectUsage, }
    ProjectUsage { alloy: Usage, pure: Usage, }
    Usage { amount: f64, tier_price: f64, used_credits: f64, }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "that it can be read is all that is asked")]
struct PlanCredit {
    r#type: CreditType,
    #[serde(default, deserialize_with = "present")]
    cpu_core_hours: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    credit_uid: Option<String>,
    #[serde(default, deserialize_with = "present")]
    expiry: Option<Time>,
    #[serde(default, deserialize_with = "present")]
    name: Option<String>,
    #[serde(default, deserialize_with = "present")]
    start: Option<Time>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "that it can be read is all that is asked")]
struct PaymentState {
    state: PaymentStateName,
    timestamp: Time,
    #[serde(default, deserialize_with = "present")]
    payment_msg: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum PaymentUnit {
    Usd,
}

#[derive(Deserialize)]
enum PlanType {
    Trial,
    MonthlyOnDemand,
    AnnualSubscription,
}

#[derive(Deserialize)]
enum CreditType {
    Pure,
    Alloy,
}

#[derive(Deserialize)]
enum PaymentStateName {
    Paid,
    PaymentPending,
    PaymentInProgress,
    PaymentFailed,
}

/// A time in the form `2026-01-31T09:15:00.000Z` and in no other.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Time;

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Time, String> {
        let fits = |(byte, shape): (u8, u8)| {
            if shape == b'0' {
                byte.is_ascii_digit()
            } else {
                byte == shape
            }
        };
        let is_time = text.len() == 24 && text.bytes().zip(*b"0000-00-00T00:00:00.000Z").all(fits);

        if is_time {
            Ok(Time)
        } else {
            Err(format!("{text} is no time"))
        }
    }
}

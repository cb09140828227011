//! The schema of a `v1Invoice`: one description of each field drives both validation and
//! normalisation.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::domain::time::{parse_time, timestamp};

/// An invalid field of a document: its JSON pointer (RFC 6901) and the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InvalidField {
    pub pointer: String,
    pub reason: String,
}

/// Checks the uid of a tenant or an invoice, as it appears in a path.
///
/// # Errors
/// Returns the reason why the uid is invalid, to be appended to the name of the parameter.
pub fn validate_uid(uid: &str) -> Result<(), String> {
    match uid {
        "" => Err("is empty".to_owned()),
        uid if uid.len() > 255 => Err("is longer than 255 bytes".to_owned()),
        uid if uid.chars().any(char::is_control) => Err("holds control characters".to_owned()),
        _ => Ok(()),
    }
}

/// Reports every invalid field of a document, and normalises the valid ones.
pub fn check_invoice(document: &mut Value, faults: &mut Vec<InvalidField>) {
    check(document, &Kind::Object(&INVOICE), "", faults);
    check_names(document, "", faults);
}

/// Field name that serde_json reserves. It parses an object whose first field has this name as the
/// text of another document.
const RAW_VALUE_NAME: &str = "$serde_json::private::RawValue";

/// Reports fields, at any depth, whose name would make the stored document unreadable or change it.
fn check_names(value: &Value, pointer: &str, faults: &mut Vec<InvalidField>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let here = child(pointer, name);
                check_names(field, &here, faults);
                if name == RAW_VALUE_NAME {
                    faults.push(InvalidField {
                        pointer: here,
                        reason: "has a name that cannot be stored".to_owned(),
                    });
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check_names(item, &format!("{pointer}/{index}"), faults);
            }
        }
        _ => {}
    }
}

/// The type of a field.
enum Kind {
    Text,
    /// An id at Stripe: non-empty text of at most 255 bytes without control characters.
    Id,
    OneOf(&'static [&'static str]),
    Time,
    /// A whole number within these bounds, both included.
    Whole(i64, i64),
    Number,
    TextMap,
    List(&'static Kind),
    Object(&'static Shape),
}

struct Shape {
    fields: &'static [(&'static str, Kind)],
    required: &'static [&'static str],
}

const fn shape(fields: &'static [(&'static str, Kind)]) -> Shape {
    Shape {
        fields,
        required: &[],
    }
}

const INT64: Kind = Kind::Whole(i64::MIN, i64::MAX);
const INT8: Kind = Kind::Whole(-128, 127);

static INVOICE: Shape = shape(&[
    ("metadata", Kind::Object(&METADATA)),
    ("spec", Kind::Object(&SPEC)),
    ("status", Kind::Object(&STATUS)),
]);

static METADATA: Shape = shape(&[
    ("annotations", Kind::TextMap),
    ("creationTimestamp", Kind::Time),
    ("deletionTimestamp", Kind::Time),
    ("labels", Kind::TextMap),
    ("lastModifiedTimestamp", Kind::Time),
    ("name", Kind::Text),
    ("uid", Kind::Text),
]);

static SPEC: Shape = shape(&[
    ("address", Kind::Object(&ADDRESS)),
    ("billingPeriod", Kind::Object(&BILLING_PERIOD)),
    ("credits", Kind::Object(&CREDITS)),
    ("envType", Kind::Text),
    ("month", Kind::Time),
    ("paymentUnit", Kind::OneOf(&["usd"])),
    ("plan", Kind::Object(&PLAN)),
]);

static ADDRESS: Shape = shape(&[
    ("addressLine1", Kind::Text),
    ("addressLine2", Kind::Text),
    ("city", Kind::Text),
    ("country", Kind::Text),
    ("pincode", Kind::Text),
    ("state", Kind::Text),
]);

static BILLING_PERIOD: Shape = shape(&[("end", Kind::Time), ("start", Kind::Time)]);

static CREDITS: Shape = shape(&[("alloyFreeCredits", INT64), ("pureFreeCredits", INT64)]);

static PLAN: Shape = shape(&[
    ("freeCredits", Kind::List(&Kind::Object(&PLAN_CREDIT_USE))),
    (
        "plantype",
        Kind::OneOf(&["Trial", "MonthlyOnDemand", "AnnualSubscription"]),
    ),
    ("slaCredits", Kind::List(&Kind::Object(&PLAN_CREDIT_USE))),
]);

static PLAN_CREDIT_USE: Shape = shape(&[
    ("planCredit", Kind::Object(&PLAN_CREDIT)),
    ("totalCpuCoreHours", INT64),
]);

static PLAN_CREDIT: Shape = Shape {
    fields: &[
        ("cpuCoreHours", INT64),
        ("creditUid", Kind::Text),
        ("expiry", Kind::Time),
        ("name", Kind::Text),
        ("start", Kind::Time),
        ("type", Kind::OneOf(&["Pure", "Alloy"])),
    ],
    required: &["type"],
};

static STATUS: Shape = shape(&[
    ("billableAmount", Kind::Number),
    ("productInvoice", Kind::Object(&PRODUCTS)),
    ("projects", Kind::List(&Kind::Object(&PROJECT))),
    ("states", Kind::List(&Kind::Object(&STATE))),
    ("stripeInvoiceId", Kind::Id),
]);

static PRODUCTS: Shape = shape(&[
    ("alloy", Kind::Object(&PRODUCT)),
    ("pure", Kind::Object(&PRODUCT)),
]);

static PRODUCT: Shape = shape(&[
    ("allocatedCredits", INT64),
    ("amount", Kind::Number),
    ("billableCredits", Kind::Number),
    ("breachedCredits", Kind::Number),
    ("discount", INT64),
    ("freeCredits", INT64),
    ("overageLimitPercentage", INT8),
    ("tierName", Kind::Text),
    ("tierPrice", Kind::Number),
    ("totalUsedCredits", Kind::Number),
    ("usedCredits", Kind::Number),
]);

static PROJECT: Shape = shape(&[
    ("amount", Kind::Number),
    ("projectName", Kind::Text),
    ("projectUid", Kind::Text),
    ("usage", Kind::Object(&PROJECT_USAGE)),
]);

static PROJECT_USAGE: Shape = shape(&[
    ("alloy", Kind::Object(&USAGE)),
    ("pure", Kind::Object(&USAGE)),
]);

static USAGE: Shape = shape(&[
    ("amount", Kind::Number),
    ("tierPrice", Kind::Number),
    ("usedCredits", Kind::Number),
]);

static STATE: Shape = Shape {
    fields: &[
        ("paymentMsg", Kind::Text),
        (
            "state",
            Kind::OneOf(&[
                "Paid",
                "PaymentPending",
                "PaymentInProgress",
                "PaymentFailed",
            ]),
        ),
        ("timestamp", Kind::Time),
    ],
    required: &["state", "timestamp"],
};

/// Reports an invalid `value`, and normalises a valid one.
fn check(value: &mut Value, kind: &Kind, pointer: &str, faults: &mut Vec<InvalidField>) {
    let reason = match kind {
        Kind::Object(shape) => match value {
            Value::Object(fields) => return check_fields(fields, shape, pointer, faults),
            _ => "must be an object".to_owned(),
        },
        Kind::List(item) => match value {
            Value::Array(items) => {
                for (index, value) in items.iter_mut().enumerate() {
                    check(value, item, &format!("{pointer}/{index}"), faults);
                }
                return;
            }
            _ => "must be a list".to_owned(),
        },
        Kind::TextMap => match value {
            Value::Object(fields) => {
                for (name, _) in fields.iter().filter(|(_, value)| !value.is_string()) {
                    faults.push(InvalidField {
                        pointer: child(pointer, name),
                        reason: "must be a string".to_owned(),
                    });
                }
                return;
            }
            _ => "must be an object of strings".to_owned(),
        },
        Kind::Time => match value.as_str().map(parse_time) {
            Some(Ok(ms)) => return *value = timestamp(ms).into(),
            Some(Err(reason)) => reason,
            None => "must be a date-time (RFC 3339) in a string".to_owned(),
        },
        Kind::Whole(first, last) => match whole(value) {
            Some(number) if (*first..=*last).contains(&number) => return *value = number.into(),
            _ => format!("must be a whole number from {first} to {last}"),
        },
        Kind::Text if value.is_string() => return,
        Kind::Text => "must be a string".to_owned(),
        Kind::Number if value.is_number() => return,
        Kind::Number => "must be a number".to_owned(),
        Kind::OneOf(words) if value.as_str().is_some_and(|text| words.contains(&text)) => return,
        Kind::OneOf(words) => format!("must be one of {}", words.join(", ")),
        Kind::Id => match value.as_str().map(validate_uid) {
            Some(Ok(())) => return,
            Some(Err(reason)) => reason,
            None => "must be a string".to_owned(),
        },
    };

    faults.push(InvalidField {
        pointer: pointer.to_owned(),
        reason,
    });
}

fn check_fields(
    fields: &mut Map<String, Value>,
    shape: &Shape,
    pointer: &str,
    faults: &mut Vec<InvalidField>,
) {
    for (name, kind) in shape.fields {
        match fields.get_mut(*name) {
            // Remove null: strict clients cannot decode it, and an absent field has the same
            // meaning.
            Some(Value::Null) => drop(fields.shift_remove(*name)),
            Some(value) => check(value, kind, &child(pointer, name), faults),
            None => {}
        }
    }

    for name in shape
        .required
        .iter()
        .filter(|name| !fields.contains_key(**name))
    {
        faults.push(InvalidField {
            pointer: child(pointer, name),
            reason: "is required".to_owned(),
        });
    }
}

fn child(pointer: &str, name: &str) -> String {
    format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// Parses a whole number, written as `2500` or `2500.0`.
fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let float = value.as_f64().filter(|_| value.is_f64())?;
        (float.fract() == 0.0 && float.abs() < 9.2e18).then_some(float as i64)
    })
}

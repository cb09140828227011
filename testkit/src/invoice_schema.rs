//! The requirement on every answer with an invoice: a `v1Invoice` that a strict client can decode.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

/// The JSON Schema of a `v1Invoice`.
pub const V1_INVOICE_SCHEMA: &str = include_str!("v1_invoice.schema.json");

/// Validator for the facts of the API's schema, which the file states in our own layout.
static V1_INVOICE: LazyLock<Validator> = LazyLock::new(|| {
    let schema: Value = serde_json::from_str(V1_INVOICE_SCHEMA).unwrap();
    jsonschema::options()
        .should_validate_formats(true)
        .build(&schema)
        .unwrap()
});

/// Integer fields. JSON Schema accepts `2500.0` as an integer; a client that decodes into `int64`
/// does not.
const INTEGERS: [&str; 8] = [
    "allocatedCredits",
    "alloyFreeCredits",
    "cpuCoreHours",
    "discount",
    "freeCredits",
    "overageLimitPercentage",
    "pureFreeCredits",
    "totalCpuCoreHours",
];

#[track_caller]
pub fn assert_is_invoice(text: &str) -> Value {
    let invoice: Value =
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"));
    let faults: Vec<String> = V1_INVOICE
        .iter_errors(&invoice)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(faults.is_empty(), "{faults:#?} in {text}");

    for name in INTEGERS {
        for (at, field) in text.match_indices(&format!("\"{name}\":")) {
            let value = text[at + field.len()..].trim_start();
            let written = &value[..value.find([',', '}', '\n']).unwrap()];
            // A plan has a list under the name of a product's number.
            let is_integer = written.parse::<i64>().is_ok() || written.starts_with('[');
            assert!(is_integer, "{name} is written as {written}");
        }
    }

    invoice
}

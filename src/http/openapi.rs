//! The OpenAPI document of the HTTP interface. `openapi.json` is written by hand;
//! `tests/api/openapi.rs` and `tests/schemathesis` check the file against the code.
//!
//! The schema of an invoice to store is derived here from the schema of an invoice in a response:
//! absent fields may be `null`, and times may have any offset.

use std::sync::LazyLock;

use axum::http::{HeaderName, header};
use serde_json::{Map, Value, json};

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut document: Value =
        serde_json::from_str(include_str!("openapi.json")).expect("a test parses the file");
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();

    let answered = document["components"]["schemas"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    let stored = answered
        .iter()
        .filter_map(|(name, schema)| Some((input_name(name)?, input(schema))));
    document["components"]["schemas"] = answered
        .clone()
        .into_iter()
        .chain(stored)
        .collect::<Map<String, Value>>()
        .into();
    serde_json::to_string_pretty(&document).expect("a JSON value always serialises")
});

/// Pattern of a time in a request: RFC 3339 with any offset and any number of fractional digits.
const TIME: &str = concat!(
    "^(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]+)?",
    "([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
);
/// Fields that are required in responses and optional in requests.
const ALWAYS_ANSWERED: [&str; 2] = ["status", "states"];

/// Returns the document as JSON.
pub fn document() -> &'static str {
    &DOCUMENT
}

/// Answers `GET /openapi.json`.
pub async fn read() -> ([(HeaderName, &'static str); 2], &'static str) {
    (
        [
            (header::CONTENT_TYPE, "application/json"),
            (header::CACHE_CONTROL, "no-cache"),
        ],
        document(),
    )
}

/// Returns the name of a part of an invoice in requests, or `None` if the schema is not such a
/// part.
fn input_name(answered: &str) -> Option<String> {
    answered
        .strip_prefix("v1")
        .map(|part| format!("{part}Input"))
}

/// Returns the schema of a part of an invoice in requests.
fn input(answered: &Value) -> Value {
    if answered["format"] == "date-time" {
        let example = "2026-01-31T09:15:00Z";
        return json!({
            "type": "string",
            "format": "date-time",
            "pattern": TIME,
            "examples": [example],
        });
    }

    if let Some(name) = answered["$ref"]
        .as_str()
        .and_then(|path| input_name(path.rsplit('/').next()?))
    {
        return json!({"$ref": format!("#/components/schemas/{name}")});
    }

    let mut schema = answered.clone();
    let Some(fields) = schema.as_object_mut() else {
        return schema;
    };

    if let Some(items) = fields.get_mut("items") {
        *items = input(items);
    }

    let mut required = fields
        .get("required")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    required.retain(|name| !ALWAYS_ANSWERED.iter().any(|always| name == always));
    if let Some(properties) = fields.get_mut("properties").and_then(Value::as_object_mut) {
        for (name, property) in properties.iter_mut() {
            *property = if required.iter().any(|required| required == name) {
                input(property)
            } else {
                or_null(property)
            };
        }
    }

    fields.remove("required");
    if !required.is_empty() {
        fields.insert("required".to_owned(), required.into());
    }

    schema
}

/// Returns the schema of an optional field, which also accepts `null` as absent.
fn or_null(answered: &Value) -> Value {
    let mut schema = json!({"anyOf": [input(answered), {"type": "null"}]});
    for name in ["description", "readOnly"] {
        if let Some(value) = answered.get(name) {
            schema[name] = value.clone();
            schema["anyOf"][0]
                .as_object_mut()
                .map(|inner| inner.remove(name));
        }
    }
    schema
}

//! The OpenAPI document compared with the program: nothing is missing, and nothing in it is wrong.
//!
//! `testkit::openapi` checks the answers of all other tests against it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use testkit::each_database;
use testkit::invoice_path;
use testkit::openapi::{DOCUMENT, faults, resolved};

const ROUTER: &str = include_str!("../../src/http/mod.rs");
const ERRORS: &str = include_str!("../../src/http/error.rs");
const V1_INVOICE: &str = testkit::V1_INVOICE_SCHEMA;
/// Undocumented paths: their last id is empty, and they are always rejected.
const REFUSED: [&str; 2] = ["/v1/tenants/{tenantUid}/invoices/", "/v1/events/"];

fn paths() -> &'static serde_json::Map<String, Value> {
    DOCUMENT["paths"].as_object().unwrap()
}

/// Returns every text between the two markers.
fn between<'a>(text: &'a str, before: &str, after: &str) -> BTreeSet<&'a str> {
    text.split(before)
        .skip(1)
        .map(|rest| rest.split(after).next().unwrap())
        .collect()
}

/// The source with each opening parenthesis on the line of its first argument.
fn unwrapped(source: &str) -> String {
    let words: Vec<&str> = source.split_whitespace().collect();
    words.join(" ").replace("( ", "(")
}

#[test]
fn document_lists_exactly_the_routes() {
    let router = unwrapped(ROUTER);
    let routes = between(&router, ".route(\"", "\"");
    assert!(routes.len() > 8, "{routes:?}");
    let documented: BTreeSet<&str> = paths().keys().map(String::as_str).chain(REFUSED).collect();
    assert_eq!(routes, documented);
}

#[test]
fn document_lists_exactly_the_error_codes() {
    let errors = unwrapped(ERRORS);
    let source = errors
        .split("fn code_and_message")
        .nth(1)
        .and_then(|rest| rest.split("fn details").next())
        .unwrap();
    let codes = between(source, "(\"", "\"");
    assert!(
        codes.len() > 12 && codes.contains("InvalidInvoice"),
        "{codes:?}"
    );

    let documented = DOCUMENT["components"]["schemas"]["Error"]["properties"]["code"]["enum"]
        .as_array()
        .unwrap();
    assert_eq!(
        codes,
        documented
            .iter()
            .map(|code| code.as_str().unwrap())
            .collect()
    );
}

/// Collects every example with its schema and its path.
fn examples<'a>(
    part: &'a Value,
    location: String,
    found: &mut Vec<(String, &'a Value, &'a Value)>,
) {
    if let Some(schema) = part.get("schema") {
        found.extend(
            part.get("example")
                .map(|example| (location.clone(), schema, example)),
        );
        let named = part["examples"].as_object().into_iter().flatten();
        found.extend(
            named.map(|(name, example)| (format!("{location}/{name}"), schema, &example["value"])),
        );
    }

    if let Some(values) = part["examples"]
        .as_array()
        .filter(|_| part["type"].is_string())
    {
        found.extend(values.iter().map(|value| (location.clone(), part, value)));
    }
    let inside: Vec<(String, &Value)> = match part {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, inner)| (name.replace('/', "~1"), inner))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, inner)| (index.to_string(), inner))
            .collect(),
        _ => return,
    };

    for (name, inner) in inside {
        examples(inner, format!("{location}/{name}"), found);
    }
}

#[test]
fn every_answer_has_an_example_that_fits_its_schema() {
    let mut found = Vec::new();
    examples(&DOCUMENT, String::new(), &mut found);
    assert!(found.len() > 40, "{}", found.len());

    for (location, schema, example) in &found {
        let faults = faults(schema, example);
        assert!(faults.is_empty(), "{location}: {faults:?}");
    }

    for (path, item) in paths() {
        for operation in item
            .as_object()
            .unwrap()
            .values()
            .filter(|operation| operation.is_object())
        {
            for (status, response) in operation["responses"].as_object().unwrap() {
                for content in resolved(response)["content"]
                    .as_object()
                    .into_iter()
                    .flat_map(|contents| contents.values())
                {
                    assert!(
                        content.get("example").is_some() || content.get("examples").is_some(),
                        "{path} {status}: {content}"
                    );
                }
            }
        }
    }
}

/// Collects the allowed values of each field of an invoice by its path.
fn fields(schema: &Value, root: &Value, path: &str, found: &mut BTreeMap<String, String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        return fields(
            root.pointer(reference.trim_start_matches('#')).unwrap(),
            root,
            path,
            found,
        );
    }

    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        fields(field, root, &format!("{path}/{name}"), found);
    }

    if let Some(items) = schema.get("items") {
        return fields(items, root, &format!("{path}/*"), found);
    }

    let kind = match schema {
        _ if schema.get("enum").is_some() => schema["enum"].to_string(),
        _ if schema.get("properties").is_some() => return,
        _ if schema.get("additionalProperties").is_some() => {
            format!("map of {}", schema["additionalProperties"])
        }
        _ => {
            let time = if schema["format"] == "date-time" {
                "date-time"
            } else {
                ""
            };
            format!(
                "{} {time} {} {}",
                schema["type"], schema["minimum"], schema["maximum"]
            )
        }
    };

    found.insert(path.to_owned(), kind);
}

#[test]
fn documented_invoice_has_the_fields_of_its_schema() {
    let of_the_api: Value = serde_json::from_str(V1_INVOICE).unwrap();
    let (mut expected, mut found) = (BTreeMap::new(), BTreeMap::new());
    fields(&of_the_api, &of_the_api, "", &mut expected);
    fields(
        &DOCUMENT["components"]["schemas"]["v1Invoice"],
        &DOCUMENT,
        "",
        &mut found,
    );

    assert!(expected.len() > 50, "{}", expected.len());
    assert_eq!(found, expected);
}

/// Returns documents at the limits of validity, on both sides.
fn documents() -> Vec<Value> {
    let time = |time: &str| json!({"spec": {"month": time}});
    let mut documents: Vec<Value> = include_str!("../../fixtures/invoices.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    documents.extend(
        [
            "2026-01-31T09:15:00Z",
            "2026-01-31t09:15:00.123456789123z",
            "2026-01-31T09:15:00-23:59",
            "2026-01-31",
            "0000-01-01T00:00:00Z",
        ]
        .map(time),
    );

    documents.extend(
        [
            "2026-01-31T09:15:60Z",
            "2026-01-31T09:15:00",
            "2026-02-30T09:15:00Z",
            "2026-01-31T24:00:00Z",
            "",
        ]
        .map(time),
    );
    documents.extend([
        json!({}),
        json!(null),
        json!([]),
        json!("x"),
        json!({"unknown": {"a": [null]}}),
        json!({"metadata": null, "spec": null, "status": null}),
        json!({"metadata": {"name": null, "labels": null, "annotations": {"a": "b"}}}),
        json!({"metadata": {"labels": {"a": null}}}),
        json!({"metadata": {"labels": {"a": 1}}}),
        json!({"metadata": []}),
        json!({"metadata": {"name": 1}}),
        json!({"spec": {"paymentUnit": "eur"}}),
        json!({"spec": {"credits": {"pureFreeCredits": 2500.0, "alloyFreeCredits": i64::MIN}}}),
        json!({"spec": {"credits": {"pureFreeCredits": 1.5}}}),
        json!({"spec": {"credits": {"pureFreeCredits": u64::MAX}}}),
        json!({"spec": {"plan": {"freeCredits": [null]}}}),
        json!({"spec": {"plan": {"freeCredits": [{"planCredit": {}}]}}}),
        json!({"spec": {"plan": {"freeCredits": [{"planCredit": {"type": null}}]}}}),
        json!({"spec": {"plan": {"freeCredits": [{"planCredit": {"type": "Pure", "expiry": null}}, {"planCredit": null}]}}}),
        json!({"status": {"productInvoice": {"pure": {"overageLimitPercentage": 127}}}}),
        json!({"status": {"productInvoice": {"pure": {"overageLimitPercentage": 128}}}}),
        json!({"status": {"billableAmount": -1e300}}),
        json!({"status": {"billableAmount": "1"}}),
        json!({"status": {"stripeInvoiceId": ""}}),
        json!({"status": {"stripeInvoiceId": "in_\n"}}),
        json!({"status": {"stripeInvoiceId": "x".repeat(256)}}),
        json!({"status": {"states": null}}),
        json!({"status": {"states": [{"state": "Paid", "timestamp": "2026-01-31T09:15:00+01:00", "paymentMsg": null}]}}),
        json!({"status": {"states": [{"state": "Paid"}]}}),
        json!({"status": {"states": [{"state": "Paid", "timestamp": null}]}}),
        json!({"status": {"states": [{"state": "paid", "timestamp": "2026-01-31T09:15:00Z"}]}}),
        json!({"status": {"projects": [{"usage": {"pure": {"amount": null}}}]}}),
    ]);

    documents
}

each_database! {
    async fn every_path_accepts_exactly_the_documented_methods(server: TestServer) {
        for (path, item) in paths() {
            let methods = item
                .as_object()
                .unwrap()
                .keys()
                .filter(|name| *name != "parameters")
                .map(|name| name.to_uppercase());
            let documented: BTreeSet<String> = methods
                .flat_map(|method| {
                    if method == "GET" {
                        vec![method, "HEAD".to_owned()]
                    } else {
                        vec![method]
                    }
                })
                .collect();
            let path = path.replace(['{', '}'], "");
            let answer = server
                .send("BREW", &path, &[("ApiKey", &server.operator_key)], vec![])
                .await
                .with_error(405, "MethodNotAllowed");
            assert_eq!(
                answer
                    .header("allow")
                    .split(',')
                    .map(str::to_owned)
                    .collect::<BTreeSet<_>>(),
                documented,
                "{path}"
            );
        }
    }

    async fn document_is_public_and_printed_by_command(server: TestServer) {
        let answer = server
            .send("GET", "/openapi.json", &[], vec![])
            .await
            .with_status(200);
        assert_eq!(answer.header("content-type"), "application/json");

        let document = answer.json();
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));

        let printed = testkit::run(&[], &["openapi"], b"").with_code(0);
        assert_eq!(printed.stdout.trim_end().as_bytes(), answer.body);

        server
            .send("HEAD", "/openapi.json", &[], vec![])
            .await
            .with_status(200);
    }

    async fn put_accepts_exactly_what_the_document_allows(server: TestServer) {
        let schema = json!({"$ref": "#/components/schemas/InvoiceInput"});
        let (mut stored, mut refused) = (0, 0);
        for (n, mut document) in documents().into_iter().enumerate() {
            if let Some(metadata) = document.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.remove("uid");
            }
            let is_right = faults(&schema, &document).is_empty();
            let answer = server.put(&invoice_path(&format!("{n}")), &document).await;
            assert_eq!(
                answer.status.is_success(),
                is_right,
                "{document} is answered {answer:?}"
            );
            (stored, refused) = (
                stored + usize::from(is_right),
                refused + usize::from(!is_right),
            );
        }

        assert!(
            stored > 15 && refused > 15,
            "{stored} stored, {refused} refused"
        );
    }
}

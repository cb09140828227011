//! Checks every answer in a test against the OpenAPI document.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use jsonschema::Validator;
use serde_json::{Value, json};
use stripe_reconciler::http::openapi;

use super::Answer;

pub static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(openapi::document()).unwrap());
static VALIDATORS: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);

/// Follows the `$ref` of a part of the document.
pub fn resolved(part: &Value) -> &Value {
    match part["$ref"].as_str() {
        Some(path) => resolved(
            DOCUMENT
                .pointer(path.trim_start_matches('#'))
                .unwrap_or_else(|| panic!("{path} leads nowhere")),
        ),
        None => part,
    }
}

/// Returns the violations of a schema of the document.
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let name = schema.to_string();
    let known = VALIDATORS.lock().unwrap().get(&name).cloned();
    let validator = known.unwrap_or_else(|| {
        let whole = json!({"allOf": [schema], "components": DOCUMENT["components"]});
        let built = jsonschema::options()
            .should_validate_formats(true)
            .build(&whole);
        let built = Arc::new(built.unwrap_or_else(|error| panic!("{error} in {schema}")));
        VALIDATORS.lock().unwrap().insert(name, built.clone());
        built
    });

    validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect()
}

/// Asserts that status, headers and body of an answer are documented for this method and path.
#[track_caller]
pub fn assert_documented(method: &str, path: &str, answer: &Answer) {
    let path = path.split('?').next().unwrap();
    let context = || format!("{method} {path} is answered {} {answer:?}", answer.status);
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let operation = paths
        .iter()
        .find(|(template, _)| fits(template, path))
        .map(|(_, item)| item)
        .map(|item| {
            let method = if method == "HEAD" {
                "get".to_owned()
            } else {
                method.to_ascii_lowercase()
            };
            item.get(method)
        });

    let undocumented = |status: u16, code: &str| {
        assert_eq!(answer.status, status, "{}", context());
        assert!(
            method == "HEAD" || answer.json()["code"] == code,
            "{}",
            context()
        );
    };
    let operation = match operation {
        None => return undocumented(404, "ResourceNotFound"),
        Some(None) => return undocumented(405, "MethodNotAllowed"),
        Some(Some(operation)) => operation,
    };
    let response = operation["responses"]
        .get(answer.status.as_str())
        .unwrap_or_else(|| panic!("undocumented: {}", context()));

    let response = resolved(response);
    for (name, header) in response["headers"].as_object().into_iter().flatten() {
        let header = resolved(header);
        let value = answer
            .headers
            .get(name)
            .map(|value| value.to_str().unwrap());
        assert!(
            value.is_some() || header["required"] != true,
            "{name} is missing: {}",
            context()
        );
        if header["schema"]["type"] == "string" {
            let faults = value
                .map(|value| faults(&header["schema"], &json!(value)))
                .unwrap_or_default();
            assert!(faults.is_empty(), "{name}: {faults:?}: {}", context());
        }
    }

    if method == "HEAD" || answer.headers.contains_key("content-encoding") {
        return;
    }

    let Some(contents) = response["content"].as_object() else {
        return assert!(answer.body.is_empty(), "a body: {}", context());
    };
    let media_type = answer.header("content-type").split(';').next().unwrap();
    let content = contents
        .get(media_type)
        .unwrap_or_else(|| panic!("another content: {}", context()));

    if media_type == "application/json" {
        let faults = faults(&content["schema"], &answer.json());
        assert!(faults.is_empty(), "{faults:#?}: {}", context());
    }
}

fn fits(template: &str, path: &str) -> bool {
    let (template, path): (Vec<&str>, Vec<&str>) =
        (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template
            .iter()
            .zip(&path)
            .all(|(wanted, is)| wanted.starts_with('{') || wanted == is)
}

//! Any request, through the program's own router with a database behind it: nothing panics, nothing fails on our side, an error
//! is said in the form that is promised, and what was accepted can be shown everywhere afterwards.
//!
//! An input is a request: `GET /v1/events?limit=1`, lines of headers, an empty line, a body.

use std::sync::{Mutex, PoisonError};

use hyper::header::{ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName};
use hyper::{Method, Uri};
use serde_json::Value;

use super::world::{ACME_KEY, Answer, Asked, OPERATOR_KEY, SECRET, World, parse};

/// What may be answered: never a failure of ours, which a panic would be too.
const STATUSES: [u16; 12] = [200, 201, 303, 304, 400, 401, 403, 404, 405, 409, 412, 413];
const REQUEST_ID: &str = "x-request-id";
/// Pages of a list that are followed.
const PAGES: usize = 100;

/// In the one world of the process.
pub fn check(input: &[u8]) {
    static WORLD: Mutex<Option<World>> = Mutex::new(None);
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    check_in(world.get_or_insert_with(World::start), input);
}

pub fn check_in(world: &mut World, input: &[u8]) {
    let Some(asked) = parse(input, world) else {
        return;
    };
    let (method, target) = (asked.method.clone(), asked.target.clone());
    let is_shown = [&asked.body[..], target.to_string().as_bytes()].concat();
    let answer = world.ask(asked);
    check_answer(&method, &target, &answer);
    let holds = |text: &[u8]| {
        text.windows(SECRET.len())
            .any(|window| window == SECRET.as_bytes())
    };
    assert!(
        holds(&is_shown) || !holds(&answer.body),
        "{target} shows the secret"
    );
    let is_written =
        answer.status.is_success() && (method == Method::PUT || method == Method::POST);
    if is_written {
        match target.path() {
            "/webhooks/stripe" => check_events(world),
            path if path.starts_with("/v1/") => check_invoice(world, path),
            _ => {}
        }
    }
    // A look at the signs writes down how far it has read.
    let is_looked_at = ["/metrics", "/ui/alarms"].contains(&target.path());
    if is_written || is_looked_at {
        world.renew();
    }
}

fn check_answer(method: &Method, target: &Uri, answer: &Answer) {
    let told = || {
        format!(
            "{method} {target}: {} {:?} {:?}",
            answer.status,
            answer.headers,
            String::from_utf8_lossy(&answer.body)
        )
    };
    let status = answer.status.as_u16();
    assert!(STATUSES.contains(&status), "{}", told());
    assert!(header(answer, REQUEST_ID).len() == 36, "{}", told());
    assert!(
        status != 405 || answer.headers.contains_key(ALLOW),
        "{}",
        told()
    );
    if method == Method::HEAD || status == 304 {
        assert!(answer.body.is_empty(), "{}", told());
    } else if target.path() == "/ui" || target.path().starts_with("/ui/") {
        assert!(
            answer.headers.contains_key("content-security-policy"),
            "{}",
            told()
        );
        assert!(
            header(answer, "content-type").starts_with("text/"),
            "{}",
            told()
        );
    } else if answer.headers.contains_key(CONTENT_ENCODING) {
        assert_eq!(header(answer, "content-encoding"), "gzip");
    } else if status >= 400 {
        check_error(answer, &told());
    } else if target.path() != "/metrics" {
        assert!(
            answer.headers[CONTENT_TYPE] == "application/json" && json(answer).is_object(),
            "{}",
            told()
        );
    }
}

/// `{"code": ..., "message": ..., "details": {}, "ref": ...}`, and nothing else.
fn check_error(answer: &Answer, told: &str) {
    assert!(answer.headers[CONTENT_TYPE] == "application/json", "{told}");
    let error = json(answer);
    let names: Vec<&str> = error
        .as_object()
        .map(|fields| fields.keys().map(String::as_str).collect())
        .unwrap_or_default();
    assert_eq!(names, ["code", "message", "details", "ref"], "{told}");
    assert!(
        error["ref"] == header(answer, REQUEST_ID) && error["details"].is_object(),
        "{told}"
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| !message.is_empty() && message.len() < 200),
        "{told}"
    );
    let codes: &[&str] = match answer.status.as_u16() {
        400 => &[
            "InvalidPath",
            "InvalidQuery",
            "InvalidInvoice",
            "InvalidSignature",
            "InvalidBody",
        ],
        401 => &["Unauthorized"],
        403 => &["Forbidden"],
        404 => &["ResourceNotFound"],
        405 => &["MethodNotAllowed"],
        409 => &["StripeInvoiceTaken", "StripeInvoiceFixed"],
        412 => &["PreconditionFailed"],
        _ => &["PayloadTooLarge"],
    };
    assert!(
        error["code"]
            .as_str()
            .is_some_and(|code| codes.contains(&code)),
        "{told}"
    );
}

/// After a delivery: all lists, all that is shown of each event, and all invoices.
fn check_events(world: &mut World) {
    let mut ids = Vec::new();
    for outcome in ["", "&outcome=unmatched", "&outcome=unreadable"] {
        let events = pages(world, &format!("/v1/events?limit=500{outcome}"));
        ids.extend(
            events
                .iter()
                .flat_map(|event| [event["id"].clone(), event["key"].clone()]),
        );
    }
    ids.retain(|id| {
        id.as_str()
            .is_some_and(|id| id.len() <= 255 && !id.chars().any(char::is_control))
    });
    ids.dedup();
    for id in ids.iter().filter_map(Value::as_str).take(4) {
        let id = encoded(id.as_bytes());
        seen(world, &format!("/v1/events/{id}"));
        looked_at(world, &format!("/ui/event?id={id}"));
    }
    for page in [
        "/ui/events",
        "/ui/unreadable",
        "/ui/waiting",
        "/ui/alarms",
        "/ui",
    ] {
        looked_at(world, page);
    }
    seen(world, "/metrics");
    pages(world, "/v1/tenants/acme/invoices?limit=500");
}

/// After an invoice was stored: it, its evidence, its page, and the lists that it is in.
fn check_invoice(world: &mut World, path: &str) {
    let stored = json(&seen(world, path));
    assert!(stored["status"]["states"].is_array(), "{stored}");
    seen(world, &format!("{path}/evidence"));
    let parts: Vec<String> = path
        .split('/')
        .map(|part| encoded(&decoded(part)))
        .collect();
    let (tenant, uid) = (&parts[3], &parts[5]);
    looked_at(world, &format!("/ui/invoice?tenant={tenant}&uid={uid}"));
    for page in ["/ui", "/ui?state=none", "/ui/waiting"] {
        looked_at(world, page);
    }
    let listed = pages(world, &format!("/v1/tenants/{tenant}/invoices?limit=7"));
    assert!(listed.contains(&stored), "it stands in the list");
    // Put back as it was read, it is the same; unless two of its states are of the same kind and second, which no document may have.
    let answer = world.ask(asked(
        Method::PUT,
        path,
        "apikey",
        OPERATOR_KEY,
        stored.to_string(),
    ));
    assert!(
        answer.status != 200 || json(&answer) == stored,
        "{stored} became {}",
        json(&answer)
    );
    assert!(
        [200, 400].contains(&answer.status.as_u16()),
        "{path}: {}",
        answer.status
    );
}

/// All items of a list, page by page.
fn pages(world: &mut World, target: &str) -> Vec<Value> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    for _ in 0..PAGES {
        let page = json(&seen(world, &format!("{target}{cursor}")));
        items.extend(
            page["items"]
                .as_array()
                .expect("a page has items")
                .iter()
                .cloned(),
        );
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return items,
        }
    }
    panic!("{target} has no end");
}

/// What the operator is answered with 200.
fn seen(world: &mut World, target: &str) -> Answer {
    answered(world, target, "apikey", OPERATOR_KEY)
}

/// A page, in the operator's browser; and the tenant's sees something, too.
fn looked_at(world: &mut World, target: &str) {
    let cookie =
        |world: &World, key: &str| format!("stripe_reconciler_session={}", world.session(key));
    let operators = cookie(world, OPERATOR_KEY);
    answered(world, target, "cookie", &operators);
    let acmes = cookie(world, ACME_KEY);
    let answer = world.ask(asked(Method::GET, target, "cookie", &acmes, String::new()));
    assert!(
        [200, 403, 404].contains(&answer.status.as_u16()),
        "{target}: {}",
        answer.status
    );
}

fn answered(world: &mut World, target: &str, name: &'static str, value: &str) -> Answer {
    let answer = world.ask(asked(Method::GET, target, name, value, String::new()));
    let told = String::from_utf8_lossy(&answer.body);
    assert!(answer.status == 200, "{target}: {} {told}", answer.status);
    answer
}

fn asked(method: Method, target: &str, name: &'static str, value: &str, body: String) -> Asked {
    let mut headers = HeaderMap::new();
    headers.insert(
        HeaderName::from_static(name),
        value.parse().expect("it is a header value"),
    );
    Asked {
        method,
        target: target.parse().expect("it is a target"),
        headers,
        body: body.into(),
    }
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer
        .headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

fn json(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_default()
}

/// As a query takes it, in which `+` is no plus.
fn encoded(text: &[u8]) -> String {
    let spell = |byte: &u8| {
        if byte.is_ascii_alphanumeric() {
            char::from(*byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    text.iter().map(spell).collect()
}

fn decoded(text: &str) -> Vec<u8> {
    let (mut decoded, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((byte, after)) = rest.split_first() {
        let digits = after
            .first_chunk::<2>()
            .filter(|_| *byte == b'%')
            .and_then(|two| std::str::from_utf8(two).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(escaped.unwrap_or(*byte));
        rest = if escaped.is_some() {
            &after[2..]
        } else {
            after
        };
    }
    decoded
}

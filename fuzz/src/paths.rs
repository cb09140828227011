//! Checks of any request, sent through the program's router with a database behind it.
//!
//! Nothing panics and nothing fails on our side, errors have the documented form, and accepted data
//! can be shown everywhere afterwards.
//!
//! An input is a request: `GET /v1/events?limit=1`, header lines, an empty line, a body.

use std::sync::{Mutex, PoisonError};

use hyper::header::{ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName};
use hyper::{Method, Uri};
use serde_json::Value;

use super::program::{ACME_KEY, Answer, OPERATOR_KEY, Program, RawRequest, SECRET, parse};

/// Allowed status codes. A 5xx is a failure on our side, as a panic would be.
const STATUSES: [u16; 12] = [200, 201, 303, 304, 400, 401, 403, 404, 405, 409, 412, 413];
const REQUEST_ID: &str = "x-request-id";
/// Limit on the pages followed in a list.
const PAGES: usize = 100;

/// Checks an input in the process's shared world.
pub fn check(input: &[u8]) {
    static WORLD: Mutex<Option<Program>> = Mutex::new(None);
    let mut program = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    check_in(program.get_or_insert_with(Program::start), input);
}

pub fn check_in(program: &mut Program, input: &[u8]) {
    let Some(request) = parse(input, program) else {
        return;
    };
    let (method, target) = (request.method.clone(), request.target.clone());
    let is_shown = [&request.body[..], target.to_string().as_bytes()].concat();
    let answer = program.send(request);
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
            "/webhooks/stripe" => check_events(program),
            path if path.starts_with("/v1/") => check_invoice(program, path),
            _ => {}
        }
    }

    // Refreshing the health monitor saves how far it has scanned.
    let is_health_read = ["/metrics", "/ui/alarms"].contains(&target.path());
    if is_written || is_health_read {
        program.renew();
    }
}

fn check_answer(method: &Method, target: &Uri, answer: &Answer) {
    let context = || {
        format!(
            "{method} {target}: {} {:?} {:?}",
            answer.status,
            answer.headers,
            String::from_utf8_lossy(&answer.body)
        )
    };
    let status = answer.status.as_u16();
    assert!(STATUSES.contains(&status), "{}", context());
    assert!(header(answer, REQUEST_ID).len() == 36, "{}", context());
    assert!(
        status != 405 || answer.headers.contains_key(ALLOW),
        "{}",
        context()
    );

    if method == Method::HEAD || status == 304 {
        assert!(answer.body.is_empty(), "{}", context());
    } else if target.path() == "/ui" || target.path().starts_with("/ui/") {
        assert!(
            answer.headers.contains_key("content-security-policy"),
            "{}",
            context()
        );
        assert!(
            header(answer, "content-type").starts_with("text/"),
            "{}",
            context()
        );
    } else if answer.headers.contains_key(CONTENT_ENCODING) {
        assert_eq!(header(answer, "content-encoding"), "gzip");
    } else if status >= 400 {
        check_error(answer, &context());
    } else if target.path() != "/metrics" {
        assert!(
            answer.headers[CONTENT_TYPE] == "application/json" && json(answer).is_object(),
            "{}",
            context()
        );
    }
}

/// Checks that an error has the form `{"code": ..., "message": ..., "details": {}, "ref": ...}` and
/// nothing else.
fn check_error(answer: &Answer, context: &str) {
    assert!(
        answer.headers[CONTENT_TYPE] == "application/json",
        "{context}"
    );

    let error = json(answer);
    let names: Vec<&str> = error
        .as_object()
        .map(|fields| fields.keys().map(String::as_str).collect())
        .unwrap_or_default();
    assert_eq!(names, ["code", "message", "details", "ref"], "{context}");
    assert!(
        error["ref"] == header(answer, REQUEST_ID) && error["details"].is_object(),
        "{context}"
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| !message.is_empty() && message.len() < 200),
        "{context}"
    );

    let codes: &[&str] = match answer.status.as_u16() {
        400 => &[
            "InvalidPath",
            "InvalidQuery",
            "InvalidInvoice",
            "InvalidSignature",
            "InvalidBody",
            "InvalidHost",
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
        "{context}"
    );
}

/// Checks all lists, every view of each event and all invoices after a delivery.
fn check_events(program: &mut Program) {
    let mut ids = Vec::new();
    for outcome in ["", "&outcome=unmatched", "&outcome=unreadable"] {
        let events = pages(program, &format!("/v1/events?limit=500{outcome}"));
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
        get_ok(program, &format!("/v1/events/{id}"));
        get_page(program, &format!("/ui/event?id={id}"));
    }

    for page in [
        "/ui/events",
        "/ui/unreadable",
        "/ui/waiting",
        "/ui/alarms",
        "/ui",
    ] {
        get_page(program, page);
    }

    get_ok(program, "/metrics");
    pages(program, "/v1/tenants/acme/invoices?limit=500");
}

/// Checks an invoice after it was stored: the invoice, its evidence, its page and its lists.
fn check_invoice(program: &mut Program, path: &str) {
    let stored = json(&get_ok(program, path));
    assert!(stored["status"]["states"].is_array(), "{stored}");

    get_ok(program, &format!("{path}/evidence"));
    let parts: Vec<String> = path
        .split('/')
        .map(|part| encoded(&decoded(part)))
        .collect();
    let (tenant, uid) = (&parts[3], &parts[5]);
    get_page(program, &format!("/ui/invoice?tenant={tenant}&uid={uid}"));
    for page in ["/ui", "/ui?state=none", "/ui/waiting"] {
        get_page(program, page);
    }

    let listed = pages(program, &format!("/v1/tenants/{tenant}/invoices?limit=7"));
    assert!(listed.contains(&stored), "it stands in the list");

    // A document that is stored again as it was read stays the same. The exception is a history
    // with two states of the same kind and second, which no document may have.
    let answer = program.send(request(
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

/// Returns all items of a list, page by page.
fn pages(program: &mut Program, target: &str) -> Vec<Value> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    for _ in 0..PAGES {
        let page = json(&get_ok(program, &format!("{target}{cursor}")));
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

/// Sends a request of the operator that must be answered with 200.
fn get_ok(program: &mut Program, target: &str) -> Answer {
    answered(program, target, "apikey", OPERATOR_KEY)
}

/// Requests a page as the operator, and as the tenant, who must get an answer too.
fn get_page(program: &mut Program, target: &str) {
    let cookie = |program: &Program, key: &str| {
        format!("stripe_reconciler_session={}", program.session(key))
    };
    let operators = cookie(program, OPERATOR_KEY);
    answered(program, target, "cookie", &operators);
    let acmes = cookie(program, ACME_KEY);
    let answer = program.send(request(
        Method::GET,
        target,
        "cookie",
        &acmes,
        String::new(),
    ));

    assert!(
        [200, 403, 404].contains(&answer.status.as_u16()),
        "{target}: {}",
        answer.status
    );
}

fn answered(program: &mut Program, target: &str, name: &'static str, value: &str) -> Answer {
    let answer = program.send(request(Method::GET, target, name, value, String::new()));
    let context = String::from_utf8_lossy(&answer.body);
    assert!(
        answer.status == 200,
        "{target}: {} {context}",
        answer.status
    );
    answer
}

fn request(
    method: Method,
    target: &str,
    name: &'static str,
    value: &str,
    body: String,
) -> RawRequest {
    let mut headers = HeaderMap::new();
    headers.insert(
        HeaderName::from_static(name),
        value.parse().expect("it is a header value"),
    );
    RawRequest {
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

/// Encodes bytes for a query string, in which `+` means a space.
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

//! The API of the fake Stripe: read only, exactly as documented.

use std::cmp::Reverse;

use hyper::Method;
use hyper::http::request::Parts;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::DAY;
use super::objects::Object;
use super::{Event, LIVE_KEY, State, StoredObject, TEST_KEY, chance};

/// A parsed call.
pub struct ApiRequest {
    path: String,
    query: Vec<(String, String)>,
    version: String,
    account: Option<String>,
    livemode: bool,
}

pub struct ErrorAnswer {
    pub status: u16,
    pub body: Value,
}

type Answer = Result<Value, ErrorAnswer>;

/// Builds an error answer of Stripe's form.
fn error_answer(
    status: u16,
    kind: &str,
    code: Option<&str>,
    param: Option<&str>,
    message: String,
) -> ErrorAnswer {
    let mut error = json!({"message": message, "type": kind});
    if let Some(code) = code {
        error["code"] = json!(code);
        error["doc_url"] = json!(format!(
            "https://stripe.com/docs/error-codes/{}",
            code.replace('_', "-")
        ));
    }

    if let Some(param) = param {
        error["param"] = json!(param);
    }

    error["request_log_url"] = json!("https://dashboard.stripe.com/logs/req_Fake");
    ErrorAnswer {
        status,
        body: json!({"error": error}),
    }
}

fn invalid(status: u16, message: String) -> ErrorAnswer {
    error_answer(status, "invalid_request_error", None, None, message)
}

fn missing(name: &str, id: &str, param: &str, addition: &str) -> ErrorAnswer {
    let message = format!("No such {name}: '{id}'{addition}");
    error_answer(
        404,
        "invalid_request_error",
        Some("resource_missing"),
        Some(param),
        message,
    )
}

pub fn rate_limited() -> ErrorAnswer {
    let message = "Request rate limit exceeded. Learn more about rate limits here https://stripe.com/docs/rate-limits.";
    error_answer(
        429,
        "invalid_request_error",
        Some("rate_limit"),
        None,
        message.to_owned(),
    )
}

pub fn failing() -> ErrorAnswer {
    error_answer(
        500,
        "api_error",
        None,
        None,
        "An unknown error occurred. Try again later.".to_owned(),
    )
}

/// Returns the path with `*` for each id, and the whole URL with the account.
///
/// Calls are counted by these.
pub fn call_names(head: &Parts) -> (String, String) {
    let is_id = |part: &&str| {
        !part.starts_with("v1")
            && !part.starts_with("v2")
            && part.contains('_')
            && part.chars().any(|c| c.is_ascii_digit())
    };
    let endpoint: Vec<&str> = head
        .uri
        .path()
        .split('/')
        .map(|part| if is_id(&part) { "*" } else { part })
        .collect();

    (
        endpoint.join("/"),
        format!("{} {}", head.uri, account_in(head).unwrap_or_default()),
    )
}

pub fn header<'h>(head: &'h Parts, name: &str) -> Option<&'h str> {
    head.headers.get(name).map(|value| value.to_str().unwrap())
}

/// Returns the account of a call. A context may be a path, whose last part is the account.
fn account_in(head: &Parts) -> Option<String> {
    let named = header(head, "stripe-account").or(header(head, "stripe-context"));
    named.map(|account| account.rsplit('/').next().unwrap().to_owned())
}

impl ApiRequest {
    /// Parses a call. Only GET with a key and a stated version is allowed.
    pub fn read(
        head: &Parts,
        violations: &mut impl Extend<String>,
    ) -> Result<ApiRequest, ErrorAnswer> {
        let mut record_violation = |message: String| {
            violations.extend([message.clone()]);
            message
        };
        if head.method != Method::GET {
            return Err(invalid(
                403,
                record_violation(format!("{} {}: this key only reads", head.method, head.uri)),
            ));
        }

        let livemode = match header(head, "authorization")
            .and_then(|value| value.strip_prefix("Bearer "))
        {
            Some(key) if key == LIVE_KEY || key.starts_with("rk_live_fake_") => true,
            Some(TEST_KEY) => false,
            Some(_) => return Err(invalid(401, "Invalid API Key provided: sk_****".to_owned())),
            None => {
                return Err(invalid(
                    401,
                    record_violation("You did not provide an API key.".to_owned()),
                ));
            }
        };
        let Some(version) =
            header(head, "stripe-version").filter(|version| version.len() >= "2022-11-15".len())
        else {
            return Err(invalid(
                400,
                record_violation(format!("{}: no Stripe-Version is stated", head.uri)),
            ));
        };

        let decoded = |text: &str| {
            percent_decode_str(&text.replace('+', " "))
                .decode_utf8()
                .unwrap()
                .into_owned()
        };
        let pairs = head
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty());
        let query = pairs
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(name, value)| (decoded(name), decoded(value)));

        Ok(ApiRequest {
            path: head.uri.path().to_owned(),
            query: query.collect(),
            version: version.to_owned(),
            account: account_in(head),
            livemode,
        })
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.query
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// Returns the values of `name[]=` or `name[0]=`.
    fn parameters(&self, name: &str) -> Vec<&str> {
        let is_list_parameter = |n: &str| {
            n.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('[') && rest.ends_with(']'))
        };
        self.query
            .iter()
            .filter(|(n, _)| is_list_parameter(n))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// Rejects unknown parameters, as Stripe does.
    fn check_parameters(&self, names: &[&str]) -> Result<(), ErrorAnswer> {
        let known = |name: &str| {
            let base = name.split('[').next().unwrap();
            names.contains(&name)
                || ((name.starts_with("types[") || name.starts_with("expand["))
                    && names.contains(&base))
        };

        match self.query.iter().find(|(name, _)| !known(name)) {
            Some((name, _)) => {
                let message = format!("Received unknown parameter: {name}");
                Err(error_answer(
                    400,
                    "invalid_request_error",
                    Some("parameter_unknown"),
                    Some(name),
                    message,
                ))
            }
            None => Ok(()),
        }
    }

    fn number(&self, name: &str) -> Result<Option<i64>, ErrorAnswer> {
        let Some(text) = self.parameter(name) else {
            return Ok(None);
        };
        let message = || format!("Invalid integer: {text}");
        let number = text.parse();

        number.map(Some).map_err(|_| {
            error_answer(
                400,
                "invalid_request_error",
                Some("parameter_invalid_integer"),
                Some(name),
                message(),
            )
        })
    }

    fn within_created(&self, created: i64) -> Result<bool, ErrorAnswer> {
        Ok(self.number("created")?.is_none_or(|at| created == at)
            && self
                .number("created[gte]")?
                .is_none_or(|from| created >= from)
            && self
                .number("created[gt]")?
                .is_none_or(|after| created > after)
            && self.number("created[lte]")?.is_none_or(|to| created <= to)
            && self
                .number("created[lt]")?
                .is_none_or(|before| created < before))
    }
}

const CREATED: [&str; 5] = [
    "created",
    "created[gte]",
    "created[gt]",
    "created[lte]",
    "created[lt]",
];
const PAGING: [&str; 4] = ["limit", "starting_after", "ending_before", "expand"];

/// Position in a list: newest first, in no meaningful order within a second.
type Position = Reverse<(i64, u32)>;

/// Cuts a page out of a sorted list of items with their positions.
fn page(
    request: &ApiRequest,
    items: Vec<(Position, Value)>,
    position_of: impl Fn(&str) -> Option<Position>,
) -> Answer {
    let limit = request.number("limit")?.unwrap_or(10);
    if !(1..=100).contains(&limit) {
        return Err(invalid(
            400,
            format!("Invalid limit: {limit}. It must be between 1 and 100"),
        ));
    }

    let limit = limit as usize;
    let cursor = |name: &str| match request.parameter(name) {
        Some(id) => position_of(id)
            .map(Some)
            .ok_or_else(|| missing("object", id, name, "")),
        None => Ok(None),
    };
    let (after, before) = (cursor("starting_after")?, cursor("ending_before")?);
    let mut items: Vec<(Position, Value)> = items
        .into_iter()
        .filter(|(position, _)| {
            after.is_none_or(|after| *position > after)
                && before.is_none_or(|before| *position < before)
        })
        .collect();

    let has_more = items.len() > limit;
    if before.is_some() {
        // Keep the items nearest to the cursor.
        items.drain(..items.len().saturating_sub(limit));
    } else {
        items.truncate(limit);
    }

    let data: Vec<Value> = items.into_iter().map(|(_, value)| value).collect();
    Ok(json!({"object": "list", "data": data, "has_more": has_more, "url": request.path}))
}

impl State {
    pub fn answer(&self, request: &ApiRequest) -> Answer {
        let parts: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
        if let Some(account) = &request.account
            && !self
                .objects
                .values()
                .any(|stored| stored.account == Some(account))
        {
            let message = format!(
                "The provided key does not have access to account '{account}' (or that account does not exist)."
            );
            return Err(error_answer(
                403,
                "invalid_request_error",
                Some("account_invalid"),
                None,
                message,
            ));
        }

        match parts[..] {
            ["v1", "events"] => self.list_events(request),
            ["v1", "events", id] => self.event(request, id).map(super::Event::as_listed),
            ["v2", "core", "events", id] => self.event(request, id).map(super::Event::as_thin),
            ["v1", "invoices"] => self.parameters(
                request,
                "invoice",
                &[
                    &PAGING[..],
                    &CREATED,
                    &["status", "customer", "collection_method"],
                ]
                .concat(),
            ),
            ["v1", "payment_intents"] => self.parameters(
                request,
                "payment_intent",
                &[&PAGING[..], &CREATED, &["customer"]].concat(),
            ),
            ["v1", "charges"] => self.parameters(
                request,
                "charge",
                &[&PAGING[..], &CREATED, &["customer", "payment_intent"]].concat(),
            ),
            ["v1", "invoice_payments", ..] if *request.version < *"2025-03-31" => {
                Err(unrecognized(request))
            }
            ["v1", "invoice_payments"] => self.invoice_payments(request),
            ["v1", "webhook_endpoints"] => self.webhook_endpoints(request),
            ["v1", kind, id]
                if [
                    "invoices",
                    "payment_intents",
                    "charges",
                    "invoice_payments",
                    "refunds",
                    "disputes",
                    "credit_notes",
                ]
                .contains(&kind) =>
            {
                self.retrieve(request, kind.trim_end_matches('s'), id)
            }
            _ => Err(unrecognized(request)),
        }
    }

    fn is_listed(&self, request: &ApiRequest, event: &Event) -> bool {
        self.is_visible(event)
            && event.livemode == request.livemode
            && event.account == request.account.as_deref()
    }

    /// Returns whether the API shows this event at all.
    pub(super) fn is_visible(&self, event: &Event) -> bool {
        let lags = chance(self.faults.seed, &event.id) < self.faults.lagging;
        event.generated && !lags && event.created >= self.clock.now_s() - 30 * DAY
    }

    fn event(&self, request: &ApiRequest, id: &str) -> Result<&Event, ErrorAnswer> {
        let is_list_parameter = |event: &&Event| {
            (event.id == id || event.thin_id() == id) && self.is_listed(request, event)
        };
        self.events
            .iter()
            .find(is_list_parameter)
            .ok_or_else(|| missing("event", id, "id", ""))
    }

    fn list_events(&self, request: &ApiRequest) -> Answer {
        request.check_parameters(
            &[
                &PAGING[..],
                &CREATED,
                &["type", "types", "delivery_success"],
            ]
            .concat(),
        )?;
        let types = request.parameters("types");
        if types.len() > 20
            || types.iter().any(|kind| kind.contains('*'))
            || (!types.is_empty() && request.parameter("type").is_some())
        {
            return Err(invalid(
                400,
                "You may give up to 20 types, each by its whole name, or one type".to_owned(),
            ));
        }
        let fits = |kind: &str| match request.parameter("type") {
            Some(wanted) => wanted
                .strip_suffix('*')
                .map_or(kind == wanted, |start| kind.starts_with(start)),
            None => types.is_empty() || types.contains(&kind),
        };
        let position = |event: &Event| Reverse((event.created, event.order));
        let mut events: Vec<&Event> = Vec::new();

        for event in self
            .events
            .iter()
            .filter(|event| fits(event.kind) && self.is_listed(request, event))
        {
            if request.within_created(event.created)? {
                events.push(event);
            }
        }
        events.sort_by_key(|event| position(event));
        let items = events
            .into_iter()
            .map(|event| (position(event), event.as_listed()))
            .collect();

        page(request, items, |id| {
            self.events
                .iter()
                .find(|event| event.id == id)
                .map(position)
        })
    }

    /// Returns the object, or its previous state while the API lags behind.
    fn visible<'k>(&self, stored: &'k StoredObject) -> &'k Object {
        let lags = chance(self.faults.seed, &stored.object.id()) < self.faults.lagging;
        stored
            .before
            .as_ref()
            .filter(|_| lags)
            .unwrap_or(&stored.object)
    }

    fn retrieve(&self, request: &ApiRequest, name: &str, id: &str) -> Answer {
        request.check_parameters(&["expand"])?;
        let found = self.objects.get(id).filter(|stored| {
            stored.object.name() == name && stored.account == request.account.as_deref()
        });

        match found {
            Some(stored) if stored.livemode == request.livemode => {
                Ok(self.rendered(request, stored, ""))
            }
            Some(_) => {
                let (theirs, yours) = if request.livemode {
                    ("test", "live")
                } else {
                    ("live", "test")
                };
                let addition = format!(
                    "; a similar object exists in {theirs} mode, but a {yours} mode key was used to make this request."
                );
                Err(missing(name, id, name, &addition))
            }
            None => Err(missing(name, id, name, "")),
        }
    }

    fn parameters(&self, request: &ApiRequest, name: &str, parameters: &[&str]) -> Answer {
        request.check_parameters(parameters)?;
        let wanted = |stored: &&StoredObject| match self.visible(stored) {
            Object::Invoice(invoice) => request
                .parameter("status")
                .is_none_or(|status| invoice.status == status),
            Object::Charge(charge) => request
                .parameter("payment_intent")
                .is_none_or(|intent| charge.intent == intent),
            _ => true,
        };
        self.list_those(request, name, wanted)
    }

    fn list_those(
        &self,
        request: &ApiRequest,
        name: &str,
        wanted: impl Fn(&&StoredObject) -> bool,
    ) -> Answer {
        let position = |stored: &StoredObject| Reverse((stored.object.created(), stored.order));
        let is_accessible = |stored: &&StoredObject| {
            stored.object.name() == name
                && stored.account == request.account.as_deref()
                && stored.livemode == request.livemode
        };
        let mut found: Vec<&StoredObject> = Vec::new();

        for stored in self.objects.values().filter(is_accessible).filter(wanted) {
            if request.within_created(stored.object.created())? {
                found.push(stored);
            }
        }

        found.sort_by_key(|stored| position(stored));
        let items = found
            .into_iter()
            .map(|stored| (position(stored), self.rendered(request, stored, "data.")))
            .collect();
        page(request, items, |id| self.objects.get(id).map(position))
    }

    fn invoice_payments(&self, request: &ApiRequest) -> Answer {
        let (intent, kind) = (
            request.parameter("payment[payment_intent]"),
            request.parameter("payment[type]"),
        );
        request.check_parameters(
            &[
                &PAGING[..],
                &CREATED,
                &[
                    "invoice",
                    "status",
                    "payment[type]",
                    "payment[payment_intent]",
                ],
            ]
            .concat(),
        )?;

        if intent.is_some() && kind != Some("payment_intent") {
            return Err(invalid(
                400,
                "Missing required param: payment[type].".to_owned(),
            ));
        }

        self.list_those(request, "invoice_payment", |stored| match &stored.object {
            Object::InvoicePayment(payment) => {
                let status = if payment.paid.is_some() {
                    "paid"
                } else {
                    "open"
                };
                intent.is_none_or(|intent| payment.intent == intent)
                    && request
                        .parameter("invoice")
                        .is_none_or(|invoice| payment.invoice == invoice)
                    && request
                        .parameter("status")
                        .is_none_or(|wanted| status == wanted)
            }
            _ => false,
        })
    }

    /// Renders an object in the requested version with the requested expansions.
    fn rendered(&self, request: &ApiRequest, stored: &StoredObject, prefix: &str) -> Value {
        let mut rendered = self.visible(stored).render(&request.version);
        for path in request
            .parameters("expand")
            .into_iter()
            .filter_map(|path| path.strip_prefix(prefix))
        {
            if path == "payments" {
                rendered["payments"] = self.payments_of(request, stored.object.id());
                continue;
            }
            let pointer = format!("/{}", path.replace('.', "/"));
            if let Some(position) = rendered.pointer_mut(&pointer)
                && let Some(expanded) = position.as_str().and_then(|id| self.objects.get(id))
            {
                *position = self.visible(expanded).render(&request.version);
            }
        }

        rendered
    }

    fn payments_of(&self, request: &ApiRequest, invoice: &str) -> Value {
        let payments = self
            .objects
            .values()
            .filter(|stored| matches!(&stored.object, Object::InvoicePayment(payment) if payment.invoice == invoice));
        let data: Vec<Value> = payments
            .map(|stored| self.visible(stored).render(&request.version))
            .collect();
        json!({"object": "list", "data": data, "has_more": false, "url": format!("/v1/invoice_payments?invoice={invoice}")})
    }

    fn webhook_endpoints(&self, request: &ApiRequest) -> Answer {
        request.check_parameters(&PAGING)?;
        let items = self.endpoints.iter().enumerate().rev().map(|(number, endpoint)| {
            let rendered = json!({"id": format!("we_1Fake{number}"), "object": "webhook_endpoint", "api_version": null, "application": null,
                "created": self.clock.now_s() - 40 * DAY, "description": null, "enabled_events": endpoint.enabled_events, "livemode": request.livemode,
                "metadata": {}, "status": endpoint.status, "url": endpoint.url});
            (Reverse((0, number as u32)), rendered)
        });
        page(request, items.collect(), |_| None)
    }
}

fn unrecognized(request: &ApiRequest) -> ErrorAnswer {
    invalid(
        404,
        format!(
            "Unrecognized request URL (GET: {}). Please see https://stripe.com/docs",
            request.path
        ),
    )
}

//! What the API answers: reading only, strictly as documented.

use std::cmp::Reverse;

use hyper::Method;
use hyper::http::request::Parts;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::DAY;
use super::objects::Object;
use super::{Event, Kept, LIVE_KEY, State, TEST_KEY, chance};

/// A call, taken apart.
pub struct Ask {
    path: String,
    query: Vec<(String, String)>,
    version: String,
    account: Option<String>,
    livemode: bool,
}

pub struct Refusal {
    pub status: u16,
    pub body: Value,
}

type Answer = Result<Value, Refusal>;

/// All that Stripe says to one that asks in vain.
fn refusal(
    status: u16,
    kind: &str,
    code: Option<&str>,
    param: Option<&str>,
    message: String,
) -> Refusal {
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
    Refusal {
        status,
        body: json!({"error": error}),
    }
}

fn invalid(status: u16, message: String) -> Refusal {
    refusal(status, "invalid_request_error", None, None, message)
}

fn missing(name: &str, id: &str, param: &str, addition: &str) -> Refusal {
    let message = format!("No such {name}: '{id}'{addition}");
    refusal(
        404,
        "invalid_request_error",
        Some("resource_missing"),
        Some(param),
        message,
    )
}

pub fn rate_limited() -> Refusal {
    let message = "Request rate limit exceeded. Learn more about rate limits here https://stripe.com/docs/rate-limits.";
    refusal(
        429,
        "invalid_request_error",
        Some("rate_limit"),
        None,
        message.to_owned(),
    )
}

pub fn failing() -> Refusal {
    refusal(
        500,
        "api_error",
        None,
        None,
        "An unknown error occurred. Try again later.".to_owned(),
    )
}

/// The path with `*` for each id, and the whole URL with the account: what calls are counted by.
pub fn names_of(head: &Parts) -> (String, String) {
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
        format!("{} {}", head.uri, account_of(head).unwrap_or_default()),
    )
}

pub fn header<'h>(head: &'h Parts, name: &str) -> Option<&'h str> {
    head.headers.get(name).map(|value| value.to_str().unwrap())
}

/// A context may be a path; its last part is the account.
fn account_of(head: &Parts) -> Option<String> {
    let named = header(head, "stripe-account").or(header(head, "stripe-context"));
    named.map(|account| account.rsplit('/').next().unwrap().to_owned())
}

impl Ask {
    /// Who asks, and how: only readers with a key, who say which version they read.
    pub fn read(head: &Parts, faults: &mut impl Extend<String>) -> Result<Ask, Refusal> {
        let mut fault = |said: String| {
            faults.extend([said.clone()]);
            said
        };
        if head.method != Method::GET {
            return Err(invalid(
                403,
                fault(format!("{} {}: this key only reads", head.method, head.uri)),
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
                    fault("You did not provide an API key.".to_owned()),
                ));
            }
        };
        let Some(version) =
            header(head, "stripe-version").filter(|version| version.len() >= "2022-11-15".len())
        else {
            return Err(invalid(
                400,
                fault(format!("{}: no Stripe-Version is stated", head.uri)),
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
        Ok(Ask {
            path: head.uri.path().to_owned(),
            query: query.collect(),
            version: version.to_owned(),
            account: account_of(head),
            livemode,
        })
    }

    fn one(&self, name: &str) -> Option<&str> {
        self.query
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// `name[]=` or `name[0]=`
    fn list(&self, name: &str) -> Vec<&str> {
        let is_it = |n: &str| {
            n.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('[') && rest.ends_with(']'))
        };
        self.query
            .iter()
            .filter(|(n, _)| is_it(n))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// Stripe refuses what it does not know.
    fn knows(&self, names: &[&str]) -> Result<(), Refusal> {
        let known = |name: &str| {
            let base = name.split('[').next().unwrap();
            names.contains(&name)
                || ((name.starts_with("types[") || name.starts_with("expand["))
                    && names.contains(&base))
        };
        match self.query.iter().find(|(name, _)| !known(name)) {
            Some((name, _)) => {
                let message = format!("Received unknown parameter: {name}");
                Err(refusal(
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

    fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        let Some(text) = self.one(name) else {
            return Ok(None);
        };
        let message = || format!("Invalid integer: {text}");
        let number = text.parse();
        number.map(Some).map_err(|_| {
            refusal(
                400,
                "invalid_request_error",
                Some("parameter_invalid_integer"),
                Some(name),
                message(),
            )
        })
    }

    fn within_created(&self, created: i64) -> Result<bool, Refusal> {
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

/// Where something stands in a list: newest first, and in the same second in an order that says nothing.
type Place = Reverse<(i64, u32)>;

/// Cuts a page out of a list that stands in order; each item with its place.
fn page(ask: &Ask, items: Vec<(Place, Value)>, place_of: impl Fn(&str) -> Option<Place>) -> Answer {
    let limit = ask.number("limit")?.unwrap_or(10);
    if !(1..=100).contains(&limit) {
        return Err(invalid(
            400,
            format!("Invalid limit: {limit}. It must be between 1 and 100"),
        ));
    }
    let limit = limit as usize;
    let cursor = |name: &str| match ask.one(name) {
        Some(id) => place_of(id)
            .map(Some)
            .ok_or_else(|| missing("object", id, name, "")),
        None => Ok(None),
    };
    let (after, before) = (cursor("starting_after")?, cursor("ending_before")?);
    let mut items: Vec<(Place, Value)> = items
        .into_iter()
        .filter(|(place, _)| {
            after.is_none_or(|after| *place > after) && before.is_none_or(|before| *place < before)
        })
        .collect();
    let has_more = items.len() > limit;
    if before.is_some() {
        // The ones nearest to the cursor.
        items.drain(..items.len().saturating_sub(limit));
    } else {
        items.truncate(limit);
    }
    let data: Vec<Value> = items.into_iter().map(|(_, value)| value).collect();
    Ok(json!({"object": "list", "data": data, "has_more": has_more, "url": ask.path}))
}

impl State {
    pub fn answer(&self, ask: &Ask) -> Answer {
        let parts: Vec<&str> = ask.path.trim_start_matches('/').split('/').collect();
        if let Some(account) = &ask.account
            && !self
                .objects
                .values()
                .any(|kept| kept.account == Some(account))
        {
            let message = format!(
                "The provided key does not have access to account '{account}' (or that account does not exist)."
            );
            return Err(refusal(
                403,
                "invalid_request_error",
                Some("account_invalid"),
                None,
                message,
            ));
        }
        match parts[..] {
            ["v1", "events"] => self.list_events(ask),
            ["v1", "events", id] => self.event(ask, id).map(|event| event.as_listed()),
            ["v2", "core", "events", id] => self.event(ask, id).map(|event| event.as_thin()),
            ["v1", "invoices"] => self.list(
                ask,
                "invoice",
                &[
                    &PAGING[..],
                    &CREATED,
                    &["status", "customer", "collection_method"],
                ]
                .concat(),
            ),
            ["v1", "payment_intents"] => self.list(
                ask,
                "payment_intent",
                &[&PAGING[..], &CREATED, &["customer"]].concat(),
            ),
            ["v1", "charges"] => self.list(
                ask,
                "charge",
                &[&PAGING[..], &CREATED, &["customer", "payment_intent"]].concat(),
            ),
            ["v1", "invoice_payments", ..] if *ask.version < *"2025-03-31" => {
                Err(unrecognized(ask))
            }
            ["v1", "invoice_payments"] => self.invoice_payments(ask),
            ["v1", "webhook_endpoints"] => self.webhook_endpoints(ask),
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
                self.retrieve(ask, kind.trim_end_matches('s'), id)
            }
            _ => Err(unrecognized(ask)),
        }
    }

    fn is_listed(&self, ask: &Ask, event: &Event) -> bool {
        self.is_shown(event)
            && event.livemode == ask.livemode
            && event.account == ask.account.as_deref()
    }

    /// To whom may see it.
    pub(super) fn is_shown(&self, event: &Event) -> bool {
        let lags = chance(self.troubles.seed, &event.id) < self.troubles.lagging;
        event.generated && !lags && event.created >= self.clock.now_s() - 30 * DAY
    }

    fn event(&self, ask: &Ask, id: &str) -> Result<&Event, Refusal> {
        let is_it = |event: &&Event| {
            (event.id == id || event.thin_id() == id) && self.is_listed(ask, event)
        };
        self.events
            .iter()
            .find(is_it)
            .ok_or_else(|| missing("event", id, "id", ""))
    }

    fn list_events(&self, ask: &Ask) -> Answer {
        ask.knows(
            &[
                &PAGING[..],
                &CREATED,
                &["type", "types", "delivery_success"],
            ]
            .concat(),
        )?;
        let types = ask.list("types");
        if types.len() > 20
            || types.iter().any(|kind| kind.contains('*'))
            || (!types.is_empty() && ask.one("type").is_some())
        {
            return Err(invalid(
                400,
                "You may give up to 20 types, each by its whole name, or one type".to_owned(),
            ));
        }
        let fits = |kind: &str| match ask.one("type") {
            Some(wanted) => wanted
                .strip_suffix('*')
                .map_or(kind == wanted, |start| kind.starts_with(start)),
            None => types.is_empty() || types.contains(&kind),
        };
        let place = |event: &Event| Reverse((event.created, event.order));
        let mut events: Vec<&Event> = Vec::new();
        for event in self
            .events
            .iter()
            .filter(|event| fits(event.kind) && self.is_listed(ask, event))
        {
            if ask.within_created(event.created)? {
                events.push(event);
            }
        }
        events.sort_by_key(|event| place(event));
        let items = events
            .into_iter()
            .map(|event| (place(event), event.as_listed()))
            .collect();
        page(ask, items, |id| {
            self.events.iter().find(|event| event.id == id).map(place)
        })
    }

    /// As it is, or as it was, when the API lags behind.
    fn seen<'k>(&self, kept: &'k Kept) -> &'k Object {
        let lags = chance(self.troubles.seed, &kept.object.id()) < self.troubles.lagging;
        kept.before
            .as_ref()
            .filter(|_| lags)
            .unwrap_or(&kept.object)
    }

    fn retrieve(&self, ask: &Ask, name: &str, id: &str) -> Answer {
        ask.knows(&["expand"])?;
        let found = self
            .objects
            .get(id)
            .filter(|kept| kept.object.name() == name && kept.account == ask.account.as_deref());
        match found {
            Some(kept) if kept.livemode == ask.livemode => Ok(self.shown(ask, kept, "")),
            Some(_) => {
                let (theirs, yours) = if ask.livemode {
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

    fn list(&self, ask: &Ask, name: &str, parameters: &[&str]) -> Answer {
        ask.knows(parameters)?;
        let wanted = |kept: &&Kept| match self.seen(kept) {
            Object::Invoice(invoice) => ask
                .one("status")
                .is_none_or(|status| invoice.status == status),
            Object::Charge(charge) => ask
                .one("payment_intent")
                .is_none_or(|intent| charge.intent == intent),
            _ => true,
        };
        self.list_those(ask, name, wanted)
    }

    fn list_those(&self, ask: &Ask, name: &str, wanted: impl Fn(&&Kept) -> bool) -> Answer {
        let place = |kept: &Kept| Reverse((kept.object.created(), kept.order));
        let is_theirs = |kept: &&Kept| {
            kept.object.name() == name
                && kept.account == ask.account.as_deref()
                && kept.livemode == ask.livemode
        };
        let mut found: Vec<&Kept> = Vec::new();
        for kept in self.objects.values().filter(is_theirs).filter(wanted) {
            if ask.within_created(kept.object.created())? {
                found.push(kept);
            }
        }
        found.sort_by_key(|kept| place(kept));
        let items = found
            .into_iter()
            .map(|kept| (place(kept), self.shown(ask, kept, "data.")))
            .collect();
        page(ask, items, |id| self.objects.get(id).map(place))
    }

    fn invoice_payments(&self, ask: &Ask) -> Answer {
        let (intent, kind) = (ask.one("payment[payment_intent]"), ask.one("payment[type]"));
        ask.knows(
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
        self.list_those(ask, "invoice_payment", |kept| match &kept.object {
            Object::InvoicePayment(payment) => {
                let status = if payment.paid.is_some() {
                    "paid"
                } else {
                    "open"
                };
                intent.is_none_or(|intent| payment.intent == intent)
                    && ask
                        .one("invoice")
                        .is_none_or(|invoice| payment.invoice == invoice)
                    && ask.one("status").is_none_or(|wanted| status == wanted)
            }
            _ => false,
        })
    }

    /// In the version that is asked for, with what is to be expanded.
    fn shown(&self, ask: &Ask, kept: &Kept, prefix: &str) -> Value {
        let mut shown = self.seen(kept).render(&ask.version);
        for path in ask
            .list("expand")
            .into_iter()
            .filter_map(|path| path.strip_prefix(prefix))
        {
            if path == "payments" {
                shown["payments"] = self.payments_of(ask, kept.object.id());
                continue;
            }
            let pointer = format!("/{}", path.replace('.', "/"));
            if let Some(place) = shown.pointer_mut(&pointer)
                && let Some(expanded) = place.as_str().and_then(|id| self.objects.get(id))
            {
                *place = self.seen(expanded).render(&ask.version);
            }
        }
        shown
    }

    fn payments_of(&self, ask: &Ask, invoice: &str) -> Value {
        let payments = self
            .objects
            .values()
            .filter(|kept| matches!(&kept.object, Object::InvoicePayment(payment) if payment.invoice == invoice));
        let data: Vec<Value> = payments
            .map(|kept| self.seen(kept).render(&ask.version))
            .collect();
        json!({"object": "list", "data": data, "has_more": false, "url": format!("/v1/invoice_payments?invoice={invoice}")})
    }

    fn webhook_endpoints(&self, ask: &Ask) -> Answer {
        ask.knows(&PAGING)?;
        let items = self.endpoints.iter().enumerate().rev().map(|(number, endpoint)| {
            let shown = json!({"id": format!("we_1Fake{number}"), "object": "webhook_endpoint", "api_version": null, "application": null,
                "created": self.clock.now_s() - 40 * DAY, "description": null, "enabled_events": endpoint.enabled_events, "livemode": ask.livemode,
                "metadata": {}, "status": endpoint.status, "url": endpoint.url});
            (Reverse((0, number as u32)), shown)
        });
        page(ask, items.collect(), |_| None)
    }
}

fn unrecognized(ask: &Ask) -> Refusal {
    invalid(
        404,
        format!(
            "Unrecognized request URL (GET: {}). Please see https://stripe.com/docs",
            ask.path
        ),
    )
}

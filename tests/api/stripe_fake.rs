//! Tests of the fake Stripe, on which the reconciliation tests depend.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use testkit::stripe::{
    BASIL, CLOVER, DAY, ENDIVE, Faults, HOUR, LIVE_KEY, OLD, Stripe, TEST_KEY, Terms, now_s,
};
use testkit::{client, try_send};

/// Returns status and body, or `None` if no complete answer came.
async fn call(stripe: &Stripe, path: &str, headers: &[(&str, &str)]) -> Option<(u16, Value)> {
    let key = format!("Bearer {LIVE_KEY}");
    let mut all = vec![("Authorization", key.as_str()), ("Stripe-Version", ENDIVE)];
    all.retain(|(name, _)| !headers.iter().any(|(other, _)| other == name));
    all.extend(headers);
    let answer = try_send(
        &client(),
        "GET",
        &format!("{}{path}", stripe.base),
        &all,
        Vec::new(),
    )
    .await
    .ok()?;

    Some((
        answer.status.as_u16(),
        serde_json::from_slice(&answer.body).unwrap_or(Value::Null),
    ))
}

async fn get(stripe: &Stripe, path: &str) -> Value {
    let (status, body) = call(stripe, path, &[]).await.unwrap();
    assert_eq!(status, 200, "{path}: {body}");
    body
}

fn ids(page: &Value) -> Vec<String> {
    page["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["id"].as_str().unwrap().to_owned())
        .collect()
}

/// Returns the ids of all pages from a cursor on, in list order: newest first.
async fn pages(stripe: &Stripe, path: &str, cursor: &str, from: Option<String>) -> Vec<String> {
    let (mut all, mut at): (Vec<String>, Option<String>) = (Vec::new(), from);
    loop {
        let page = get(
            stripe,
            &format!(
                "{path}{}",
                at.map(|id| format!("&{cursor}={id}")).unwrap_or_default()
            ),
        )
        .await;
        let found = ids(&page);
        at = if cursor == "starting_after" {
            found.last()
        } else {
            found.first()
        }
        .cloned();
        all = if cursor == "starting_after" {
            [all, found].concat()
        } else {
            [found, all].concat()
        };
        if page["has_more"] == false {
            return all;
        }
    }
}

#[tokio::test]
async fn fake_pages_show_each_event_once_in_both_directions() {
    let stripe = Stripe::start();
    for _ in 0..30 {
        stripe
            .draft(Terms::automatic(now_s() - DAY, CLOVER))
            .later(HOUR)
            .finalized()
            .paid_by_card();
    }

    let path = "/v1/events?limit=7&type=invoice.*";
    let forward = pages(&stripe, path, "starting_after", None).await;
    let backward = pages(&stripe, path, "ending_before", forward.last().cloned()).await;
    assert_eq!(forward.len(), 30 * 6);
    assert_eq!(backward[..], forward[..forward.len() - 1]);

    let unique: BTreeSet<&String> = forward.iter().collect();
    assert_eq!(unique.len(), forward.len());

    let two = get(
        &stripe,
        "/v1/events?types[]=invoice.paid&types[1]=charge.succeeded&limit=100",
    )
    .await;
    assert_eq!(
        (two["data"].as_array().unwrap().len(), &two["has_more"]),
        (60, &json!(false))
    );

    let none = get(&stripe, &format!("/v1/events?created%5Bgte%5D={}", now_s())).await;
    assert_eq!(none["data"], json!([]));
}

#[tokio::test]
async fn fake_renders_objects_and_events_in_their_versions() {
    let stripe = Stripe::start();
    let mut life = stripe.draft(Terms::automatic(now_s() - DAY, OLD));
    life.later(HOUR).finalized().later(2).paid_by_card();
    let invoice = format!("/v1/invoices/{}", life.id());
    let (_, old) = call(&stripe, &invoice, &[("Stripe-Version", OLD)])
        .await
        .unwrap();
    let new = get(&stripe, &invoice).await;

    assert_eq!(
        (
            &old["paid"],
            &old["payment_intent"].is_string(),
            &new["paid"]
        ),
        (&json!(true), &true, &Value::Null)
    );

    let intent = format!(
        "/v1/payment_intents/{}",
        old["payment_intent"].as_str().unwrap()
    );
    assert_eq!(
        get(&stripe, &intent).await["payment_details"]["order_reference"],
        life.id()
    );

    let (_, basil) = call(&stripe, &intent, &[("Stripe-Version", BASIL)])
        .await
        .unwrap();
    assert!(!basil.to_string().contains(life.id()));

    let events = get(&stripe, "/v1/events?type=payment_intent.succeeded").await;
    assert_eq!(events["data"][0]["data"]["object"]["invoice"], life.id());

    let joined = get(
        &stripe,
        &format!(
            "/v1/invoice_payments?invoice={}&expand[]=data.payment.payment_intent",
            life.id()
        ),
    )
    .await;
    assert_eq!(
        joined["data"][0]["payment"]["payment_intent"]["status"],
        "succeeded"
    );
}

#[tokio::test]
async fn fake_rejects_calls_with_stripes_messages() {
    let stripe = Stripe::start();
    let mut life = stripe.draft(Terms {
        livemode: false,
        ..Terms::automatic(now_s() - DAY, CLOVER)
    });
    life.omit_events(&["invoice.finalized"]).finalized();
    stripe
        .draft(Terms {
            account: Some("acct_1Connected"),
            ..Terms::automatic(now_s() - DAY, CLOVER)
        })
        .finalized();
    let refused = [
        (
            "/v1/invoices/in_none",
            vec![],
            404,
            "No such invoice: 'in_none'",
        ),
        (
            "/v1/invoices/in_1F000001",
            vec![],
            404,
            "a similar object exists in test mode",
        ),
        ("/v1/invoices/in_1F000002", vec![], 404, "No such invoice"),
        (
            "/v1/invoices/in_1F000002",
            vec![("Stripe-Account", "acct_1Other")],
            403,
            "does not have access",
        ),
        ("/v1/invoices?limit=101", vec![], 400, "between 1 and 100"),
        (
            "/v1/invoices?sort=asc",
            vec![],
            400,
            "unknown parameter: sort",
        ),
        ("/v1/nothing", vec![], 404, "Unrecognized request URL"),
        (
            "/v1/invoice_payments",
            vec![("Stripe-Version", OLD)],
            404,
            "Unrecognized request URL",
        ),
        (
            "/v1/events",
            vec![("Authorization", "Bearer sk_live_other")],
            401,
            "Invalid API Key",
        ),
        (
            "/v1/events",
            vec![("Stripe-Version", "")],
            400,
            "no Stripe-Version",
        ),
    ];

    for (path, headers, status, words) in refused {
        let (found, body) = call(&stripe, path, &headers).await.unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(
            found == status && message.contains(words),
            "{path}: {found} {body}"
        );
    }

    assert!(stripe.has("in_1F000001") && !stripe.has("in_none"));
    assert_eq!(stripe.violations().len(), 1, "{:?}", stripe.violations());

    let of_account = [("Stripe-Account", "acct_1Connected")];
    assert_eq!(
        call(&stripe, "/v1/invoices/in_1F000002", &of_account)
            .await
            .unwrap()
            .0,
        200
    );

    let in_test_mode = [("Authorization", &*format!("Bearer {TEST_KEY}"))];
    let (_, events) = call(
        &stripe,
        "/v1/events?types[]=invoice.finalized&types[]=invoice.updated",
        &in_test_mode,
    )
    .await
    .unwrap();
    assert_eq!(
        events["data"].as_array().unwrap().len(),
        1,
        "one was never made"
    );
}

#[tokio::test]
async fn fake_fails_in_every_way_but_not_thrice_in_a_row() {
    let stripe = Stripe::start();
    stripe
        .draft(Terms::automatic(now_s() - DAY, CLOVER))
        .finalized();
    stripe.set_faults(Faults {
        rate_limited: 0.2,
        failing: 0.2,
        resets: 0.2,
        truncated: 0.2,
        slow: 0.1,
        ..Faults::all(7)
    });
    let (mut answers, mut in_a_row) = (BTreeMap::new(), 0);

    for _ in 0..60 {
        let status = call(&stripe, "/v1/events", &[])
            .await
            .map_or(0, |(status, _)| status);
        in_a_row = if status == 200 { 0 } else { in_a_row + 1 };
        assert!(in_a_row <= 2);
        *answers.entry(status).or_insert(0) += 1;
    }

    assert_eq!(
        answers.into_keys().collect::<Vec<_>>(),
        [0, 200, 429, 500, 502]
    );

    let calls = stripe.calls();
    assert_eq!(calls.len(), 60);
    assert!(
        calls.iter().any(|call| call.status.is_none())
            && calls.iter().all(|call| call.endpoint == "/v1/events")
    );
}

//! What `doctor` says of Stripe: from its API, from the passes against it, and of what no webhook brought.

use super::*;
use crate::reconcile;
use testkit::stripe::{CLOVER, DAY, Endpoint, HOUR, Stripe, Terms, Troubles, now_s};

each_database! {
    async fn webhooks_that_are_lost_for_a_day_are_missed(server: TestServer) {
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!("{}/webhooks/stripe", server.process.base)));
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        came(&server, [DAY_MS]).await;
        let settings = stripe.settings();
        let environment = [&[("DATABASE_URL", server.database.url.as_str())], &settings[..]].concat();
        server.store("a", life.id()).await;
        testkit::run(&environment, &["reconcile"], b"");
        let missed = |said: &DoctorOutput| {
            said.assert_says("deliveries", &["1.0 days ago", "created events since, the first 23.0 hours ago", "Dashboard"]);
            assert_eq!(said.check("deliveries")["state"], "failing");
        };
        missed(&doctor(&server, &settings));
        testkit::run(&environment, &["reconcile"], b"").with_code(0);
        doctor(&server, &[]).assert_says("endpoint", &["No webhook was received since", "Stripe's list has new events", "The last run found this"]);
        // As if the pass that found them had failed half way.
        server.database.execute("delete from runs").await;
        missed(&doctor(&server, &settings));
        came(&server, [0]).await;
        assert_eq!(doctor(&server, &settings).check("deliveries")["state"], "ok");
    }

    async fn what_a_clock_noted_that_was_ahead_does_not_hide_what_is_so_now(server: TestServer) {
        let stripe = Stripe::start();
        let ours = format!("{}/webhooks/stripe", server.process.base);
        stripe.register(Endpoint { status: "disabled", ..Endpoint::enabled(&ours) });
        came(&server, [10 * MINUTE_MS]).await;
        let environment = [&[("DATABASE_URL", server.database.url.as_str())], &stripe.settings()[..]].concat();
        testkit::run(&environment, &["reconcile"], b"");
        doctor(&server, &[]).assert_says("endpoint", &["is disabled"]);
        move_passes(&server, -DAY_MS).await;
        server.database.execute(&format!("insert into moments values ('refused stale', {})", Clock::system().now_ms() + DAY_MS)).await;
        doctor(&server, &[]).assert_wrong(&[]).assert_says("endpoint", &["It was not checked yet"]);
        server.database.execute(&format!("insert into moments values ('reconciling failed', {})", Clock::system().now_ms())).await;
        let said = doctor(&server, &[]);
        said.assert_wrong(&[("reconciliation", "failing")]).assert_says("reconciliation", &["The last run failed", "none has succeeded yet"]);
        let why = "insert into moments select 'reconciling failed by busy', at_ms from moments where name = 'reconciling failed'";
        server.database.execute(why).await;
        doctor(&server, &[]).assert_says("reconciliation", &["The last run failed: Stripe took no more calls (429)", "let them make fewer"]);
    }

    async fn what_an_endpoint_need_not_send_is_not_missed(server: TestServer) {
        let stripe = Stripe::start();
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        came(&server, [DAY_MS + HOUR_MS]).await;
        let environment = [&[("DATABASE_URL", server.database.url.as_str())], &stripe.settings()[..]].concat();
        let report = testkit::run(&environment, &["reconcile", "--json"], b"").json();
        let found = report["apiOnlyEvents"].as_array().unwrap();
        assert!(found.iter().any(|event| event["type"] == "invoice.created"), "{report}");
        server.database.execute("delete from events where source = 'api' and event_type <> 'invoice.created'").await;
        assert_eq!(doctor(&server, &[]).check("deliveries")["state"], "ok");
    }

    async fn stripe_is_asked_three_times_and_what_it_answers_then_is_said(server: TestServer) {
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!("{}/webhooks/stripe", server.process.base)));
        let asked = |troubles: Troubles| {
            stripe.trouble(troubles);
            stripe.forget_calls();
            let said = doctor(&server, &stripe.settings());
            (said, stripe.calls().iter().map(|call| call.status.unwrap()).collect::<Vec<u16>>())
        };
        for (troubles, first) in [(Troubles { rate_limited: 1.0, ..Troubles::default() }, 429), (Troubles { failing: 1.0, ..Troubles::default() }, 500)] {
            let (said, statuses) = asked(troubles);
            said.assert_says("endpoint", &["It is enabled"]);
            assert_eq!((statuses.len(), statuses[0], statuses[2]), (3, first, 200), "patience pays: {statuses:?}");
        }
        let (said, statuses) = asked(Troubles { rate_limited: 1.0, lasting: true, ..Troubles::default() });
        said.assert_wrong(&[("endpoint", "warning"), ("reconciliation", "warning")]).assert_says("endpoint", &["Stripe takes no more calls now", "429 Too Many Requests", "let them make fewer"]);
        assert_eq!((said.code, statuses), (3, vec![429; 3]));
        let (said, statuses) = asked(Troubles { failing: 1.0, lasting: true, ..Troubles::default() });
        said.assert_wrong(&[("endpoint", "warning"), ("reconciliation", "warning")]).assert_says("endpoint", &["500 Internal Server Error", "status.stripe.com"]);
        assert_eq!((said.code, statuses), (3, vec![500, 502, 500]));
    }

    async fn what_is_wrong_at_stripe_is_said_from_its_api_and_from_the_last_pass(server: TestServer) {
        let stripe = Stripe::start();
        let settings = stripe.settings();
        doctor(&server, &settings).assert_says("endpoint", &["no webhook endpoint"]).assert_says("clock", &["It agrees with Stripe's"]);
        let ours = format!("{}/webhooks/stripe", server.process.base);
        stripe.register(Endpoint { status: "disabled", ..Endpoint::enabled(&ours) });
        let said = doctor(&server, &settings);
        said.assert_wrong(&[("endpoint", "failing"), ("reconciliation", "warning")]);
        said.assert_says("endpoint", &["is disabled", "Dashboard"]).assert_says("reconciliation", &["No run has ended yet"]);
        let environment = [&[("DATABASE_URL", server.database.url.as_str())], &settings[..]].concat();
        testkit::run(&environment, &["reconcile"], b"").with_code(0);
        let said = doctor(&server, &[]);
        said.assert_wrong(&[("endpoint", "failing")]).assert_says("endpoint", &["is disabled"]);
        doctor(&server, &[("STRIPE_API_BASE", &stripe.base), ("STRIPE_API_KEY", "sk_live_of_somebody_else")])
            .assert_says("endpoint", &["does not accept STRIPE_API_KEY", "restricted key"]);
        move_passes(&server, HOUR_MS).await;
        doctor(&server, &[]).assert_wrong(&[("endpoint", "failing"), ("reconciliation", "warning")]).assert_says("reconciliation", &["overdue"]);
        assert_eq!(stripe.faults(), [""; 0]);
    }

    async fn a_clock_that_is_off_is_said(server: TestServer) {
        for (ahead_s, state, words) in [(120, "failing", "behind Stripe's"), (-20, "warning", "ahead of Stripe's"), (3, "ok", "agrees with Stripe's")] {
            let stripe = Stripe::start_at(Clock::fixed((now_s() + ahead_s) * 1000));
            let said = doctor(&server, &stripe.settings());
            assert_eq!(said.check("clock")["state"], state);
            said.assert_says("clock", &[words]);
            assert!(state == "ok" || said.check("clock")["cure"].as_str().unwrap().contains("NTP"));
        }
    }

    async fn passes_that_fail_and_invoices_that_differ_are_said(server: TestServer) {
        let mut server = server;
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!("{}/webhooks/stripe", server.process.base)));
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        let document = json!({"spec": {"paymentUnit": "usd"}, "status": {"billableAmount": 49.99, "stripeInvoiceId": life.id()}});
        server.put(&invoice_path("a"), &document).await;
        let settings = stripe.settings();
        let environment = [&[("DATABASE_URL", server.database.url.as_str())], &settings[..]].concat();
        testkit::run(&environment, &["reconcile"], b"").with_code(3);
        doctor(&server, &settings).assert_wrong(&[("drift", "warning")]).assert_says("drift", &["Different from Stripe's: 1 invoice,", "reconcile", "Find out which side is wrong"]);
        let url = server.database.url.clone();
        server.process = Server::start_with(&[("DATABASE_URL", &url), ("STRIPE_WEBHOOK_SECRET", SECRET), ("STRIPE_API_BASE", &stripe.base), ("STRIPE_API_KEY", "sk_live_of_somebody_else")]);
        until(&server, "a pass fails", |scrape| scrape.value("reconcile_runs_total{result=\"failed\"}") >= 1.0).await;
        doctor(&server, &settings).assert_says("reconciliation", &["The last run failed: Stripe does not accept STRIPE_API_KEY", "the last that succeeded ended", "restricted key"]);
    }
}

/// An invoice of yesterday.
fn terms() -> Terms {
    reconcile::terms(now_s() - DAY, CLOVER)
}

/// As if all passes were made so much earlier.
async fn move_passes(server: &TestServer, ms: i64) {
    let statement =
        format!("update runs set started_ms = started_ms - {ms}, ended_ms = ended_ms - {ms}");
    server.database.execute(&statement).await;
}

//! `doctor` about Stripe: its API, the last reconcile runs, and events that no webhook delivered.

use super::*;
use crate::reconcile;
use testkit::stripe::{CLOVER, DAY, Endpoint, Faults, HOUR, Stripe, Terms, now_s};

each_database! {
    async fn webhooks_lost_for_a_day_are_reported(server: TestServer) {
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!(
            "{}/webhooks/stripe",
            server.process.base
        )));
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        insert_deliveries(&server, [DAY_MS]).await;
        let settings = stripe.settings();
        let environment = [
            &[("DATABASE_URL", server.database.url.as_str())],
            &settings[..],
        ]
        .concat();

        server.store("a", life.id()).await;
        testkit::run(&environment, &["reconcile"], b"");
        let assert_gap_reported = |report: &DoctorOutput| {
            report.assert_mentions(
                "deliveries",
                &[
                    "1.0 days ago",
                    "created events since, the first 23.0 hours ago",
                    "Dashboard",
                ],
            );
            assert_eq!(report.check("deliveries")["state"], "failing");
        };
        assert_gap_reported(&doctor(&server, &settings));

        testkit::run(&environment, &["reconcile"], b"").with_code(0);
        doctor(&server, &[]).assert_mentions(
            "endpoint",
            &[
                "No webhook was received since",
                "Stripe's list has new events",
                "The last run found this",
            ],
        );

        // As if the run that found them had failed half way.
        server.database.execute("delete from runs").await;
        assert_gap_reported(&doctor(&server, &settings));

        insert_deliveries(&server, [0]).await;
        assert_eq!(
            doctor(&server, &settings).check("deliveries")["state"],
            "ok"
        );
    }

    async fn times_from_skewed_clock_do_not_hide_current_problems(server: TestServer) {
        let stripe = Stripe::start();
        let ours = format!("{}/webhooks/stripe", server.process.base);
        stripe.register(Endpoint {
            status: "disabled",
            ..Endpoint::enabled(&ours)
        });
        insert_deliveries(&server, [10 * MINUTE_MS]).await;
        let environment = [
            &[("DATABASE_URL", server.database.url.as_str())],
            &stripe.settings()[..],
        ]
        .concat();
        testkit::run(&environment, &["reconcile"], b"");
        doctor(&server, &[]).assert_mentions("endpoint", &["is disabled"]);

        move_runs(&server, -DAY_MS).await;
        server
            .database
            .execute(&format!(
                "insert into moments values ('refused stale', {})",
                Clock::system().now_ms() + DAY_MS
            ))
            .await;
        doctor(&server, &[])
            .assert_findings(&[])
            .assert_mentions("endpoint", &["It was not checked yet"]);
        server
            .database
            .execute(&format!(
                "insert into moments values ('reconciling failed', {})",
                Clock::system().now_ms()
            ))
            .await;

        let report = doctor(&server, &[]);
        report
            .assert_findings(&[("reconciliation", "failing")])
            .assert_mentions(
                "reconciliation",
                &["The last run failed", "none has succeeded yet"],
            );
        let why = "insert into moments select 'reconciling failed by busy', at_ms from moments where name = 'reconciling failed'";
        server.database.execute(why).await;

        doctor(&server, &[]).assert_mentions(
            "reconciliation",
            &[
                "The last run failed: Stripe rejected calls above its rate limit (429)",
                "let them make fewer",
            ],
        );
    }

    async fn unsubscribed_event_types_do_not_count_as_lost(server: TestServer) {
        let stripe = Stripe::start();
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        insert_deliveries(&server, [DAY_MS + HOUR_MS]).await;
        let environment = [
            &[("DATABASE_URL", server.database.url.as_str())],
            &stripe.settings()[..],
        ]
        .concat();
        let report = testkit::run(&environment, &["reconcile", "--json"], b"").json();
        let found = report["apiOnlyEvents"].as_array().unwrap();

        assert!(
            found.iter().any(|event| event["type"] == "invoice.created"),
            "{report}"
        );

        server
            .database
            .execute("delete from events where source = 'api' and event_type <> 'invoice.created'")
            .await;
        assert_eq!(doctor(&server, &[]).check("deliveries")["state"], "ok");
    }

    async fn doctor_retries_stripe_twice_and_reports_last_answer(server: TestServer) {
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!(
            "{}/webhooks/stripe",
            server.process.base
        )));
        let doctor_with_faults = |faults: Faults| {
            stripe.set_faults(faults);
            stripe.clear_calls();
            let report = doctor(&server, &stripe.settings());
            (
                report,
                stripe
                    .calls()
                    .iter()
                    .map(|call| call.status.unwrap())
                    .collect::<Vec<u16>>(),
            )
        };

        for (faults, first) in [
            (
                Faults {
                    rate_limited: 1.0,
                    ..Faults::default()
                },
                429,
            ),
            (
                Faults {
                    failing: 1.0,
                    ..Faults::default()
                },
                500,
            ),
        ] {
            let (report, statuses) = doctor_with_faults(faults);
            report.assert_mentions("endpoint", &["It is enabled"]);
            assert_eq!(
                (statuses.len(), statuses[0], statuses[2]),
                (3, first, 200),
                "patience pays: {statuses:?}"
            );
        }

        let (report, statuses) = doctor_with_faults(Faults {
            rate_limited: 1.0,
            lasting: true,
            ..Faults::default()
        });
        report
            .assert_findings(&[("endpoint", "warning"), ("reconciliation", "warning")])
            .assert_mentions(
                "endpoint",
                &[
                    "Stripe rate limit reached",
                    "429 Too Many Requests",
                    "let them make fewer",
                ],
            );

        assert_eq!((report.code, statuses), (3, vec![429; 3]));

        let (report, statuses) = doctor_with_faults(Faults {
            failing: 1.0,
            lasting: true,
            ..Faults::default()
        });
        report
            .assert_findings(&[("endpoint", "warning"), ("reconciliation", "warning")])
            .assert_mentions(
                "endpoint",
                &["500 Internal Server Error", "status.stripe.com"],
            );
        assert_eq!((report.code, statuses), (3, vec![500, 502, 500]));
    }

    async fn endpoint_problems_are_reported_from_api_and_last_run(server: TestServer) {
        let stripe = Stripe::start();
        let settings = stripe.settings();
        doctor(&server, &settings)
            .assert_mentions("endpoint", &["no webhook endpoint"])
            .assert_mentions("clock", &["It agrees with Stripe's"]);
        let ours = format!("{}/webhooks/stripe", server.process.base);

        stripe.register(Endpoint {
            status: "disabled",
            ..Endpoint::enabled(&ours)
        });
        let report = doctor(&server, &settings);
        report.assert_findings(&[("endpoint", "failing"), ("reconciliation", "warning")]);
        report
            .assert_mentions("endpoint", &["is disabled", "Dashboard"])
            .assert_mentions("reconciliation", &["No run has ended yet"]);
        let environment = [
            &[("DATABASE_URL", server.database.url.as_str())],
            &settings[..],
        ]
        .concat();
        testkit::run(&environment, &["reconcile"], b"").with_code(0);

        let report = doctor(&server, &[]);
        report
            .assert_findings(&[("endpoint", "failing")])
            .assert_mentions("endpoint", &["is disabled"]);
        doctor(
            &server,
            &[
                ("STRIPE_API_BASE", &stripe.base),
                ("STRIPE_API_KEY", "sk_live_of_somebody_else"),
            ],
        )
        .assert_mentions(
            "endpoint",
            &["does not accept STRIPE_API_KEY", "restricted key"],
        );

        move_runs(&server, HOUR_MS).await;
        doctor(&server, &[])
            .assert_findings(&[("endpoint", "failing"), ("reconciliation", "warning")])
            .assert_mentions("reconciliation", &["overdue"]);
        assert_eq!(stripe.violations(), [""; 0]);
    }

    async fn skewed_clock_is_reported(server: TestServer) {
        for (ahead_s, state, text) in [
            (120, "failing", "behind Stripe's"),
            (-20, "warning", "ahead of Stripe's"),
            (3, "ok", "agrees with Stripe's"),
        ] {
            let stripe = Stripe::start_at(Clock::fixed((now_s() + ahead_s) * 1000));
            let report = doctor(&server, &stripe.settings());
            assert_eq!(report.check("clock")["state"], state);
            report.assert_mentions("clock", &[text]);
            assert!(
                state == "ok"
                    || report.check("clock")["cure"]
                        .as_str()
                        .unwrap()
                        .contains("NTP")
            );
        }
    }

    async fn failed_runs_and_differing_invoices_are_reported(server: TestServer) {
        let mut server = server;
        let stripe = Stripe::start();
        stripe.register(Endpoint::enabled(&format!(
            "{}/webhooks/stripe",
            server.process.base
        )));
        let mut life = stripe.draft(terms());
        life.later(HOUR).finalized();
        let document = json!({"spec": {"paymentUnit": "usd"}, "status": {"billableAmount": 49.99, "stripeInvoiceId": life.id()}});
        server.put(&invoice_path("a"), &document).await;
        let settings = stripe.settings();
        let environment = [
            &[("DATABASE_URL", server.database.url.as_str())],
            &settings[..],
        ]
        .concat();

        testkit::run(&environment, &["reconcile"], b"").with_code(3);
        doctor(&server, &settings)
            .assert_findings(&[("drift", "warning")])
            .assert_mentions(
                "drift",
                &[
                    "Different from Stripe's: 1 invoice,",
                    "reconcile",
                    "Find out which side is wrong",
                ],
            );
        let url = server.database.url.clone();

        server.process = Server::start_with(&[
            ("DATABASE_URL", &url),
            ("STRIPE_WEBHOOK_SECRET", SECRET),
            ("STRIPE_API_BASE", &stripe.base),
            ("STRIPE_API_KEY", "sk_live_of_somebody_else"),
        ]);
        until(&server, "a pass fails", |scrape| {
            scrape.value("reconcile_runs_total{result=\"failed\"}") >= 1.0
        })
        .await;

        doctor(&server, &settings).assert_mentions(
            "reconciliation",
            &[
                "The last run failed: Stripe does not accept STRIPE_API_KEY",
                "the last that succeeded ended",
                "restricted key",
            ],
        );
    }
}

/// Returns the terms of an invoice of yesterday.
fn terms() -> Terms {
    reconcile::terms(now_s() - DAY, CLOVER)
}

/// Moves all runs into the past by this many milliseconds.
async fn move_runs(server: &TestServer, ms: i64) {
    let statement =
        format!("update runs set started_ms = started_ms - {ms}, ended_ms = ended_ms - {ms}");
    server.database.execute(&statement).await;
}

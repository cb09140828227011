//! Tracing: a delivery is followed from its request to its commit, in the log and in a collector of
//! spans.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tokio::net::TcpListener;

use testkit::collector::{Collector, attribute};
use testkit::each_database;
use testkit::stripe::Stripe;
use testkit::{SECRET, Server, TestServer, invoice_path, signature};

fn event(id: &str) -> Value {
    json!({"id": id, "object": "event", "type": "customer.updated", "created": 100, "data": {"object": {"id": "cus_1"}}})
}

/// Returns the lines of a server's log as JSON documents.
fn lines(server: &Server) -> Vec<Value> {
    server
        .log()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

each_database! {
    async fn log_traces_request_id_from_delivery_to_commit(server: TestServer) {
        let server = server.with_server(&[("RUST_LOG", "debug"), ("LOG_FORMAT", "json")]);
        let answer = server.deliver(&event("evt_1")).await.with_status(200);
        let id = answer.header("x-request-id");
        let lines = lines(&server.process);
        let spans = |line: &Value| line["spans"].as_array().cloned().unwrap_or_default();
        let durable = lines
            .iter()
            .find(|line| line["fields"]["message"] == "durable")
            .unwrap();
        let (request, keep) = (&spans(durable)[0], &spans(durable)[1]);

        assert_eq!(
            (&request["request.id"], &keep["event.id"]),
            (&json!(id), &json!("evt_1")),
            "{durable}"
        );
        assert_eq!(durable["fields"]["outcome"], "no_payment_fact");

        let commit = lines
            .iter()
            .find(|line| line["fields"]["message"] == "commit")
            .unwrap();
        let batch = &spans(commit)[0];
        assert_eq!(
            (&batch["batch.id"], &batch["batch.size"]),
            (&keep["batch.id"], &json!(1)),
            "{commit}"
        );

        let done = lines
            .iter()
            .find(|line| {
                line["fields"]["message"] == "request" && spans(line)[0]["request.id"] == id
            })
            .unwrap();
        assert_eq!(done["fields"]["status"], 200);
    }

    async fn spans_cover_delivery_at_any_log_level(server: TestServer) {
        let collector = Collector::start();
        let server = server.with_server(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.base),
            ("OTEL_SERVICE_NAME", "till"),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "x-collector-key=of%20the%20collector",
            ),
        ]);
        let answer = server.deliver(&event("evt_1")).await.with_status(200);
        let id = answer.header("x-request-id").to_owned();
        let request = collector
            .wait_for(|span| attribute(span, "request.id") == id)
            .await;

        assert_eq!(request.name, "POST /webhooks/stripe");
        assert_eq!(
            (
                request.kind,
                attribute(&request, "http.response.status_code").as_str()
            ),
            (2, "200"),
            "{request:?}"
        );

        let keep = collector.wait_for(|span| span.name == "keep").await;
        assert_eq!(
            (&keep.trace_id, &keep.parent_span_id),
            (&request.trace_id, &request.span_id)
        );
        assert_eq!(attribute(&keep, "event.id"), "evt_1");

        let batch = collector.wait_for(|span| span.name == "batch").await;
        assert_eq!(attribute(&batch, "batch.id"), attribute(&keep, "batch.id"));
        assert!(!attribute(&batch, "batch.id").is_empty());
        assert_eq!(
            batch
                .links
                .iter()
                .map(|link| &link.span_id)
                .collect::<Vec<_>>(),
            [&keep.span_id]
        );
        assert_eq!(collector.service_names()[0], "till");
        assert!(
            collector
                .raw()
                .iter()
                .all(|(headers, _)| headers["x-collector-key"] == "of the collector")
        );
    }

    async fn request_continues_incoming_trace(server: TestServer) {
        let collector = Collector::start();
        let server = server.with_server(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.base)]);
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let answer = server
            .send(
                "GET",
                &invoice_path("none"),
                &[("ApiKey", &server.acme_key), ("traceparent", traceparent)],
                vec![],
            )
            .await;
        let id = answer.with_status(404).header("x-request-id").to_owned();
        let request = collector
            .wait_for(|span| attribute(span, "request.id") == id)
            .await;

        assert_eq!(hex::encode(&request.trace_id), &traceparent[3..35]);
        assert_eq!(hex::encode(&request.parent_span_id), &traceparent[36..52]);

        for odd in ["", "00-0-0-01", "zz", &"0".repeat(10_000)] {
            server
                .send("GET", "/healthz", &[("traceparent", odd)], vec![])
                .await
                .with_status(200);
        }

        let odd = collector.wait_for(|span| span.name == "GET /healthz").await;
        assert!(odd.parent_span_id.is_empty(), "{odd:?}");
    }

    async fn pending_spans_are_sent_on_exit(server: TestServer) {
        let collector = Collector::start();
        let mut server = server.with_server(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.base)]);
        for n in 0..50 {
            server
                .deliver(&event(&format!("evt_{n}")))
                .await
                .with_status(200);
        }

        server.process.terminate();
        assert_eq!(server.process.exit_code(), Some(0));

        let kept: Vec<String> = collector
            .spans()
            .iter()
            .filter(|span| span.name == "keep")
            .map(|span| attribute(span, "event.id"))
            .collect();
        assert_eq!(
            kept,
            (0..50).map(|n| format!("evt_{n}")).collect::<Vec<_>>()
        );
    }

    async fn sampler_drops_unsampled_traces(server: TestServer) {
        let collector = Collector::start();
        let mut server = server.with_server(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.base),
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.5"),
        ]);

        for n in 0..60 {
            server
                .deliver(&event(&format!("evt_{n}")))
                .await
                .with_status(200);
        }

        server.process.terminate();
        assert_eq!(server.process.exit_code(), Some(0));

        let kept = collector
            .spans()
            .iter()
            .filter(|span| span.name == "keep")
            .count();
        assert!((5..55).contains(&kept), "{kept} of 60");
    }

    async fn reconcile_run_has_its_own_trace_id(server: TestServer) {
        let (collector, stripe) = (Collector::start(), Stripe::start());
        let environment = [
            &[
                ("DATABASE_URL", server.database.url.as_str()),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.base),
            ][..],
            &stripe.settings(),
        ]
        .concat();
        testkit::run(&environment, &["reconcile"], b"").with_code(0);
        let pass = collector
            .spans()
            .into_iter()
            .find(|span| span.name == "run")
            .expect("a command sends its spans too");

        let runs = server
            .run(&["reconcile", "--list", "--json"])
            .with_code(0)
            .json();
        assert_eq!(runs["runs"][0]["id"], attribute(&pass, "run.id"));

        let calls: Vec<_> = collector
            .spans()
            .into_iter()
            .filter(|span| span.name == "call Stripe")
            .collect();
        assert!(
            calls
                .iter()
                .any(|span| attribute(span, "url.path") == "/v1/events"
                    && span.trace_id == pass.trace_id),
            "{calls:?}"
        );
    }

    async fn unreachable_or_slow_collector_delays_nobody(server: TestServer) {
        // A collector that accepts connections and never answers, and an unreachable one.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("http://{}", silent.local_addr().unwrap());

        for endpoint in [at.as_str(), "http://127.0.0.1:9"] {
            let mut server = TestServer::start(server.engine)
                .await
                .with_server(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]);
            let started = Instant::now();
            let deliver = async |connection: usize| {
                for n in 0..100 {
                    let body = event(&format!("evt_{connection}_{n}")).to_string();
                    let signature = signature(SECRET, Clock::system().now_s(), body.as_bytes());
                    server
                        .deliver_signed(&signature, body.as_bytes())
                        .await
                        .with_status(200);
                }
            };
            // More spans than the queue holds.
            futures_util::future::join_all((0..20).map(deliver)).await;
            let took = started.elapsed();
            let metrics = server
                .get("/metrics", &server.operator_key)
                .await
                .with_status(200);
            let text = String::from_utf8(metrics.body.to_vec()).unwrap();
            let dropped = text
                .lines()
                .find_map(|line| line.strip_prefix("stripe_reconciler_spans_dropped "))
                .unwrap();
            assert!(dropped.parse::<u64>().unwrap() > 0, "{dropped}");
            assert!(took < Duration::from_secs(30), "{took:?}");
            let started = Instant::now();
            server.process.terminate();
            assert_eq!(server.process.exit_code(), Some(0));
            assert!(
                started.elapsed() < Duration::from_secs(8),
                "{:?}",
                started.elapsed()
            );
        }
    }
}

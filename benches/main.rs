//! Benchmarks behind the README's figures: `cargo bench`.
//!
//! One run measures both engines and the plain implementation, with the load generator on the same
//! machine. It asserts nothing; it prints figures and ratios.
//!
//! `--quick` takes a fifth of the time. `--engine sqlite` or `--engine postgres` measures one
//! engine. `--connections 256` measures one number of connections, for use under a profiler.
//! `--picture FILE` draws the results. `--growth 5` measures deliveries and reads instead while the
//! log grows to five million events. `--fold` measures instead folds and reads of an invoice with
//! thousands of failed tries. `--beside-batch` measures deliveries while each batch command works on
//! the same database; `--rows 20000` sets how much work the command has.

mod beside_batch;
mod deliveries;
mod fold;
mod load;
mod picture;
mod process;
mod reference;

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use load::{Timings, closed_loop, open_loop};
use process::{Served, cpu, product, pss_mb};
use tempfile::TempDir;
use testkit::PostgresServer;

const CONNECTIONS: [usize; 4] = [1, 16, 64, 256];

struct Bench {
    /// Duration of each measurement.
    time: Duration,
    folder: TempDir,
    postgres: Option<PostgresServer>,
    databases: usize,
    events: usize,
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|a| a == "--plain") {
        return reference::serve_plain(&arguments[at + 1]).await;
    }

    let has = |word: &str| arguments.iter().any(|a| a == word);
    let time = if has("--quick") {
        Duration::from_millis(800)
    } else {
        Duration::from_secs(4)
    };
    let value = |name: &str| {
        arguments
            .iter()
            .position(|a| a == name)
            .and_then(|at| arguments.get(at + 1))
            .cloned()
    };
    let (only, connections) = (
        value("--engine"),
        value("--connections").and_then(|n| n.parse().ok()),
    );

    let folder = tempfile::Builder::new()
        .prefix("stripe-reconciler-bench-")
        .tempdir()
        .expect("a folder");
    let mut bench = Bench {
        time,
        folder,
        postgres: None,
        databases: 0,
        events: 0,
    };

    if let Some(millions) = value("--growth").and_then(|n| n.parse::<f64>().ok()) {
        return bench
            .growth(only.as_deref().unwrap_or("sqlite"), millions)
            .await;
    }
    if has("--fold") {
        let engine = only.as_deref().unwrap_or("sqlite");
        let urls: Vec<String> = (0..3).map(|_| bench.database(engine)).collect();
        return fold::run(&urls).await;
    }

    if has("--beside-batch") {
        let rows = value("--rows").and_then(|n| n.parse().ok());
        return bench
            .beside_batch(only.as_deref(), rows.unwrap_or(20_000))
            .await;
    }

    let mut drawn = Vec::new();
    let disk = reference::disk_commits(&bench.folder.path().join("disk"), time);
    println!("The disk makes {disk:.0} appends of 8 KB durable a second, one by one.");
    for engine in ["sqlite", "postgres"] {
        if only.as_deref().is_none_or(|only| only == engine) {
            drawn.push(bench.measure(engine, connections).await);
        }
    }

    if let Some(file) = value("--picture") {
        std::fs::write(&file, picture::svg(&drawn)).expect("the picture is written");
    }
}

/// Result of one implementation at one number of connections.
struct Side {
    timings: Timings,
    cpu_us: f64,
}

impl Bench {
    /// Measures one engine and returns the bars of the picture.
    async fn measure(
        &mut self,
        engine: &str,
        only: Option<usize>,
    ) -> (String, Vec<picture::Group>) {
        let about = reference::about(&self.database(engine)).await;
        println!("\n{about}");
        let mut drawn = Vec::new();
        let limit = reference::batch_limit(&self.database(engine), self.time).await;
        let commit_ms = reference::commit_ms(&self.database(engine), self.time).await;
        println!("Batch limit: {limit:.0} rows/s. One commit: {commit_ms:.3} ms.\n");
        println!("connections  way      acks/s  p50 ms  p99 ms  p99.9 ms  CPU us/ack  not 2xx");
        for connections in CONNECTIONS
            .into_iter()
            .filter(|n| only.is_none_or(|only| only == *n))
        {
            let (plain_url, url) = (self.database(engine), self.database(engine));
            let plain = self
                .acks(&plain_url, connections, Served::plain, engine)
                .await;
            let ours = self.acks(&url, connections, Served::product, engine).await;
            print_side(connections, "plain", &plain);
            print_side(connections, "ours", &ours);
            let acks = ours.timings.per_second();
            drawn.push((connections, plain.timings.per_second(), acks));
            println!(
                "{:>11}  ratio    {:>5.2}x  {:>5.2}x  {:>5.2}x            {:>8.2}x  {:.2} of the batch limit",
                "",
                acks / plain.timings.per_second(),
                ours.timings.quantile_ms(0.5) / plain.timings.quantile_ms(0.5),
                ours.timings.quantile_ms(0.99) / plain.timings.quantile_ms(0.99),
                ours.cpu_us / plain.cpu_us,
                acks / limit,
            );
        }

        if only.is_some() {
            return (about, drawn);
        }

        let urls = [
            self.database(engine),
            self.database(engine),
            self.database(engine),
        ];
        self.steady(&urls).await;
        let url = self.database(engine);
        self.alone(&url, commit_ms).await;
        (about, drawn)
    }

    /// Measures deliveries and reads while the log grows, in five steps.
    async fn growth(&mut self, engine: &str, millions: f64) {
        let url = self.database(engine);
        let step = (millions * 1e6 / 5.0) as usize;
        println!("    events  acks/s at 64  p50 ms at 1  read p50 ms  replay events/s");

        for _ in 0..5 {
            let replay = self.replay(&url, step);
            let (key, path) = self.invoice(&url);
            let server = Served::product(&url);
            let warm = self.deliveries(2_000);
            closed_loop(&server.authority, 64, &warm).await;
            let (many, few) = (self.deliveries(20_000), self.deliveries(1_000));
            let acks = closed_loop(&server.authority, 64, &many).await.per_second();
            let alone_ms = closed_loop(&server.authority, 1, &few)
                .await
                .quantile_ms(0.5);
            let reads = deliveries::reads(&path, &format!("apikey: {key}\r\n"), 2_000);
            reference::settle(&url).await;
            let read_ms = closed_loop(&server.authority, 1, &reads)
                .await
                .quantile_ms(0.5);
            println!(
                "{:>10}  {acks:>12.0}  {alone_ms:>11.3}  {read_ms:>11.3}  {replay:>15.0}",
                self.events
            );
        }
    }

    async fn beside_batch(&mut self, only: Option<&str>, rows: usize) {
        for engine in ["sqlite", "postgres"] {
            if only.is_some_and(|only| only != engine) {
                continue;
            }
            println!("\n{engine}, {rows} rows");
            let beside = beside_batch::BesideBatch {
                url: self.database(engine),
                copy_url: self.database(engine),
                folder: self.folder.path().to_owned(),
                rows,
            };
            beside.measure().await;
        }
    }

    fn database(&mut self, engine: &str) -> String {
        if engine == "postgres" && self.postgres.is_none() {
            self.postgres = Some(PostgresServer::start("-c max_connections=100"));
        }

        self.databases += 1;
        match &self.postgres {
            Some(server) if engine == "postgres" => server.url(&server.create_database()),
            _ => format!(
                "sqlite://{}/{}.db",
                self.folder.path().display(),
                self.databases
            ),
        }
    }

    /// Returns requests with events that no earlier measurement delivered.
    fn deliveries(&mut self, count: usize) -> load::Requests {
        self.events += count;
        deliveries::signed(self.events - count, count)
    }

    async fn acks(
        &mut self,
        url: &str,
        connections: usize,
        start: fn(&str) -> Served,
        engine: &str,
    ) -> Side {
        let server = start(url);
        let warm_up = self.deliveries(connections * 8);
        let warm = closed_loop(&server.authority, connections, &warm_up).await;
        let count = (warm.per_second() * self.time.as_secs_f64()) as usize;
        let requests = self.deliveries(count.clamp(connections * 8, 120_000));
        let used = |bench: &Bench| {
            let database = if engine == "postgres" {
                bench.postgres.as_ref().map(|server| cpu(server.pid()))
            } else {
                None
            };
            cpu(server.pid()) + database.unwrap_or_default()
        };
        reference::settle(url).await;

        let before = used(self);
        let timings = closed_loop(&server.authority, connections, &requests).await;
        let cpu_us = (used(self) - before).as_secs_f64() * 1e6 / timings.sorted.len() as f64;
        Side { timings, cpu_us }
    }

    /// Measures latency at a fixed rate, from the time a request was due.
    async fn steady(&mut self, [plain_url, url, fast_url]: &[String; 3]) {
        let seconds = self.time.as_secs_f64() * 2.0;
        println!("\nrate/s  connections  way     p50 ms  p99 ms  p99.9 ms  not 2xx");

        for (way, start, url, rate, connections) in [
            (
                "plain",
                Served::plain as fn(&str) -> Served,
                plain_url,
                300.0,
                64,
            ),
            ("ours", Served::product, url, 300.0, 64),
            ("ours", Served::product, fast_url, 2000.0, 256),
        ] {
            let server = start(url);
            reference::settle(url).await;
            self.at_rate(way, server, rate, connections, seconds).await;
        }
    }

    async fn at_rate(
        &mut self,
        way: &str,
        server: Served,
        rate: f64,
        connections: usize,
        seconds: f64,
    ) {
        let requests = self.deliveries((rate * seconds) as usize);
        let t = open_loop(&server.authority, connections, &requests, rate).await;
        let (p50, p99, p999) = (
            t.quantile_ms(0.5),
            t.quantile_ms(0.99),
            t.quantile_ms(0.999),
        );

        println!(
            "{rate:>6}  {connections:>11}  {way:<6}  {p50:>6.2}  {p99:>6.2}  {p999:>8.2}  {:>7}",
            t.not_2xx
        );
    }

    /// Stores the invoice of the next four events. Returns a key that reads it, and its path.
    fn invoice(&mut self, url: &str) -> (String, String) {
        let run = |arguments: &[&str]| {
            let output = product(url).args(arguments).output().expect("it runs");
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        self.events = self.events.next_multiple_of(4);
        let stripe_invoice_id = deliveries::stripe_invoice_id(self.events / 4);
        let uid = format!("invoice-{}", self.events);
        let file = self.folder.path().join("invoice.json");
        let invoice = format!(
            r#"{{"metadata":{{"uid":"{uid}"}},"status":{{"stripeInvoiceId":"{stripe_invoice_id}"}}}}"#
        );

        std::fs::write(&file, invoice).expect("a file");
        run(&[
            "invoices",
            "import",
            "--tenant",
            "acme",
            &file.display().to_string(),
        ]);

        (
            run(&["keys", "create", "--tenant", "acme"]),
            format!("/v1/tenants/acme/invoices/{uid}"),
        )
    }

    async fn alone(&mut self, url: &str, commit_ms: f64) {
        let (key, path) = self.invoice(url);
        let path = path.as_str();
        let begun = Instant::now();
        let server = Served::product(url);
        let first = closed_loop(&server.authority, 1, &deliveries::reads("/healthz", "", 1)).await;
        let ready_ms = begun.elapsed().as_secs_f64() * 1e3;
        assert_eq!(first.not_2xx, 0);
        let idle_mb = pss_mb(server.pid());
        let events = self.deliveries(4);
        closed_loop(&server.authority, 1, &events).await;

        let headers = format!("apikey: {key}\r\n");
        let alone = closed_loop(
            &server.authority,
            1,
            &deliveries::reads(path, &headers, 2_000),
        )
        .await;
        let many = closed_loop(
            &server.authority,
            16,
            &deliveries::reads(path, &headers, 30_000),
        )
        .await;
        let tag = etag(&server.authority, path, &headers);
        let not_modified = format!("{headers}if-none-match: {tag}\r\n");
        let unchanged = closed_loop(
            &server.authority,
            16,
            &deliveries::reads(path, &not_modified, 30_000),
        )
        .await;
        let empty = closed_loop(
            &server.authority,
            1,
            &deliveries::reads("/healthz", "", 2_000),
        )
        .await;
        let warm = self.deliveries(500);
        closed_loop(&server.authority, 1, &warm).await;
        let single_requests = self.deliveries(1_000);
        let single = closed_loop(&server.authority, 1, &single_requests).await;
        let busy = self.deliveries(40_000);
        closed_loop(&server.authority, 256, &busy).await;
        let busy_mb = pss_mb(server.pid());
        let floor_ms = commit_ms + empty.quantile_ms(0.5);
        let single_ms = single.quantile_ms(0.5);
        println!(
            "\none delivery, alone: p50 {single_ms:.3} ms; one commit and an empty answer: {floor_ms:.3} ms; ratio {:.2}x",
            single_ms / floor_ms
        );
        println!(
            "reads: {:.0}/s at 16 connections, p50 {:.3} ms at 1; not 2xx {}",
            many.per_second(),
            alone.quantile_ms(0.5),
            many.not_2xx
        );
        println!(
            "304:   {:.0}/s at 16 connections, {:.2}x a full read",
            unchanged.per_second(),
            unchanged.per_second() / many.per_second()
        );
        println!(
            "memory (PSS): {idle_mb:.1} MB idle, {busy_mb:.1} MB after 256 connections. Start to first answer: {ready_ms:.0} ms."
        );
        drop(server);
        self.replay_and_rebuild(url);
    }

    fn replay_and_rebuild(&mut self, url: &str) {
        let replayed = self.replay(url, 50_000);
        let begun = Instant::now();
        let output = product(url)
            .args(["rebuild", "--json"])
            .output()
            .expect("it runs");
        let rebuilt: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("it reports");
        let read = rebuilt["events"].as_f64().unwrap_or(0.0) / begun.elapsed().as_secs_f64();
        println!("replay: {replayed:.0} events/s. rebuild: {read:.0} events/s.");
    }

    /// Measures how many events per second `replay` accepts.
    ///
    /// They come through a pipe, because a file would be written to the same disk.
    fn replay(&mut self, url: &str, count: usize) -> f64 {
        let begun = Instant::now();
        let mut replay = product(url)
            .args(["replay", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("it runs");
        let mut lines = std::io::BufWriter::new(replay.stdin.take().expect("piped"));
        for body in deliveries::bodies(self.events, count) {
            writeln!(lines, "{}", body.replace('\n', "")).expect("it takes a line");
        }

        drop(lines);
        assert!(replay.wait().expect("it ends").success());

        self.events += count;
        count as f64 / begun.elapsed().as_secs_f64()
    }
}

fn print_side(connections: usize, way: &str, side: &Side) {
    let t = &side.timings;
    println!(
        "{connections:>11}  {way:<6}  {:>7.0}  {:>6.2}  {:>6.2}  {:>8.2}  {:>10.0}  {:>7}",
        t.per_second(),
        t.quantile_ms(0.5),
        t.quantile_ms(0.99),
        t.quantile_ms(0.999),
        side.cpu_us,
        t.not_2xx
    );
}

fn etag(authority: &str, path: &str, headers: &str) -> String {
    use std::io::Read;

    let mut socket = std::net::TcpStream::connect(authority).expect("it listens");
    write!(
        socket,
        "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n{headers}\r\n"
    )
    .expect("it takes a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("it answers");

    answer
        .lines()
        .find_map(|line| line.strip_prefix("etag: "))
        .expect("an answer has a tag")
        .to_owned()
}

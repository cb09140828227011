//! A running server with its database, its keys and the steps that most tests need.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::signature::sign;
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;
use stripe_reconciler::http_client::HttpClient;
use tempfile::NamedTempFile;

use super::command::{self, CommandOutput, binary};
use super::database::{Database, Engine};
use super::http::{self, Answer};
use super::openapi::assert_documented;

pub const SECRET: &str = "whsec_world_live";
pub const OLD_SECRET: &str = "whsec_world_old";

/// Lines of the server's log shown when a test fails.
const LOG_LINES_SHOWN: usize = 30;

pub struct TestServer {
    pub engine: Engine,
    pub database: Database,
    pub operator_key: String,
    /// Key that reads tenant `acme`.
    pub acme_key: String,
    pub process: Server,
    client: HttpClient,
}

/// A running `serve`. Dropping it kills the process.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    process: Child,
    /// Standard error, shown when the test fails.
    ///
    /// A file, because an outage logs every rejected request.
    log: NamedTempFile,
}

impl TestServer {
    /// Starts a server on an empty database.
    ///
    /// It accepts `SECRET` (label `live`) and `OLD_SECRET` (label `old`).
    pub async fn start(engine: Engine) -> TestServer {
        TestServer::on(Database::create(engine)).await
    }

    /// Starts a server on an existing database, with the secrets of [`TestServer::start`].
    pub async fn on(database: Database) -> TestServer {
        let key = |arguments: &[&str]| {
            let arguments = [&["keys", "create"], arguments].concat();
            command::run(&[("DATABASE_URL", &database.url)], &arguments, b"")
                .with_code(0)
                .stdout
                .trim()
                .to_owned()
        };
        let (operator_key, acme_key) = (key(&["--operator"]), key(&["--tenant", "acme"]));
        let server = Server::start(&database.url);

        TestServer {
            engine: database.engine,
            database,
            operator_key,
            acme_key,
            process: server,
            client: http::client(),
        }
    }

    /// Starts an independent server on the same engine, for comparison.
    pub async fn another(&self) -> TestServer {
        TestServer::start(self.database.engine).await
    }

    /// Creates an empty database on the same engine.
    pub fn empty_database(&self) -> Database {
        Database::create(self.engine)
    }

    /// Creates a key with `keys create` and these arguments.
    pub fn key(&self, arguments: &[&str]) -> String {
        self.run(&[&["keys", "create"], arguments].concat())
            .with_code(0)
            .stdout
            .trim()
            .to_owned()
    }

    /// Returns a revoked key of tenant `acme` that opened this path before.
    pub async fn revoked_key(&self, path: &str) -> String {
        let output = self
            .run(&["keys", "create", "--tenant", "acme"])
            .with_code(0);
        let (key, id) = (
            output.stdout.trim(),
            output.stderr.split_once(':').unwrap().0,
        );
        self.get(path, key).await.with_status(200);
        self.run(&["keys", "revoke", id]).with_code(0);
        self.get(path, key).await.with_error(401, "Unauthorized");
        key.to_owned()
    }

    /// Returns an expired key of tenant `acme` that opened this path until its expiry.
    pub async fn expired_key(&self, path: &str) -> String {
        let created_before = Clock::system().now_ms();
        let key = self.key(&["--tenant", "acme", "--expires-in", "2s"]);
        let created_after = Clock::system().now_ms();

        loop {
            let sent = Clock::system().now_ms();
            let status = self.get(path, &key).await.status;
            let received = Clock::system().now_ms();
            if received < created_before + 2000 {
                assert_eq!(
                    status,
                    200,
                    "{} ms before it expires",
                    created_before + 2000 - received
                );
            }
            if sent >= created_after + 2000 {
                assert_eq!(
                    status,
                    401,
                    "{} ms after it expired",
                    sent - created_after - 2000
                );
                return key;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Starts another server on the same database, after a restart or as a replica.
    pub fn another_server(&self) -> Server {
        Server::start(&self.database.url)
    }

    /// Runs a command on this database.
    pub fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.run_with_input(arguments, b"")
    }

    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> CommandOutput {
        command::run(
            &[
                ("DATABASE_URL", &self.database.url),
                ("STRIPE_WEBHOOK_SECRET", SECRET),
            ],
            arguments,
            input,
        )
    }

    /// Replaces the server by one with these additional settings.
    pub fn with_server(mut self, environment: &[(&str, &str)]) -> TestServer {
        let secrets = format!("live={SECRET},old={OLD_SECRET}");
        let defaults = [
            ("DATABASE_URL", self.database.url.as_str()),
            ("STRIPE_WEBHOOK_SECRET", &secrets),
        ];
        self.process = Server::start_with(&[&defaults, environment].concat());
        self
    }

    /// Sends a request and checks the answer against the OpenAPI document.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Answer {
        let answer = http::send(
            &self.client,
            method,
            &format!("{}{path}", self.process.base),
            headers,
            body,
        )
        .await;
        assert_documented(method, path, &answer);

        answer
    }

    pub async fn send_raw(&self, request: &[u8]) -> String {
        http::send_raw(self.process.authority(), request).await
    }

    /// Returns the payment states of each invoice of tenant `acme` with a history, by uid, as
    /// `invoices list` prints them.
    pub fn all_histories(&self) -> BTreeMap<String, String> {
        let listed = self
            .run(&["invoices", "list", "--tenant", "acme", "--json"])
            .with_code(0)
            .json_lines();
        listed
            .iter()
            .map(uid_and_states)
            .filter(|(_, states)| states != "[]")
            .collect()
    }

    /// Returns the ids of all logged events, including repetitions.
    pub fn logged_ids(&self) -> Vec<String> {
        let log = self
            .run(&["events", "list", "--limit", "100000", "--json"])
            .with_code(0)
            .json_lines();
        log.iter()
            .map(|event| event["id"].as_str().unwrap().to_owned())
            .collect()
    }

    pub async fn get(&self, path: &str, key: &str) -> Answer {
        self.send("GET", path, &[("ApiKey", key)], Vec::new()).await
    }

    /// Puts a document as the operator.
    pub async fn put(&self, path: &str, document: &Value) -> Answer {
        self.send(
            "PUT",
            path,
            &[("ApiKey", &self.operator_key)],
            document.to_string().into_bytes(),
        )
        .await
    }

    /// Stores an invoice of tenant `acme` that contains only its Stripe invoice.
    pub async fn store(&self, uid: &str, stripe_invoice_id: &str) -> Answer {
        self.put(
            &invoice_path(uid),
            &json!({"status": {"stripeInvoiceId": stripe_invoice_id}}),
        )
        .await
    }

    /// Delivers an event signed with the live secret at the current time.
    pub async fn deliver(&self, event: &Value) -> Answer {
        self.deliver_bytes(event.to_string().as_bytes()).await
    }

    pub async fn deliver_bytes(&self, body: &[u8]) -> Answer {
        let signature = signature(SECRET, Clock::system().now_s(), body);
        self.deliver_signed(&signature, body).await
    }

    pub async fn deliver_signed(&self, signature: &str, body: &[u8]) -> Answer {
        self.send(
            "POST",
            "/webhooks/stripe",
            &[("Stripe-Signature", signature)],
            body.to_vec(),
        )
        .await
    }

    /// Returns `State time` for each entry of an invoice of tenant `acme`, read with its key.
    pub async fn history(&self, uid: &str) -> Vec<String> {
        let states = self.states(uid).await;
        let line = |state: &Value| {
            format!(
                "{} {}",
                state["state"].as_str().unwrap(),
                state["timestamp"].as_str().unwrap()
            )
        };

        states
            .as_array()
            .expect("states are always there")
            .iter()
            .map(line)
            .collect()
    }

    pub async fn states(&self, uid: &str) -> Value {
        self.get(&invoice_path(uid), &self.acme_key)
            .await
            .with_status(200)
            .invoice()["status"]["states"]
            .clone()
    }
}

pub fn uid_and_states(invoice: &Value) -> (String, String) {
    (
        invoice["metadata"]["uid"].as_str().unwrap().to_owned(),
        invoice["status"]["states"].to_string(),
    )
}

pub fn invoice_path(uid: &str) -> String {
    format!("/v1/tenants/acme/invoices/{uid}")
}

/// Returns the header value for a body signed with this secret.
pub fn signature(secret: &str, time_s: i64, body: &[u8]) -> String {
    sign(SigningSecrets::parse(secret).unwrap().first(), time_s, body)
}

impl Server {
    pub fn start(database_url: &str) -> Server {
        let secrets = format!("live={SECRET},old={OLD_SECRET}");
        Server::start_with(&[
            ("DATABASE_URL", database_url),
            ("STRIPE_WEBHOOK_SECRET", &secrets),
        ])
    }

    /// Starts a server with these settings. Returns when it prints its address.
    pub fn start_with(environment: &[(&str, &str)]) -> Server {
        Server::start_command(binary(&[&[("RUST_LOG", "warn")], environment].concat()))
    }

    /// Starts a server with a command that executes the binary.
    pub fn start_command(mut command: Command) -> Server {
        command.env("LISTEN_ADDR", "127.0.0.1:0");
        let log = NamedTempFile::new().unwrap();
        let mut process = command
            .arg("serve")
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();

        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let context = || {
            format!(
                "first line: {line:?}, and {}",
                std::fs::read_to_string(log.path()).unwrap()
            )
        };
        let base = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap_or_else(|| panic!("{}", context()))
            .to_owned();

        Server { base, process, log }
    }

    pub fn authority(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// Returns the log written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Returns the memory in MB: private memory plus the share of shared memory.
    pub fn memory_mb(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).unwrap();
        let kb = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap()
            .trim()
            .trim_end_matches(" kB");
        kb.parse::<u64>().unwrap() / 1024
    }

    /// Kills the server and waits for its end.
    pub fn sigkill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Sends SIGTERM without waiting.
    pub fn terminate(&self) {
        let sent = std::process::Command::new("kill")
            .args(["-TERM", &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Waits for the end of the server. Returns `None` if a signal ended it.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = self.log();
            let last: Vec<&str> = log.lines().rev().take(LOG_LINES_SHOWN).collect();
            eprintln!(
                "what {} logged, its last lines:\n{}",
                self.base,
                last.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
    }
}

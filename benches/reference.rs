//! Reference points for the program: the plain way to receive webhooks durably, the engine's
//! throughput in large batches and in single commits, and the disk's.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{PgPool, Row, SqlitePool};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::signature::SignatureHeader;
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;

use crate::deliveries;

#[derive(Clone)]
pub enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

#[derive(Clone)]
struct Plain {
    pool: Pool,
    secrets: Arc<SigningSecrets>,
}

const TABLE: &str = "create table if not exists payloads (id text primary key, received bigint not null, body BYTES not null)";

impl Pool {
    /// Opens ten connections to PostgreSQL or one to SQLite, and creates a table for whole
    /// payloads.
    pub async fn open(url: &str) -> Pool {
        if let Some(path) = url.strip_prefix("sqlite://") {
            let options = SqliteConnectOptions::new()
                .filename(path)
                .create_if_missing(true);
            let options = options
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .page_size(8192);
            let pool = SqlitePoolOptions::new()
                .max_connections(1)
                .connect_with(options)
                .await
                .expect("a database");
            let table = sqlx::AssertSqlSafe(TABLE.replace("BYTES", "blob"));
            sqlx::query(table).execute(&pool).await.expect("a table");
            Pool::Sqlite(pool)
        } else {
            let pool = PgPoolOptions::new()
                .max_connections(10)
                .connect(url)
                .await
                .expect("a database");
            let table = sqlx::AssertSqlSafe(TABLE.replace("BYTES", "bytea"));
            sqlx::query(table).execute(&pool).await.expect("a table");
            Pool::Postgres(pool)
        }
    }

    /// Inserts one payload in its own transaction, as most handlers do.
    async fn insert(&self, id: &str, body: &[u8]) -> Result<(), sqlx::Error> {
        const INSERT: &str =
            "insert into payloads (id, received, body) values ($1, $2, $3) on conflict do nothing";

        let received = Clock::system().now_ms();
        match self {
            Pool::Sqlite(pool) => {
                let mut transaction = pool.begin().await?;
                sqlx::query(INSERT)
                    .bind(id)
                    .bind(received)
                    .bind(body)
                    .execute(&mut *transaction)
                    .await?;
                transaction.commit().await
            }
            Pool::Postgres(pool) => {
                let mut transaction = pool.begin().await?;
                sqlx::query(INSERT)
                    .bind(id)
                    .bind(received)
                    .bind(body)
                    .execute(&mut *transaction)
                    .await?;
                transaction.commit().await
            }
        }
    }

    /// Inserts all payloads in one commit.
    async fn insert_batch(&self, batch: &[(String, Vec<u8>)]) -> Result<(), sqlx::Error> {
        match self {
            Pool::Sqlite(pool) => {
                let mut transaction = pool.begin().await?;
                for part in batch.chunks(64) {
                    let mut sql =
                        sqlx::QueryBuilder::new("insert into payloads (id, received, body) ");
                    sql.push_values(part, |mut row, (id, body)| {
                        row.push_bind(id).push_bind(0_i64).push_bind(&body[..]);
                    });
                    sql.build().execute(&mut *transaction).await?;
                }
                transaction.commit().await
            }
            Pool::Postgres(pool) => {
                let (ids, bodies): (Vec<&str>, Vec<&[u8]>) =
                    batch.iter().map(|(id, body)| (&**id, &body[..])).unzip();
                let sql = "insert into payloads (id, received, body) select id, 0, body from unnest($1::text[], $2::bytea[]) as t (id, body)";
                sqlx::query(sql)
                    .bind(ids)
                    .bind(bodies)
                    .execute(pool)
                    .await
                    .map(drop)
            }
        }
    }
}

/// Serves the plain implementation on a free port and prints its address.
pub async fn serve_plain(url: &str) {
    let plain = Plain {
        pool: Pool::open(url).await,
        secrets: Arc::new(SigningSecrets::parse(deliveries::SECRET).expect("a secret")),
    };
    let router = Router::new()
        .route("/webhooks/stripe", post(receive))
        .route("/empty", get(async || ""))
        .with_state(plain);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");

    println!(
        "listening on http://{}",
        listener.local_addr().expect("an address")
    );
    axum::serve(listener, router).await.expect("it serves");
}

async fn receive(State(plain): State<Plain>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let signatures: Vec<&[u8]> = headers
        .get_all("stripe-signature")
        .iter()
        .map(axum::http::HeaderValue::as_bytes)
        .collect();
    let Ok(signature) = SignatureHeader::read(&signatures) else {
        return StatusCode::BAD_REQUEST;
    };
    let mut verifier = plain.secrets.verifier(&signature);
    verifier.update(&body);
    if verifier.finish(Clock::system().now_s()).is_err() {
        return StatusCode::BAD_REQUEST;
    }

    let Ok(event) = serde_json::from_slice::<serde_json::Value>(&body) else {
        return StatusCode::BAD_REQUEST;
    };
    match plain
        .pool
        .insert(event["id"].as_str().unwrap_or_default(), &body)
        .await
    {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Returns how many rows per second the engine alone commits, 256 per commit.
///
/// PostgreSQL uses two connections, which is faster there.
pub async fn batch_limit(url: &str, time: Duration) -> f64 {
    let pool = Pool::open(url).await;
    let writers = if matches!(pool, Pool::Postgres(_)) {
        2
    } else {
        1
    };
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();

    for writer in 0..writers {
        let pool = pool.clone();
        tasks.spawn(async move {
            let mut rows = 0;
            let mut first = writer * 100_000_000;
            while started.elapsed() < time {
                let bodies = deliveries::bodies(first, 256).enumerate();
                let batch: Vec<(String, Vec<u8>)> = bodies
                    .map(|(n, body)| (format!("evt_1{:010}", first + n), body.into()))
                    .collect();
                pool.insert_batch(&batch).await.expect("a batch is taken");
                rows += batch.len();
                first += 256;
            }
            rows
        });
    }

    let rows: usize = tasks.join_all().await.into_iter().sum();
    rows as f64 / started.elapsed().as_secs_f64()
}

/// Returns the median time of a single insert with its commit, in milliseconds.
pub async fn commit_ms(url: &str, time: Duration) -> f64 {
    let pool = Pool::open(url).await;
    let bodies: Vec<String> = deliveries::bodies(0, 4).collect();
    let started = Instant::now();
    let mut times = Vec::new();

    while started.elapsed() < time {
        let begun = Instant::now();
        pool.insert(
            &format!("evt_alone_{}", times.len()),
            bodies[times.len() % 4].as_bytes(),
        )
        .await
        .expect("it is taken");
        times.push(begun.elapsed());
    }

    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Makes PostgreSQL write dirty pages and finish vacuuming, so that no measurement pays for an
/// earlier one.
pub async fn settle(url: &str) {
    if let Pool::Postgres(pool) = Pool::open(url).await {
        sqlx::query("checkpoint")
            .execute(&pool)
            .await
            .expect("we may");
        let busy = "select count(*) from pg_stat_activity where backend_type = 'autovacuum worker'";
        while sqlx::query_scalar::<_, i64>(busy)
            .fetch_one(&pool)
            .await
            .expect("we may")
            > 0
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Returns how many appends of 8 KB the disk makes durable per second, one at a time.
pub fn disk_commits(path: &std::path::Path, time: Duration) -> f64 {
    let mut file = File::create(path).expect("a file");
    let (started, mut commits) = (Instant::now(), 0);
    while started.elapsed() < time {
        file.write_all(&[7; 8192])
            .and_then(|()| file.sync_data())
            .expect("the disk takes it");
        commits += 1;
    }
    f64::from(commits) / started.elapsed().as_secs_f64()
}

/// Describes the engine's version and the settings that control its commits.
pub async fn about(url: &str) -> String {
    match Pool::open(url).await {
        Pool::Sqlite(pool) => {
            let row = sqlx::query("select sqlite_version()")
                .fetch_one(&pool)
                .await
                .expect("it has a version");
            format!(
                "SQLite {}, WAL, synchronous = FULL",
                row.get::<String, _>(0)
            )
        }
        Pool::Postgres(pool) => {
            let sql = "select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')";
            let row = sqlx::query(sql)
                .fetch_one(&pool)
                .await
                .expect("it has settings");
            let setting = |index: usize| row.get::<String, _>(index);
            format!(
                "PostgreSQL {}, fsync = {}, synchronous_commit = {}",
                setting(0),
                setting(1),
                setting(2)
            )
        }
    }
}

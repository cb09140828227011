//! Rounds, each played on both engines. A failure is reported with all steps that led to it.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::ending::{Histories, round};
use super::script::Script;
use super::simulation::Trace;
use testkit::Engine;

/// Default of `SIMULATOR_ROUNDS`.
pub const ROUNDS: u64 = 8;
/// Number of rounds between progress lines of a long run.
const PROGRESS_EVERY: u64 = 20;
/// Number of attempts to reproduce a failure by its seed, every second of them watched, because the
/// number of waits before a crash varies slightly.
const REPRODUCTION_ROUNDS: usize = 12;
/// Number of rounds spent on removing steps from a failure.
const SHORTENING_ROUNDS: usize = 60;

thread_local! {
    /// Panics on a thread that plays a round. `None` on all other threads.
    static PANICS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

fn watch_panics() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let kept = PANICS.with_borrow_mut(|panics| {
                panics.as_mut().map(|panics| panics.push(panic.to_string()))
            });
            kept.unwrap_or_else(|| print(panic));
        }));
    });
}

/// A failed round with its trace.
struct Failure {
    description: String,
    trace: Vec<String>,
}

fn play(engine: Engine, script: &Script) -> Result<Histories, Failure> {
    PANICS.set(Some(Vec::new()));
    let trace = Trace::default();
    let played = catch_unwind(AssertUnwindSafe(|| round(engine, script, trace.clone())));
    let panics = PANICS.take().unwrap_or_default();

    match played {
        Ok(histories) if panics.is_empty() => Ok(histories),
        _ => Err(Failure {
            description: panics.join("\n"),
            trace: std::mem::take(&mut trace.lock().unwrap()),
        }),
    }
}

/// Plays the script on both engines at the same time.
fn play_both(script: &Script) -> Result<(), (Engine, Failure)> {
    let (sqlite, postgres) = std::thread::scope(|scope| {
        let postgres = scope.spawn(|| play(Engine::Postgres, script));
        (
            play(Engine::Sqlite, script),
            postgres.join().expect("its panics are caught"),
        )
    });
    let sqlite = sqlite.map_err(|failure| (Engine::Sqlite, failure))?;
    let postgres = postgres.map_err(|failure| (Engine::Postgres, failure))?;

    if sqlite != postgres {
        let description =
            format!("the engines differ:\nSQLite     {sqlite:#?}\nPostgreSQL {postgres:#?}");
        return Err((
            Engine::Postgres,
            Failure {
                description,
                trace: Vec::new(),
            },
        ));
    }

    Ok(())
}

fn setting(name: &str) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "the settings of a test")]
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {text}"))
    })
}

pub fn rounds() -> u64 {
    setting("SIMULATOR_ROUNDS").unwrap_or(ROUNDS)
}

#[test]
fn random_lives_under_faults_end_in_the_true_history() {
    watch_panics();
    let (seed, rounds) = (setting("SIMULATOR_SEED"), rounds());
    let first = seed.unwrap_or_else(rand::random);
    let chances = if seed.is_some() && rounds == 1 {
        REPRODUCTION_ROUNDS
    } else {
        1
    };
    println!("SIMULATOR_SEED={first} SIMULATOR_ROUNDS={rounds}");

    for n in 0..rounds {
        if n > 0 && n.is_multiple_of(PROGRESS_EVERY) {
            println!("{n} rounds, and nothing is wrong");
        }
        let seed = first.wrapping_add(n);
        let script = Script::of(seed);
        let mut plays = (0..chances).map(|n| script.watched(n % 2 == 1));
        let failed = plays.find_map(|script| {
            play_both(&script)
                .err()
                .map(|(engine, failure)| (script, engine, failure))
        });
        let Some((script, engine, failure)) = failed else {
            continue;
        };
        // If watching reveals the failure, the crash point no longer matters.
        let watched = script.watched(true);
        let script = if play(engine, &watched).is_err() {
            watched
        } else {
            script
        };
        let shorter = script.shortened(SHORTENING_ROUNDS, |shorter| play(engine, shorter).is_err());
        let again = play(engine, &shorter).err();
        let Failure { description, trace } = again.unwrap_or(failure);
        println!("{}", trace.join("\n"));
        println!(
            "{} of its {} steps suffice",
            shorter.steps.len(),
            script.steps.len()
        );
        println!(
            "SIMULATOR_SEED={seed} SIMULATOR_ROUNDS=1 cargo test --test simulator random_lives"
        );
        std::panic::resume_unwind(Box::new(eprint_and_keep(format!(
            "on {engine:?}, seed {seed}: {description}"
        ))));
    }
}

fn eprint_and_keep(description: String) -> String {
    println!("{description}");
    description
}

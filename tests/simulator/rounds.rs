//! Rounds, one after the other, each on both engines; what one of them finds is told with all that led to it.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::ending::{Histories, round};
use super::script::Script;
use super::world::Trace;
use testkit::Engine;

/// Without a word from `SIMULATOR_ROUNDS`.
pub const ROUNDS: u64 = 8;
/// Rounds after which a long run says that it goes on.
const NEWS: u64 = 20;
/// A failure that is looked for again by its seed alone is given so many chances, every second of them watched: how often the program
/// waits until a crash comes is not quite the same each time.
const CHANCES: usize = 12;
/// Rounds that are made to tell a failure in fewer steps.
const TRIES: usize = 60;

thread_local! {
    /// What panicked on a thread that plays a round; none: this one plays none.
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

/// What went wrong in a round, and all that happened until then.
struct Failure {
    told: String,
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
            told: panics.join("\n"),
            trace: std::mem::take(&mut trace.lock().unwrap()),
        }),
    }
}

/// Plays it on both engines at the same time.
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
        let told = format!("the engines differ:\nSQLite     {sqlite:#?}\nPostgreSQL {postgres:#?}");
        return Err((
            Engine::Postgres,
            Failure {
                told,
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
fn random_lives_and_a_wicked_stripe_end_in_the_truth_on_both_engines() {
    watch_panics();
    let (seed, rounds) = (setting("SIMULATOR_SEED"), rounds());
    let first = seed.unwrap_or_else(rand::random);
    let chances = if seed.is_some() && rounds == 1 {
        CHANCES
    } else {
        1
    };
    println!("SIMULATOR_SEED={first} SIMULATOR_ROUNDS={rounds}");
    for n in 0..rounds {
        if n > 0 && n.is_multiple_of(NEWS) {
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
        // Where to watch is enough to see it, no moment matters any more.
        let watched = script.watched(true);
        let script = if play(engine, &watched).is_err() {
            watched
        } else {
            script
        };
        let shorter = script.shortened(TRIES, |shorter| play(engine, shorter).is_err());
        let again = play(engine, &shorter).err();
        let Failure { told, trace } = again.unwrap_or(failure);
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
            "on {engine:?}, seed {seed}: {told}"
        ))));
    }
}

fn eprint_and_keep(told: String) -> String {
    println!("{told}");
    told
}

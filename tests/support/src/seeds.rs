//! Runs of a model with consecutive seeds, on all processors, until enough steps are taken; and counters of
//! events, so that a run without any is noticed.
//!
//! `CHAINFS_SEED` is the first seed, `CHAINFS_STEPS` how many steps are taken.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use parking_lot::Mutex;

/// Steps of the usual run, and where time is taken.
const STEPS: [u64; 2] = [800, 100_000];
/// The interval of progress messages.
const SAID: u64 = 10_000;

/// How often something has happened.
pub trait Counts: Debug + Default + Send {
    fn steps(&self) -> u64;
    fn add(&mut self, other: &Self);
    /// Whether all that has to happen did.
    fn all_happened(&self) -> bool;
}

/// Defines the counters: events that have to happen in every run of many seeds, and events that may.
#[macro_export]
macro_rules! tally {
    (
        always: $($(#[$doc:meta])* $name:ident),* $(,)?;
        rarely: $($(#[$rare_doc:meta])* $rare:ident),* $(,)?
    ) => {
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Tally {
            pub(crate) steps: u64,
            $($(#[$doc])* pub(crate) $name: u64,)*
            $($(#[$rare_doc])* pub(crate) $rare: u64,)*
        }

        impl $crate::seeds::Counts for Tally {
            fn steps(&self) -> u64 {
                self.steps
            }

            fn add(&mut self, other: &Self) {
                self.steps += other.steps;
                $(self.$name += other.$name;)*
                $(self.$rare += other.$rare;)*
            }

            fn all_happened(&self) -> bool {
                [$(self.$name),*].iter().all(|count| *count > 0)
            }
        }
    };
}

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Calls `run` with a seed, repeatedly; `place` makes the shared state of a thread's runs.
pub fn run_all<T: Counts, P>(place: impl Fn() -> P + Sync, run: impl Fn(u64, &P) -> T + Sync) {
    let is_long = std::env::var_os("CHAINFS_LONG").is_some();
    let steps = number("CHAINFS_STEPS", STEPS[usize::from(is_long)]);
    let (seed, taken) = (AtomicU64::new(number("CHAINFS_SEED", 1)), AtomicU64::new(0));
    let total = Mutex::new(T::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let place = place();
                while taken.load(Ordering::Relaxed) < steps {
                    let tally = run(seed.fetch_add(1, Ordering::Relaxed), &place);
                    let before = taken.fetch_add(tally.steps(), Ordering::Relaxed);
                    let mut total = total.lock();
                    total.add(&tally);
                    if before / SAID < (before + tally.steps()) / SAID {
                        eprintln!("{total:?}");
                    }
                }
            });
        }
    });
    let total = total.into_inner();
    println!("{total:?}");
    assert!(total.all_happened(), "something never happened: {total:?}");
}

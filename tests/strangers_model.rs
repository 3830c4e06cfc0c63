//! A store that many hands change at once: commands, guests, other programs, damage, kills, copies. Beside it a model of
//! what each file has to show. No file shows other bytes, what is damaged finds all it rests on when it is mended, and
//! nothing of others is removed.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part of what tests share")]

mod common;
mod strangers;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use strangers::world::{Tally, World};

/// Steps of one run.
const STEPS: u64 = 40;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn no_hand_changes_what_another_relies_on() {
    let is_long = std::env::var_os("CHAINFS_LONG").is_some();
    let steps = number("CHAINFS_STEPS", if is_long { 100_000 } else { 800 });
    let first = number("CHAINFS_SEED", 1);
    let (seed, taken) = (AtomicU64::new(first), AtomicU64::new(0));
    let total = parking_lot::Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while taken.load(Ordering::Relaxed) < steps {
                    let mut world = World::new(seed.fetch_add(1, Ordering::Relaxed));
                    for _ in 0..STEPS {
                        if !world.step() {
                            break;
                        }
                    }
                    let tally = world.end();
                    let before = taken.fetch_add(tally.steps, Ordering::Relaxed);
                    let mut total = total.lock();
                    total.add(&tally);
                    if before / 10_000 < (before + tally.steps) / 10_000 {
                        eprintln!("{total:?}");
                    }
                }
            });
        }
    });
    let total = *total.lock();
    println!("{total:?}");
    let happened = [
        total.writes,
        total.done,
        total.refused,
        total.killed,
        total.resumed,
        total.damaged,
        total.stranded,
        total.compared,
    ];
    assert!(happened.iter().all(|count| *count > 0), "something never happened: {total:?}");
}

//! A store of several owners, shared by a mount: users make images on whatever they can name, give commands, read reports;
//! root changes owners and modes; commands are cut off. The kernel is the judge of who may do what: nobody gets, by the
//! mount, what it would not give on the store itself.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part of what tests share")]

mod common;
mod owners;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use owners::people::People;
use owners::world::{Tally, World};

/// Steps of one store.
const STEPS: u64 = 60;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn nobody_gets_what_the_kernel_would_not_give() {
    let is_long = std::env::var_os("CHAINFS_LONG").is_some();
    let steps = number("CHAINFS_STEPS", if is_long { 100_000 } else { 800 });
    let first = number("CHAINFS_SEED", 1);
    let (seed, taken) = (AtomicU64::new(first), AtomicU64::new(0));
    let total = parking_lot::Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let people = People::new();
                while taken.load(Ordering::Relaxed) < steps {
                    let mut world = World::new(seed.fetch_add(1, Ordering::Relaxed), &people);
                    for _ in 0..STEPS {
                        world.step();
                    }
                    let tally = world.end();
                    taken.fetch_add(tally.steps, Ordering::Relaxed);
                    total.lock().add(&tally);
                }
            });
        }
    });
    let total = total.into_inner();
    println!("{total:?}");
    assert!(total.all_happened(), "something never happened: {total:?}");
}

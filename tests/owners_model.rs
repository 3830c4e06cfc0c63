//! A store of several owners, shared by a mount: users make images on whatever they can name, give commands, read reports;
//! root changes owners and modes; commands are cut off. The kernel is the judge of who may do what: nobody gets, by the
//! mount, what it would not give on the store itself.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part of what tests share")]

mod common;
mod owners;

use owners::people::People;
use owners::world::World;

/// Steps of one store.
const STEPS: u64 = 60;

#[test]
fn nobody_gets_what_the_kernel_would_not_give() {
    common::seeds::run_all(People::new, |seed, people| {
        let mut world = World::new(seed, people);
        for _ in 0..STEPS {
            world.step();
        }
        world.end()
    });
}

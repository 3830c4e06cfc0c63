//! A store that many programs change at once: commands, guests, other programs, damage, kills, copies. Beside
//! it a model of the expected bytes of each file. No file shows other bytes, a repaired file finds all its
//! backing files, and no foreign file is removed.

mod checks;
mod commands;
pub(crate) mod damage;
pub(crate) mod kills;
mod others;
pub(crate) mod reader;
mod store;
pub(crate) mod world;

use world::World;

/// Steps of one run.
const STEPS: u64 = 40;

#[test]
fn no_process_changes_files_that_another_relies_on() {
    support::seeds::run_all(
        || (),
        |seed, ()| {
            let mut world = World::new(seed);
            for _ in 0..STEPS {
                if !world.step() {
                    break;
                }
            }
            world.end()
        },
    );
}

//! A store that many hands change at once: commands, guests, other programs, damage, kills, copies. Beside it
//! a model of what each file has to show. No file shows other bytes, what is damaged finds all it rests on
//! when it is mended, and nothing of others is removed.

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

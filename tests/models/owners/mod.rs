//! A store of several owners, shared by a mount: users make images backed by any file that they can name,
//! give commands, read reports; root changes owners and modes; commands are interrupted. The kernel is the
//! reference for rights: no user gets access through the mount that the kernel would deny on the store
//! itself.

pub(crate) mod after;
pub(crate) mod checks;
pub(crate) mod commands;
pub(crate) mod hands;
pub(crate) mod image;
pub(crate) mod people;
pub(crate) mod seen;
pub(crate) mod through;
pub(crate) mod world;

use people::People;
use world::World;

/// Steps of one store.
const STEPS: u64 = 60;

#[test]
// A1, A2
fn no_user_gets_access_that_the_kernel_would_deny() {
    support::seeds::run_all(People::new, |seed, people| {
        let mut world = World::new(seed, people);
        for _ in 0..STEPS {
            world.step();
        }
        world.end()
    });
}

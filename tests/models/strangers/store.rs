//! The open store: guests that write, and their reads.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::ops::{Engine, JobState};
use chainfs::store::{Access, Store, StoreOptions};

use super::world::{LIMIT, World};
use support::host::Mortal;

fn options() -> StoreOptions {
    StoreOptions { notify: false, cache: 4 << 20, ..StoreOptions::default() }
}

impl World {
    pub(super) fn open(&mut self) {
        let host = Mortal::new();
        let store = Store::open_on(&self.root, options(), &|directory| host.open(directory));
        let store = store.unwrap_or_else(|error| self.fail(&format!("opening the store: {error}")));
        let engine = Engine::new(&store);
        engine.resume();
        self.store = Some((store, engine, host));
        self.await_jobs();
    }

    pub(super) fn close(&mut self) {
        let (_, engine, _) = self.store.take().expect("an open store");
        engine.stop();
    }

    pub(super) fn await_jobs(&self) {
        let (store, engine, _) = self.store.as_ref().expect("an open store");
        let start = Instant::now();
        let chains: BTreeSet<PathBuf> = store
            .catalog()
            .intents
            .iter()
            .map(|found| found.intent.chain.clone())
            .chain(store.catalog().chains().map(|(path, _)| path))
            .collect();
        for chain in chains {
            loop {
                let status = engine.status(&chain);
                if status.state != JobState::Running {
                    break;
                }
                if start.elapsed() > LIMIT {
                    self.fail("a job hangs");
                }
                engine.wait(&chain, status.version, Duration::from_millis(100));
            }
        }
        store.rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
    }

    pub(super) fn chains(&self) -> Vec<String> {
        let (store, ..) = self.store.as_ref().expect("an open store");
        store.catalog().chains().map(|(path, _)| path.display().to_string()).collect()
    }

    /// The names of a chain's layers: view and file, top first.
    pub(super) fn layers(&self, chain: &str) -> Vec<(String, String, bool)> {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let catalog = store.catalog();
        let Some(leaf) = catalog.chain(Path::new(chain)) else { return Vec::new() };
        let views = store.chain_views(&catalog, leaf);
        let layers = views.views.iter().filter(|view| view.snapshot.is_none());
        let file = |layer: usize| catalog.images[views.layers[layer]].place.path.display().to_string();
        layers
            .map(|view| (String::from_utf8_lossy(&view.name).into_owned(), file(view.layer), view.active))
            .collect()
    }

    /// A guest writes to any active disk.
    pub(super) fn write(&mut self) {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let store = Arc::clone(store);
        let chains = self.chains();
        let Some(chain) = self.pick(&chains) else { return };
        let Some((_, file, true)) = self.layers(&chain).into_iter().next() else { return };
        if self.damage.values().any(|damage| damage.present_name() == Some(&file)) {
            // Under its current name it is a raw disk, for any writer.
            return;
        }
        if !self.disks.contains_key(&file) {
            self.fail(&format!("{file} is an active disk, and no image of the store"));
        }
        let catalog = store.catalog();
        let Some(leaf) = catalog.chain(Path::new(&chain)) else { return };
        let views = store.chain_views(&catalog, leaf);
        let Some(active) = views.active() else { return };
        let id = store.view_id(&catalog, &Arc::new(PathBuf::from(&chain)), &views, active, false);
        let opened = store.open_writable(&id, Access::ReadWrite);
        let disk = match opened {
            Ok(disk) => disk,
            Err(error) => {
                self.tally.denied_writes += 1;
                return self.say(format!("{file} cannot be written: {error}"));
            }
        };
        if self.frozen.contains(&file) {
            self.fail(&format!("{file} was frozen, and can be written"));
        }
        for _ in 0..=self.rng.below(6) {
            let size = self.disks[&file].len() as u64;
            let at = self.rng.below(size);
            let len = (1 + self.rng.below(9000)).min(size - at);
            let bytes = self.rng.bytes(len);
            match disk.write_at(at, &bytes) {
                Ok(written) => {
                    let known = self.disks.get_mut(&file).expect("its disk");
                    known[at as usize..at as usize + written].copy_from_slice(&bytes[..written]);
                    self.tally.writes += 1;
                }
                Err(error) => {
                    self.tally.denied_writes += 1;
                    self.say(format!("{file} was not written: {error}"));
                    break;
                }
            }
        }
        let _ = disk.flush();
        self.say(format!("a guest writes {file}"));
    }
}

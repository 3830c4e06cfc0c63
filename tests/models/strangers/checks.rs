//! The checks after each step.

use std::sync::Arc;

use chainfs::store::ViewPart;
use chainfs::units::{Stability, are_zero};

use super::kills::Pending;
use super::world::World;

fn is_tail_zero(bytes: &[u8], from: usize) -> bool {
    are_zero(bytes.get(from..).unwrap_or_default())
}

/// Whether `have` is `want`, made longer with zeroes or shorter by zeroes.
pub(super) fn is_same_disk(have: &[u8], want: &[u8]) -> bool {
    let common = have.len().min(want.len());
    have[..common] == want[..common] && is_tail_zero(have, common) && is_tail_zero(want, common)
}

impl World {
    /// Every shown view has its expected bytes.
    pub(super) fn views(&mut self, pending: Option<&Pending>) {
        let (store, ..) = self.store.as_ref().expect("an open store");
        let store = Arc::clone(store);
        let catalog = store.catalog();
        for (path, leaf) in catalog.chains() {
            let views = store.chain_views(&catalog, leaf);
            for view in views.views.iter().filter(|view| view.snapshot.is_none()) {
                let layers = &views.layers[view.layer..];
                let name = catalog.images[layers[0]].place.path.display().to_string();
                if view.active && self.frozen.contains(&name) {
                    self.fail(&format!("{name} was frozen, and is an active disk"));
                }
                let opened =
                    store.open_view(&catalog, layers, ViewPart::Active, Stability::live_if(view.active));
                let bytes = opened.and_then(|open| {
                    let mut bytes = vec![0; open.view.size() as usize];
                    open.view.read_at(0, &mut bytes).map(|()| bytes)
                });
                let bytes = match bytes {
                    Ok(bytes) => bytes,
                    Err(error) if self.is_sound(&name) && pending.is_none() => {
                        self.fail(&format!("{name} is sound, and cannot be read: {error}"))
                    }
                    Err(_) => continue,
                };
                self.tally.compared += 1;
                let legal = pending.and_then(|pending| pending.legal.get(&name));
                let known = self.disks.get(&name);
                let is_right = known.into_iter().chain(legal.into_iter().flatten());
                if !is_right.clone().any(|wanted| is_same_disk(&bytes, wanted)) && is_right.count() > 0 {
                    self.fail(&format!("{name} in {} shows other bytes than it has to", path.display()));
                }
            }
        }
    }

    /// Every file has, for the model's own reader, its expected bytes.
    pub(super) fn files(&self) {
        let reader = self.reader();
        for (name, wanted) in &self.disks {
            match reader.disk(name) {
                Some(disk) if disk == *wanted => {}
                Some(_) => self.fail(&format!("{name} shows other bytes than it has to")),
                None => self.fail(&format!("{name} cannot be read any more")),
            }
        }
    }
}

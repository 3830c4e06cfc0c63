//! Layers that keep their identity although files have changed: commands change files and keep the bytes of
//! the layers above, whose disks keep their inode numbers.
//!
//! The state of a layer is a digest of the versions of all files that it shows. While a command is at work,
//! each scan finds other versions; each of these states stands for the one from before the command.

use std::collections::HashMap;
use std::sync::Arc;

use crate::io::ObjectId;

use super::catalog::{Catalog, ImageIndex};
use super::{CHAINS_KEPT_LEN, Store, Weighted};

/// The files that a running command of this process changes, until dropped.
#[derive(Debug)]
pub(crate) struct ChangingFiles {
    /// As it was before.
    before: Arc<Catalog>,
    files: Vec<ObjectId>,
    /// The one whose own disk changes, too.
    changed: Option<ObjectId>,
}

impl Store {
    /// A command begins to change `files`, and keeps the bytes of every layer of `before` that still exists,
    /// except `changed`: from now on until the result is dropped, their disks keep their identities. Not
    /// where any other file of theirs has changed as well.
    pub(crate) fn change_files(
        &self,
        before: &Arc<Catalog>,
        files: Vec<ObjectId>,
        changed: Option<ObjectId>,
    ) -> Arc<ChangingFiles> {
        let changing = Arc::new(ChangingFiles { before: Arc::clone(before), files, changed });
        let mut all = self.changing.lock();
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&changing));
        changing
    }

    /// The states of a new catalog, which is not shown yet, stand for those from before the running commands.
    pub(super) fn keep_states_of_commands(&self, after: &Catalog) {
        let changing: Vec<_> = self.changing.lock().iter().filter_map(std::sync::Weak::upgrade).collect();
        for ChangingFiles { before, files, changed } in changing.iter().map(AsRef::as_ref) {
            self.keep_states_in(before, after, files, *changed);
        }
    }

    /// The same for the present catalog, after a command that has changed files.
    pub(crate) fn keep_states(&self, before: &Catalog, files: &[ObjectId], changed: Option<ObjectId>) {
        self.keep_states_in(before, &self.catalog(), files, changed);
    }

    fn keep_states_in(
        &self,
        before: &Catalog,
        after: &Catalog,
        files: &[ObjectId],
        changed: Option<ObjectId>,
    ) {
        let states = |catalog: &Catalog| -> HashMap<ObjectId, (u64, Vec<u64>)> {
            let mut states = HashMap::new();
            for (_, leaf) in catalog.chains() {
                let views = self.chain_views(catalog, leaf);
                for (layer, index) in views.layers.iter().enumerate() {
                    let image = |index: &ImageIndex| &catalog.images[*index];
                    let is_ours = |index: &&ImageIndex| files.contains(&image(index).stat.id);
                    if !views.layers[layer..].iter().any(|index| is_ours(&index)) {
                        break;
                    }
                    let others = views.layers[layer..].iter().filter(|index| !is_ours(index));
                    let versions = others.map(|index| image(index).version).collect();
                    states.insert(image(index).stat.id, (views.state(layer), versions));
                }
            }
            states
        };
        let old = states(before);
        let is_kept = |id: &ObjectId| changed.is_none_or(|changed| *id != changed || !files.contains(id));
        let same = |(id, (now, others)): (ObjectId, (u64, Vec<u64>))| {
            let (state, others_then) = old.get(&id)?;
            (*state != now && *others_then == others).then_some((now, *state))
        };
        let moved: Vec<(u64, u64)> =
            states(after).into_iter().filter(|(id, _)| is_kept(id)).filter_map(same).collect();
        if !moved.is_empty() {
            self.same_states.lock().extend(moved);
            *self.chain_views.lock() = Weighted::new(CHAINS_KEPT_LEN);
        }
    }
}

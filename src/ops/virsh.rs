//! What libvirt's users do instead of a command that is refused because a domain runs on the disk.
//!
//! Promises: virsh's command is named only if the command itself would be refused for nothing else, and if it
//! changes no file that another image depends on. virsh does not check that.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, shell_word};
use crate::store::ImageIndex;

use super::command::Command;
use super::lookup;
use super::plan::Plan;
use super::scanned_store::{ScannedChain, ScannedStore};

/// A chain, and the running domain that has its active layer as a disk.
pub(super) struct DomainDisk<'a> {
    scan: &'a ScannedStore,
    chain: &'a ScannedChain,
    domain: &'a str,
}

/// Ends each refusal that a running domain causes with virsh's command for it.
pub(super) fn help(scan: &ScannedStore, path: &Path, asked: &dyn Command, plan: &mut Plan) {
    let Some(domain) = plan.refusals.first().and_then(Error::domain).map(str::to_owned) else { return };
    if plan.refusals.iter().any(|refusal| refusal.domain() != Some(&domain)) {
        return;
    }
    let Ok(chain) = scan.chain(path) else { return };
    // Without definitions the locks alone say whose disk it is.
    let mut defined = scan.image(chain.views.layers[0]).domains().peekable();
    if defined.peek().is_some() && defined.all(|name| name != domain) {
        return;
    }
    let Some(command) = asked.virsh(&DomainDisk { scan, chain: &chain, domain: &domain }) else { return };
    let remedy = format!("while {domain} runs, use {command}, or shut it down first");
    plan.refusals = std::mem::take(&mut plan.refusals)
        .into_iter()
        .map(|refusal| refusal.held_by(domain.clone(), remedy.clone()))
        .collect();
}

impl DomainDisk<'_> {
    /// The layer of that name, counted from the leaf; without a name the active one.
    pub(super) fn layer(&self, name: Option<&[u8]>) -> Option<usize> {
        name.map_or(Some(0), |name| lookup::layer(self.scan, self.chain, name).ok())
    }

    fn image(&self, layer: usize) -> Option<ImageIndex> {
        self.chain.views.layers.get(layer).copied()
    }

    /// The file of a layer on this machine.
    fn path(&self, layer: usize) -> Option<PathBuf> {
        Some(self.scan.store.host_path(&self.scan.image(self.image(layer)?).place))
    }

    /// The size of the disk in bytes.
    pub(super) fn size(&self) -> Option<u64> {
        self.scan.image(self.image(0)?).virtual_size()
    }

    /// `virsh NAME DOMAIN WORDS`, for a shell. `None` if a word is not UTF-8.
    pub(super) fn command<'w>(
        &self,
        name: &str,
        words: impl IntoIterator<Item = &'w [u8]>,
    ) -> Option<String> {
        let mut line = format!("virsh {name} {}", shell_word(self.domain));
        for word in words {
            line = format!("{line} {}", shell_word(str::from_utf8(word).ok()?));
        }
        Some(line)
    }

    /// A command about the disk, with layers as the values of options.
    fn about_disk(&self, name: &str, layers: &[(&str, usize)], flags: &[&str]) -> Option<String> {
        let mut words: Vec<OsString> = vec![self.path(0)?.into()];
        for (option, layer) in layers {
            words.extend([(*option).into(), self.path(*layer)?.into()]);
        }
        words.extend(flags.iter().map(Into::into));
        let words: Vec<Vec<u8>> = words.into_iter().map(OsStringExt::into_vec).collect();
        self.command(name, words.iter().map(Vec::as_slice))
    }

    /// The command that merges `top` down into `base`; `None` if other chains use a layer that it changes.
    pub(super) fn commit(&self, top: usize, base: usize) -> Option<String> {
        let has_no_other_user = |layer: usize| {
            let most = usize::from(layer > 0);
            self.image(layer).is_some_and(|index| self.scan.image(index).users.len() <= most)
        };
        if top >= base || !(top..=base).all(has_no_other_user) {
            return None;
        }
        match top {
            0 => self.about_disk("blockcommit", &[("--base", base)], &["--active", "--pivot", "--wait"]),
            _ => self.about_disk("blockcommit", &[("--top", top), ("--base", base)], &["--wait"]),
        }
    }

    /// The command that copies the layers above `base` into the active one.
    pub(super) fn pull(&self, base: Option<usize>) -> Option<String> {
        let base: Vec<(&str, usize)> = base.map(|base| ("--base", base)).into_iter().collect();
        self.about_disk("blockpull", &base, &["--wait"])
    }

    /// The command that gives the disk that size.
    pub(super) fn resize(&self, size: u64) -> Option<String> {
        self.about_disk("blockresize", &[], &[&format!("{size}B")])
    }

    /// The name of libvirt's snapshot whose state a view is.
    pub(super) fn snapshot(&self, view: &[u8]) -> Option<&str> {
        let view = lookup::view(self.scan, self.chain, view).ok()?;
        let mut known = self.scan.image(self.image(view.layer)?).domain_snapshots();
        let is_it = view.snapshot.is_none();
        known.find(|of| is_it && of.domain == self.domain).map(|of| of.name.as_str())
    }
}

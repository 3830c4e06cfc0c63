//! The image as it is at one step of a repair, counted window by window.

use super::super::audited::{Audited, Pass};
use super::super::window::Window;
use super::super::{CheckReport, References, Without};
use crate::error::Result;
use crate::io::WriteStorage;

/// The value that refcounts are set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CountPolicy {
    /// The number of references.
    References,
    /// The same, but no less than the stored count: there are references that cannot be decoded.
    NeverLower,
}

/// The image as it is at one step of a repair.
pub(super) struct Stage<'a> {
    pub(super) storage: &'a dyn WriteStorage,
    pub(super) audited: Audited<'a>,
    pub(super) references: References,
    pub(super) window_clusters: u64,
}

impl Stage<'_> {
    /// The windows of the file, as first cluster and length; one cluster more than the file has.
    pub(super) fn windows(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (step, end) = (self.window_clusters, self.audited.file_clusters() + 1);
        (0..end).step_by(step as usize).map(move |first| (first, step.min(end - first)))
    }

    /// Counts one window. Unlike an audit's, it distinguishes more references than the image can count.
    pub(super) fn window(&self, (first, len): (u64, u64), without: Without) -> Result<Window> {
        let mut window = Window::new(self.audited.header.cluster, first, len, u64::MAX);
        let mut told_before = CheckReport::default();
        let mut pass =
            Pass { audited: &self.audited, first: false, window: &mut window, report: &mut told_before };
        self.references.count(&mut pass, without)?;
        Ok(window)
    }

    /// The runs of `clusters` that one refcount block counts.
    pub(super) fn block_parts(
        &self,
        clusters: std::ops::Range<u64>,
    ) -> impl Iterator<Item = std::ops::Range<u64>> + use<> {
        let per_block = self.references.refcounts.per_block();
        let mut at = clusters.start;
        std::iter::from_fn(move || {
            let next = ((at / per_block + 1) * per_block).min(clusters.end);
            let part = (at < clusters.end).then_some(at..next);
            at = next;
            part
        })
    }
}

//! The bytes that a layer needs of its own before its backing file changes: ranges where the layer is
//! unallocated and the old and the new backing differ.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::chain::View;
use crate::error::Result;
use crate::image::Mapping;
use crate::image::write::{BackingDisk, FilePlace, Fill};
use crate::store::Store;
use crate::units::{BlockStatus, HostOffset, Run, are_zero};

/// Bytes compared at once.
const COMPARED: u64 = 256 << 10;
/// The granularity of the comparison: a sector.
const GRAIN: usize = 512;

/// The old and the new backing of a layer.
pub(in crate::ops) enum Filling {
    /// The layers that are dropped, and those below them, which stay.
    Between {
        /// `None` if all layers are dropped.
        between: Option<Arc<View>>,
        /// `None` if no layer stays.
        base: Option<Arc<View>>,
    },
    /// Two stacks that may share their lower layers.
    Differing {
        /// The old backing; `None` if there is none.
        old: Option<Arc<View>>,
        /// The new backing.
        new: Option<Arc<View>>,
        /// The range that was read and compared last.
        compared: Mutex<ComparedRange>,
    },
}

/// A range of both, and how long they stay equal, or different, from its start on.
#[derive(Default)]
pub(in crate::ops) struct ComparedRange {
    at: u64,
    runs: Vec<Run<Option<BlockStatus>>>,
}

/// The backing of a layer while it is filled: the old one, but a range is zero only if it is zero in the new
/// one as well. So zeroes that a guest writes, and the ranges by which a disk grows, are recorded in the
/// layer's own tables wherever an unallocated range would soon read as something else.
pub(super) struct SwitchBacking {
    pub(super) old: Option<Arc<View>>,
    pub(super) new: Option<Arc<View>>,
}

impl BackingDisk for SwitchBacking {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let Some(old) = &self.old else {
            buf.fill(0);
            return Ok(());
        };
        BackingDisk::read_at(&**old, at, buf)
    }

    fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        let status_of = |view: &Option<Arc<View>>| match view {
            Some(view) => view.status_run(at, len),
            None => Ok(Run::new(BlockStatus::Zero, len)),
        };
        let (old, new) = (status_of(&self.old)?, status_of(&self.new)?);
        match (old.value, new.value) {
            (BlockStatus::Zero, BlockStatus::Zero) => Ok(old.at_most(new.len)),
            (BlockStatus::Data, _) => Ok(old),
            (BlockStatus::Zero, BlockStatus::Data) => Ok(new),
        }
    }
}

impl Filling {
    /// The new backing.
    pub(super) fn new_backing(&self) -> Option<Arc<View>> {
        match self {
            Self::Between { base, .. } => base.clone(),
            Self::Differing { new, .. } => new.clone(),
        }
    }

    /// The first `depth` layers of `below` are dropped.
    pub(super) fn between(store: &Store, below: &View, depth: usize) -> Self {
        let count = below.layers().len();
        Self::Between {
            between: store.part_of(below, 0, depth),
            base: if depth < count { store.part_of(below, depth, count) } else { None },
        }
    }

    /// Another stack replaces the backing.
    pub(super) fn differing(old: Option<Arc<View>>, new: Option<Arc<View>>) -> Self {
        Self::Differing { old, new, compared: Mutex::default() }
    }

    /// How many of `len` bytes from `at` on need no copy, if that is known without reading.
    pub(super) fn unchanged_for(&self, at: u64, len: u64) -> Result<Option<u64>> {
        let is_nothing = match self {
            Self::Between { .. } => self.wanted(at, len)?.map(|wanted| wanted.is_none()),
            Self::Differing { old, new, .. } => {
                let (old, new) = (locate(old.as_ref(), at, len)?, locate(new.as_ref(), at, len)?);
                old.at_most(new.len).map(|old| old == new.value && old != StackMapping::Read)
            }
        };
        Ok(is_nothing.value.then_some(is_nothing.len))
    }

    /// Whether bytes may have to be copied at `at`, and for how many of `len` the same holds. Reads no data.
    pub(super) fn may_differ(&self, at: u64, len: u64) -> Result<Run<bool>> {
        match self {
            Self::Between { .. } => Ok(self.wanted(at, len)?.map(|wanted| wanted == Some(BlockStatus::Data))),
            Self::Differing { old, new, .. } => {
                let (old, new) = (locate(old.as_ref(), at, len)?, locate(new.as_ref(), at, len)?);
                Ok(old.at_most(new.len).map(|old| old != new.value && old != StackMapping::Zero))
            }
        }
    }
}

/// Where a stack has its bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StackMapping {
    Zero,
    /// In the image of that serial number, at that offset.
    At(u64, u64),
    /// In a form that cannot be compared by its location.
    Read,
}

fn locate(view: Option<&Arc<View>>, at: u64, len: u64) -> Result<Run<StackMapping>> {
    let Some(view) = view.filter(|view| at < view.size()) else {
        return Ok(Run::new(StackMapping::Zero, len));
    };
    let extent = view.resolve(at, len.min(view.size() - at))?;
    let Some(layer) = view.layers().get(extent.layer) else {
        return Ok(Run::new(StackMapping::Zero, extent.len));
    };
    match extent.mapping {
        Some(Mapping::Zero(_)) => Ok(Run::new(StackMapping::Zero, extent.len)),
        Some(Mapping::Data(host)) => {
            let run = layer.image().file_extent(host, HostOffset(host.0 + extent.len))?;
            Ok(run.map(|status| match status {
                BlockStatus::Data => StackMapping::At(layer.image().serial(), host.0),
                BlockStatus::Zero => StackMapping::Zero,
            }))
        }
        Some(Mapping::Compressed(_) | Mapping::Hole) | None => Ok(Run::new(StackMapping::Read, extent.len)),
    }
}

impl Fill for Filling {
    fn wanted(&self, at: u64, len: u64) -> Result<Run<Option<BlockStatus>>> {
        match self {
            Self::Between { between, base } => between_wants(between.as_ref(), base.as_ref(), at, len),
            Self::Differing { old, new, compared } => {
                let (old_run, new_run) = (locate(old.as_ref(), at, len)?, locate(new.as_ref(), at, len)?);
                let run = old_run.len.min(new_run.len);
                match (old_run.value, new_run.value) {
                    (StackMapping::Zero, StackMapping::Zero) => Ok(Run::new(None, run)),
                    (StackMapping::At(image, place), StackMapping::At(other, same))
                        if (image, place) == (other, same) =>
                    {
                        Ok(Run::new(None, run))
                    }
                    _ => compare(old.as_ref(), new.as_ref(), at, run, &mut compared.lock()),
                }
            }
        }
    }

    fn place(&self, at: u64, len: u64) -> Result<Run<Option<FilePlace>>> {
        let shown = match self {
            Self::Between { between, .. } => between,
            Self::Differing { old, .. } => old,
        };
        let Some(view) = shown.as_ref().filter(|view| at < view.size()) else {
            return Ok(Run::new(None, len));
        };
        let extent = view.resolve(at, len.min(view.size() - at))?;
        let place = match (extent.mapping, view.layers().get(extent.layer)) {
            // A raw file may end within its last sector.
            (Some(Mapping::Data(host)), Some(layer))
                if host.0 + extent.len <= layer.image().data().len()? =>
            {
                Some((Arc::clone(layer.image().data()), host.0))
            }
            _ => None,
        };
        Ok(Run::new(place, extent.len))
    }
}

/// The status of the layers between, unless the layers below have the same.
fn between_wants(
    between: Option<&Arc<View>>,
    base: Option<&Arc<View>>,
    at: u64,
    len: u64,
) -> Result<Run<Option<BlockStatus>>> {
    let zero = |len: u64| match base {
        // Without a backing file, unallocated ranges read as zeroes.
        None => Ok(Run::new(None, len)),
        Some(base) => Ok(base.status_run(at, len)?.map(|status| match status {
            BlockStatus::Zero => None,
            BlockStatus::Data => Some(BlockStatus::Zero),
        })),
    };
    let Some(view) = between.filter(|view| at < view.size()) else {
        // A shorter layer reads as zeroes beyond its end.
        return zero(len);
    };
    let extent = view.resolve(at, len.min(view.size() - at))?;
    if extent.layer >= view.layers().len() {
        return Ok(Run::new(None, extent.len));
    }
    let data = |len: u64| Ok(Run::new(Some(BlockStatus::Data), len));
    match extent.mapping {
        Some(Mapping::Zero(_)) => zero(extent.len),
        Some(Mapping::Data(host)) => {
            let image = view.layers()[extent.layer].image();
            let run = image.file_extent(host, HostOffset(host.0 + extent.len))?;
            match run.value {
                BlockStatus::Data => data(run.len),
                BlockStatus::Zero => zero(run.len),
            }
        }
        Some(Mapping::Compressed(_) | Mapping::Hole) | None => data(extent.len),
    }
}

/// Reads both, and returns how long the same answer holds from `at` on.
fn compare(
    old: Option<&Arc<View>>,
    new: Option<&Arc<View>>,
    at: u64,
    len: u64,
    compared: &mut ComparedRange,
) -> Result<Run<Option<BlockStatus>>> {
    if let Some(known) = compared.find(at, len) {
        return Ok(known);
    }
    let len = len.min(COMPARED);
    let (mut before, mut after) = (vec![0; len as usize], vec![0; len as usize]);
    read(old, at, &mut before)?;
    read(new, at, &mut after)?;
    let mut runs: Vec<Run<Option<BlockStatus>>> = Vec::new();
    for (before, after) in before.chunks(GRAIN).zip(after.chunks(GRAIN)) {
        let wanted = if before == after {
            None
        } else if are_zero(before) {
            Some(BlockStatus::Zero)
        } else {
            Some(BlockStatus::Data)
        };
        match runs.last_mut() {
            Some(last) if last.value == wanted => last.len += before.len() as u64,
            _ => runs.push(Run::new(wanted, before.len() as u64)),
        }
    }
    *compared = ComparedRange { at, runs };
    Ok(compared.find(at, len).expect("it has just been compared"))
}

impl ComparedRange {
    fn find(&self, at: u64, len: u64) -> Option<Run<Option<BlockStatus>>> {
        let mut start = self.at;
        for run in &self.runs {
            let end = start + run.len;
            if (start..end).contains(&at) {
                return Some(Run::new(run.value, (end - at).min(len)));
            }
            start = end;
        }
        None
    }
}

/// Reads from a stack; beyond its end, and without a stack, zeroes.
fn read(view: Option<&Arc<View>>, at: u64, buf: &mut [u8]) -> Result<()> {
    let Some(view) = view else { return Ok(()) };
    let have = view.size().saturating_sub(at).min(buf.len() as u64) as usize;
    if have == 0 { Ok(()) } else { view.read_at(at, &mut buf[..have]) }
}

//! A view: one disk, from a layer downwards.
//!
//! Reading resolves a range to extents and reads each with one call straight into the caller's buffer. A top
//! layer that may change is asked first, every time; the frozen ones below it answer through their flattened
//! map.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Layer, Mapping};
use crate::units::{BlockStatus, GuestOffset, HostOffset, Run, Stability};

use super::extent::Extent;
use super::flat::{FlatCache, FlatMap};

/// Maximum duration of one seek, since other requests wait for its thread.
const SEEK_LIMIT: Duration = Duration::from_millis(200);

/// One disk.
#[derive(Debug)]
pub struct View {
    layers: Arc<[Layer]>,
    size: u64,
    /// Whether the top layer may change while it is read.
    stability: Stability,
    /// The layers that do not change, flattened; `None` if there are none.
    flat: Option<Arc<FlatMap>>,
}

/// A run for `map`, as QEMU describes one.
#[expect(clippy::struct_excessive_bools, reason = "QEMU's four flags, and one more")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Index of the layer that holds it, from the top; the lowest if none does.
    pub depth: usize,
    /// Whether any layer holds it.
    pub present: bool,
    /// Whether it reads as zeroes.
    pub zero: bool,
    /// Whether a file holds bytes for it.
    pub data: bool,
    /// Whether it is compressed.
    pub compressed: bool,
    /// Whether its content is unknown: it is in none of the layers that are left.
    pub lost: bool,
    /// Its offset in that layer's data file.
    pub offset: Option<u64>,
}

impl View {
    /// A view of `layers`, top first. `stability` is that of the top one; the others never change.
    pub fn new(layers: Vec<Layer>, stability: Stability, cache: &Arc<FlatCache>) -> Arc<Self> {
        assert!(!layers.is_empty(), "a view has a top layer");
        let size = layers[0].size();
        let live = stability == Stability::Live;
        let frozen: Arc<[Layer]> = layers[usize::from(live)..].into();
        let flat = (!frozen.is_empty()).then(|| FlatMap::new(frozen, size, cache));
        let layers = match &flat {
            Some(flat) if !live => Arc::clone(flat.layers()),
            _ => layers.into(),
        };
        Arc::new(Self { layers, size, stability, flat })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether its top layer may change.
    pub fn is_live(&self) -> bool {
        self.stability == Stability::Live
    }

    /// Its layers, top first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Fills `buf` with the bytes at `at`. The range must lie within the disk.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let end = at.checked_add(buf.len() as u64).expect("a range of the disk");
        assert!(end <= self.size, "a read past the end of the disk");
        if !self.is_live() {
            return self.read_flat(at, buf);
        }
        let mut done = 0;
        while done < buf.len() {
            let (position, left) = (at + done as u64, (buf.len() - done) as u64);
            let Run { value: mapping, len } = self.layers[0].map(GuestOffset(position), left)?;
            let piece = &mut buf[done..done + len as usize];
            match mapping {
                Mapping::Data(host) => self.layers[0].image().read_data(host, piece)?,
                Mapping::Zero(_) => piece.fill(0),
                Mapping::Compressed(_) => read_asked(&self.layers[0], position, piece)?,
                Mapping::Hole => self.read_flat(position, piece)?,
            }
            done += len as usize;
        }
        Ok(())
    }

    fn read_flat(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let Some(flat) = &self.flat else {
            buf.fill(0);
            return Ok(());
        };
        let mut rest = buf;
        let len = rest.len() as u64;
        flat.walk(at, len, |position, Extent { layer, mapping, len }| {
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len as usize);
            rest = more;
            let layer = &flat.layers()[layer];
            match mapping {
                Some(Mapping::Data(host)) => layer.image().read_data(host, piece),
                Some(Mapping::Zero(_)) => {
                    piece.fill(0);
                    Ok(())
                }
                Some(Mapping::Compressed(_) | Mapping::Hole) | None => read_asked(layer, position, piece),
            }
        })
    }

    /// The layer that holds `at`, and where its bytes are, for at most `max` bytes. Each layer that has the
    /// range unallocated may shorten the run, never lengthen it.
    pub fn resolve(&self, at: u64, max: u64) -> Result<Extent> {
        let mut len = max.min(self.size - at);
        for (layer, state) in self.layers.iter().enumerate() {
            let run = match state.map(GuestOffset(at), len) {
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    let len = state.rest_of_cluster(GuestOffset(at), len);
                    return Ok(Extent { layer, mapping: None, len });
                }
                other => other?,
            };
            assert!(run.len > 0 && run.len <= len);
            len = run.len;
            if run.value != Mapping::Hole {
                return Ok(Extent { layer, mapping: Some(run.value), len });
            }
        }
        // R1: all layers have been asked.
        Ok(Extent { layer: self.layers.len(), mapping: Some(Mapping::Zero(None)), len })
    }

    /// The first byte at or after `at` whose status is `wanted`. `None` if there is none before the end of
    /// the disk.
    ///
    /// A disk can have tables for petabytes. A search that reaches its time limit reports the rest as data,
    /// which is always allowed: the next call continues from there.
    pub fn seek(&self, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let start = Instant::now();
        let mut at = at;
        while at < self.size {
            let run = self.seek_run(at)?;
            if run.value == wanted {
                return Ok(Some(at));
            }
            at += run.len;
            if start.elapsed() > SEEK_LIMIT {
                return Ok(Some(at).filter(|at| wanted == BlockStatus::Data && *at < self.size));
            }
        }
        Ok(None)
    }

    /// Whether there is data at `at`, and the minimum length of that run.
    fn seek_run(&self, at: u64) -> Result<Run<BlockStatus>> {
        // Long unallocated ranges are answered by the tables, dense ones by the flattened map.
        let whole = self.resolve(at, u64::MAX)?;
        let extent = match (&self.flat, whole.mapping) {
            (Some(flat), Some(Mapping::Data(_) | Mapping::Compressed(_))) if !self.is_live() => {
                let dense = flat.lookup(at)?;
                Extent { len: dense.len.min(self.size - at).max(whole.len), ..dense }
            }
            _ => whole,
        };
        self.status(extent)
    }

    /// As [`View::seek_run`], but by the flattened map only: one lookup, whatever the depth.
    pub(super) fn frozen_run(&self, at: u64) -> Result<Run<BlockStatus>> {
        assert!(!self.is_live() && at < self.size);
        let Some(flat) = &self.flat else { unreachable!("a frozen view has a map") };
        let extent = flat.lookup(at)?;
        self.status(Extent { len: extent.len.min(self.size - at), ..extent })
    }

    fn status(&self, Extent { layer, mapping, len }: Extent) -> Result<Run<BlockStatus>> {
        match mapping {
            // A raw image has its holes in its file.
            Some(Mapping::Data(host)) if self.layers[layer].image().is_raw() => {
                self.layers[layer].image().file_extent(host, HostOffset(host.0 + len))
            }
            Some(Mapping::Zero(_)) => Ok(Run::new(BlockStatus::Zero, len)),
            // R2: an unreadable range is no hole, so that a copying program sees the error.
            Some(Mapping::Data(_) | Mapping::Compressed(_) | Mapping::Hole) | None => {
                Ok(Run::new(BlockStatus::Data, len))
            }
        }
    }

    /// The run at `at`, as `map` shows it: which layer, and whether zero, data or compressed.
    pub fn map_run(&self, at: u64, max: u64) -> Result<MapRun> {
        let Extent { layer, mapping, len } = self.resolve(at, max)?;
        let lowest = self.layers.len() - 1;
        let mut run = MapRun {
            start: at,
            len,
            depth: layer.min(lowest),
            present: layer <= lowest,
            zero: false,
            data: true,
            compressed: false,
            lost: false,
            offset: None,
        };
        match mapping {
            Some(Mapping::Data(host)) => {
                run.offset = Some(host.0);
                if self.layers[layer].image().is_raw() {
                    let end = HostOffset(host.0 + len);
                    let found = self.layers[layer].image().file_extent(host, end)?;
                    (run.data, run.len) = (found.value == BlockStatus::Data, found.len);
                    run.zero = !run.data;
                }
            }
            Some(Mapping::Compressed(_)) => run.compressed = true,
            Some(Mapping::Zero(_)) => {
                (run.zero, run.data) = (true, false);
                // At a layer's end, QEMU names the unallocated layer above it.
                if layer > 0 && run.present && at >= self.layers[layer].size() {
                    (run.depth, run.present) = (layer - 1, false);
                }
                // A place that is preallocated for zeroes, or for subclusters that are not written.
                let kept = self.layers[run.depth].map(GuestOffset(at), run.len)?;
                if let Mapping::Zero(Some(host)) = kept.value {
                    (run.offset, run.len) = (Some(host.0), kept.len);
                }
            }
            Some(Mapping::Hole) | None if self.layers[layer].image().is_lost() => {
                (run.present, run.data, run.lost) = (false, false, true);
            }
            Some(Mapping::Hole) | None => {
                self.layers[layer].map(GuestOffset(at), len)?;
            }
        }
        Ok(run)
    }
}

/// Reads a range for which the flattened map says that the layer has to be asked again.
fn read_asked(layer: &Layer, at: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let position = GuestOffset(at + done as u64);
        let Run { value: mapping, len } = layer.map(position, (buf.len() - done) as u64)?;
        let piece = &mut buf[done..done + len as usize];
        match mapping {
            Mapping::Compressed(stream) => {
                let cluster = layer.image().read_compressed(stream)?;
                let within = layer.within_cluster(position) as usize;
                piece.copy_from_slice(&cluster[within..within + piece.len()]);
            }
            Mapping::Data(host) => layer.image().read_data(host, piece)?,
            Mapping::Zero(_) => piece.fill(0),
            // The backing of the layer is not known here.
            Mapping::Hole => {
                let fact = format!("{} has changed while it was read; read it again", layer.image().name());
                return Err(Error::new(ErrorKind::Stale, fact));
            }
        }
        done += len as usize;
    }
    Ok(())
}

//! What a page shows, as plain values. Texts are as they are; the renderer makes them safe. Links are paths
//! from the mount's root, percent-encoded.

use std::time::SystemTime;

use jiff::tz::TimeZone;

use crate::report::tree::{NodeMark, TreeNodeKind};

/// A page about a store, or about one chain of it.
#[derive(Debug)]
pub struct Page {
    /// The chain that the page is about; `None` for the whole store.
    pub chain: Option<String>,
    /// The directory of that chain; empty, or ending in `/`.
    pub chain_path: String,
    /// The path of the store.
    pub store: String,
    /// The path from the page to the mount's root: `../` for each directory.
    pub to_root: String,
    /// When the page was made.
    pub made: SystemTime,
    /// The time zone of its dates.
    pub zone: TimeZone,
    /// Its figures.
    pub totals: Totals,
    /// The commands that are running.
    pub running: Vec<RunningCommand>,
    /// The problems.
    pub problems: Listed<ProblemLine>,
    /// The chains.
    pub chains: Listed<ChainLine>,
    /// The backing trees.
    pub trees: Listed<PageTree>,
    /// Number of trees that are a single image without snapshots, and are not among them.
    pub single_images: usize,
    /// Snapshots, the latest first.
    pub snapshots: Listed<SnapshotLine>,
    /// Commands to copy, each after a sentence that says what it does.
    pub commands: Vec<(&'static str, String)>,
    /// Other files about the same, with a word on each.
    pub documents: Vec<(String, &'static str)>,
}

/// The first items of a list, and the number of all.
#[derive(Debug)]
pub struct Listed<T> {
    /// The items that are shown.
    pub shown: Vec<T>,
    /// The number of all items.
    pub count: usize,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { shown: Vec::new(), count: 0 }
    }
}

impl<T> Listed<T> {
    /// The first `most` of `all`.
    pub fn of(all: impl IntoIterator<Item = T>, most: usize) -> Self {
        let mut all = all.into_iter();
        let shown: Vec<T> = all.by_ref().take(most).collect();
        let count = shown.len() + all.count();
        Self { shown, count }
    }
}

/// The figures at the top of a page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Number of chains.
    pub chains: usize,
    /// Number of images in them.
    pub images: usize,
    /// Number of frozen layers and internal snapshots.
    pub snapshots: usize,
    /// Bytes on disk of all images.
    pub on_disk: u64,
}

/// A command that is running.
#[derive(Debug)]
pub struct RunningCommand {
    /// Its chain.
    pub chain: String,
    /// How far it is, as in `control/progress`.
    pub progress: String,
    /// How far it is, in thousandths.
    pub per_mille: u64,
    /// The file `control/status`.
    pub status: String,
}

/// A problem.
#[derive(Debug)]
pub struct ProblemLine {
    /// The file.
    pub path: String,
    /// What is wrong, and after the first semicolon what to do.
    pub sentence: String,
}

/// A chain, in the list of all.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct ChainLine {
    /// Its name.
    pub name: String,
    /// Its directory; empty, or ending in `/`.
    pub path: String,
    /// Whether it has an active disk.
    pub is_active: bool,
    /// Size of its disk.
    pub virtual_size: Option<u64>,
    /// Its sizes on disk.
    pub sizes: ChainSizes,
    /// Number of its snapshots, internal ones included.
    pub snapshot_count: usize,
    /// When the latest was taken.
    pub latest: Option<SystemTime>,
    /// The guest's system.
    pub system: GuestSystem,
    /// Whether `files/` is shown.
    pub has_files: bool,
    /// Whether its disk cannot be read, or not completely.
    pub has_problem: bool,
    /// Whether a command is running.
    pub is_busy: bool,
}

/// Bytes on disk of a chain's images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChainSizes {
    /// Of images that no other chain has: what is freed if the chain is removed.
    pub own: u64,
    /// Of images that other chains have as well.
    pub shared: u64,
}

/// What is known about the guest's system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestSystem {
    /// It was looked for before: its name, or that there is none.
    Known(String),
    /// It was not looked for yet: `info/os.txt` does that.
    NotYet,
    /// It cannot be looked for.
    None,
}

/// A snapshot, in the list of the latest.
#[derive(Debug)]
pub struct SnapshotLine {
    /// When it was frozen or taken.
    pub date: SystemTime,
    /// Its view's name.
    pub name: String,
    /// A chain that has it.
    pub chain: String,
    /// The directory of that chain.
    pub chain_path: String,
    /// Whether it is an internal snapshot.
    pub is_internal: bool,
    /// Bytes on disk of its file.
    pub own_size: Option<u64>,
    /// Its disk and files.
    pub links: Option<ViewLinks>,
}

/// Where a view is in the mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViewLinks {
    /// Its disk.
    pub disk: String,
    /// Its guest's files.
    pub files: Option<String>,
}

/// A base with all its overlays.
#[derive(Debug)]
pub struct PageTree {
    /// The chain that names it.
    pub title: String,
    /// Virtual size, size on disk and counts.
    pub summary: String,
    /// The page about it, unless this is it.
    pub page: Option<String>,
    /// Its rows, base first.
    pub rows: Listed<TreeRow>,
}

/// A row of a tree.
#[derive(Debug)]
pub struct TreeRow {
    /// Its lines.
    pub lines: RowLines,
    /// What it shows.
    pub item: RowContent,
}

/// The lines to the left of a row's text.
#[derive(Clone, Debug)]
pub struct RowLines {
    /// For each column to the left of the row's joint, whether its line continues.
    pub bars: Vec<bool>,
    /// How the row joins the row of its backing file.
    pub joint: RowJoint,
    /// Whether a line goes on from its mark.
    pub continues: bool,
}

/// How a row joins that of its backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowJoint {
    /// It is the base.
    Base,
    /// In the same column.
    Straight,
    /// As a side branch; the flag: nothing follows in the column that it leaves.
    Side(bool),
}

/// What a row shows.
#[derive(Debug)]
pub enum RowContent {
    /// An image or internal snapshot.
    Layer(LayerCells),
    /// Folded layers of a straight run.
    Fold {
        /// "25 layers".
        label: String,
        /// First and last name.
        names: (String, String),
        /// Their common format.
        kind: &'static str,
        /// Their days.
        days: String,
        /// Bytes on disk of all of them.
        own_size: u64,
        /// The layers.
        layers: Listed<LayerCells>,
    },
}

/// What a row says of an image or internal snapshot.
#[derive(Debug)]
pub struct LayerCells {
    /// Its role.
    pub mark: NodeMark,
    /// Its view's name.
    pub name: String,
    /// Its format.
    pub kind: TreeNodeKind,
    /// When it was frozen or taken, or else last changed.
    pub date: Option<SystemTime>,
    /// Bytes on disk of its file.
    pub own_size: Option<u64>,
    /// The chain whose leaf it is, and flags.
    pub flags: String,
    /// Its disk and files.
    pub links: Option<ViewLinks>,
}

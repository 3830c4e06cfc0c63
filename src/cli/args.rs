//! The commands and their words, as clap reads them.
//!
//! qemu-img's and mount(8)'s spellings wherever they have one. Nothing is done here; wrong words
//! end with the exit code of the command they were meant for.

mod guests;
mod verbs;

pub use guests::{CatArgs, CpArgs, DiffArgs, LookArgs, LsArgs, VersionsArgs};
pub use verbs::{
    CancelArgs, CloneArgs, CommitArgs, DeleteArgs, PullArgs, RebaseArgs, ResizeArgs, RevertArgs, RunArgs, SnapshotArgs,
};

use super::mount_options::{ImageFormat, SETTINGS, Takes, suggestion};
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::PathBuf;

/// Every backing chain a directory, every snapshot a disk.
#[derive(Debug, Parser)]
#[command(
    name = "chainfs",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  chainfs mount /srv/images /mnt/images    every chain of the store a directory
  chainfs tree /srv/images                 who stands on whom, without mounting
  chainfs umount /mnt/images               returns when every file has been let go

Exit codes: 0, 1 failed, 2 usage; mount, check, compare and diff say theirs in their own help."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a store of disk images as a tree of directories and disks
    Mount(MountArgs),
    /// Take a mount away; returns when every file and lock has been let go
    Umount(UmountArgs),
    /// Draw the branching tree of a store's chains
    Tree(TreeArgs),
    /// Describe an image, or its whole chain, as `qemu-img info` does
    Info(InfoArgs),
    /// Show where each part of a disk is stored, as `qemu-img map` does
    Map(MapArgs),
    /// Look for damage in images
    Check(CheckArgs),
    /// Compare the disks that two images or snapshots show
    Compare(CompareArgs),
    /// Tell in which ranges two disks differ, or in which files
    Diff(DiffArgs),
    /// List the volumes of a guest's disk, or files in them
    Ls(LsArgs),
    /// Print files of a guest
    Cat(CatArgs),
    /// Copy files of a guest out of its disk
    Cp(CpArgs),
    /// Tell which snapshots hold which version of a guest's file
    Versions(VersionsArgs),
    /// Create an empty qcow2 image, alone or on top of another
    Create(CreateArgs),
    /// Freeze the active disk of a chain under a name
    Snapshot(SnapshotArgs),
    /// Merge layers of a chain down into one of them
    Commit(CommitArgs),
    /// Copy what lies below a layer into it
    Pull(PullArgs),
    /// Remove a snapshot, and change no other
    Delete(DeleteArgs),
    /// Make the active disk what a snapshot shows
    Revert(RevertArgs),
    /// Put a layer on another backing file
    Rebase(RebaseArgs),
    /// Make a new chain on top of a snapshot
    Clone(CloneArgs),
    /// Make the active disk longer or shorter
    Resize(ResizeArgs),
    /// List, restore or remove what commands have put into a store's trash
    Trash(TrashArgs),
    /// Finish or give up what commands that were cut off have left
    Recover(RecoverArgs),
    /// Stop the running command of a chain
    Cancel(CancelArgs),
    /// Read guests' file systems for the program that has started this one
    #[command(name = crate::browse::worker::WORKER, hide = true)]
    Worker {
        /// Without the kernel's filter of system calls
        #[arg(long)]
        without_seccomp: bool,
    },
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  chainfs completions bash > /usr/share/bash-completion/completions/chainfs")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    #[command(after_help = "Example:\n  mkdir -p man1 && chainfs man man1 && man ./man1/chainfs-mount.1")]
    Man {
        /// Where they go; must exist
        dir: PathBuf,
    },
}

/// The words of `mount`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Options of -o:
  ro                     no image is ever opened for writing
  allow_other            let every user in; the modes shown are enforced
  uid= gid= umask=       owner, group and permission bits shown
  threads=N              requests served at once
  cache=SIZE             memory for tables and decompressed clusters, as in 64M
  backing_dir=DIR        a directory outside of the store that layers may come from (repeatable)
  map=OLD=NEW            where files are that moved since images named them (repeatable)
  readonly=GLOB          images that never become writable (repeatable)
  format=GLOB:FORMAT     raw or qcow2, for images that do not tell (repeatable)
  standalone=GLOB        files and directories that cannot be read, and stand on nothing (repeatable)
  probe                  believe the content where a header names no backing format
  force_share            show what another process is writing
  salvage                where a layer is lost, read what the others hold; the rest is an error
  nolock                 write images even on file systems without file locks
  nofiles                leave the guests' partitions and files out
  symlinks=HOW           links of guests: inside (their volume, the default) or verbatim
  rescan=SECONDS         how often a store that cannot be watched is looked through
  trash=DAYS             for how long layers that a command has removed can be restored
  config=FILE            read this in place of /etc/chainfs.toml and the user's file
  nopassthrough noparallelwrites nosharedmapping noacl noseccomp noinotify noreadahead
                         do without a feature of the kernel
A comma within a value is written \\, - what mount(8), fstab and systemd add is understood.

Examples:
  chainfs mount /srv/images /mnt/images
  chainfs mount web01.qcow2 /mnt/web01 -o ro,uid=1000
  chainfs mount /srv/images /mnt/images -o allow_other -o backing_dir=/srv/templates

Exit codes, as of mount(8): 0, 1 usage, 32 failed.")]
pub struct MountArgs {
    /// A directory of disk images, or one image
    pub store: PathBuf,
    /// Where the tree appears; an empty directory
    pub dir: PathBuf,
    /// Mount options, separated by commas (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Stay in the foreground, messages on stderr
    #[arg(short, long)]
    pub foreground: bool,
    /// Say more
    #[arg(short, long)]
    pub verbose: bool,
    /// Ignore mount options that are unknown
    #[arg(short, long, hide = true)]
    pub sloppy: bool,
}

/// The words of `recover`.
#[derive(Debug, Args)]
#[command(after_help = "\
A mount takes up by itself what was cut off. What it could not take up stays hidden; here is why, and once that has been
seen to it goes on. Exits 1 if something is left.

Examples:
  chainfs recover --dry-run /srv/images
  chainfs recover /srv/images
  chainfs recover /srv/images --forget 18dcf2a-1-0")]
pub struct RecoverArgs {
    /// A store, or a place in its mount
    pub store: PathBuf,
    /// Only say what can be done
    #[arg(long)]
    pub dry_run: bool,
    /// Give this command up, or what frozen.toml said: nothing is hidden for its sake any more
    #[arg(long, value_name = "NAME")]
    pub forget: Option<OsString>,
    /// Mount options that say how the store is read, as for mount
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// The words of `trash`.
#[derive(Debug, Args)]
#[command(after_help = "\
Layers go there that a command has removed although they still show what they did: in a store that is mounted, or
worked on, with -o trash=DAYS. They are removed for good after so many days, or when what they stand on changes.

Examples:
  chainfs trash /srv/images
  chainfs trash /srv/images --restore 18dcf2a-1f
  chainfs trash /srv/images --restore 18dcf2a-1f --name monday-again.qcow2
  chainfs trash /srv/images --empty")]
pub struct TrashArgs {
    /// A store, or a place in its mount
    pub store: PathBuf,
    /// Give this layer its place in the store again
    #[arg(long, value_name = "ID", conflicts_with_all = ["remove", "empty"])]
    pub restore: Option<String>,
    /// Under another name, beside where it was
    #[arg(long, value_name = "FILE", requires = "restore")]
    pub name: Option<OsString>,
    /// Remove this layer for good
    #[arg(long, value_name = "ID", conflicts_with = "empty")]
    pub remove: Option<String>,
    /// Remove all of them for good
    #[arg(long)]
    pub empty: bool,
    /// How they are listed.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The words of `umount`.
#[derive(Debug, Args)]
#[command(after_help = "A mount that is in use goes on serving, and who uses it is said, unless --lazy.")]
pub struct UmountArgs {
    /// Where the tree is
    pub dir: PathBuf,
    /// Take it out of the way at once; those who use it may finish
    #[arg(short, long)]
    pub lazy: bool,
}

/// How an image that is not mounted is opened.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Read even what another process is writing
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Options as of `mount -o`, such as `backing_dir=DIR` and `probe` (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// People or programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people.
    Human,
    /// JSON with QEMU's keys.
    Json,
}

/// How a result is written.
#[derive(Clone, Copy, Debug, Args)]
pub struct OutputArgs {
    /// For people or for programs
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    output: Output,
    /// Short for --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl OutputArgs {
    /// What was asked for, in either spelling.
    pub fn format(self) -> Output {
        if self.json { Output::Json } else { self.output }
    }
}

/// Ways to draw a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TreeOutput {
    /// Text for people.
    Human,
    /// JSON, nothing folded.
    Json,
    /// Graphviz.
    Dot,
    /// A picture that opens in a browser.
    Svg,
}

/// The words of `tree`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs tree /srv/images
  chainfs tree --full web01.qcow2
  chainfs tree --output svg /srv/images > tree.svg
  chainfs tree web01.qcow2 --dry-run commit top=sn3 base=sn1")]
pub struct TreeArgs {
    /// A store, an image, or a place inside a mount
    pub path: PathBuf,
    /// Every layer a line of its own
    #[arg(long)]
    pub full: bool,
    /// Draw with ASCII alone
    #[arg(long)]
    pub ascii: bool,
    /// How to draw
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    pub output: TreeOutput,
    /// Show a chain before and after this command, in the words of the control files; nothing is done
    #[arg(long, value_name = "COMMAND", num_args = 1.., allow_hyphen_values = true)]
    pub dry_run: Vec<OsString>,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The words of `info`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs info web01.qcow2
  chainfs info --backing-chain --output json web01.qcow2 | jq '.[].filename'
  chainfs info /mnt/images/web01/snapshots/base.raw")]
pub struct InfoArgs {
    /// A store, an image, or a place inside a mount
    pub path: PathBuf,
    /// The image and everything below it
    #[arg(long)]
    pub backing_chain: bool,
    /// The image's format, where its name and header do not tell
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The words of `map`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE@VIEW is the disk of an internal snapshot or of a layer below, as in web01.qcow2@before-upgrade.

Examples:
  chainfs map web01.qcow2
  chainfs map --output json web01.qcow2@before-upgrade")]
pub struct MapArgs {
    /// An image, IMAGE@VIEW, or a disk inside a mount
    pub path: PathBuf,
    /// The image's format, where its name and header do not tell
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The words of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs check web01.qcow2
  chainfs check --output json /srv/images
  chainfs check --repair leaks web01.qcow2

A repair says first what is wrong, then mends it, then checks again. No disk or snapshot changes by it. \
The image must not be in use.

Exit codes, as of qemu-img: 0 fine, 1 could not check, 2 corrupt, 3 leaks, 63 this format has nothing to check. \
After a repair they tell what is left.")]
pub struct CheckArgs {
    /// A store, an image, or a place inside a mount
    pub path: PathBuf,
    /// Mend leaked clusters, or all that can be mended without guessing
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<RepairScope>,
    /// The image's format, where its name and header do not tell
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// What `check --repair` is to mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairScope {
    /// Leaked clusters
    Leaks,
    /// Refcounts that are too low, flags and tables as well
    All,
}

/// Formats of two images.
#[derive(Debug, Args)]
pub struct FormatsArgs {
    /// Format of the first
    #[arg(short = 'f', long, value_enum, value_name = "FORMAT")]
    pub a_format: Option<ImageFormat>,
    /// Format of the second
    #[arg(short = 'F', long, value_enum, value_name = "FORMAT")]
    pub b_format: Option<ImageFormat>,
}

/// The words of `compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE@VIEW is the disk of an internal snapshot or of a layer below. A longer disk is the same if its rest is zero, unless --strict.

Examples:
  chainfs compare web01.qcow2 web02.qcow2
  chainfs compare web01.qcow2 web01.qcow2@before-upgrade
  chainfs compare -F raw web01.qcow2 copy.img

Exit codes: 0 same, 1 different, 2 trouble.")]
pub struct CompareArgs {
    /// An image, IMAGE@VIEW, or a disk inside a mount
    pub a: PathBuf,
    /// Another
    pub b: PathBuf,
    /// What the two are.
    #[command(flatten)]
    pub formats: FormatsArgs,
    /// Different sizes and different holes are differences, too
    #[arg(short, long)]
    pub strict: bool,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    pub quiet: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The words of `create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs create disk.qcow2 10G
  chainfs create -b base.raw -F raw web01.qcow2
  chainfs create -o cluster_size=128K,extended_l2=on disk.qcow2 10G")]
pub struct CreateArgs {
    /// The new image; must not exist
    pub image: PathBuf,
    /// Size of the disk, as in 10G; by default that of the backing file
    #[arg(value_parser = size, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// The image to stand on
    #[arg(short, long, requires = "backing_format")]
    pub backing: Option<PathBuf>,
    /// Its format
    #[arg(short = 'F', long, value_enum, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<ImageFormat>,
    /// The new image's format; there is one
    #[arg(short, long, value_parser = ["qcow2"], default_value = "qcow2", hide = true)]
    pub format: String,
    /// Details as of `qemu-img create -o`, such as `cluster_size=128K` (repeatable)
    #[arg(short, value_name = "OPTIONS", value_delimiter = ',', value_parser = key_value)]
    pub options: Vec<(String, String)>,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
}

/// Words that could not be read, or a request for help; [`Refusal::code`] is the exit code.
#[derive(Debug)]
pub struct Refusal {
    /// Prints itself where it belongs.
    pub error: clap::Error,
    /// 0 for help, 1 for `mount` and for `check` (whose 2 is an answer), 2 for everything else.
    pub code: u8,
}

/// Reads a command line, the program's name first.
pub fn parse<I, T>(words: I) -> Result<Cli, Refusal>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString>,
{
    let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
    Cli::try_parse_from(&words).map_err(|error| {
        let error = with_right_tip(error, words.get(1));
        let usage_is_one = words.get(1).is_some_and(|word| word == "mount" || word == "check");
        let code = match (error.use_stderr(), usage_is_one) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        };
        Refusal { error, code }
    })
}

/// An unknown option with a tip that helps: clap's own, to give it behind `--`, would make it a file's name.
fn with_right_tip(mut error: clap::Error, command: Option<&OsString>) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
    let (name, value) = given.split_once('=').map_or((given.as_str(), None), |(name, value)| (name, Some(value)));
    let option = suggestion(name.trim_start_matches('-')).filter(|_| command.is_some_and(|word| word == "mount"));
    error.remove(ContextKind::Suggested);
    if let Some(option) = option {
        let takes_value = SETTINGS.iter().any(|(known, takes)| *known == option && *takes != Takes::Nothing);
        let value = value.or(takes_value.then_some("...")).map(|value| format!("={value}")).unwrap_or_default();
        let tip = StyledStr::from(format!("mount options are given with -o: -o {option}{value}"));
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
    error
}

fn size(text: &str) -> Result<u64, String> {
    crate::units::parse_size(text).map_err(|error| error.to_string())
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("must be KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests;

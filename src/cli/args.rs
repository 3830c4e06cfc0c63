//! The commands and their arguments, as clap parses them.
//!
//! Options are spelt as in qemu-img and mount(8) where those have them. This module only parses. An invalid
//! command line ends with the exit code of its command.

mod guests;
mod verbs;

pub use guests::{
    Boot, CatArgs, CpArgs, DiffArgs, FindArgs, LogArgs, LookArgs, LsArgs, TryArgs, VersionsArgs,
};
pub use verbs::{Invocation, RunArgs, VerbCommand};

use super::mount_options::{ImageFormat, SETTINGS, Takes, suggestion};
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::PathBuf;

/// The command that completion scripts call.
pub(super) const COMPLETE: &str = "complete";

/// Mount a store of qcow2 and raw images: each backing chain is a directory, each snapshot a disk.
#[derive(Debug, Parser)]
#[command(
    name = "chainfs",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  chainfs mount /srv/images /mnt/images    show each chain of the store as a directory
  chainfs tree /srv/images                 show the backing tree, without mounting
  chainfs umount /mnt/images               unmount, and wait until all files are closed

Exit codes: 0 success, 1 failed, 2 usage; mount, check, compare and diff document theirs in their own help."
)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a store of disk images as a tree of directories and disks
    Mount(MountArgs),
    /// Unmount; returns when all files are closed and all locks released
    Umount(UmountArgs),
    /// Draw the backing tree of a store
    Tree(TreeArgs),
    /// Describe an image or its whole chain, like `qemu-img info`
    Info(InfoArgs),
    /// Show where each part of a disk is stored, like `qemu-img map`
    Map(MapArgs),
    /// Check images for damage, and repair it
    Check(CheckArgs),
    /// Compare the disks of two images or snapshots
    Compare(CompareArgs),
    /// List the ranges or the files in which two disks differ
    Diff(DiffArgs),
    /// List the volumes of a guest's disk, or the files in them
    Ls(LsArgs),
    /// Print files of a guest
    Cat(CatArgs),
    /// Copy files of a guest out of its disk
    Cp(CpArgs),
    /// List the versions of a guest's file and the snapshots that hold each
    Versions(VersionsArgs),
    /// Find guests' files by name, in all snapshots of a store
    Find(FindArgs),
    /// Show the history of a guest's file: each version, and what changed
    Log(LogArgs),
    /// Boot a snapshot on a throw-away overlay
    Try(TryArgs),
    /// Create an empty qcow2 image, with or without a backing file
    Create(CreateArgs),
    /// A verb.
    #[command(flatten)]
    Verb(VerbCommand),
    /// List, restore or remove layers in a store's trash
    Trash(TrashArgs),
    /// Resume or discard interrupted commands
    Recover(RecoverArgs),
    /// List who has an image, a disk or a store open, and how to end that
    Who(WhoArgs),
    /// Check this machine, a store, an image or a mount for what stops chainfs
    Doctor(DoctorArgs),
    /// Read guests' file systems for the parent process
    #[command(name = crate::browse::worker::WORKER, hide = true)]
    Worker {
        /// Run without the seccomp filter
        #[arg(long)]
        without_seccomp: bool,
        /// Derive the key of an encrypted volume
        #[arg(long)]
        unlocks: bool,
    },
    /// Print what may follow on a command line, for the scripts of shells
    #[command(name = COMPLETE, hide = true)]
    Complete {
        /// The words up to the cursor
        #[arg(last = true)]
        words: Vec<OsString>,
    },
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  chainfs completions bash > /usr/share/bash-completion/completions/chainfs"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    #[command(after_help = "Example:\n  mkdir -p man1 && chainfs man man1 && man ./man1/chainfs-mount.1")]
    Man {
        /// Directory for the pages; must exist
        dir: PathBuf,
    },
}

/// The arguments of `mount`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Options of -o:
  ro                     never open an image for writing
  allow_other            allow access by all users; the kernel enforces the modes shown
  uid= gid= umask=       owner, group and masked permission bits to show
  threads=N              number of threads that serve requests
  cache=SIZE             memory for tables and decompressed clusters, e.g. 64M
  backing_dir=DIR        a directory outside the store that may hold backing files (repeatable)
  map=OLD=NEW            look for backing files named under OLD in NEW (repeatable)
  readonly=GLOB          images that never become writable (repeatable)
  format=GLOB:FORMAT     raw or qcow2, for images whose name and header do not say (repeatable)
  standalone=GLOB        unreadable files and directories that have no backing file (repeatable)
  probe                  detect the format where a header names no backing format
  force_share            show images that another process is writing
  salvage                if a layer is missing, read the others; data of the missing layer is an error
  nolock                 write images even on file systems without file locks
  nofiles                do not show the guests' partitions and files
  symlinks=HOW           symbolic links of guests: inside (their volume, the default) or verbatim
  keys=FILE              keys of encrypted volumes (LUKS); FILE must be readable by its owner only
  rescan=SECONDS         interval of scans for a store that cannot be watched
  trash=DAYS             how long removed layers can be restored
  config=FILE            read FILE instead of /etc/chainfs.toml and the user's file
  kernelmap=HOW          the kernel reads chains by itself: auto (where it can, the default), on or off
  map_dir=DIR            where it keeps the maps for that (default /var/cache/chainfs)
  cache_dir=DIR          where what was fetched from a remote store is kept
  cache_size=SIZE        the space that this may have (default 20G)
  offline                show a remote store from cache_dir alone
  timeout=SECONDS        the time after which a request to a remote store fails (default 30)
  nopassthrough noparallelwrites nosharedmapping noacl noxattr noseccomp noinotify noreadahead
  noiouring
                         do not use a feature of the kernel
Write a comma within a value as \\, - options that mount(8), fstab and systemd add are accepted.

Examples:
  chainfs mount /srv/images /mnt/images
  chainfs mount web01.qcow2 /mnt/web01 -o ro,uid=1000
  chainfs mount /srv/images /mnt/images -o allow_other -o backing_dir=/srv/templates

Exit codes, as for mount(8): 0 success, 1 usage, 32 failed.")]
pub struct MountArgs {
    /// A directory of disk images, or one image
    pub store: PathBuf,
    /// The mount point; an empty directory
    pub dir: PathBuf,
    /// Mount options, separated by commas (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Stay in the foreground and log to stderr
    #[arg(short, long)]
    pub foreground: bool,
    /// Log more
    #[arg(short, long)]
    pub verbose: bool,
    /// Ignore unknown mount options
    #[arg(short, long, hide = true)]
    pub sloppy: bool,
}

/// The arguments of `recover`.
#[derive(Debug, Args)]
#[command(after_help = "\
A mount resumes interrupted commands by itself. If it cannot resume one, the layers that the command may \
have damaged \
stay hidden. This command shows the reason, and resumes it once the reason is gone. Exits 1 if something is \
left.

Examples:
  chainfs recover --dry-run /srv/images
  chainfs recover /srv/images
  chainfs recover /srv/images --forget 18dcf2a-1-0")]
pub struct RecoverArgs {
    /// A store, or a path in its mount
    pub store: PathBuf,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Discard this interrupted command, or a damaged frozen.toml, and show the layers it hid
    #[arg(long, value_name = "NAME")]
    pub forget: Option<OsString>,
    /// Options as for `mount -o`
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// The arguments of `trash`.
#[derive(Debug, Args)]
#[command(after_help = "\
With -o trash=DAYS, commands move a removed layer into the trash if it still shows the same disk. A layer in \
the trash \
is removed permanently after DAYS days, or when its backing file changes.

Examples:
  chainfs trash /srv/images
  chainfs trash /srv/images --restore 18dcf2a-1f
  chainfs trash /srv/images --restore 18dcf2a-1f --name monday-again.qcow2
  chainfs trash /srv/images --empty")]
pub struct TrashArgs {
    /// A store, or a path in its mount
    pub store: PathBuf,
    /// Restore this layer to its path in the store
    #[arg(long, value_name = "ID", conflicts_with_all = ["remove", "empty"])]
    pub restore: Option<String>,
    /// Restore it under this name, in the directory where it was
    #[arg(long, value_name = "FILE", requires = "restore")]
    pub name: Option<OsString>,
    /// Remove this layer permanently
    #[arg(long, value_name = "ID", conflicts_with = "empty")]
    pub remove: Option<String>,
    /// Remove all layers in the trash permanently
    #[arg(long)]
    pub empty: bool,
    /// How the list is written.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The arguments of `umount`.
#[derive(Debug, Args)]
#[command(after_help = "A mount in use stays mounted, and its users are listed, unless --lazy.")]
pub struct UmountArgs {
    /// The mount point
    pub dir: PathBuf,
    /// Detach the mount now; open files stay usable until they are closed
    #[arg(short, long)]
    pub lazy: bool,
}

/// The arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line says what was found, what it means, and the command that mends it. Nothing is changed. Marks: ok, \
note (worth knowing), warning (something works less well, or not for everybody), problem (something stops you).

Examples:
  chainfs doctor
  chainfs doctor /srv/images
  chainfs doctor --output json /mnt/images | jq '.[] | select(.mark != \"ok\")'

Exit codes: 0 nothing stops you, 1 something does, 2 usage.")]
pub struct DoctorArgs {
    /// A store, an image or a mount; without it, the machine is checked
    pub path: Option<PathBuf>,
    /// Do one part of the work, for the parent process
    #[arg(long, value_enum, hide = true)]
    pub part: Option<super::doctor::Part>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// How an image that is not mounted is opened.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Read images that another process is writing
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Options as for `mount -o`, such as `backing_dir=DIR` and `probe` (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// Formats of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text.
    Human,
    /// JSON with QEMU's keys.
    Json,
}

/// How a result is written.
#[derive(Clone, Copy, Debug, Args)]
pub struct OutputArgs {
    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    output: Output,
    /// Short for --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl OutputArgs {
    /// The format from either option.
    pub fn format(self) -> Output {
        if self.json { Output::Json } else { self.output }
    }
}

/// Ways to draw a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TreeOutput {
    /// Text.
    Human,
    /// JSON; layers are not folded.
    Json,
    /// Graphviz.
    Dot,
    /// SVG, for a browser.
    Svg,
}

/// When output is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless `NO_COLOR` is set or `TERM` is dumb.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The order of chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChainOrder {
    /// By name.
    Name,
    /// The one with the latest layer first.
    Date,
    /// The largest on disk first.
    Size,
}

/// The arguments of `tree`.
#[derive(Debug, Args)]
#[command(after_help = "\
--sizes prints each layer on its own line, with the bytes of its file, those of them that other chains need \
as well, and those that its deletion would free: what no overlay shows. Copies for several overlays can make \
that negative. \"-\" stands for layers that cannot be deleted at present.
--watch draws the tree again whenever the store changes or a job advances, until Ctrl-C. If the output is \
not a terminal, each tree that differs from the last one is printed.

Examples:
  chainfs tree /srv/images
  chainfs tree --sort size --sizes /srv/images
  chainfs tree --watch /mnt/images/web01
  chainfs tree --full web01.qcow2
  chainfs tree --output svg /srv/images > tree.svg
  chainfs tree web01.qcow2 --dry-run commit top=sn3 base=sn1")]
#[expect(clippy::struct_excessive_bools, reason = "each is an option")]
pub struct TreeArgs {
    /// A store, an image, or a path in a mount
    pub path: PathBuf,
    /// Print each layer on its own line
    #[arg(long)]
    pub full: bool,
    /// Use only ASCII characters
    #[arg(long)]
    pub ascii: bool,
    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    pub output: TreeOutput,
    /// Colour the text
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,
    /// Order of the chains; the layers of a chain are in the order of their backing files
    #[arg(long, value_enum, value_name = "BY", default_value = "name")]
    pub sort: ChainOrder,
    /// Also print what each layer shares with other chains, and what its deletion would free
    #[arg(long)]
    pub sizes: bool,
    /// Draw the tree again whenever it changes
    #[arg(long)]
    pub watch: bool,
    /// Show the chain before and after this command, written as in control files; nothing is changed
    #[arg(long, value_name = "COMMAND", num_args = 1.., allow_hyphen_values = true)]
    #[arg(conflicts_with_all = ["watch", "sizes", "sort"])]
    pub dry_run: Vec<OsString>,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `who`.
#[derive(Debug, Args)]
#[command(after_help = "\
For `Failed to get \"write\" lock`, and for commands that are refused because something is in use. Lists \
processes with the file open or locked, also through a mount, with the virtual machine that each runs; loop \
devices; and running or interrupted commands. An image means its own file, a disk in a mount the files of \
all its layers, a chain or a store everything in it. Each entry ends with a command that would let it go.

Examples:
  chainfs who web01.qcow2
  chainfs who /mnt/images/web01
  chainfs who --json /srv/images | jq -r '.users[].release'

Exit codes: 0 a process has it, 1 none, 2 error.")]
pub struct WhoArgs {
    /// A store, an image, or a path in a mount
    pub path: PathBuf,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `info`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs info web01.qcow2
  chainfs info --backing-chain --output json web01.qcow2 | jq '.[].filename'
  chainfs info /mnt/images/web01/snapshots/base.raw")]
pub struct InfoArgs {
    /// A store, an image, or a path in a mount
    pub path: PathBuf,
    /// Describe the image and all its backing files
    #[arg(long)]
    pub backing_chain: bool,
    /// The image's format, if its name and header do not say
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `map`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE@VIEW is the disk of an internal snapshot or of a backing file, as in web01.qcow2@before-upgrade.

Examples:
  chainfs map web01.qcow2
  chainfs map --output json web01.qcow2@before-upgrade")]
pub struct MapArgs {
    /// An image, IMAGE@VIEW, or a disk in a mount
    pub path: PathBuf,
    /// The image's format, if its name and header do not say
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs check web01.qcow2
  chainfs check --output json /srv/images
  chainfs check --repair leaks web01.qcow2

--repair reports the damage, repairs it, and checks again. It changes no disk and no snapshot. \
The image must not be in use.

Exit codes, as for qemu-img: 0 no damage, 1 check failed, 2 corrupt, 3 leaks, 63 checks not supported by \
this format. After a repair, the code describes the remaining damage.")]
pub struct CheckArgs {
    /// A store, an image, or a path in a mount
    pub path: PathBuf,
    /// Repair leaked clusters only, or all damage that can be repaired without guessing
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<RepairScope>,
    /// The image's format, if its name and header do not say
    #[arg(short, long, value_enum)]
    pub format: Option<ImageFormat>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// What `check --repair` repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairScope {
    /// Leaked clusters
    Leaks,
    /// Also refcounts that are too low, flags and tables
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

/// The arguments of `compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE@VIEW is the disk of an internal snapshot or of a backing file. Disks of different size are the same if \
the rest of \
the longer one is zero, unless --strict.

Examples:
  chainfs compare web01.qcow2 web02.qcow2
  chainfs compare web01.qcow2 web01.qcow2@before-upgrade
  chainfs compare -F raw web01.qcow2 copy.img

Exit codes: 0 same, 1 different, 2 error.")]
pub struct CompareArgs {
    /// An image, IMAGE@VIEW, or a disk in a mount
    pub a: PathBuf,
    /// The other image or disk
    pub b: PathBuf,
    /// The formats of the two images.
    #[command(flatten)]
    pub formats: FormatsArgs,
    /// Also report different sizes and different holes
    #[arg(short, long)]
    pub strict: bool,
    /// Print nothing; only set the exit code
    #[arg(short, long)]
    pub quiet: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs create disk.qcow2 10G
  chainfs create -b base.raw -F raw web01.qcow2
  chainfs create -o cluster_size=128K,extended_l2=on disk.qcow2 10G")]
pub struct CreateArgs {
    /// The new image; must not exist
    pub image: PathBuf,
    /// Size of the disk, e.g. 10G; by default that of the backing file
    #[arg(value_parser = size, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// The backing file
    #[arg(short, long, requires = "backing_format")]
    pub backing: Option<PathBuf>,
    /// The backing file's format
    #[arg(short = 'F', long, value_enum, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<ImageFormat>,
    /// The new image's format; only qcow2
    #[arg(short, long, value_parser = ["qcow2"], default_value = "qcow2", hide = true)]
    pub format: String,
    /// Options as for `qemu-img create -o`, such as `cluster_size=128K` (repeatable)
    #[arg(short, value_name = "OPTIONS", value_delimiter = ',', value_parser = key_value)]
    pub options: Vec<(String, String)>,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
}

/// An invalid command line, or a request for help; [`Refusal::code`] is the exit code.
#[derive(Debug)]
pub struct Refusal {
    /// Prints itself to stdout or stderr.
    pub error: clap::Error,
    /// 0 for help, 1 for `mount` and for `check` (whose 2 means "corrupt"), 2 for all other commands.
    pub code: u8,
}

/// Parses a command line that begins with the program's name.
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

/// Replaces clap's tip for an unknown option: clap suggests to put it behind `--`, which would make it a file
/// name.
fn with_right_tip(mut error: clap::Error, command: Option<&OsString>) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
    let (name, value) =
        given.split_once('=').map_or((given.as_str(), None), |(name, value)| (name, Some(value)));
    let option =
        suggestion(name.trim_start_matches('-')).filter(|_| command.is_some_and(|word| word == "mount"));
    error.remove(ContextKind::Suggested);
    if let Some(option) = option {
        let takes_value = SETTINGS.iter().any(|(known, takes)| *known == option && *takes != Takes::Nothing);
        let value =
            value.or(takes_value.then_some("...")).map(|value| format!("={value}")).unwrap_or_default();
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

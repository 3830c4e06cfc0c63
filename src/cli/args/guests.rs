//! The arguments of the commands that read guests' disks.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{FormatsArgs, ImageArgs, OutputArgs};
use crate::guest::FileKind;

/// How the images that a command reads are found and opened.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// The store that holds the images and the other disks of their volume groups
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Open encrypted volumes (LUKS) with the bytes of this file, or of standard input (-); see also -o keys=
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The arguments of `ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
Operands are written IMAGE[@VIEW]:/VOLUME/PATH. IMAGE: alone lists the volumes. VOLUME is one of these \
names, or root \
for the volume with the operating system. VIEW is an internal snapshot of the image, by name or id, or a \
view of its \
chain (base, active@monday). Paths in a mount are accepted as well: MOUNT/web01/files/sn1/p1/etc.
Nothing is mounted and nothing is written. No process may have the image open for writing, unless -U.

Examples:
  chainfs ls web01.qcow2:
  chainfs ls -l web01.qcow2:/root/etc
  chainfs ls -lR web01.qcow2@before-upgrade:/p1/home
  chainfs ls --json web01.qcow2@base:/vg-data/srv | jq '.[].entries[].name'")]
#[expect(clippy::struct_excessive_bools, reason = "each is a letter of ls")]
pub struct LsArgs {
    /// What to list
    #[arg(required = true, value_name = "IMAGE[@VIEW]:/VOLUME/PATH")]
    pub places: Vec<OsString>,
    /// Show type, mode, links, owner, group, size, time and the target of a symbolic link
    #[arg(short, long)]
    pub long: bool,
    /// Include names that begin with a dot
    #[arg(short, long)]
    pub all: bool,
    /// List subdirectories recursively
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// List directories themselves, not their entries
    #[arg(short, long, conflicts_with = "recursive")]
    pub directory: bool,
    /// Print one name per line, also on a terminal
    #[arg(short = '1')]
    pub one: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `cat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Operands are written as for `chainfs ls`. Symbolic links are followed within the volume.

Examples:
  chainfs cat web01.qcow2:/root/etc/fstab
  chainfs cat web01.qcow2@sn1:/p1/var/log/syslog | grep error")]
pub struct CatArgs {
    /// The files
    #[arg(required = true, value_name = "IMAGE[@VIEW]:/VOLUME/PATH")]
    pub places: Vec<OsString>,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sources are written as for `chainfs ls`. DEST is a directory, or the new name of a single source. A source \
that ends in \
/. means the content of that directory. Holes stay holes. Permission bits and times are kept; set-ID bits \
only by root \
with -a. With -r, symbolic links are copied as links; without -r, a link given as SOURCE is followed. cp \
never writes \
through a symbolic link below DEST. It replaces existing files. Devices, FIFOs and sockets are copied only \
with -a, and \
only by users who may create them.

Examples:
  chainfs cp web01.qcow2:/root/etc/fstab .
  chainfs cp -r web01.qcow2@before-upgrade:/p1/etc old-etc
  chainfs cp -a web01.qcow2:/p1/. /srv/rescue")]
pub struct CpArgs {
    /// What to copy
    #[arg(required = true, num_args = 1.., value_name = "IMAGE[@VIEW]:/VOLUME/PATH")]
    pub sources: Vec<OsString>,
    /// The destination
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Copy directories with their content
    #[arg(short, long, visible_short_alias = 'R')]
    pub recursive: bool,
    /// Keep all permission bits, extended attributes and, if permitted, owners
    #[arg(short, long)]
    pub preserve: bool,
    /// Like -r and -p; also copy hard links, devices, FIFOs and sockets
    #[arg(short, long)]
    pub archive: bool,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `diff`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --files: lists the ranges in which the two disks differ, and the volumes that contain them. Disks of \
different size are the same if the rest of the longer one is zero.
With --files, or if A or B is IMAGE[@VIEW]:/VOLUME[/PATH]: lists the files that were added (+), removed (-) \
or changed (~, with what changed), and those that cannot be read (!). If only one operand has a path, it \
applies to both. Data that both disks share is not read. Access times are never compared; times of \
directories and inode change times only with --all.

Examples:
  chainfs diff base.qcow2 web01.qcow2
  chainfs diff --files web01.qcow2@before-upgrade web01.qcow2
  chainfs diff web01.qcow2@sn1:/p1/etc web01.qcow2
  chainfs diff --files --json a.qcow2 b.qcow2 | jq '.changes[].path'

Exit codes: 0 same, 1 different, 2 error.")]
pub struct DiffArgs {
    /// An image or IMAGE@VIEW, optionally followed by :/VOLUME/PATH, or a path in a mount
    pub a: OsString,
    /// The other operand
    pub b: OsString,
    /// Compare the files of the guests
    #[arg(long)]
    pub files: bool,
    /// Also compare times of directories and inode change times
    #[arg(long)]
    pub all: bool,
    /// The formats of the two images.
    #[command(flatten)]
    pub formats: FormatsArgs,
    /// Print nothing; only set the exit code
    #[arg(short, long)]
    pub quiet: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `versions`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE is any layer. All views of its chains are searched, internal snapshots as well, from the base upwards. \
The store \
with these chains is --store, or the nearest directory above that holds .chainfs, or else the image's own \
directory. Views \
in which the file has the same content, owner, permissions, attributes and time are one version. A symbolic \
link at the \
end of the path is not followed.

Examples:
  chainfs versions web01.qcow2:/root/etc/passwd
  chainfs versions /mnt/images/web01/files/sn1/p1/etc/hostname
  chainfs versions --json web01.qcow2:/p1/etc/hosts | jq '.versions[].views'")]
pub struct VersionsArgs {
    /// The file
    #[arg(value_name = "IMAGE:/VOLUME/PATH")]
    pub place: OsString,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `log`.
#[derive(Debug, Args)]
#[command(after_help = "\
The views of one chain are gone through, from IMAGE or VIEW down to the base, internal snapshots as well. \
Each version that differs from the one before it is shown, newest first: the views that have it, the date of \
the first of these, the file as in ls -l, and what changed. What counts as a change is as for `chainfs \
versions`, which lists the versions of all chains that have IMAGE. Files of more than 4 MiB and binary files \
are not compared line by line. The output of -p is one for patch(1), unless it is a terminal, where what \
that would interpret is escaped.

Examples:
  chainfs log web01.qcow2:/root/etc/passwd
  chainfs log -p web01.qcow2@monday:/root/etc/fstab
  chainfs log -n 1 /mnt/images/web01/files/active/root/etc/hosts")]
pub struct LogArgs {
    /// The file
    #[arg(value_name = "IMAGE[@VIEW]:/VOLUME/PATH")]
    pub place: OsString,
    /// Show the difference to the version before, as diff -u does
    #[arg(short, long)]
    pub patch: bool,
    /// Show at most this many versions
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub max_count: Option<usize>,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The arguments of `find`.
#[derive(Debug, Args)]
#[command(after_help = "\
NAME is a pattern with *, ? and [...], as for find -name. With a slash it is matched with the whole path, \
which begins with the volume, and * matches slashes, too, as for find -path: \"*/etc/*.conf\". A store means \
all views of all its chains; an image its own chain, from itself down to the base; IMAGE@VIEW that disk.
Prints a line for each version: chain, the views that have it (first..last), path, size and time of last \
change. Neighbouring views whose files have the same content, owner, permissions, attributes and time are \
one version, as for `chainfs versions`. Views that several chains share are searched once, with the first of \
these chains. What cannot be read is said on stderr.

Examples:
  chainfs find fstab /srv/images
  chainfs find '*/etc/ssh/*_key' web01.qcow2
  chainfs find -t f '*.conf' web01.qcow2@monday
  chainfs find -0 fstab /srv/images | xargs -0 chainfs cat

Exit codes, as for find: 0 everything was searched, found or not; 1 something could not be read; 2 usage.")]
pub struct FindArgs {
    /// A name, or a pattern of names; with a slash, of whole paths
    pub name: OsString,
    /// A store, an image, IMAGE@VIEW, or a path in a mount
    #[arg(value_name = "STORE")]
    pub place: OsString,
    /// Do not distinguish upper and lower case
    #[arg(short, long)]
    pub ignore_case: bool,
    /// Only files of this type
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    pub kind: Option<FindKind>,
    /// Print only what cat, cp and ls take (IMAGE@VIEW:/PATH, in the last view that has it), each followed by
    /// a NUL
    #[arg(short = '0', long, conflicts_with_all = ["output", "json"])]
    pub print0: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The types of files, by the letters of find(1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FindKind {
    /// Regular files
    #[value(name = "f")]
    File,
    /// Directories
    #[value(name = "d")]
    Directory,
    /// Symbolic links
    #[value(name = "l")]
    Symlink,
    /// Character devices
    #[value(name = "c")]
    CharDevice,
    /// Block devices
    #[value(name = "b")]
    BlockDevice,
    /// FIFOs
    #[value(name = "p")]
    Fifo,
    /// Sockets
    #[value(name = "s")]
    Socket,
}

impl From<FindKind> for FileKind {
    fn from(kind: FindKind) -> Self {
        match kind {
            FindKind::File => Self::File,
            FindKind::Directory => Self::Directory,
            FindKind::Symlink => Self::Symlink,
            FindKind::CharDevice => Self::CharDevice,
            FindKind::BlockDevice => Self::BlockDevice,
            FindKind::Fifo => Self::Fifo,
            FindKind::Socket => Self::Socket,
        }
    }
}

/// The arguments of `try`.
#[derive(Debug, Args)]
#[command(after_help = "\
Makes an overlay (qcow2, mode 0600) in a directory of its own, backed by the view, and prints the QEMU line \
that boots it. The store is only read: what the machine writes goes to the overlay. With --run the line is \
run, and the overlay is removed when the machine ends; without it, the overlay is removed when this command \
is ended (Ctrl-C). The view is held open meanwhile. If the store is not mounted, the image is mounted for \
this command, read-only. The active disk of a mount may change, so it is not tried: take a snapshot of it first.
The machine has no network, 2 GiB of memory and a virtio disk. Words after -- are passed to QEMU and \
replace these: -nic, -m, -accel. A disk with an EFI system partition and no boot code gets UEFI firmware (OVMF), if \
that is installed.

Examples:
  chainfs try --run web01.qcow2@monday
  chainfs try --run web01.qcow2@before-upgrade -- -nic user -m 4G
  chainfs try --run /mnt/images/web01/snapshots/monday.raw -- -nographic
  chainfs try --dir /var/tmp web01.qcow2@monday")]
pub struct TryArgs {
    /// An image, IMAGE@VIEW, or a snapshot in a mount
    #[arg(value_name = "VIEW")]
    pub view: OsString,
    /// Run the machine, and remove the overlay when it ends
    #[arg(short, long)]
    pub run: bool,
    /// Where the overlay is made; by default in $TMPDIR or /tmp
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// QEMU's program; by default that of this machine's kind, such as qemu-system-x86_64
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<OsString>,
    /// How the guest sees its disk: virtio, ide, scsi
    #[arg(long, value_name = "IF", default_value = "virtio", value_parser = ["virtio", "ide", "scsi"])]
    pub interface: String,
    /// How the machine boots
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto")]
    pub boot: Boot,
    /// Options as for `mount -o` (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Words for QEMU
    #[arg(last = true, value_name = "WORD")]
    pub words: Vec<OsString>,
}

/// How a machine boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// By UEFI if the disk has an EFI system partition and no boot code, else by BIOS.
    Auto,
    /// By BIOS.
    Bios,
    /// By UEFI.
    Uefi,
}

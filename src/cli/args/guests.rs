//! The arguments of the commands that read guests' disks.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{FormatsArgs, ImageArgs, OutputArgs};

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

//! The words of the commands that look into guests' disks.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{FormatsArgs, ImageArgs, OutputArgs};

/// How the images that are looked into are found and opened.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// The store that the images belong to, where other disks of their volume groups are
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// How images are opened.
    #[command(flatten)]
    pub image: ImageArgs,
}

/// The words of `ls`.
#[derive(Debug, Args)]
#[command(after_help = "\
What is listed is IMAGE[@VIEW]:/VOLUME/PATH. IMAGE: alone lists the volumes; VOLUME is one of these names, or root for the \
one that holds the operating system. VIEW is an internal snapshot of the image, by name or id, or a view of its chain \
(base, active@monday). A place in a mount will do as well: MOUNT/web01/files/sn1/p1/etc.
Nothing is mounted and nothing is written; the image must not be in use for writing, unless -U.

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
    /// Type, mode, links, owner, group, size, time and a link's target as well
    #[arg(short, long)]
    pub long: bool,
    /// Names that begin with a dot as well
    #[arg(short, long)]
    pub all: bool,
    /// All directories below as well
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Directories themselves, not what is in them
    #[arg(short, long, conflicts_with = "recursive")]
    pub directory: bool,
    /// One name in each line, also on a terminal
    #[arg(short = '1')]
    pub one: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The words of `cat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Places are written as for `chainfs ls`. Links are followed within the volume.

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

/// The words of `cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sources are written as for `chainfs ls`; DEST is a directory, or the name that the one source is to get. A source that ends in \
/. stands for what is in it. Holes stay holes. Permission bits and times are kept; set-ID bits only by root with -a. Links are \
copied as links with -r, and followed where they are named without. Nothing is ever written through a symbolic link below \
DEST; files that are there are replaced. Devices, FIFOs and sockets are copied only with -a, by who may make them.

Examples:
  chainfs cp web01.qcow2:/root/etc/fstab .
  chainfs cp -r web01.qcow2@before-upgrade:/p1/etc old-etc
  chainfs cp -a web01.qcow2:/p1/. /srv/rescue")]
pub struct CpArgs {
    /// What to copy
    #[arg(required = true, num_args = 1.., value_name = "IMAGE[@VIEW]:/VOLUME/PATH")]
    pub sources: Vec<OsString>,
    /// Where to
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Directories with all that is in them
    #[arg(short, long, visible_short_alias = 'R')]
    pub recursive: bool,
    /// Keep all permission bits, extended attributes and, where it is allowed, owners
    #[arg(short, long)]
    pub preserve: bool,
    /// As -r and -p; hard links, devices, FIFOs and sockets as well
    #[arg(short, long)]
    pub archive: bool,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The words of `diff`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --files: the ranges of the two disks that differ, and the volumes that these lie in. A longer disk is the same if its rest \
is zero.
With --files, or where A or B is IMAGE[@VIEW]:/VOLUME[/PATH]: the files that were added (+), removed (-) or changed (~, and what of \
them), and those that cannot be read (!). Where only one has a path, the other's is the same. What the disks share is not read. \
Times of last access never count; times of directories, and times of last change of the inode, only with --all.

Examples:
  chainfs diff base.qcow2 web01.qcow2
  chainfs diff --files web01.qcow2@before-upgrade web01.qcow2
  chainfs diff web01.qcow2@sn1:/p1/etc web01.qcow2
  chainfs diff --files --json a.qcow2 b.qcow2 | jq '.changes[].path'

Exit codes: 0 same, 1 different, 2 trouble.")]
pub struct DiffArgs {
    /// An image, IMAGE@VIEW, either with :/VOLUME/PATH behind it, or a place inside a mount
    pub a: OsString,
    /// Another
    pub b: OsString,
    /// Compare the files of the guests
    #[arg(long)]
    pub files: bool,
    /// Times of directories and of inodes count, too
    #[arg(long)]
    pub all: bool,
    /// What the two are.
    #[command(flatten)]
    pub formats: FormatsArgs,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    pub quiet: bool,
    /// How the result is written.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How images are found.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The words of `versions`.
#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE is any layer: all views of the chains that it is part of are looked at, from the base upwards, internal snapshots as well. \
These are the chains of its store: --store, or the marked directory above, or else the image's own directory. Views that show the same content, owner, permissions, attributes and time of the file are one version. A symbolic link \
at the end of the path is itself what is looked for.

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

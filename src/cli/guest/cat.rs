//! `chainfs cat`: prints guests' files.

use std::ffi::OsStr;
use std::io::{self, Write};

use super::super::args::CatArgs;
use super::images::OpenStores;
use super::{OpenedPath, about, complain, open};
use crate::browse::content::OpenContent;
use crate::browse::walk::FinalSymlink;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileKind, RunKind};
use crate::report::files::kind;
use crate::units::Run;

/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// Why printing stopped.
enum Stopped {
    /// The reader has closed the pipe, as `| head` does.
    Closed,
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs the command.
pub(in crate::cli) fn run(args: &CatArgs) -> Result<u8> {
    let mut images = OpenStores::new(&args.look, &[])?;
    let mut failed = false;
    for word in &args.places {
        match print(&mut images, word) {
            Ok(()) => {}
            Err(Stopped::Closed) => break,
            Err(Stopped::Failed(error)) => complain(&mut failed, &about(word, error)),
        }
    }
    let is_stale = images.warn_stale();
    Ok(u8::from(failed || is_stale))
}

fn print(images: &mut OpenStores, word: &OsStr) -> std::result::Result<(), Stopped> {
    let OpenedPath { tree, path, .. } = open(images, word)?;
    let file = tree.resolve(&path, FinalSymlink::Followed)?;
    if file.attributes.kind != FileKind::File {
        let fact = format!("not a regular file but a {}", kind(file.attributes.kind));
        return Err(Error::new(ErrorKind::Unsupported, fact).into());
    }
    let content = OpenContent::new(&tree, &file);
    let mut out = io::stdout().lock();
    let (mut buf, zeroes) = (vec![0; STEP], vec![0; STEP]);
    let mut at = 0;
    while at < file.attributes.size {
        let Run { value: kind, len } = content.run(at)?;
        let len = len.min(STEP as u64) as usize;
        let bytes = if kind == RunKind::Hole {
            &zeroes[..len]
        } else {
            content.read_at(at, &mut buf[..len])?;
            &buf[..len]
        };
        out.write_all(bytes).map_err(closed)?;
        at += len as u64;
    }
    out.flush().map_err(closed)
}

fn closed(error: io::Error) -> Stopped {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Stopped::Closed
    } else {
        Stopped::Failed(Error::io("writing the result", error))
    }
}

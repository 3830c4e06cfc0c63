//! Helpers of the tests of volumes.

pub(crate) mod arrays;
mod content;
mod damage;
mod groups;
pub(crate) mod kernel;
mod persistent;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::volumes::{Volume, VolumeLayout, layout};

use support::*;

/// A disk in a file.
pub(crate) fn blank(path: &Path, size: u64) {
    fs::File::create(path).and_then(|file| file.set_len(size)).expect("a disk");
}

/// The content of a file, as a disk for the parsers.
pub(crate) fn disk(path: &Path) -> Arc<dyn Source> {
    Arc::new(fs::read(path).expect("the disk"))
}

/// The layout of a single disk.
pub(crate) fn layout_of(path: &Path) -> VolumeLayout {
    layout(&[disk(path)])
}

pub(crate) fn names(layout: &VolumeLayout) -> Vec<&str> {
    layout.volumes.iter().map(|volume| volume.name.as_str()).collect()
}

pub(crate) fn volume<'a>(layout: &'a VolumeLayout, name: &str) -> &'a Volume {
    let found = layout.volumes.iter().find(|volume| volume.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", names(layout)))
}

/// Runs a program that reads its orders.
pub(crate) fn told(program: &str, args: &[&str], device: &Path, orders: &str) {
    use std::io::Write as _;
    let mut command = tool(program);
    command.args(args).arg(device).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    child.stdin.take().expect("a pipe").write_all(orders.as_bytes()).expect("its orders");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file as a block device, until this is dropped.
pub(crate) struct Loop(PathBuf);

impl Loop {
    pub(crate) fn new(file: &Path, sector_len: u32) -> Self {
        let mut command = tool("losetup");
        command.args(["--find", "--show", "--sector-size", &sector_len.to_string()]).arg(file);
        Self(PathBuf::from(command.succeeds().trim()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It is detached when its last opener closes it.
        let _ = tool("losetup").arg("--detach").arg(&self.0).status();
    }
}

//! mount.chainfs: what mount(8) calls for `mount -t chainfs STORE DIR` and for lines of fstab.
//!
//! Translates mount(8)'s words into those of `chainfs mount` and becomes that program; nothing else
//! is decided here, least of all what an option means. Installed as `/sbin/mount.chainfs` and, for
//! the type that mounts are listed under, `/sbin/mount.fuse.chainfs`. Exit codes are mount(8)'s:
//! 0 mounted, 1 usage, 32 failed.

// Names are shown as Debug shows them: with what a terminal would obey escaped.
#![allow(clippy::unnecessary_debug_formatting)]

mod translate;

use std::env;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use translate::{Action, USAGE, translate};

const USAGE_ERROR: u8 = 1;
const MOUNT_FAILED: u8 = 32;
const PROGRAM: &str = "chainfs";

fn main() -> ExitCode {
    match translate(env::args_os().skip(1)) {
        Ok(Action::Nothing) => ExitCode::SUCCESS,
        Ok(Action::Version) => {
            println!("mount.chainfs {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Action::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Action::Mount { words, verbose }) => {
            let Some(program) = program() else {
                return refuse("chainfs: not found beside mount.chainfs nor on PATH; install it", MOUNT_FAILED);
            };
            if verbose {
                eprintln!("mount.chainfs: {program:?} {words:?}");
            }
            let error = Command::new(&program).args(words).exec();
            refuse(&format!("{program:?}: {error}"), MOUNT_FAILED)
        }
        Err(sentence) => refuse(&format!("{sentence}\n{USAGE}"), USAGE_ERROR),
    }
}

fn refuse(sentence: &str, code: u8) -> ExitCode {
    eprintln!("mount.chainfs: {sentence}");
    ExitCode::from(code)
}

/// Beside this program (not beside the link it was called by), on PATH, or where local installs go.
/// At boot PATH may be nearly empty.
fn program() -> Option<PathBuf> {
    let beside = env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    let path = env::var_os("PATH").unwrap_or_default();
    let listed: Vec<PathBuf> = env::split_paths(&path).collect();
    let usual = ["/usr/local/bin", "/usr/bin"].map(PathBuf::from);
    let places = beside.into_iter().chain(listed).chain(usual);
    // A relative place would run whatever lies in the current directory.
    places.filter(|dir| dir.is_absolute()).map(|dir| dir.join(PROGRAM)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

//! mount.chainfs: the helper that mount(8) runs for `mount -t chainfs STORE DIR` and for fstab entries.
//!
//! Translates mount(8)'s arguments into those of `chainfs mount` and executes that program. The helper does
//! not interpret mount options. Installed as `/sbin/mount.chainfs` and, for the type in the list of mounts,
//! as `/sbin/mount.fuse.chainfs`. Exit codes are those of mount(8): 0 mounted, 1 usage, 32 failed.

// Names are printed with Debug, which escapes control characters.
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
                return refuse(
                    "chainfs: not found beside mount.chainfs nor on PATH; install it",
                    MOUNT_FAILED,
                );
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

/// Finds chainfs in the directory of this program (links resolved), on PATH, or in the default directories:
/// PATH may be nearly empty at boot.
fn program() -> Option<PathBuf> {
    let beside = env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    let path = env::var_os("PATH").unwrap_or_default();
    let listed: Vec<PathBuf> = env::split_paths(&path).collect();
    let usual = ["/usr/local/bin", "/usr/bin"].map(PathBuf::from);
    let places = beside.into_iter().chain(listed).chain(usual);
    // A relative directory would run a program from the current directory.
    places.filter(|dir| dir.is_absolute()).map(|dir| dir.join(PROGRAM)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

//! Finds the users of a busy mount, and the namespaces in which an unmounted one lives on.
//!
//! Only for messages: the answer may be outdated, and lacks processes of other users.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::lock_holders::{LockHolder, OwnProcess, others, processes};
use super::mounts;

/// Other processes with an open or mapped file, a current or root directory, or their program beneath
/// `directory`.
pub fn users_of(directory: &Path) -> Vec<LockHolder> {
    let beneath = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(directory));
    others(|process| {
        if beneath(&process.join("cwd")) || beneath(&process.join("root")) || beneath(&process.join("exe")) {
            return true;
        }
        let maps = || {
            fs::read_dir(process.join("map_files"))
                .is_ok_and(|mut all| all.any(|m| m.is_ok_and(|m| beneath(&m.path()))))
        };
        let open = fs::read_dir(process.join("fd"))
            .is_ok_and(|mut all| all.any(|fd| fd.is_ok_and(|fd| beneath(&fd.path()))));
        open || maps()
    })
}

/// All loop devices in use, each with its file.
pub fn loop_devices() -> Vec<(String, PathBuf)> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let file = |device: fs::DirEntry| {
        let file = fs::read(device.path().join("loop/backing_file")).ok()?;
        let file = PathBuf::from(OsStr::from_bytes(file.trim_ascii_end()));
        Some((format!("/dev/{}", device.file_name().to_string_lossy()), file))
    };
    devices.filter_map(file).collect()
}

/// Other users of a mount at `directory`: loop devices, mounts on it, and with `with_own` this process'
/// current directory.
pub fn other_users_of(directory: &Path, own: OwnProcess) -> Vec<String> {
    let mut users = Vec::new();
    if own == OwnProcess::Included
        && fs::read_link("/proc/self/cwd").is_ok_and(|place| place.starts_with(directory))
    {
        users.push("this command, which has its current directory there".to_owned());
    }
    for (device, file) in loop_devices() {
        if file.starts_with(directory) {
            users.push(format!("{device} (detach it: losetup -d {device})"));
        }
    }
    let places = mounts().unwrap_or_default().into_iter().map(|mount| mount.directory);
    let beneath = places.filter(|place| place != directory && place.starts_with(directory));
    users.extend(beneath.map(|place| format!("a mount on {}", place.display())));
    users
}

/// One process of each other mount namespace in which the device is still mounted.
pub fn namespaces_with(device: (u32, u32)) -> Vec<LockHolder> {
    let mut seen: Vec<PathBuf> = fs::read_link("/proc/self/ns/mnt").into_iter().collect();
    let wanted = format!("{}:{}", device.0, device.1);
    let mut found = Vec::new();
    for (pid, process) in processes(OwnProcess::Excluded) {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let text = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        if text.lines().any(|line| line.split(' ').nth(2) == Some(&wanted)) {
            found.push(LockHolder::of(pid, &process));
        }
    }
    found
}

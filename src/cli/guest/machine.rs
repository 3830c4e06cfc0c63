//! The QEMU line that boots a disk.
//!
//! The machine has no network: a copy of a server that talks to the world as that server does harm. Words of
//! the user replace the defaults that they are about.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::shell_word;

/// Memory of the machine, in MiB.
const MEMORY: &str = "2048";

/// A machine that boots a disk.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    /// QEMU's program.
    pub(super) program: &'a OsStr,
    /// The disk, in qcow2.
    pub(super) disk: &'a Path,
    /// How the guest sees the disk, as in `if=`.
    pub(super) interface: &'a str,
    /// UEFI firmware, and the file of its variables.
    pub(super) firmware: Option<(&'a Path, &'a Path)>,
    /// Further words of the user.
    pub(super) words: &'a [OsString],
}

impl Machine<'_> {
    /// The words of the command.
    pub(super) fn command(&self) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec![self.program.to_owned()];
        let mut add = |words: &[&str]| all.extend(words.iter().map(OsString::from));
        if !self.has(&["-accel", "-enable-kvm", "--accel", "--enable-kvm"]) {
            // The first one that works.
            add(&["-accel", "kvm", "-accel", "tcg"]);
        }
        if !self.has(&["-M", "-machine", "--machine"]) && cfg!(target_arch = "aarch64") {
            add(&["-machine", "virt"]);
        }
        if !self.has(&["-m", "--m"]) {
            add(&["-m", MEMORY]);
        }
        if !self.has(&["-nic", "-net", "-netdev", "--nic", "--net", "--netdev"]) {
            add(&["-nic", "none"]);
        }
        if let Some((code, variables)) = self.firmware {
            all.extend(["-drive".into(), option(code, "if=pflash,format=raw,unit=0,readonly=on")]);
            all.extend(["-drive".into(), option(variables, "if=pflash,format=raw,unit=1")]);
        }
        let drive = format!("format=qcow2,if={},cache=unsafe,discard=unmap", self.interface);
        all.extend(["-drive".into(), option(self.disk, &drive)]);
        all.extend(self.words.iter().cloned());
        all
    }

    fn has(&self, names: &[&str]) -> bool {
        self.words.iter().any(|word| names.iter().any(|name| word == name))
    }
}

/// `file=PATH,KEYS`; a comma in the path is doubled.
fn option(path: &Path, keys: &str) -> OsString {
    let mut option = b"file=".to_vec();
    for byte in path.as_os_str().as_bytes() {
        option.extend(if *byte == b',' { &b",,"[..] } else { std::slice::from_ref(byte) });
    }
    option.extend(format!(",{keys}").into_bytes());
    OsString::from_vec(option)
}

/// The words as a line for a shell.
pub(super) fn line(words: &[OsString]) -> String {
    let words = words.iter().map(|word| shell_word(&String::from_utf8_lossy(word.as_bytes())));
    words.collect::<Vec<_>>().join(" ")
}

/// Where distributions keep UEFI firmware, and the variables that it starts with.
const FIRMWARE: &[(&str, &str)] = if cfg!(target_arch = "aarch64") {
    &[
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
    ]
} else {
    &[
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    ]
};

/// The UEFI firmware of this machine, and the variables that it starts with.
pub(super) fn firmware() -> Option<(PathBuf, PathBuf)> {
    let found = FIRMWARE.iter().find(|(code, vars)| Path::new(code).is_file() && Path::new(vars).is_file());
    found.map(|(code, vars)| (PathBuf::from(code), PathBuf::from(vars)))
}

/// The file that a program's name means, as for a shell.
pub(super) fn find_program(name: &OsStr) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if name.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(name)).filter(|path| is_program(path));
    }
    let path = super::super::store_options::variable("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| is_program(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(disk: &str, firmware: bool, words: &[&str]) -> String {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let firmware = firmware.then_some((Path::new("/code"), Path::new("/vars")));
        let machine = Machine {
            program: OsStr::new("qemu"),
            disk: Path::new(disk),
            interface: "virtio",
            firmware,
            words: &words,
        };
        line(&machine.command())
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn words_of_the_user_replace_defaults() {
        let drive = "-drive file=/t/o,format=qcow2,if=virtio,cache=unsafe,discard=unmap";
        let all = format!("qemu -accel kvm -accel tcg -m 2048 -nic none {drive}");
        assert_eq!(shown("/t/o", false, &[]), all);
        let own = ["-nic", "user", "-m", "1G", "-accel", "tcg"];
        assert_eq!(shown("/t/o", false, &own), format!("qemu {drive} -nic user -m 1G -accel tcg"));
        let flash = "-drive file=/code,if=pflash,format=raw,unit=0,readonly=on \
            -drive file=/vars,if=pflash,format=raw,unit=1 -drive";
        assert!(shown("/t/o", true, &[]).contains(flash), "{}", shown("/t/o", true, &[]));
    }

    #[test]
    fn commas_and_spaces_of_a_path_stay_in_it() {
        assert!(
            shown("/t/a,b c", false, &[]).contains("'file=/t/a,,b c,"),
            "{}",
            shown("/t/a,b c", false, &[])
        );
    }
}

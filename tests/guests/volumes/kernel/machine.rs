//! A virtual machine with a distribution's kernel and its md and device-mapper modules: it makes arrays and
//! logical volumes with their own tools, and says which bytes it reads from them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use support::cpio::Archive;
use support::*;
use tempfile::TempDir;

/// Emulation is slow, and so is a machine with much to do.
const LIMIT: Duration = Duration::from_mins(15);

/// The files of the machine's first file system, and their names.
#[derive(Default)]
struct FirstFiles(Archive, BTreeSet<PathBuf>);

impl FirstFiles {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.0.add(name, mode, content);
    }

    /// A file of this machine at the same path, and the directories above it.
    fn add_file(&mut self, path: &Path, name: &str) {
        let mut above: Vec<&Path> = Path::new(name).ancestors().skip(1).collect();
        above.reverse();
        for dir in above.into_iter().filter(|dir| !dir.as_os_str().is_empty()) {
            if self.1.insert(dir.to_owned()) {
                self.add(&dir.display().to_string(), 0o040_755, b"");
            }
        }
        if self.1.insert(PathBuf::from(name)) {
            let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            self.add(name, 0o100_755, &bytes);
        }
    }

    /// A program of this machine with its libraries.
    fn add_program(&mut self, program: &str) {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        let path = places.iter().map(|dir| Path::new(dir).join(program)).find(|path| path.exists());
        let path = path.unwrap_or_else(|| panic!("{program} is missing; run tests/setup.sh"));
        self.add_file(&path, &format!("bin/{program}"));
        let (_, listed, _) = tool("ldd").arg(&path).outcome();
        for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            self.add_file(Path::new(library), library.trim_start_matches('/'));
        }
    }
}

/// The kernel's modules, each after those that it needs.
struct Modules {
    files: Vec<PathBuf>,
    order: Vec<PathBuf>,
}

impl Modules {
    fn new(dir: &Path) -> Self {
        let mut modules = Self { files: Vec::new(), order: Vec::new() };
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            let entries =
                fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}; run tests/setup.sh", dir.display()));
            for entry in entries.map(|entry| entry.expect("an entry").path()) {
                if entry.is_dir() && !entry.is_symlink() {
                    dirs.push(entry);
                } else if entry.extension().is_some_and(|ext| ext == "ko") {
                    modules.files.push(entry);
                }
            }
        }
        modules
    }

    /// Adds a module; one that is not there is part of the kernel.
    fn add(&mut self, name: &str) {
        let is_it = |path: &&PathBuf| {
            path.file_stem()
                .is_some_and(|stem| stem.to_string_lossy().replace('-', "_") == name.replace('-', "_"))
        };
        let Some(path) = self.files.iter().find(is_it).cloned() else { return };
        if self.order.contains(&path) {
            return;
        }
        let bytes = fs::read(&path).expect("a module");
        let key = b"\0depends=";
        let at = bytes
            .windows(key.len())
            .position(|window| window == key)
            .map_or(bytes.len(), |at| at + key.len());
        let needs: Vec<u8> = bytes[at..].iter().copied().take_while(|byte| *byte != 0).collect();
        for needed in String::from_utf8_lossy(&needs).split(',').filter(|name| !name.is_empty()) {
            self.add(needed);
        }
        self.order.push(path);
    }
}

/// Runs a shell script in a virtual machine with these disks (`/dev/vda` and so on), until it ends. Returns
/// what it printed.
pub(super) fn run(
    dir: &TempDir,
    disks: &[PathBuf],
    programs: &[&str],
    modules: &[&str],
    script: &str,
) -> String {
    converse(dir, (disks, "unsafe"), programs, modules, script, &mut |_| None)
}

/// The same with disks that QEMU caches in this way. `answer` gets each line that the script prints, and may
/// return a line that the script reads.
pub(crate) fn converse(
    dir: &TempDir,
    (disks, cache): (&[PathBuf], &str),
    programs: &[&str],
    modules: &[&str],
    script: &str,
    answer: &mut dyn FnMut(&str) -> Option<&'static str>,
) -> String {
    let kernel = project().join("target/tools/kernel");
    let mut found = Modules::new(&kernel.join("lib/modules"));
    let always = ["virtio_pci", "virtio_blk", "crc32c_generic", "crc32c-intel"];
    always.iter().chain(modules).for_each(|module| found.add(module));
    let mut archive = FirstFiles::default();
    archive.add_program("busybox");
    for program in programs {
        archive.add_program(program);
    }
    let mut init = String::from(
        "#!/bin/busybox sh\n\
         /bin/busybox mkdir -p /proc /sys /dev /run /tmp /etc /var /sbin /usr\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin LD_LIBRARY_PATH=/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         ln -s /bin/busybox /sbin/modprobe 2>/dev/null; hostname guest\n",
    );
    for path in &found.order {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        archive.add_file(path, &format!("modules/{name}"));
        let _ = writeln!(init, "insmod /modules/{name}");
    }
    let _ = writeln!(init, ". /script 2>&1\necho 'the script has ended'\nsync\npoweroff -f");
    archive.add("script", 0o100_644, script.as_bytes());
    archive.add("init", 0o100_755, init.as_bytes());
    let initramfs = dir.path().join("initramfs");
    fs::write(&initramfs, archive.0.finish()).expect("room");
    let boot = fs::read_dir(kernel.join("boot")).expect("a kernel; run tests/setup.sh");
    let vmlinuz = boot
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .expect("a kernel; run tests/setup.sh");
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-m",
        "768",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
    ]);
    command.arg("-kernel").arg(vmlinuz).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on raid=noautodetect"]);
    for disk in disks {
        command.arg("-drive").arg(format!("format=raw,if=virtio,cache={cache},file={}", disk.display()));
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|e| panic!("qemu-system-x86_64: {e}; run tests/setup.sh"));
    let mut input = child.stdin.take().expect("a pipe");
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    let (tell, lines) = channel();
    thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            if tell.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let ends = Instant::now() + LIMIT;
    let mut said = String::new();
    while let Ok(line) = lines.recv_timeout(ends.saturating_duration_since(Instant::now())) {
        println!("{line}");
        if let Some(answer) = answer(&line) {
            writeln!(input, "{answer}").expect("the machine runs");
        }
        said.push_str(&line);
        said.push('\n');
    }
    let _ = child.kill();
    let _ = child.wait();
    assert!(said.contains("the script has ended"), "{said}");
    said
}

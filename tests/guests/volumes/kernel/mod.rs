//! Arrays and logical volumes as the kernel's own md and device-mapper make them, in a virtual machine. Their
//! bytes, as that kernel read them, are compared with what is assembled here: of all members, and of as many
//! as the level allows.
//!
//! Every scenario has a partition of each disk for itself.

mod luks;
mod lvm;
pub(crate) mod machine;
mod md;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::volumes::{Assembly, assemble};
use tempfile::TempDir;

use lvm::BEFORE;

use super::{blank, told};
use support::*;

/// Disks of the machine, without the one with the pattern.
const DISKS: usize = 6;

/// A scenario: its name, and a script with its partitions as `$P0` to `$P5`, which calls `judge NAME DEVICE`.
struct Scenario {
    name: String,
    script: String,
}

/// Whether a scenario belongs to this run: all do in long runs, and these in others. The machine is emulated,
/// so that each takes seconds.
fn is_wanted(name: &str, usual: &[&str]) -> bool {
    std::env::var_os("CHAINFS_LONG").is_some() || usual.contains(&name)
}

/// The disks after all scenarios, and the kernel's sum of each device.
struct Judged {
    /// Of each scenario, its partitions.
    parts: BTreeMap<String, Vec<Vec<u8>>>,
    /// By scenario and device.
    sums: BTreeMap<String, Vec<(String, String, u64)>>,
}

/// Runs scenarios in one machine. `sizes`: bytes of the partitions of each disk.
fn judge(
    scenarios: &[Scenario],
    sizes: [u64; DISKS],
    programs: &[&str],
    modules: &[&str],
    before: &str,
) -> Judged {
    let dir = TempDir::new().expect("a directory");
    let mut disks: Vec<PathBuf> = Vec::new();
    for (number, size) in sizes.iter().enumerate() {
        let path = dir.path().join(format!("disk{number}"));
        blank(&path, 2 * MIB + size * scenarios.len() as u64);
        let orders = format!("label: gpt\ntable-length: {}\n", scenarios.len().max(128));
        let parts = format!("size={}K\n", size / KIB).repeat(scenarios.len());
        told("sfdisk", &["-q", "--no-tell-kernel"], &path, &(orders + &parts));
        disks.push(path);
    }
    let pattern = dir.path().join("pattern");
    fs::write(&pattern, Rng::new(7).bytes(64 * MIB)).expect("a pattern");
    let mut script = format!(
        "judge() {{ echo \"JUDGED $scenario $1 $(md5sum <$2 | cut -c1-32) $(blockdev --getsize64 $2)\"; }}\n\
         try() {{ \"$@\" >/tmp/out 2>&1 || {{ echo \"FAILED $scenario: $*\"; cat /tmp/out; }}; }}\n\
         fill() {{ [ -b $1 ] && dd if=/dev/vdg of=$1 bs=64k skip=${{2:-0}} 2>/dev/null; sync; }}\n\
         {before}\n"
    );
    for (number, scenario) in scenarios.iter().enumerate() {
        let parts =
            (0..DISKS).map(|disk| format!("P{disk}=/dev/vd{}{}", (b'a' + disk as u8) as char, number + 1));
        let parts: Vec<String> = parts.collect();
        let Scenario { name, script: own } = scenario;
        let _ = writeln!(script, "scenario={name}\n{}\n{own}", parts.join("; "));
    }
    let mut all = disks.clone();
    all.push(pattern);
    let said = machine::run(&dir, &all, programs, modules, &script);
    assert!(!said.contains("FAILED"), "{said}");
    let mut judged = Judged { parts: BTreeMap::new(), sums: BTreeMap::new() };
    for line in said.lines().filter_map(|line| line.strip_prefix("JUDGED ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [scenario, device, sum, size] = words[..] else { panic!("{line}") };
        let size = size.parse().expect("a size");
        judged.sums.entry(scenario.to_owned()).or_default().push((device.to_owned(), sum.to_owned(), size));
    }
    let files: Vec<File> = disks.iter().map(|disk| File::open(disk).expect("a disk")).collect();
    for (number, scenario) in scenarios.iter().enumerate() {
        assert!(judged.sums.contains_key(&scenario.name), "{}: {said}", scenario.name);
        let part = |(file, size): (&File, &u64)| {
            let mut bytes = vec![0; *size as usize];
            file.read_exact_at(&mut bytes, MIB + size * number as u64).expect("a partition");
            bytes
        };
        judged.parts.insert(scenario.name.clone(), files.iter().zip(&sizes).map(part).collect());
    }
    judged
}

/// Disks as sources.
fn sources(parts: &[Vec<u8>]) -> Vec<Arc<dyn Source>> {
    parts.iter().map(|bytes| Arc::new(bytes.clone()) as Arc<dyn Source>).collect()
}

/// The bytes of a volume as its source gives them, which must be those that its segments lead to.
fn bytes_of(assembly: &Assembly, name: &str, disks: &[Arc<dyn Source>]) -> Result<Vec<u8>, String> {
    let volumes = &assembly.layout.volumes;
    let Some(index) = volumes.iter().position(|volume| volume.name == name) else {
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        return Err(format!("no {name} in {names:?}: {:?}", assembly.layout.remarks));
    };
    let volume = &volumes[index];
    if volume.segments.is_empty() {
        return Err(format!("{name}: {:?}", volume.problem));
    }
    let mut bytes = vec![0; volume.size as usize];
    assembly.source(index).read_at(0, &mut bytes).map_err(|error| error.to_string())?;
    let mut at = 0;
    while at < volume.size {
        let run = volume.locate(at, volume.size - at).expect("a place");
        if let Some(position) = run.on_disk() {
            let mut piece = vec![0; run.len as usize];
            disks[position.disk as usize].read_at(position.offset, &mut piece).expect("its bytes");
            assert!(bytes[at as usize..][..piece.len()] == piece, "{name} at {at:#x}");
        }
        at += run.len;
    }
    Ok(bytes)
}

fn sum(bytes: &[u8]) -> String {
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("bytes");
    fs::write(&file, bytes).expect("room");
    tool("md5sum").arg(&file).succeeds()[..32].to_owned()
}

/// Whether the volume of these disks has the kernel's sum.
fn matches(parts: &[Vec<u8>], name: &str, judged: &(String, String, u64)) -> Result<(), String> {
    let disks = sources(parts);
    let found = bytes_of(&assemble(&disks, None), name, &disks)?;
    if found.len() as u64 != judged.2 {
        return Err(format!("{name} has {} bytes, and the kernel's {}", found.len(), judged.2));
    }
    if sum(&found) == judged.1 { Ok(()) } else { Err(format!("{name} has other bytes")) }
}

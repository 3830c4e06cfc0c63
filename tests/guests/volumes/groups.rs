//! Volume groups made by LVM itself, without the kernel's help: it only writes metadata. The bytes of each
//! volume are assembled from LVM's own report of its extents, and compared.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::content::VolumeContent;
use chainfs::guest::volumes::{DiskPosition, VolumeLayout, VolumeRun, assemble, layout, set_members};
use tempfile::TempDir;

use super::{Loop, blank, disk, names, persistent, told, volume};
use support::*;

const EXTENT: u64 = 64 * KIB;

/// A segment in LVM's report: the stripes' length, and of each leg the disk, begin and end.
type Told = (u64, Vec<(usize, u64, u64)>);

/// Disks in files, and LVM restricted to them.
struct Lab {
    dir: TempDir,
    disks: Vec<PathBuf>,
    devices: Vec<Loop>,
}

impl Lab {
    fn new(sizes: &[u64]) -> Self {
        let dir = TempDir::new().expect("a directory");
        let disks: Vec<PathBuf> =
            (0..sizes.len()).map(|number| dir.path().join(format!("disk{number}"))).collect();
        for (disk, size) in disks.iter().zip(sizes) {
            blank(disk, *size);
        }
        let devices = disks.iter().map(|disk| Loop::new(disk, 512)).collect();
        let lab = Self { dir, disks, devices };
        lab.configure();
        lab
    }

    fn configure(&self) {
        let accepted = self.devices.iter().map(|device| format!("\"a|^{}$|\", ", device.path().display()));
        let accepted: String = accepted.collect();
        let etc = self.dir.path().display();
        let config = format!(
            "devices {{ use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source \
                = \"none\"\n\
             filter = [ {accepted} \"r|.*|\" ] global_filter = [ {accepted} \"r|.*|\" ] }}\n\
             activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\n\
             backup {{ backup = 0 archive = 0 }}\n\
             global {{ etc = \"{etc}\" event_activation = 0 use_lvmpolld = 0 locking_dir = \"{etc}/lock\" \
             }}\n"
        );
        fs::write(self.dir.path().join("lvm.conf"), config).expect("a configuration");
    }

    fn lvm(&self, words: &str) -> String {
        let mut words = words.split_whitespace();
        let mut command = tool(words.next().expect("a program"));
        command.env("LVM_SYSTEM_DIR", self.dir.path()).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.args(["--driverloaded", "n"]).args(words).succeeds()
    }

    fn device(&self, number: usize) -> String {
        self.devices[number].path().display().to_string()
    }

    /// All devices are physical volumes of a group.
    fn group(&self, name: &str) {
        let devices: Vec<String> = (0..self.devices.len()).map(|number| self.device(number)).collect();
        let devices = devices.join(" ");
        self.lvm(&format!("pvcreate -q -y {devices}"));
        self.lvm(&format!("vgcreate -q -s {EXTENT}b {name} {devices}"));
    }

    fn create(&self, words: &str) {
        // Changes to the active volume need the kernel.
        self.lvm(&format!("lvcreate -q -y -an -Zn -Wn {words}"));
    }

    /// Writes metadata of a kind that LVM makes only with the kernel's help, but takes back from a backup.
    fn restore(&self, group: &str, volumes: &str) {
        let file = self.dir.path().join("backup");
        self.lvm(&format!("vgcfgbackup -q -f {} {group}", file.display()));
        let text = fs::read_to_string(&file).expect("a backup");
        let end = text.trim_end().rfind('}').expect("its end");
        // LVM numbers physical volumes as it likes.
        let device =
            |line: &str| Some(line.trim().strip_prefix("device = \"")?.split('"').next()?.to_owned());
        let order = text.lines().filter_map(device);
        let volumes = order.enumerate().fold(volumes.to_owned(), |volumes, (number, device)| {
            let disk =
                self.devices.iter().position(|known| known.path() == Path::new(&device)).expect("our device");
            volumes.replace(&format!("\"disk{disk}\""), &format!("\"pv{number}\""))
        });
        fs::write(&file, format!("{}\nlogical_volumes {{\n{volumes}\n}}\n}}\n", &text[..end]))
            .expect("a backup");
        self.lvm(&format!("vgcfgrestore -q --force -f {} {group}", file.display()));
    }

    /// The disks' bytes, each with different data after the metadata.
    fn scribbled(&self) -> Vec<Arc<dyn Source>> {
        let scribble = |(number, disk): (usize, &PathBuf)| {
            let mut bytes = fs::read(disk).expect("the disk");
            let random = Rng::new(number as u64).bytes(bytes.len() as u64);
            let from = MIB as usize;
            bytes[from..].copy_from_slice(&random[from..]);
            let source: Arc<dyn Source> = Arc::new(bytes);
            source
        };
        self.disks.iter().enumerate().map(scribble).collect()
    }

    /// The segments of the visible volumes in LVM's report: by `VG/LV`.
    fn judged(&self) -> BTreeMap<String, Vec<Told>> {
        let mut begins = BTreeMap::new();
        for line in self.lvm("pvs --noheadings --units b --nosuffix -o pv_name,pe_start").lines() {
            let mut words = line.split_whitespace();
            let device = words.next().expect("a device").to_owned();
            begins.insert(device, words.next().expect("a place").parse::<u64>().expect("a number"));
        }
        let fields = "vg_name,lv_name,stripe_size,seg_start,seg_pe_ranges";
        let words = "--segments --noheadings --units b --nosuffix -O vg_name,lv_name,seg_start";
        let mut judged: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for line in self.lvm(&format!("lvs {words} -o {fields}")).lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Others are made of other volumes, or of none.
            if !words.get(4).is_some_and(|range| range.starts_with("/dev/")) {
                continue;
            }
            let legs = words[4..].iter().map(|range| {
                let (device, extents) = range.split_once(':').expect("a range");
                let (first, last) = extents.split_once('-').expect("a range");
                let place = |extent: u64| begins[device] + extent * EXTENT;
                let number = self
                    .devices
                    .iter()
                    .position(|known| known.path() == Path::new(device))
                    .expect("our device");
                (number, place(first.parse().unwrap()), place(last.parse::<u64>().unwrap() + 1))
            });
            let segment = (words[2].parse().expect("a length"), legs.collect());
            judged.entry(format!("{}/{}", words[0], words[1])).or_default().push(segment);
        }
        judged
    }
}

/// Runs a program of LVM's on a file, which is a device meanwhile.
pub(super) fn on_a_device(file: &Path, program: &str, args: &[&str]) {
    let dir = TempDir::new().expect("a directory");
    let device = Loop::new(file, 512);
    let lab = Lab { dir, disks: vec![file.to_owned()], devices: vec![device] };
    lab.configure();
    lab.lvm(&format!("{program} {} {}", args[2..].join(" "), lab.device(0)));
}

/// The position on a disk of a volume's byte.
fn place_at(layout: &VolumeLayout, name: &str, at: u64) -> DiskPosition {
    let volume = volume(layout, name);
    let run = volume.locate(at, 1).unwrap_or_else(|| panic!("{name}: {:?}", volume.problem));
    run.on_disk().expect("a place on a disk")
}

fn read(layout: &VolumeLayout, name: &str, disks: &[Arc<dyn Source>]) -> Vec<u8> {
    let volume = volume(layout, name);
    assert!(!volume.segments.is_empty(), "{name}: {:?}", volume.problem);
    let mut bytes = vec![0; volume.size as usize];
    let assembly = assemble(disks, None);
    let index = assembly.layout.volumes.iter().position(|other| other.name == name).expect("the volume");
    assembly.source(index).read_at(0, &mut bytes).expect("its bytes");
    bytes
}

/// Distributes bytes as LVM reports, a stripe at a time.
fn put_together(segments: &[Told], disks: &[Arc<dyn Source>]) -> Vec<u8> {
    let mut all = Vec::new();
    for (stripe_len, legs) in segments {
        let mut places: Vec<u64> = legs.iter().map(|leg| leg.1).collect();
        let step = if *stripe_len == 0 { EXTENT } else { *stripe_len };
        while places[0] < legs[0].2 {
            for (place, (disk, _, end)) in places.iter_mut().zip(legs) {
                let mut piece = vec![0; step as usize];
                assert!(*place + step <= *end, "legs of different lengths");
                disks[*disk].read_at(*place, &mut piece).expect("a piece");
                all.extend(piece);
                *place += step;
            }
        }
    }
    all
}

#[test]
fn volumes_of_three_disks_are_assembled_as_by_lvm() {
    let lab = Lab::new(&[24 * MIB, 20 * MIB, 16 * MIB]);
    lab.group("my-vg.1");
    lab.create(&format!(
        "-n striped -i 3 -I 4k -L 3m my-vg.1 {} {} {}",
        lab.device(2),
        lab.device(1),
        lab.device(0)
    ));
    lab.create("-n root-1 -L 30m my-vg.1");
    lab.create("-n gap -L 2m my-vg.1");
    lab.create("-n last -L 3m my-vg.1");
    lab.lvm("lvremove -q -y my-vg.1/gap");
    lab.lvm("lvextend -q -L +4m my-vg.1/root-1");
    let disks = lab.scribbled();
    let layout = layout(&disks);
    let judged = lab.judged();
    assert_eq!(names(&layout), ["disk", "my--vg.1-last", "my--vg.1-root--1", "my--vg.1-striped"]);
    assert!(judged["my-vg.1/root-1"].len() > 2 && judged["my-vg.1/striped"][0].1.len() == 3);
    for (name, segments) in &judged {
        let (group, name) = name.split_once('/').expect("a name");
        let shown = format!("{}-{}", group.replace('-', "--"), name.replace('-', "--"));
        assert!(read(&layout, &shown, &disks) == put_together(segments, &disks), "{shown}");
    }
    assert_eq!((layout.missing.len(), &layout.remarks), (0, &vec![]));
    let first = volume(&layout, "disk");
    assert_eq!((first.content, first.problem.is_some()), (VolumeContent::LvmPhysicalVolume, true));

    // Every disk knows the group; each can be the first.
    let turned = [Arc::clone(&disks[2]), Arc::clone(&disks[0]), Arc::clone(&disks[1])];
    let other = super::layout(&turned);
    assert!(read(&other, "my--vg.1-root--1", &turned) == read(&layout, "my--vg.1-root--1", &disks));
    let known = set_members(&disks[1]);
    let id = lab.lvm("vgs --noheadings -o vg_uuid").trim().to_owned();
    assert_eq!((known.len(), &known[0].set), (1, &Some(id)));
}

#[test]
fn volumes_that_do_not_need_a_missing_disk_are_shown() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    lab.create(&format!("-n here -L 5m vg {}", lab.device(0)));
    lab.create(&format!("-n there -L 5m vg {}", lab.device(1)));
    lab.create("-n both -i 2 -L 2m vg");
    let disks = lab.scribbled();
    let ids = lab.lvm(&format!("pvs --noheadings -o pv_uuid {}", lab.device(1)));
    let absent = ids.trim();
    let part = layout(&disks[..1]);
    assert_eq!(names(&part), ["disk", "vg-both", "vg-here", "vg-there"]);
    for name in ["vg-both", "vg-there"] {
        let problem = volume(&part, name).problem.clone().expect("a problem");
        assert!(problem.contains(absent) && volume(&part, name).segments.is_empty(), "{problem}");
    }
    assert!(read(&part, "vg-here", &disks) == put_together(&lab.judged()["vg/here"], &disks));
    assert_eq!(
        (part.missing[0].name.as_str(), part.missing[0].absent.as_slice()),
        ("vg", [absent.to_owned()].as_slice())
    );

    // A copy of the first disk, offered too, is not taken for the second; nor is one of another group.
    let other = Lab::new(&[16 * MIB]);
    other.group("vg");
    other.create("-n here -L 5m vg");
    let offered =
        [Arc::clone(&disks[0]), Arc::clone(&disks[0]), disk(&other.disks[0]), Arc::clone(&disks[1])];
    let all = layout(&offered);
    assert_eq!((names(&all), all.missing.len(), all.remarks.len()), (names(&part), 0, 1));
    assert!(all.remarks[0].contains("on disk 1, too"), "{:?}", all.remarks);
    assert_eq!(place_at(&all, "vg-both", 0).disk, 0);
    assert!(read(&all, "vg-there", &offered) == put_together(&lab.judged()["vg/there"], &disks));
}

#[test]
fn physical_volumes_in_partitions_are_found() {
    let dir = TempDir::new().expect("a directory");
    let whole = dir.path().join("disk");
    blank(&whole, 64 * MIB);
    told("sfdisk", &["-q"], &whole, "label: gpt\nsize=8M, type=L\nsize=20M, type=V\nsize=20M, type=V\n");
    let lab = Lab::new(&[20 * MIB, 20 * MIB]);
    lab.group("vg");
    lab.create("-n root -L 25m vg");
    let parts = lab.scribbled();
    let mut bytes = fs::read(&whole).expect("the disk");
    for (number, part) in parts.iter().enumerate() {
        let at = ((9 + 20 * number) as u64 * MIB) as usize;
        part.read_at(0, &mut bytes[at..at + (20 * MIB) as usize]).expect("a part");
    }
    let disks: Vec<Arc<dyn Source>> = vec![Arc::new(bytes)];
    let layout = layout(&disks);
    assert_eq!(names(&layout), ["p1", "p2", "p3", "vg-root"]);
    assert_eq!(volume(&layout, "p2").content, VolumeContent::LvmPhysicalVolume);
    assert!(read(&layout, "vg-root", &disks) == put_together(&lab.judged()["vg/root"], &parts));
    assert_eq!(set_members(&disks[0]).len(), 2);
}

/// A machine that was copied has groups of one name; so has a disk that was put into another machine.
#[test]
fn two_groups_of_one_name_are_distinguished() {
    let dir = TempDir::new().expect("a directory");
    let whole = dir.path().join("disk");
    blank(&whole, 40 * MIB);
    told("sfdisk", &["-q"], &whole, "label: gpt\nsize=16M, type=V\nsize=16M, type=V\n");
    let mut bytes = fs::read(&whole).expect("the disk");
    let mut ids = Vec::new();
    for at in [MIB, 17 * MIB] {
        let lab = Lab::new(&[16 * MIB]);
        lab.group("vg");
        lab.create("-n root -L 1m vg");
        ids.push(lab.lvm("vgs --noheadings -o vg_uuid").trim().to_owned());
        lab.scribbled()[0].read_at(0, &mut bytes[at as usize..(at + 16 * MIB) as usize]).expect("a part");
    }
    ids.sort();
    let layout = layout(&[Arc::new(bytes)]);
    assert_eq!(names(&layout), ["p1", "p2", "vg-root", &format!("vg-root~{}", ids[1])]);
    let place = |name| place_at(&layout, name, 0).offset;
    assert_ne!(place("vg-root"), place(&format!("vg-root~{}", ids[1])));
}

/// A logical volume in LVM's text.
fn text(name: &str, number: u32, status: &str, count: u64, segment: &str) -> String {
    format!(
        "{name} {{ id = \"{number:06}-0000-0000-0000-0000-0000-000000\" status = \
            [\"READ\", \"WRITE\"{status}] flags = []\n\
         creation_host = \"a\" creation_time = 1 segment_count = 1\n\
         segment1 {{ start_extent = 0 extent_count = {count}\n {segment} }} }}\n"
    )
}

const SHOWN: &str = ", \"VISIBLE\"";

fn linear(disk: usize, extent: u64) -> String {
    format!("type = \"striped\" stripe_count = 1 stripes = [ \"disk{disk}\", {extent} ]")
}

/// Mirrors of two and four images on two disks, the second of which may be a part of the first.
fn mirrors(disk_count: usize) -> String {
    let linear = |disk: usize, extent: u64| match disk_count {
        1 => linear(0, extent + 75 * disk as u64),
        _ => linear(disk, extent),
    };
    let mut all = String::new();
    let mut number = 0;
    let mut add = |name: &str, status: &str, count, segment: &str| {
        number += 1;
        all += &text(name, number, status, count, segment);
    };
    let raids = |name: &str, count: usize| {
        let pair = |n| format!("\"{name}_rmeta_{n}\", \"{name}_rimage_{n}\"");
        format!("raids = [ {} ]", (0..count).map(pair).collect::<Vec<_>>().join(", "))
    };
    add("one", SHOWN, 8, &format!("type = \"raid1\" device_count = 2 region_size = 64 {}", raids("one", 2)));
    for n in 0..2 {
        add(&format!("one_rmeta_{n}"), "", 1, &linear(n, 0));
        add(&format!("one_rimage_{n}"), "", 8, &linear(n, 1));
    }
    let ten = "type = \"raid10\" device_count = 4 stripe_size = 16 data_copies = 2 region_size = 64";
    add("ten", SHOWN, 16, &format!("{ten} {}", raids("ten", 4)));
    for n in 0..4 {
        let (disk, at) = (n / 2, 20 + n as u64 % 2 * 20);
        add(&format!("ten_rmeta_{n}"), "", 1, &linear(disk, at));
        add(&format!("ten_rimage_{n}"), "", 8, &linear(disk, at + 1));
    }
    let old = "type = \"mirror\" mirror_count = 2 region_size = 64 mirrors = [ \"old_mimage_0\", \
        0, \"old_mimage_1\", 0 ]";
    add("old", SHOWN, 4, old);
    for n in 0..2 {
        add(&format!("old_mimage_{n}"), "", 4, &linear(n, 70));
    }
    all
}

/// dm-raid's metadata of a leg.
fn state(events: u64, failed: u64, recovered: u64) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..4].copy_from_slice(&0x6452_6d44_u32.to_le_bytes());
    block[16..24].copy_from_slice(&events.to_le_bytes());
    block[24..32].copy_from_slice(&failed.to_le_bytes());
    block[32..40].copy_from_slice(&recovered.to_le_bytes());
    block
}

#[test]
fn mirrors_are_read_from_a_present_synchronised_leg() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    lab.restore("vg", &mirrors(2));
    // LVM itself has taken them.
    let judged = lab.lvm("lvs --noheadings -o lv_name,segtype,devices -O lv_name vg");
    let judged: Vec<&str> = judged.lines().map(str::trim_end).map(str::trim_start).collect();
    assert_eq!(judged.len(), 3, "{judged:?}");
    assert!(
        judged[0].contains("mirror") && judged[1].contains("raid1") && judged[2].contains("ten_rimage_3(0)")
    );

    let begin: u64 = lab
        .lvm("pvs --noheadings --units b --nosuffix -o pe_start")
        .lines()
        .next()
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let disks = lab.scribbled();
    let place = |name: &str, disks: &[Arc<dyn Source>], at: u64| {
        let place = place_at(&layout(disks), name, at);
        (place.disk, (place.offset - begin) / EXTENT)
    };
    assert_eq!(place("vg-one", &disks, 0), (0, 1));
    assert_eq!(place("vg-old", &disks, 0), (0, 70));
    // Stripes of 8 KiB, dealt to two pairs: the first pair's are on the first disk, the second pair's on the
    // other.
    assert_eq!((place("vg-ten", &disks, 0), place("vg-ten", &disks, 8 * KIB)), ((0, 21), (1, 21)));
    let whole = layout(&disks);
    let ten = volume(&whole, "vg-ten");
    let (a, b) = (ten.locate(16 * KIB + 5, 1).unwrap(), ten.locate(24 * KIB + 5, 100_000).unwrap());
    let offset = |run: VolumeRun| run.on_disk().expect("a place").offset - begin - 21 * EXTENT;
    assert_eq!((offset(a), offset(b)), (8 * KIB + 5, 8 * KIB + 5));
    assert_eq!(b.len, 8 * KIB - 5);

    // With the second disk only; a set without any leg left is a problem that names the disk.
    let alone = [Arc::clone(&disks[1])];
    assert_eq!((place("vg-one", &alone, 0), place("vg-old", &alone, 0)), ((0, 1), (0, 70)));
    assert!(volume(&layout(&alone), "vg-ten").problem.as_ref().unwrap().contains("is missing"));

    // The kernel's record of the legs decides.
    let with = |states: [Option<Vec<u8>>; 2]| -> Vec<Arc<dyn Source>> {
        let put = |(disk, state): (&Arc<dyn Source>, Option<Vec<u8>>)| -> Arc<dyn Source> {
            let mut bytes = vec![0; disk.size() as usize];
            disk.read_at(0, &mut bytes).expect("the disk");
            if let Some(state) = state {
                bytes[begin as usize..][..512].copy_from_slice(&state);
            }
            Arc::new(bytes)
        };
        disks.iter().zip(states).map(put).collect()
    };
    let whole = u64::MAX;
    let good = state(9, 0, whole);
    assert_eq!(place("vg-one", &with([Some(good.clone()), Some(good.clone())]), 0), (0, 1));
    assert_eq!(place("vg-one", &with([Some(state(5, 0, whole)), Some(good.clone())]), 0), (1, 1));
    assert_eq!(place("vg-one", &with([Some(state(9, 0, 77)), Some(good.clone())]), 0), (1, 1));
    assert_eq!(place("vg-one", &with([Some(state(8, 0, whole)), Some(state(9, 1, whole))]), 0), (1, 1));
    assert_eq!(place("vg-one", &with([None, Some(good.clone())]), 0), (1, 1));
    let stale = with([Some(state(9, 0, 77)), Some(good)]);
    let problem = volume(&layout(&stale[..1]), "vg-one").problem.clone().expect("a problem");
    assert!(problem.contains("out of sync") && problem.contains("is missing"), "{problem}");
}

/// A volume is being moved from one disk to another, in three pieces: one has been moved, one is being moved,
/// one is yet to be.
#[test]
fn a_volume_under_pvmove_is_read_at_its_current_location() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    let segment = |number: usize, moved: &str, from: u64, to: u64| {
        format!(
            "segment{number} {{ start_extent = {} extent_count = 4 type = \"mirror\" mirror_count = 2 \
                region_size = 64 {moved}\n\
             mirrors = [ \"disk0\", {from}, \"disk1\", {to} ] }}\n",
            (number - 1) * 4
        )
    };
    let segments = segment(1, "extents_moved = 4", 30, 50)
        + &segment(2, "extents_moved = 2", 40, 54)
        + &segment(3, "", 60, 58);
    let mut all =
        text("root", 1, SHOWN, 12, "type = \"striped\" stripe_count = 1 stripes = [ \"pvmove0\", 0 ]");
    let moving = format!(
        "pvmove0 {{ id = \"000002-0000-0000-0000-0000-0000-000000\" status = \
            [\"READ\", \"WRITE\", \"PVMOVE\", \"LOCKED\"]\n\
         flags = [] creation_host = \"a\" creation_time = 1 allocation_policy = \"contiguous\" segment_count \
         = 3\n\
         {segments} }}\n"
    );
    all += &moving;
    lab.restore("vg", &all);
    let begin: u64 = lab
        .lvm("pvs --noheadings --units b --nosuffix -o pe_start")
        .lines()
        .next()
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let shown = layout(&lab.scribbled());
    let place = |extent: u64| {
        let place = place_at(&shown, "vg-root", extent * EXTENT);
        (place.disk, (place.offset - begin) / EXTENT)
    };
    assert_eq!([0, 3, 4, 7, 8, 11].map(place), [(1, 50), (1, 53), (0, 40), (0, 43), (0, 60), (0, 63)]);
}

#[test]
fn volumes_that_cannot_be_assembled_are_listed_with_the_reason() {
    let lab = Lab::new(&[16 * MIB]);
    lab.group("vg");
    let mut all = text("root", 1, SHOWN, 4, &linear(0, 0));
    all += &text("snap", 2, SHOWN, 4, &linear(0, 4));
    all += &text(
        "snapshot0",
        3,
        SHOWN,
        4,
        "type = \"snapshot\" chunk_size = 8 origin = \"root\" cow_store = \"snap\"",
    );
    let pool = "type = \"thin-pool\" metadata = \"pool_tmeta\" pool = \"pool_tdata\" transaction_id = 1 \
        chunk_size = 128\n\
                discards = \"passdown\" zero_new_blocks = 1";
    all += &text("pool", 4, SHOWN, 4, pool);
    all += &text("pool_tmeta", 5, "", 2, &linear(0, 10));
    all += &text("pool_tdata", 6, "", 4, &linear(0, 12));
    all +=
        &text("thin", 7, SHOWN, 9, "type = \"thin\" thin_pool = \"pool\" transaction_id = 0 device_id = 1");
    lab.restore("vg", &all);
    let judged = lab.lvm("lvs --noheadings -o lv_name -O lv_name vg");
    let judged: Vec<String> = judged.split_whitespace().map(|name| format!("vg-{name}")).collect();
    let disks = lab.scribbled();
    let layout = layout(&disks);
    assert_eq!(names(&layout)[1..], judged);
    assert_eq!(judged, ["vg-pool", "vg-root", "vg-snap", "vg-thin"]);
    let facts = [("vg-pool", "a pool"), ("vg-snap", "no header"), ("vg-thin", "no superblock")];
    for (name, fact) in facts {
        let volume = volume(&layout, name);
        let problem = volume.problem.as_ref().expect("a problem");
        assert!(problem.contains(fact) && volume.segments.is_empty(), "{name}: {problem}");
    }
    assert_eq!(volume(&layout, "vg-thin").size, 9 * EXTENT);
    assert!(read(&layout, "vg-root", &disks) == put_together(&lab.judged()["vg/root"], &disks));
}

/// LVM's own raid0, whose images are volumes of several pieces.
#[test]
fn stripes_over_fragmented_volumes_are_assembled() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    lab.create("--type raid0 -i 2 -I 16k -L 4m -n zero vg");
    lab.create(&format!("-n gap0 -L 1m vg {}", lab.device(0)));
    lab.lvm("lvextend -q -L +4m vg/zero");
    let images = lab.lvm("lvs -a --segments --noheadings -o lv_name,seg_pe_ranges -O lv_name,seg_start vg");
    let mut legs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let disks = lab.scribbled();
    let begin: u64 = lab
        .lvm("pvs --noheadings --units b --nosuffix -o pe_start")
        .lines()
        .next()
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    for line in images.lines().filter(|line| line.contains("rimage") && line.contains("/dev/")) {
        let (name, range) = line.trim().split_once(' ').expect("two words");
        let (device, extents) = range.trim().split_once(':').expect("a range");
        let (first, last) = extents.split_once('-').expect("a range");
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        let number =
            lab.devices.iter().position(|known| known.path() == Path::new(device)).expect("our device");
        let mut bytes = vec![0; ((last + 1 - first) * EXTENT) as usize];
        disks[number].read_at(begin + first * EXTENT, &mut bytes).expect("a leg");
        legs.entry(name.to_owned()).or_default().extend(bytes);
    }
    assert_eq!(legs.len(), 2, "{images}");
    let mut pieces: Vec<_> = legs.values().map(|leg| leg.chunks(16 << 10)).collect();
    let mut expected = Vec::new();
    'all: loop {
        for leg in &mut pieces {
            let Some(piece) = leg.next() else { break 'all };
            expected.extend_from_slice(piece);
        }
    }
    assert_eq!(expected.len() as u64, 8 * MIB);
    let layout = layout(&disks);
    assert!(volume(&layout, "vg-zero").segments.len() > 1, "{images}");
    assert!(read(&layout, "vg-zero", &disks) == expected);
}

#[test]
fn metadata_are_found_anywhere_in_their_ring() {
    let dir = TempDir::new().expect("a directory");
    let file = dir.path().join("disk");
    blank(&file, 16 * MIB);
    let device = Loop::new(&file, 512);
    let lab = Lab { dir, disks: vec![file.clone()], devices: vec![device] };
    lab.configure();
    lab.lvm(&format!("pvcreate -q -y --metadatasize 32k --dataalignment 4k {}", lab.device(0)));
    lab.lvm(&format!("vgcreate -q -s {EXTENT}b vg {}", lab.device(0)));
    let (mut wrapped_count, mut last_at) = (0, 0);
    for turn in 0..90 {
        if turn % 3 == 2 {
            lab.lvm(&format!("lvremove -q -y vg/lv{}", turn - 1));
        } else {
            lab.create(&format!("-n lv{turn} -l 1 vg"));
        }
        let layout = super::layout_of(&file);
        let judged = lab.lvm("lvs --noheadings -o lv_name -O lv_name vg");
        let judged: Vec<String> = judged.split_whitespace().map(|name| format!("vg-{name}")).collect();
        assert_eq!(names(&layout)[1..], judged, "{turn}: {:?}", layout.remarks);
        let bytes = fs::read(&file).expect("the disk");
        let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (ring_len, at, len) = (field(4096 + 32), field(4096 + 40), field(4096 + 48));
        wrapped_count += u32::from(at + len > ring_len);
        assert_ne!(at, last_at);
        last_at = at;
        if turn > 12 && wrapped_count > 1 {
            return;
        }
    }
    panic!("the ring has wrapped {wrapped_count} times only");
}

#[test]
fn an_exported_group_and_damaged_metadata_are_reported() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    lab.create("-n root -L 1m vg");
    lab.lvm("vgexport -q vg");
    let disks = lab.scribbled();
    assert!(layout(&disks).remarks.iter().any(|remark| remark.contains("exported")));

    // One copy of the metadata is enough, whichever it is; without any there is no group.
    let damaged = |disk: &Arc<dyn Source>| -> Arc<dyn Source> {
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(0, &mut bytes).expect("the disk");
        bytes[4096 + 512..MIB as usize].fill(b'#');
        Arc::new(bytes)
    };
    let first = [damaged(&disks[0]), Arc::clone(&disks[1])];
    let shown = layout(&first);
    assert!(shown.remarks[0].contains("its text's checksum is wrong"), "{:?}", shown.remarks);
    assert!(read(&shown, "vg-root", &first) == read(&layout(&disks), "vg-root", &disks));
    let shown = layout(&[damaged(&disks[0]), damaged(&disks[1])]);
    assert_eq!((names(&shown), shown.remarks.len()), (vec!["disk"], 2), "{:?}", shown.remarks);
}

#[test]
fn the_newest_metadata_of_a_group_count_and_older_are_reported() {
    let lab = Lab::new(&[16 * MIB, 16 * MIB]);
    lab.group("vg");
    lab.create("-n root -L 1m vg");
    let old = lab.scribbled();
    lab.create("-n later -L 1m vg");
    let new = lab.scribbled();
    let disks = [Arc::clone(&old[0]), Arc::clone(&new[1])];
    let layout = layout(&disks);
    assert_eq!(names(&layout), ["disk", "vg-later", "vg-root"]);
    let remark = &layout.remarks[0];
    assert!(remark.contains("disk 1") && remark.contains("newer"), "{remark}");
}

#[test]
fn the_comparison_notices_what_changes() {
    let lab = Lab::new(&[16 * MIB]);
    lab.group("vg");
    lab.create("-n root -L 1m vg");
    let disks = lab.scribbled();
    let mut judged = lab.judged().remove("vg/root").expect("its segments");
    let ours = read(&layout(&disks), "vg-root", &disks);
    assert!(ours == put_together(&judged, &disks));
    judged[0].1[0].1 += EXTENT;
    judged[0].1[0].2 += EXTENT;
    assert!(ours != put_together(&judged, &disks));
}

/// A disk with a group that has something of everything.
pub(super) fn sample() -> Vec<u8> {
    let lab = Lab::new(&[16 * MIB]);
    lab.group("vg");
    let stripes =
        "type = \"striped\" stripe_count = 2 stripe_size = 8 stripes = [ \"disk0\", 160, \"disk0\", 170 ]";
    let mut all = text("wide", 90, SHOWN, 8, stripes);
    all += &mirrors(1);
    lab.restore("vg", &all);
    fs::read(&lab.disks[0]).expect("the disk")
}

/// A disk with a thin pool, a cache and a snapshot, and where their metadata are.
pub(super) fn pools() -> (Vec<u8>, BTreeMap<&'static str, u64>) {
    let lab = Lab::new(&[16 * MIB]);
    lab.group("vg");
    let (store, tmeta, cmeta) = (8, 10, 20);
    let mut all = text("root", 1, SHOWN, 4, &linear(0, 0));
    all += &text("snap", 2, SHOWN, 2, &linear(0, store));
    let link = "type = \"snapshot\" chunk_size = 8 origin = \"root\" cow_store = \"snap\"";
    all += &text("snapshot0", 3, SHOWN, 4, link);
    let pool = "type = \"thin-pool\" metadata = \"pool_tmeta\" pool = \"pool_tdata\" transaction_id = 1 \
        chunk_size = 128";
    all += &text("pool", 4, SHOWN, 4, pool);
    all += &text("pool_tmeta", 5, "", 1, &linear(0, tmeta));
    all += &text("pool_tdata", 6, "", 4, &linear(0, 12));
    for number in [1, 2] {
        let thin = format!("type = \"thin\" thin_pool = \"pool\" transaction_id = 0 device_id = {number}");
        all += &text(&format!("thin{number}"), 6 + number, SHOWN, 9, &thin);
    }
    let fast = "type = \"cache-pool\" data = \"fast_cdata\" metadata = \"fast_cmeta\" chunk_size = 128 \
        cache_mode = \"writeback\" metadata_format = 2 policy = \"smq\"";
    all += &text("fast", 9, "", 3, fast);
    all += &text("fast_cmeta", 10, "", 1, &linear(0, cmeta));
    all += &text("fast_cdata", 11, "", 3, &linear(0, 22));
    all += &text("slow", 12, "", 5, &linear(0, 30));
    all += &text("cached", 13, SHOWN, 5, "type = \"cache\" cache_pool = \"fast\" origin = \"slow\"");
    lab.restore("vg", &all);
    let mut bytes = fs::read(&lab.disks[0]).expect("the disk");
    let place = |extent: u64| MIB + extent * EXTENT;
    let places = BTreeMap::from([("tmeta", place(tmeta)), ("cmeta", place(cmeta)), ("store", place(store))]);
    let parts =
        [("tmeta", persistent::thin()), ("cmeta", persistent::cache()), ("store", persistent::snapshot())];
    for (name, part) in parts {
        bytes[places[name] as usize..][..part.len()].copy_from_slice(&part);
    }
    (bytes, places)
}

#[test]
fn pools_caches_and_snapshots_map_to_the_disk() {
    let (bytes, _) = pools();
    let layout = layout(&[Arc::new(bytes)]);
    let place = |name: &str, block: u64| {
        let volume = volume(&layout, name);
        let run = volume.locate(block * EXTENT, 1).unwrap_or_else(|| panic!("{name}: {:?}", volume.problem));
        run.on_disk().map(|place| (place.offset - MIB) / EXTENT)
    };
    let thin = |name| (0..9).map(|block| place(name, block)).collect::<Vec<_>>();
    let (a, b, c, d) = (Some(12), Some(13), Some(14), Some(15));
    assert_eq!(thin("vg-thin1"), [b, c, None, a, d, None, None, c, None]);
    assert_eq!(thin("vg-thin2"), [None, c, d, None, None, None, None, None, None]);
    let cached: Vec<_> = (0..5).map(|block| place("vg-cached", block)).collect();
    assert_eq!(cached, [30, 31, 24, 22, 34].map(Some));
    // Chunks 3 and 9 of 4 KiB are in the store.
    let offset = |chunk: u64| place_at(&layout, "vg-snap", chunk * 4096).offset - MIB;
    assert_eq!((offset(2), offset(3), offset(9)), (8192, 8 * EXTENT + 8192, 8 * EXTENT + 12_288));
}

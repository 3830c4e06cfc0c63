//! Whole damaged images, read to their end through the library: no panic, bounded time and memory, and the
//! same answer by every path.
//!
//! The undamaged images are QEMU's; see fuzz/ for the damage and the reads. A failing chain is kept in the
//! temporary directory. `fuzz/fuzz_targets/image.rs` has the same for cargo-fuzz.

use std::sync::Arc;

use support::fuzz::images::Specimen;
use support::fuzz::random::{Random, put};
use support::fuzz::reader::{File, Tally, read_chain};
use support::is_alone;
use support::oracle::Scratch;

/// Default duration of a run in seconds.
const SECONDS: u64 = 8;
/// Of a run that may take its time.
const LONG_SECONDS: u64 = 60;
/// The test's own share is some 40 MiB of good images.
const MAX_MEMORY: u64 = 256 << 20;
/// Larger images take their time; they come less often.
const LARGE: usize = 1 << 20;

#[test]
fn damaged_images_read_the_same_by_every_path() {
    // Its memory is measured.
    if !is_alone(module_path!(), "damaged_images_read_the_same_by_every_path") {
        return;
    }
    let scratch = Scratch::new();
    let corpus = Maker { scratch, specimens: Vec::new() }.corpus();
    let (images, mut tally) = (corpus.len(), Tally::default());
    for specimen in &corpus {
        let mut chain = vec![specimen.file.clone()];
        chain.extend(specimen.below.iter().map(|below| corpus[*below].file.clone()));
        let refused = tally.refused;
        read(&chain, &mut Random::new(1), &mut tally);
        let readable = specimen.is_qcow2() && !specimen.name.starts_with("encrypted");
        assert_eq!(tally.refused == refused, readable, "{}", specimen.name);
    }

    let mut tally = Tally::default();
    let seconds = if std::env::var_os("CHAINFS_LONG").is_some() { LONG_SECONDS } else { SECONDS };
    let run = support::fuzz::drive("images", seconds, |random| {
        read(&damaged_chain(&corpus, random), random, &mut tally);
    });
    let peak = support::fuzz::peak_memory();
    println!("images: {images} good ones, {tally:?}");
    let rate = u128::from(tally.read) * 1000 / run.elapsed.as_millis().max(1);
    println!("images: {rate} a second, peak memory {peak:?} bytes");
    assert!(peak.is_none_or(|peak| peak < MAX_MEMORY), "{peak:?} bytes of memory");
    assert!(run.inputs < 1000 || tally.read > run.inputs / 3, "too few images are worth reading: {tally:?}");
}

/// A damaged image, on top of others: its own chain, or any.
fn damaged_chain(corpus: &[Specimen], random: &mut Random) -> Vec<File> {
    let top = loop {
        let top = &corpus[random.below(corpus.len())];
        if top.is_qcow2() && (top.file.bytes.len() <= LARGE || random.once_in(16)) {
            break top;
        }
    };
    let below = if top.below.is_empty() || random.once_in(4) {
        (0..random.below(4)).map(|_| random.below(corpus.len())).collect()
    } else {
        top.below.clone()
    };
    let mut chain = vec![top.mutated(corpus, random)];
    for specimen in
        below.into_iter().map(|index| &corpus[index]).filter(|below| below.file.bytes.len() <= LARGE)
    {
        chain.push(if random.once_in(2) { specimen.mutated(corpus, random) } else { specimen.file.clone() });
    }
    chain
}

/// Reads a chain, and keeps it if it fails.
fn read(chain: &[File], random: &mut Random, tally: &mut Tally) {
    let _kept_on_panic = Evidence(chain);
    read_chain(chain, random, tally);
}

struct Evidence<'a>(&'a [File]);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (layer, file) in self.0.iter().enumerate() {
                let path =
                    std::env::temp_dir().join(format!("chainfs-fuzz-{}-layer{layer}", std::process::id()));
                drop(std::fs::write(&path, &*file.bytes));
                println!("layer {layer} is left in {}", path.display());
            }
        }
    }
}

/// Makes good images of every kind.
struct Maker {
    scratch: Scratch,
    specimens: Vec<Specimen>,
}

impl Maker {
    fn corpus(mut self) -> Vec<Specimen> {
        self.raw();
        self.cluster_sizes_and_versions();
        self.refcount_widths();
        self.compressed();
        self.extended();
        self.zeroes();
        self.snapshots();
        self.vm_states();
        self.overlays();
        self.bitmaps();
        self.data_files();
        self.odd_sizes();
        self.odd_headers();
        self.specimens
    }

    /// Takes in a file as it is.
    fn take(&mut self, name: &str, below: &[usize]) -> usize {
        let path = |name: &str| self.scratch.path(name);
        let bytes = std::fs::read(path(name)).unwrap();
        // A guest's data for images that lose their own, or seem to have some after damage.
        let data = std::fs::read(path(&format!("{name}.data"))).unwrap_or_else(|_| pattern(200_000));
        self.specimens.push(Specimen::new(name, bytes, data, below.to_vec()));
        self.specimens.len() - 1
    }

    /// The bytes of the image that was taken in last, changed.
    fn change_last(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        let last = self.specimens.pop().expect("there is one");
        let mut bytes = Arc::unwrap_or_clone(last.file.bytes);
        change(&mut bytes);
        self.specimens.push(Specimen::new(&last.name, bytes, Vec::clone(&last.file.data), last.below));
    }

    /// An image that is written to.
    fn image(&mut self, name: &str, options: &str, size: u64, commands: &[String]) -> usize {
        self.scratch.create(name, options, &size.to_string());
        self.io(name, commands);
        self.take(name, &[])
    }

    fn io(&self, name: &str, commands: &[String]) {
        self.scratch.io(name, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn raw(&mut self) {
        let zeroes = || vec![0; 30_000];
        for (name, bytes) in [
            ("base.raw", pattern(65_536)),
            ("holes.raw", [pattern(10_000), zeroes(), pattern(20_001), zeroes()].concat()),
            ("short.raw", pattern(777)),
            // Bytes that compress to about half.
            ("half.raw", pattern(65_536).iter().map(|byte| byte & 15).collect()),
            ("empty.raw", Vec::new()),
        ] {
            std::fs::write(self.scratch.path(name), bytes).unwrap();
            self.take(name, &[]);
        }
    }

    fn cluster_sizes_and_versions(&mut self) {
        for cluster in [512, 1024, 2048, 4096, 16_384, 65_536] {
            for compat in ["0.10", "1.1"] {
                let options = format!("cluster_size={cluster},compat={compat}");
                let name = format!("c{cluster}-{compat}");
                self.image(&name, &options, 80 * cluster, &scribbles(cluster, 80 * cluster));
            }
        }
        let (cluster, size) = (2 << 20, 5 << 20);
        let commands = [write(0, 3000, 1), write(cluster + 5000, 512, 2)];
        self.image("c2m", "cluster_size=2M", size, &commands);
    }

    fn refcount_widths(&mut self) {
        for bits in [1, 2, 4, 8, 32, 64] {
            for cluster in [512, 4096] {
                let options = format!("cluster_size={cluster},refcount_bits={bits}");
                let name = format!("r{bits}-{cluster}");
                self.image(&name, &options, 50 * cluster, &scribbles(cluster, 50 * cluster));
                if bits >= 8 {
                    self.scratch.img(&format!("snapshot -c one {name}"));
                    self.take(&name, &[]);
                }
            }
        }
    }

    fn compressed(&mut self) {
        for kind in ["zlib", "zstd"] {
            for cluster in [512, 4096, 32_768, 65_536] {
                let options = format!("cluster_size={cluster},compression_type={kind}");
                let mut commands: Vec<String> = (0..6)
                    .flat_map(|index| {
                        let (at, source) = (index * 4 * cluster, self.scratch.path("half.raw"));
                        let long = format!("write -q -c -s {source} {} {cluster}", at + 2 * cluster);
                        [compressed_write(at, cluster, index as u8), long]
                    })
                    .collect();
                commands.push(write(cluster, cluster / 2, 77));
                commands.push(write(8 * cluster + 512, 512.min(cluster / 2), 78));
                self.image(&format!("{kind}-{cluster}"), &options, 40 * cluster, &commands);
            }
        }
    }

    fn extended(&mut self) {
        for (cluster, kind) in [(16_384, "zlib"), (16_384, "zstd"), (32_768, "zlib"), (65_536, "zlib")] {
            let options = format!("extended_l2=on,cluster_size={cluster},compression_type={kind}");
            let piece = cluster / 32;
            let mut commands = scribbles(cluster, 14 * cluster);
            commands.push(compressed_write(9 * cluster, cluster, 3));
            for index in [0, 3, 4, 17, 31] {
                commands.push(write(10 * cluster + index * piece, piece, index as u8));
            }
            commands.push(format!("write -q -z {} {}", 10 * cluster + 5 * piece, 3 * piece));
            commands.push(format!("discard -q {} {piece}", 10 * cluster + 4 * piece));
            self.image(&format!("extended-{cluster}-{kind}"), &options, 14 * cluster, &commands);
        }
    }

    fn zeroes(&mut self) {
        for cluster in [512, 4096, 65_536] {
            let commands = [
                write(0, 4 * cluster, 9),
                format!("write -q -z {cluster} {cluster}"),
                format!("write -q -z -u {} {cluster}", 2 * cluster),
                format!("write -q -z {} {}", 5 * cluster, 2 * cluster),
            ];
            self.image(
                &format!("zero-{cluster}"),
                &format!("cluster_size={cluster}"),
                9 * cluster,
                &commands,
            );
            let options = format!("cluster_size={cluster},preallocation=metadata");
            self.image(&format!("preallocated-{cluster}"), &options, 6 * cluster, &[write(0, 512, 1)]);
        }
    }

    fn snapshots(&mut self) {
        for (cluster, compat) in [(512, "1.1"), (512, "0.10"), (4096, "1.1"), (65_536, "1.1")] {
            let name = format!("snapshots-{cluster}-{compat}");
            let size = 40 * cluster;
            self.scratch.create(&name, &format!("cluster_size={cluster},compat={compat}"), &size.to_string());
            for index in 0..4 {
                let at = [0, 3, 1, 20][index as usize] * cluster;
                self.io(
                    &name,
                    &[write(at, 3 * cluster, index + 1), write(at + 10 * cluster + 100, 300, index + 50)],
                );
                self.scratch.img(&format!(
                    "snapshot -c {} {name}",
                    ["monday", "t", "a-longer-name", "4"][index as usize]
                ));
            }
            self.scratch.img(&format!("snapshot -d t {name}"));
            self.io(&name, &[write(5 * cluster, 2 * cluster, 99)]);
            self.take(&name, &[]);
        }
        // Snapshots of disks of other sizes than the image's.
        self.scratch.create("resized", "cluster_size=512", "50000");
        for (index, size) in [(1, 9216), (2, 119_808), (3, 30_208)] {
            self.io("resized", &[write(1000, 6000, index)]);
            self.scratch.img(&format!("snapshot -c s{index} resized"));
            self.scratch.img(&format!("resize -q --shrink -f qcow2 resized {size}"));
        }
        self.take("resized", &[]);
    }

    /// VM state as savevm leaves it, except that nothing needs to run for it. Its length need not
    /// be one of sectors.
    fn vm_states(&mut self) {
        for (cluster, len) in [(512, 40_000), (4096, 12_345), (65_536, 70_007)] {
            let name = format!("vm-state-{cluster}");
            let commands = [
                write(0, 3 * cluster, 1),
                format!("write -q -b -P 0x77 0 {cluster}"),
                format!("write -q -b -P 0x33 {cluster} {}", (len - cluster).next_multiple_of(512)),
            ];
            self.image(&name, &format!("cluster_size={cluster}"), 11 * cluster, &commands);
            self.scratch.img(&format!("snapshot -c saved {name}"));
            self.specimens.pop();
            self.take(&name, &[]);
            self.change_last(|bytes| {
                let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
                put(bytes, table + 32, 4, len);
                put(bytes, table + 40, 8, len);
            });
        }
    }

    fn overlays(&mut self) {
        let base = self.find("base.raw");
        let mut below = vec![base];
        let (mut backing, mut format) = ("base.raw".to_owned(), "raw");
        for (index, (cluster, size)) in
            [(512, 65_536), (65_536, 130_000), (4096, 40_000)].into_iter().enumerate()
        {
            let name = format!("overlay{index}");
            let options = format!("cluster_size={cluster},backing_file={backing},backing_fmt={format}");
            self.scratch.create(&name, &options, &size.to_string());
            let at = 1000 * (index as u64 + 1);
            self.io(
                &name,
                &[
                    write(at, 3000, 100 + index as u8),
                    format!("write -q -z {} 8192", at + 12_000),
                    format!("discard -q {} 4096", at + 24_000),
                ],
            );
            let taken = self.take(&name, &below);
            below.insert(0, taken);
            (backing, format) = (name, "qcow2");
        }
        let options = "extended_l2=on,cluster_size=16k,backing_file=overlay2,backing_fmt=qcow2";
        self.scratch.create("overlay3", options, "100000");
        self.io("overlay3", &[write(600, 2000, 42), "write -q -z 20480 1024".into()]);
        self.take("overlay3", &below);
    }

    fn bitmaps(&mut self) {
        for cluster in [512, 4096, 65_536] {
            let name = format!("bitmaps-{cluster}");
            self.scratch.create(&name, &format!("cluster_size={cluster}"), &(60 * cluster).to_string());
            self.scratch.img(&format!("bitmap --add -g 512 {name} first"));
            self.scratch.img(&format!("bitmap --add --disable -g 4096 {name} second"));
            self.io(&name, &scribbles(cluster, 60 * cluster));
            self.take(&name, &[]);
        }
    }

    fn data_files(&mut self) {
        for (cluster, raw, extended) in
            [(512, false, false), (4096, true, false), (65_536, false, false), (16_384, false, true)]
        {
            let name = format!("external-{cluster}");
            let mut options =
                format!("cluster_size={cluster},data_file={}", self.scratch.path(&format!("{name}.data")));
            if raw {
                options += ",data_file_raw=on";
            }
            if extended {
                options += ",extended_l2=on";
            }
            self.image(&name, &options, 20 * cluster, &scribbles(cluster, 20 * cluster));
        }
    }

    fn odd_sizes(&mut self) {
        for (name, size) in [("size-0", 0), ("size-512", 512), ("size-66048", 66_048)] {
            let commands = if size > 0 { vec![write(0, 512, 1), write(size - 512, 512, 2)] } else { vec![] };
            self.image(name, "cluster_size=4096", size, &commands);
        }
        self.image("size-poked", "cluster_size=512", 30_208, &[write(29_000, 1208, 1)]);
        self.change_last(|bytes| put(bytes, 24, 8, 30_001));
        for (name, options, size) in
            [("2t", "cluster_size=64k", 2 << 40), ("60t", "cluster_size=2M", 60 << 40)]
        {
            self.image(name, options, size, &[write(size / 2 + 12_345, 1000, 1), write(size - 512, 512, 2)]);
        }
        self.image("1g", "cluster_size=4096", 1 << 30, &scribbles(4096, 1 << 30));
    }

    fn odd_headers(&mut self) {
        let commands = scribbles(4096, 80_000);
        self.image("lazy", "cluster_size=4096,lazy_refcounts=on", 80_000, &commands);
        self.image("corrupt", "cluster_size=4096", 80_000, &commands);
        self.change_last(|bytes| bytes[79] |= 2);
        self.image("encrypted", "cluster_size=4096", 80_000, &commands);
        self.change_last(|bytes| bytes[35] = 1);
        // A version 3 header of the least length, and one with fields to come.
        self.image("header-104", "cluster_size=4096", 80_000, &commands);
        self.change_last(|bytes| {
            bytes.copy_within(112..1000, 104);
            bytes[103] = 104;
        });
        self.image("header-128", "cluster_size=4096", 80_000, &commands);
        self.change_last(|bytes| {
            bytes.copy_within(112..1000, 128);
            bytes[104..128].fill(0);
            bytes[103] = 128;
        });
    }

    fn find(&self, name: &str) -> usize {
        self.specimens.iter().position(|specimen| specimen.name == name).expect("it was made before")
    }
}

/// Bytes that differ at each offset.
fn pattern(len: usize) -> Vec<u8> {
    let mut random = Random::new(len as u64);
    (0..len).map(|_| random.next() as u8).collect()
}

fn write(at: u64, len: u64, pattern: u8) -> String {
    format!("write -q -P {pattern} {at} {len}")
}

fn compressed_write(at: u64, len: u64, pattern: u8) -> String {
    format!("write -q -c -P {pattern} {at} {len}")
}

/// Data, zeroes and discarded ranges, at both ends of a disk and between.
fn scribbles(cluster: u64, size: u64) -> Vec<String> {
    vec![
        write(0, 5 * cluster / 2, 1),
        write(4 * cluster, 2 * cluster, 2),
        write(4 * cluster + 512.min(cluster / 2), cluster, 3),
        format!("write -q -z {} {cluster}", 5 * cluster),
        format!("discard -q {cluster} {cluster}"),
        write(size / 2, 3 * cluster / 2, 4),
        write(size - 512, 512, 5),
    ]
}

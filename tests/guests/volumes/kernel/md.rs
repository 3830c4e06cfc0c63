//! md arrays of every level, layout and metadata version.

use chainfs::guest::volumes::assemble;

use super::{Judged, Scenario, bytes_of, judge, matches, sources};
use support::*;

const MODULES: [&str; 7] = ["md-mod", "linear", "raid0", "raid1", "raid10", "raid456", "ext4"];

/// A kind of array: its name, mdadm's words, its members' disks, and how many may be missing.
type Kind = (&'static str, &'static str, &'static [usize], usize);

const KINDS: [Kind; 39] = [
    ("linear", "--level=linear", &[0, 3, 4], 0),
    ("r0", "--level=0 --chunk=64", &[0, 1, 2], 0),
    ("r0-original", "--level=0 --chunk=16 --layout=original", &[5, 0, 3, 4], 0),
    ("r0-alternate", "--level=0 --chunk=16 --layout=alternate", &[5, 0, 3, 4], 0),
    ("r1", "--level=1", &[0, 1], 1),
    ("r1-old", "--level=1 --metadata=0.90", &[0, 1, 2], 2),
    ("r1-end", "--level=1 --metadata=1.0", &[0, 1], 1),
    ("r1-start", "--level=1 --metadata=1.1 --bitmap=internal", &[0, 1], 1),
    ("r4", "--level=4 --chunk=16", &[0, 1, 2], 1),
    ("r4-old", "--level=4 --chunk=16 --metadata=0.90", &[0, 1, 2, 3], 1),
    ("r5", "--level=5 --chunk=64", &[0, 1, 2], 1),
    ("r5-old", "--level=5 --chunk=32 --metadata=0.90", &[2, 1, 0, 4], 1),
    ("r5-la", "--level=5 --chunk=16 --layout=left-asymmetric", &[0, 1, 2, 3], 1),
    ("r5-ra", "--level=5 --chunk=16 --layout=right-asymmetric", &[0, 1, 2, 3], 1),
    ("r5-rs", "--level=5 --chunk=16 --layout=right-symmetric", &[0, 1, 2, 3], 1),
    ("r5-first", "--level=5 --chunk=16 --layout=parity-first", &[0, 1, 2], 1),
    ("r5-last", "--level=5 --chunk=16 --layout=parity-last", &[0, 1, 2], 1),
    ("r6", "--level=6 --chunk=16", &[0, 1, 2, 3, 4], 2),
    ("r6-old", "--level=6 --chunk=16 --metadata=0.90", &[0, 1, 2, 3], 2),
    ("r6-la", "--level=6 --chunk=16 --layout=left-asymmetric", &[0, 1, 2, 3, 4], 2),
    ("r6-ra", "--level=6 --chunk=16 --layout=right-asymmetric", &[0, 1, 2, 3, 4], 2),
    ("r6-rs", "--level=6 --chunk=16 --layout=right-symmetric", &[0, 1, 2, 3, 4], 2),
    ("r6-zr", "--level=6 --chunk=16 --layout=ddf-zero-restart", &[0, 1, 2, 3, 4], 2),
    ("r6-nr", "--level=6 --chunk=16 --layout=ddf-N-restart", &[0, 1, 2, 3, 4], 2),
    ("r6-nc", "--level=6 --chunk=16 --layout=ddf-N-continue", &[0, 1, 2, 3, 4], 2),
    ("r6-la6", "--level=6 --chunk=16 --layout=left-asymmetric-6", &[0, 1, 2, 3, 4], 2),
    ("r6-ra6", "--level=6 --chunk=16 --layout=right-asymmetric-6", &[0, 1, 2, 3, 4], 2),
    ("r6-ls6", "--level=6 --chunk=16 --layout=left-symmetric-6", &[0, 1, 2, 3, 4], 2),
    ("r6-rs6", "--level=6 --chunk=16 --layout=right-symmetric-6", &[0, 1, 2, 3, 4], 2),
    ("r6-first6", "--level=6 --chunk=16 --layout=parity-first-6", &[0, 1, 2, 3, 4], 2),
    ("r10", "--level=10 --chunk=64", &[0, 1, 2, 3], 1),
    ("r10-old", "--level=10 --chunk=64 --metadata=0.90", &[0, 1, 2, 3], 1),
    ("r10-odd", "--level=10 --chunk=16", &[0, 1, 2], 1),
    ("r10-n3", "--level=10 --chunk=16 --layout=n3", &[0, 1, 2, 3, 4], 2),
    ("r10-f2", "--level=10 --chunk=16 --layout=f2", &[0, 1, 2], 1),
    ("r10-f3", "--level=10 --chunk=16 --layout=f3", &[0, 1, 2, 3], 2),
    ("r10-o2", "--level=10 --chunk=16 --layout=o2", &[0, 1, 2, 3, 4], 1),
    ("r10-o3", "--level=10 --chunk=16 --layout=o3", &[0, 1, 2, 3], 2),
    ("r10-f2-even", "--level=10 --chunk=64 --layout=f2", &[0, 1, 2, 3], 1),
];

/// Makes the array `$scenario` as `/dev/md9`, and fills it.
fn create(words: &str, disks: &[usize]) -> String {
    let parts: Vec<String> = disks.iter().map(|disk| format!("$P{disk}")).collect();
    let name = if words.contains("0.90") { "" } else { "--name=$scenario --homehost=guest" };
    format!(
        "try mdadm --create /dev/md9 --run --force {name} {words} --raid-devices={} {}\n\
         mdadm --wait /dev/md9 >/dev/null 2>&1\nfill /dev/md9\nmdadm --wait /dev/md9 >/dev/null 2>&1\n",
        disks.len(),
        parts.join(" ")
    )
}

const STOP: &str = "try mdadm --stop /dev/md9\n";

/// All subsets of so many members.
fn subsets(len: usize, count: usize) -> Vec<Vec<usize>> {
    (0..1u32 << len)
        .filter(|set| set.count_ones() as usize == count)
        .map(|set| (0..len).filter(|index| set & (1 << index) != 0).collect())
        .collect()
}

/// The volume's name: arrays of metadata 0.90 have a number only.
fn shown(kind: &str) -> String {
    if kind.ends_with("-old") { "md9".to_owned() } else { format!("md-{kind}") }
}

fn all_kinds_match(judged: &Judged) {
    for (kind, _, disks, spare) in KINDS {
        let sum = &judged.sums[kind][0];
        let members: Vec<Vec<u8>> = disks.iter().map(|disk| judged.parts[kind][*disk].clone()).collect();
        matches(&members, &shown(kind), sum).unwrap_or_else(|fact| panic!("{kind}: {fact}"));
        let mut tried = 0;
        for count in 1..=spare {
            for left in subsets(disks.len(), disks.len() - count) {
                // The order of the disks says nothing.
                let present: Vec<Vec<u8>> = left.iter().rev().map(|index| members[*index].clone()).collect();
                let result = matches(&present, &shown(kind), sum);
                result.unwrap_or_else(|fact| panic!("{kind} with {left:?} only: {fact}"));
                tried += 1;
            }
        }
        let too_few = subsets(disks.len(), disks.len() - spare - 1).swap_remove(0);
        if !too_few.is_empty() && kind != "r10" && !kind.starts_with("r10-f2-") && kind != "r10-old" {
            let present: Vec<Vec<u8>> = too_few.iter().map(|index| members[*index].clone()).collect();
            let disks = sources(&present);
            let assembly = assemble(&disks, None);
            let fact = bytes_of(&assembly, &shown(kind), &disks).map(|_| ()).expect_err("too few members");
            assert!(fact.contains("missing"), "{kind}: {fact}");
        }
        println!("{kind}: as the kernel's, and {tried} times degraded");
    }
}

#[test]
#[ignore = "takes minutes"]
fn arrays_are_read_as_by_the_kernel() {
    let mut scenarios: Vec<Scenario> = KINDS
        .into_iter()
        .map(|(name, words, disks, _)| {
            let script = create(words, disks) + "judge array /dev/md9\n" + STOP;
            Scenario { name: name.to_owned(), script }
        })
        .collect();
    let mut add = |name: &str, script: String| scenarios.push(Scenario { name: name.to_owned(), script });
    // A member fails, and the array is written without it.
    let fail = "try mdadm /dev/md9 --fail $P1\n";
    let write = "fill /dev/md9 30\njudge array /dev/md9\n";
    add("failed", create("--level=5 --chunk=16", &[0, 1, 2]) + fail + write + STOP);
    let mirror = create("--level=1", &[0, 1]);
    add("removed", mirror.clone() + fail + "try mdadm /dev/md9 --remove $P1\n" + write + STOP);
    // The array goes on without noticing that a member is gone: only the counts tell.
    add(
        "dirty",
        mirror
            + "dd if=/dev/vdg of=/dev/md9 bs=4k count=3 conv=notrunc 2>/dev/null; sync\njudge array \
                /dev/md9\n"
            + "dd if=$P0 of=/tmp/p0 2>/dev/null; dd if=$P1 of=/tmp/p1 2>/dev/null\n"
            + STOP
            + "dd if=/tmp/p0 of=$P0 2>/dev/null; dd if=/tmp/p1 of=$P1 2>/dev/null; sync\n",
    );
    add(
        "nested",
        "try mdadm --create /dev/md9 --run --force --name=lower --homehost=guest --level=1 \
            --raid-devices=2 $P0 $P1\n\
         try mdadm --create /dev/md8 --run --force --name=other --homehost=guest --level=5 --chunk=16 \
         --raid-devices=3 $P2 $P3 $P4\n\
         try mdadm --create /dev/md7 --run --force --name=upper --homehost=guest --level=0 --chunk=64 \
         --raid-devices=2 /dev/md9 /dev/md8 --layout=alternate\n\
         mdadm --wait /dev/md8 >/dev/null 2>&1\nfill /dev/md7\njudge array /dev/md7\n\
         try mdadm --stop /dev/md7\ntry mdadm --stop /dev/md8\ntry mdadm --stop /dev/md9\n"
            .to_owned(),
    );
    let sizes = [4 * MIB, 4 * MIB, 4 * MIB, 5 * MIB, 6 * MIB, 6 * MIB];
    let before = "export MDADM_NO_UDEV=1 MDADM_NO_SYSTEMCTL=1; mkdir -p /run/mdadm /dev/md\n\
        echo 200000 >/proc/sys/dev/raid/speed_limit_min\n";
    let judged = judge(&scenarios, sizes, &["mdadm"], &MODULES, before);
    all_kinds_match(&judged);

    let failed = &judged.parts["failed"];
    matches(&failed[..3], "md-failed", &judged.sums["failed"][0]).unwrap();
    let layout = assemble(&sources(&failed[..3]), None).layout;
    let said = layout.remarks.join("\n");
    assert!(said.contains("disk 1 is not used") && said.contains("2 of 3 members"), "{said}");
    let removed = &judged.parts["removed"];
    for order in [[0, 1], [1, 0]] {
        let parts = order.map(|index: usize| removed[index].clone());
        matches(&parts, "md-removed", &judged.sums["removed"][0])
            .unwrap_or_else(|fact| panic!("{order:?}: {fact}"));
    }
    matches(&judged.parts["dirty"][..2], "md-dirty", &judged.sums["dirty"][0]).unwrap();

    // Arrays of arrays: the lower ones degraded, too.
    let nested = &judged.parts["nested"];
    let sum = &judged.sums["nested"][0];
    matches(&nested[..5], "md-upper", sum).unwrap();
    let fewer = [&nested[1], &nested[2], &nested[4]].map(Vec::clone);
    matches(&fewer, "md-upper", sum).unwrap();
}

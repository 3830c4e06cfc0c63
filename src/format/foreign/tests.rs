use std::convert::Infallible;

use super::*;

fn look(file: &[u8]) -> (Option<ForeignFormat>, Parents) {
    let mut read = |at: u64, buf: &mut [u8]| -> Result<usize, Infallible> {
        let rest = file.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    };
    let kind = probe(&file[..file.len().min(PROBE_LEN)]);
    let found = kind.map_or(Ok(Parents::None), |kind| parents(kind, file.len() as u64, &mut read));
    (kind, found.unwrap_or(Parents::Unknown))
}

fn names(names: &[&str]) -> Parents {
    Parents::Named(names.iter().map(|name| name.as_bytes().to_vec()).collect())
}

fn wide(text: &str, swap: bool) -> Vec<u8> {
    text.encode_utf16().flat_map(|unit| if swap { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn sparse_vmdk(descriptor: &str) -> Vec<u8> {
    let mut file = vec![0; 4096];
    put(&mut file, 0, b"KDMV");
    put(&mut file, 28, &1_u64.to_le_bytes());
    put(&mut file, 36, &4_u64.to_le_bytes());
    put(&mut file, 512, descriptor.as_bytes());
    file
}

fn vhdx() -> Vec<u8> {
    let mut file = vec![0; 512 << 10];
    put(&mut file, 0, b"vhdxfile");
    let table = 192 << 10;
    put(&mut file, table, b"regi");
    put(&mut file, table + 8, &[1, 0]);
    put(
        &mut file,
        table + 16,
        &[0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 5, 15, 0x88, 0x6e],
    );
    let metadata = 256 << 10;
    put(&mut file, table + 32, &(metadata as u64).to_le_bytes());
    put(&mut file, metadata, b"metadata");
    put(&mut file, metadata + 10, &[1, 0]);
    let id = [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
    put(&mut file, metadata + 32, &id);
    put(&mut file, metadata + 48, &(64_u32 << 10).to_le_bytes());
    put(&mut file, metadata + 52, &200_u32.to_le_bytes());
    let locator = metadata + (64 << 10);
    put(&mut file, locator + 18, &[1, 0]);
    let (key, value) = (wide("relative_path", false), wide(r".\base.vhdx", false));
    put(&mut file, locator + 20, &40_u32.to_le_bytes());
    put(&mut file, locator + 24, &100_u32.to_le_bytes());
    put(&mut file, locator + 28, &(key.len() as u16).to_le_bytes());
    put(&mut file, locator + 30, &(value.len() as u16).to_le_bytes());
    put(&mut file, locator + 40, &key);
    put(&mut file, locator + 100, &value);
    file
}

fn vhd() -> Vec<u8> {
    let mut file = vec![0; 4096];
    put(&mut file, 0, b"conectix");
    put(&mut file, 16, &512_u64.to_be_bytes());
    put(&mut file, 60, &4_u32.to_be_bytes());
    put(&mut file, 512, b"cxsparse");
    put(&mut file, 512 + 64, &wide("base.vhd", true));
    put(&mut file, 512 + 576, b"W2ru");
    put(&mut file, 512 + 584, &18_u32.to_be_bytes());
    put(&mut file, 512 + 592, &2048_u64.to_be_bytes());
    put(&mut file, 2048, &wide(r"..\b.vhd", false));
    file
}

fn qed() -> Vec<u8> {
    let mut file = vec![0; 1024];
    put(&mut file, 0, b"QED\0");
    put(&mut file, 16, &1_u64.to_le_bytes());
    put(&mut file, 56, &64_u32.to_le_bytes());
    put(&mut file, 60, &10_u32.to_le_bytes());
    put(&mut file, 64, b"base.qcow2");
    file
}

fn qcow1() -> Vec<u8> {
    let mut file = vec![0; 1024];
    put(&mut file, 0, b"QFI\xfb\0\0\0\x01");
    put(&mut file, 8, &64_u64.to_be_bytes());
    put(&mut file, 16, &8_u32.to_be_bytes());
    put(&mut file, 64, b"base.raw");
    file
}

#[test]
fn the_files_that_a_foreign_image_needs_are_read() {
    let text = "# Disk DescriptorFile\nversion=1\nparentCID=12345678\nparentFileNameHint=\"base.vmdk\"\n\
                RW 2048 FLAT \"a b-flat.raw\" 0\nRDONLY 63 SPARSE \"s1.vmdk\"\nddb.adapterType = \"ide\"\n";
    let all = names(&["base.vmdk", "a b-flat.raw", "s1.vmdk"]);
    assert_eq!(look(text.as_bytes()), (Some(ForeignFormat::Vmdk), all.clone()));
    assert_eq!(look(&sparse_vmdk(text)), (Some(ForeignFormat::Vmdk), all));
    assert_eq!(look(&sparse_vmdk("gone")), (Some(ForeignFormat::Vmdk), Parents::Unknown));
    assert_eq!(
        look(b"# comment\n\nversion=1\ncreateType=\"x\"\n"),
        (Some(ForeignFormat::Vmdk), Parents::None)
    );
    let mut esx = vec![0; 2048];
    put(&mut esx, 0, b"COWD");
    put(&mut esx, 32, b"parent.vmdk");
    assert_eq!(look(&esx), (Some(ForeignFormat::Vmdk), names(&["parent.vmdk"])));
    assert_eq!(look(&vhdx()), (Some(ForeignFormat::Vhdx), names(&[r".\base.vhdx"])));
    assert_eq!(look(&vhd()), (Some(ForeignFormat::Vpc), names(&["base.vhd", r"..\b.vhd"])));
    assert_eq!(look(&qed()), (Some(ForeignFormat::Qed), names(&["base.qcow2"])));
    assert_eq!(look(&qcow1()), (Some(ForeignFormat::Qcow), names(&["base.raw"])));
    assert_eq!(look(b"version=1x"), (None, Parents::None));
}

#[test]
fn an_impossible_name_is_unknown() {
    let mut lost = qcow1();
    put(&mut lost, 8, &5000_u64.to_be_bytes());
    assert_eq!(look(&lost).1, Parents::Unknown);
    let mut long = qed();
    put(&mut long, 60, &u32::MAX.to_le_bytes());
    assert_eq!(look(&long).1, Parents::Unknown);
    assert_eq!(look(&qed()[..20]).1, Parents::Unknown);
}

/// For any bytes there is an answer, in bounded time and without a panic.
#[test]
fn damaged_headers_are_read_without_a_panic() {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let seeds = [vhdx(), vhd(), qed(), qcow1(), sparse_vmdk("version=1\nRW 1 FLAT \"x\"\n")];
    for round in 0..20_000 {
        let mut file = seeds[round % seeds.len()].clone();
        let reach = [64, 1024, file.len()][random() as usize % 3];
        for _ in 0..=random() % 8 {
            let at = random() as usize % reach;
            file[at] = [0, 1, 0x7f, 0x80, 0xff, random() as u8][random() as usize % 6];
        }
        if random().is_multiple_of(4) {
            file.truncate(random() as usize % file.len());
        }
        let _ = look(&file);
    }
}

use super::*;

fn parse(list: &str) -> Result<MountOptions> {
    MountOptions::parse(&[list], false)
}

fn refusal(list: &str) -> String {
    parse(list).unwrap_err().to_string()
}

#[test]
fn every_option_is_parsed() {
    let options = parse(
        "ro,allow_other,uid=5,gid=0,umask=027,threads=4,cache=64M,backing_dir=/a,backing_dir=/b,\
         map=/old=/new,readonly=base*.raw,format=*.img:raw,format=a:b.*:qcow2,standalone=old/*,probe,\
         name=vm.snap*:vm,domains=/d,domains=/e,nodomains,\
         force_share,salvage,nolock,nofiles,symlinks=verbatim,rescan=30,trash=7,config=/c.toml,\
         keys=/k.toml,nopassthrough,kernelmap=on,map_dir=/m,cache_dir=/k,cache_size=2G,offline,timeout=9,\
         noparallelwrites,nosharedmapping,noacl,noxattr,noseccomp,noinotify,\
         noreadahead,noiouring,noexec,noatime,\
         sync,dirsync,fsname=images,context=a:b:c,rootcontext=\"a:b:c:s0:c1,c2\",auto_unmount,remount",
    );
    let expected = MountOptions {
        read_only: true,
        allow_other: true,
        uid: Some(5),
        gid: Some(0),
        umask: Some(0o27),
        threads: Some(4),
        cache: Some(64 << 20),
        backing_dirs: vec!["/a".into(), "/b".into()],
        maps: vec![PathMap { old: "/old".into(), new: "/new".into() }],
        readonly: vec![Pattern::new("base*.raw").unwrap()],
        standalone: vec![Pattern::new("old/*").unwrap()],
        formats: vec![
            FormatRule { glob: Pattern::new("*.img").unwrap(), format: ImageFormat::Raw },
            FormatRule { glob: Pattern::new("a:b.*").unwrap(), format: ImageFormat::Qcow2 },
        ],
        names: vec![NameRule { glob: Pattern::new("vm.snap*").unwrap(), name: b"vm".to_vec() }],
        domains: vec!["/d".into(), "/e".into()],
        no_domains: true,
        probe: true,
        force_share: true,
        salvage: true,
        no_lock: true,
        no_files: true,
        keys: Some("/k.toml".into()),
        symlinks: Some(Symlinks::Verbatim),
        rescan: Some(Duration::from_secs(30)),
        trash: Some(Duration::from_hours(7 * 24)),
        config: Some("/c.toml".into()),
        no_passthrough: true,
        kernel_map: Some(KernelMapping::On),
        map_dir: Some("/m".into()),
        cache_dir: Some("/k".into()),
        cache_size: Some(2 << 30),
        offline: true,
        timeout: Some(Duration::from_secs(9)),
        no_parallel_writes: true,
        no_shared_mapping: true,
        no_acl: true,
        no_xattr: true,
        no_seccomp: true,
        no_inotify: true,
        no_readahead: true,
        no_io_uring: true,
        fsname: Some("images".into()),
        contexts: vec![b"context=a:b:c".to_vec(), b"rootcontext=\"a:b:c:s0:c1,c2\"".to_vec()],
        auto_unmount: true,
        remount: true,
        exec: Some(false),
        atime: Some(false),
        sync: Some(true),
        dirsync: true,
    };
    assert_eq!(options.unwrap(), expected);
}

#[test]
fn options_of_mount_and_systemd_are_ignored() {
    let left = "rw,_netdev,nofail,user,users,owner,group,noauto,auto,defaults,relatime,nodiratime,lazytime,\
                nosuid,suid,dev,nodev,x-systemd.automount,X-mount.mkdir=0755,x-foo=a b,comment=x,\
                subtype=chainfs,,";
    assert_eq!(parse(left).unwrap(), MountOptions::default());
    assert!(parse("ro,rw").unwrap().read_only, "mount(8) adds rw by default");
}

#[test]
fn the_last_value_holds_and_lists_add_up() {
    let options =
        MountOptions::parse(&["uid=1,noexec,backing_dir=/a", "uid=2,exec,backing_dir=/b"], false).unwrap();
    assert_eq!((options.uid, options.exec, options.backing_dirs.len()), (Some(2), Some(true), 2));
}

#[test]
fn commas_and_equals_signs_of_paths_are_escaped() {
    let options = parse(r"backing_dir=/a\,b\\c\d,map=/o\=ld=/n=ew,ro").unwrap();
    assert_eq!(options.backing_dirs, [PathBuf::from(r"/a,b\c\d")]);
    assert_eq!(options.maps, [PathMap { old: "/o=ld".into(), new: "/n=ew".into() }]);
    assert!(options.read_only);
}

#[test]
fn paths_may_be_any_bytes() {
    let list = OsStr::from_bytes(b"backing_dir=/\xff,ro");
    let options = MountOptions::parse(&[list], false).unwrap();
    assert_eq!(options.backing_dirs[0].as_os_str().as_bytes(), b"/\xff");
}

#[test]
fn unknown_options_are_refused_with_a_suggestion() {
    for (typed, meant) in [
        ("allow-other", "allow_other"),
        ("alow_other", "allow_other"),
        ("thread=3", "threads"),
        ("no_files", "nofiles"),
        ("forceshare", "force_share"),
        ("read_only", "readonly"),
        ("RO", "ro"),
    ] {
        let name = typed.split('=').next().unwrap();
        assert_eq!(refusal(typed), format!("mount option '{name}': unknown; did you mean '{meant}'?"));
    }
    assert_eq!(refusal("quux"), "mount option 'quux': unknown; see chainfs mount --help");
    assert_eq!(refusal("a\x1b[2J"), "mount option 'a\\x1b[2J': unknown; see chainfs mount --help");
    assert!(MountOptions::parse(&[OsStr::from_bytes(b"\xff=1")], false).is_err());
    let sloppy = MountOptions::parse(&["quux=1,ro,sec=none,\u{fffd}"], true).unwrap();
    assert_eq!(sloppy, MountOptions { read_only: true, ..MountOptions::default() });
    assert!(refusal(&"x".repeat(1 << 20)).contains("unknown"));
}

#[test]
fn invalid_values_name_the_option_and_what_it_takes() {
    for (list, said) in [
        ("uid", "mount option 'uid': needs a value"),
        ("uid=", "mount option 'uid': needs a value"),
        ("uid=root", "mount option 'uid': 'root' must be a number from 0 to 4294967294"),
        ("uid=4294967295", "mount option 'uid': '4294967295' must be a number from 0 to 4294967294"),
        ("uid=+1", "mount option 'uid': '+1' must be a number from 0 to 4294967294"),
        ("ro=1", "mount option 'ro': takes no value"),
        ("umask=9", "mount option 'umask': '9' must be octal, as in 027"),
        ("umask=1777", "mount option 'umask': '1777' must be octal, as in 027"),
        ("threads=0", "mount option 'threads': '0' must be a number from 1 to 256"),
        ("rescan=0", "mount option 'rescan': '0' must be a number from 1 to 86400"),
        ("map=/a", "mount option 'map': '/a' must be OLD=NEW, two directories"),
        ("map=/a=", "mount option 'map': '/a=' must be OLD=NEW, two directories"),
        ("format=raw", "mount option 'format': 'raw' must be GLOB:raw or GLOB:qcow2"),
        ("format=*:vmdk", "mount option 'format': '*:vmdk' must be GLOB:raw or GLOB:qcow2"),
        ("kernelmap=yes", "mount option 'kernelmap': must be auto, on or off"),
        ("symlinks=no", "mount option 'symlinks': must be inside or verbatim"),
        ("config", "mount option 'config': needs a value"),
    ] {
        assert_eq!(refusal(list), said);
    }
    assert!(refusal("cache=lots").starts_with("mount option 'cache': size 'lots': "));
    assert!(refusal("readonly=[").starts_with("mount option 'readonly': '[' is not a pattern: "));
}

#[test]
fn options_override_the_file_and_lists_are_joined() {
    let file = parse("uid=1,gid=1,backing_dir=/file,ro,exec").unwrap();
    let merged = parse("uid=2,backing_dir=/option,noexec,rw").unwrap().over(file);
    assert_eq!(
        (merged.uid, merged.gid, merged.exec, merged.read_only),
        (Some(2), Some(1), Some(false), true)
    );
    assert_eq!(merged.backing_dirs, [PathBuf::from("/file"), PathBuf::from("/option")]);
}

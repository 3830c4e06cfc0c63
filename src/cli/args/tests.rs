use super::*;
use clap::CommandFactory as _;

fn parsed(line: &str) -> Result<Command, u8> {
    parse(line.split_whitespace()).map(|cli| cli.command).map_err(|refusal| refusal.code)
}

#[test]
fn the_definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn mount_takes_the_arguments_of_mount_8() {
    let Ok(Command::Mount(args)) = parsed("chainfs mount /s /d -o ro,uid=5 -f --sloppy -o probe") else {
        panic!()
    };
    assert_eq!((args.store, args.dir), ("/s".into(), "/d".into()));
    assert_eq!(args.options, ["ro,uid=5", "probe"]);
    assert!(args.foreground && args.sloppy);
}

#[test]
fn invalid_arguments_end_with_the_exit_code_of_their_command() {
    for (line, code) in [
        ("chainfs mount /s", 1),
        ("chainfs mount /s /d --nonsense", 1),
        ("chainfs mount --help", 0),
        ("chainfs --version", 0),
        ("chainfs umount", 2),
        ("chainfs", 2),
        ("chainfs create a.qcow2", 2),
        ("chainfs create a.qcow2 10Q", 2),
        ("chainfs create a.qcow2 -b b.raw", 2),
        ("chainfs create a.qcow2 1G -f raw", 2),
        ("chainfs info a --output dot", 2),
        ("chainfs info a --output human --json", 2),
        ("chainfs snapshot /mnt/web", 2),
        ("chainfs snapshot /mnt/web n --internal --file f", 2),
        ("chainfs commit", 2),
        ("chainfs commit /mnt/web --into x", 2),
        ("chainfs pull /mnt/web --detach -p", 2),
        ("chainfs cancel /mnt/web now", 2),
    ] {
        assert_eq!(parsed(line).unwrap_err(), code, "{line}");
    }
}

#[test]
fn qemu_img_s_spellings_work() {
    let Ok(Command::Info(args)) = parsed("chainfs info -U --backing-chain -f raw --output=json a.img") else {
        panic!()
    };
    assert!(args.image.force_share && args.backing_chain && args.format == Some(ImageFormat::Raw));
    assert_eq!(args.output.format(), Output::Json);
    let Ok(Command::Map(args)) = parsed("chainfs map --json a@sn") else { panic!() };
    assert_eq!(args.output.format(), Output::Json);
    let Ok(Command::Compare(args)) = parsed("chainfs compare -s -U -f raw -F qcow2 a b") else { panic!() };
    assert!(args.strict && args.formats.b_format == Some(ImageFormat::Qcow2));
    let Ok(Command::Create(args)) =
        parsed("chainfs create -f qcow2 -b base.raw -F raw -o cluster_size=64K,compat=1.1 new.qcow2 1.5G")
    else {
        panic!()
    };
    assert_eq!((args.size, args.options.len()), (Some(3 << 29), 2));
    let Ok(Command::Tree(args)) = parsed("chainfs tree --full --ascii --output svg /s") else { panic!() };
    assert!(args.full && args.ascii && args.output == TreeOutput::Svg);
}

#[test]
fn verbs_take_the_arguments_of_control_files() {
    let given = |line: &str| {
        let Ok(Command::Verb(verb)) = parsed(line) else { panic!("{line}: {:?}", parsed(line)) };
        verb.invocation().map(|given| given.request.to_string()).map_err(|error| error.kind())
    };
    for (line, command) in [
        ("chainfs snapshot t n --file f --description d", "snapshot n file=f description=d"),
        ("chainfs snapshot --internal t n", "snapshot n internal"),
        ("chainfs snapshot --chains a,b/c t n", "snapshot n chains=a,b/c"),
        ("chainfs commit t", "commit"),
        (
            "chainfs commit t --top a --base b --keep --discard-internal",
            "commit top=a base=b keep discard-internal",
        ),
        ("chainfs pull t --base none", "pull"),
        (
            "chainfs pull --base b --into i --delete --discard-internal t",
            "pull base=b into=i delete discard-internal",
        ),
    ] {
        assert_eq!(given(line).as_deref(), Ok(command), "{line}");
    }
    for line in ["chainfs snapshot t a/b", "chainfs snapshot t internal", "chainfs commit t --top a/b"] {
        assert_eq!(given(line), Err(crate::error::ErrorKind::Usage), "{line}");
    }
}

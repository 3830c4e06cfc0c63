//! `chainfs check`: checks one image, or all images of a store, and repairs them with `--repair`.

use super::args::{CheckArgs, Output, RepairScope};
use super::complain;
use super::output::print;
use super::target::{Target, TargetKind, host_path};
use crate::error::{Error, ErrorKind, Result};
use crate::image::check::{CheckReport, Scope, check, repair};
use crate::io::{Expect, LockSupport, Storage, WriterKind};
use crate::report::json::pretty;
use crate::report::safe::terminal;
use crate::store::{Catalog, DetectedContent, Format, ImageIndex, Store};
use crate::units::Stability;

const COULD_NOT: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
/// qemu-img's code for formats without checks.
const NO_CHECKS: u8 = 63;

/// Runs the command.
pub(super) fn run(args: &CheckArgs) -> Result<u8> {
    let target = Target::find(&args.path, args.format, &args.image)?;
    if args.repair.is_some() && target.store.options().force_share {
        let fact = "a repair needs exclusive access; leave out --force-share";
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    let Target { store, catalog, .. } = &target;
    let images: Vec<ImageIndex> = match &target.what {
        TargetKind::Store => {
            (0..catalog.images.len()).filter(|index| catalog.images[*index].chain_count > 0).collect()
        }
        TargetKind::Chain(leaf) => catalog.layers(*leaf),
        TargetKind::Disk(disk) => return one(&target, disk.layers[0], args),
    };
    let images: Vec<ImageIndex> = images.into_iter().filter(|index| !is_raw(catalog, *index)).collect();
    let mut worst = 0;
    let mut reports = Vec::new();
    for index in images {
        let name = host_path(store, catalog, index).to_string_lossy().into_owned();
        let title = format!("{}:\n", terminal(&name));
        match judge(store, catalog, index, &name, args, &title) {
            Ok(report) => {
                worst = worse(worst, report.exit_code());
                if args.output.format() == Output::Human {
                    print("\n")?;
                } else {
                    reports.push(report);
                }
            }
            Err(error) => {
                complain(&error);
                worst = worse(worst, COULD_NOT);
            }
        }
    }
    if args.output.format() == Output::Json {
        print(&pretty(&reports))?;
    }
    Ok(worst)
}

/// Checks a single image, like `qemu-img check`.
fn one(target: &Target, index: ImageIndex, args: &CheckArgs) -> Result<u8> {
    if is_raw(&target.catalog, index) {
        complain(&Error::new(ErrorKind::Unsupported, "this image format does not support checks"));
        return Ok(NO_CHECKS);
    }
    let name = target.filename.to_string_lossy();
    let report = judge(&target.store, &target.catalog, index, &name, args, "")?;
    if args.output.format() == Output::Json {
        print(&pretty(&report))?;
    }
    Ok(report.exit_code())
}

fn is_raw(catalog: &Catalog, index: ImageIndex) -> bool {
    catalog.images[index].format == Some(Format::Raw)
}

/// Checks an image, or repairs it. In text output, prints `title` and the report.
fn judge(
    store: &Store,
    catalog: &Catalog,
    index: ImageIndex,
    name: &str,
    args: &CheckArgs,
    title: &str,
) -> Result<CheckReport> {
    let image = &catalog.images[index];
    let bears_magic = matches!(image.content, DetectedContent::Qcow2(_) | DetectedContent::Malformed(_));
    let is_undecided = image.format.is_none() && matches!(image.content, DetectedContent::Qcow2(_));
    if let Some(problem) = image.problem.as_ref().filter(|_| !bears_magic || is_undecided) {
        return Err(Error::new(ErrorKind::Broken, format!("{name} {problem}")));
    }
    let say = |text: &str| if args.output.format() == Output::Human { print(text) } else { Ok(()) };
    let file = store.file(&image.place, &image.stat, Expect::SameVersion);
    let Some(scope) = args.repair else {
        // While another process writes the image, its tables on disk are incomplete and look damaged.
        let _lock = if store.options().force_share { None } else { Some(file.lock(Stability::Frozen)?) };
        let storage: &dyn Storage = &*file;
        let report = check(storage, name)?;
        say(&format!("{title}{}", safe_lines(&report)))?;
        return Ok(report);
    };
    if image.place.root != 0 {
        let fact = "it is in a backing_dir, whose images are never changed; name the image itself";
        return Err(Error::new(ErrorKind::Forbidden, format!("{name}: {fact}")));
    }
    let _lock = file.lock_for_writing(WriterKind::Guest, LockSupport::Required)?;
    let storage = file.open_for_writing()?;
    let scope = match scope {
        RepairScope::Leaks => Scope::Leaks,
        RepairScope::All => Scope::Loss,
    };
    let done = repair(&*storage, name, scope, &mut |found| say(&format!("{title}{}", safe_lines(found))))?;
    let (leaks, corruptions) = (done.report.leaks_fixed, done.report.corruptions_fixed);
    let lost = done.lost.to_string();
    if args.output.format() == Output::Json {
        // Losses are reported in each output format.
        lost.lines().for_each(|line| eprintln!("chainfs: {name}: {}", terminal(line)));
    } else {
        print(&lost.lines().map(|line| terminal(line) + "\n").collect::<String>())?;
    }
    let notes: Vec<String> = done.notes.iter().map(|note| terminal(note) + "\n").collect();
    let text = if done.is_mended {
        format!(
            "\n{}The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
             {corruptions} corruptions\n\n{}Double checking the fixed image now...\n{}",
            done.actions,
            notes.concat(),
            safe_lines(&done.report)
        )
    } else {
        notes.concat()
    };
    say(&text)?;
    Ok(done.report)
}

/// The lines of a report, each made safe for a terminal.
fn safe_lines(report: &CheckReport) -> String {
    report.to_string().lines().map(|line| terminal(line) + "\n").collect()
}

/// The more severe of two exit codes.
fn worse(a: u8, b: u8) -> u8 {
    let gravity = |code: u8| match code {
        CORRUPT => 3,
        COULD_NOT => 2,
        LEAKS => 1,
        _ => 0,
    };
    if gravity(b) > gravity(a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corruption_outranks_a_failed_check_and_that_outranks_leaks() {
        assert_eq!([0, 3, 1, 2, 0, 1].into_iter().fold(0, worse), 2);
        assert_eq!([0, 3, 1].into_iter().fold(0, worse), 1);
        assert_eq!([3, 0].into_iter().fold(0, worse), 3);
    }
}

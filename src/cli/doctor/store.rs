//! A store or an image: its file system, its problems, who uses its images, and whether libvirt's user reaches
//! them.

use std::path::Path;

use super::file_system;
use super::finding::{Finding, Mark, quoted};
use super::fuse;
use super::host::Host;
use super::libvirt;
use super::mounts;
use crate::cli::args::ImageArgs;
use crate::cli::target::{Target, host_path, place_in_mount};
use crate::io::{LockKind, is_address};
use crate::report::store::{no_images, problems_text};
use crate::store::shown;

/// Findings of one sort that are listed; of more, their number.
const MAX_LISTED: usize = 10;

/// Everything about the path, given to `say` as it is found; `scan` is told which store is scanned next.
pub(super) fn check(
    host: &Host,
    path: &Path,
    args: &ImageArgs,
    scan: &dyn Fn(&Path),
    say: &mut dyn FnMut(Finding),
) {
    let all = mounts::all(host);
    match place_in_mount(path) {
        Ok(Some((store, _))) => {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let covering = all.iter().filter(|mount| absolute.starts_with(&mount.directory));
            if let Some(mount) = covering.max_by_key(|mount| mount.directory.as_os_str().len()) {
                mounts::check(host, mount).into_iter().for_each(&mut *say);
            }
            scan(&store);
            of_store(host, &store, args, say);
        }
        Ok(None) => {
            if path.is_dir()
                && let Some(finding) = fuse::confined(host, path.canonicalize().ok().as_deref())
            {
                say(finding);
            }
            scan(path);
            of_store(host, path, args, say);
        }
        Err(error) => say(unopened(path, &error)),
    }
}

fn unopened(path: &Path, error: &crate::error::Error) -> Finding {
    Finding::problem(shown(path), error.to_string()).means("it cannot be mounted")
}

fn of_store(host: &Host, path: &Path, args: &ImageArgs, say: &mut dyn FnMut(Finding)) {
    let target = match Target::find(path, None, args) {
        Ok(target) => target,
        Err(error) => return say(unopened(path, &error)),
    };
    let (store, catalog) = (&target.store, &target.catalog);
    // What is elsewhere has no file system and no permissions of this machine.
    let is_here = !is_address(path);
    let directory = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    if is_here {
        file_system::check(&directory, &host.mounts()).into_iter().for_each(&mut *say);
    }

    let chains = catalog.chains().count();
    match no_images(store, catalog) {
        Some(sentence) => say(Finding::warning(shown(path), "has no disks").means(sentence)),
        None => say(Finding::ok(
            shown(path),
            format!(
                "chains: {chains}, images: {}, directories: {}",
                catalog.images.len(),
                catalog.directories.len()
            ),
        )),
    }
    if is_here {
        watched(host, catalog.directories.len(), say);
    }
    let problems = problems_text(catalog);
    let problems = problems.lines().map(|line| Finding::warning(shown(path), line.to_owned()));
    listed(problems, "problems", &format!("chainfs info {}", quoted(path)), say);

    let leaves: Vec<_> =
        catalog.chains().map(|(_, leaf)| leaf).filter(|leaf| catalog.is_active(*leaf)).collect();
    let used = leaves.iter().filter_map(|leaf| {
        let error = store.locked_out(&catalog.images[*leaf], LockKind::Writer)?;
        Some(
            Finding::note(shown(&host_path(store, catalog, *leaf)), error.to_string())
                .means("its active disk cannot be written here until that ends"),
        )
    });
    listed(used, "images in use", "cat MOUNT/.chainfs/problems.txt", say);

    if let Some(user) = libvirt::user(host).filter(|_| is_here) {
        let mut seen = std::collections::HashSet::new();
        let stopped = (0..catalog.images.len()).filter_map(|index| {
            let path = host_path(store, catalog, index);
            match libvirt::obstacle(&user.subject, &path) {
                Ok(Some(found)) => seen
                    .insert(found.path.clone())
                    .then(|| libvirt::unreachable(&user, &shown(&path), &found)),
                Ok(None) => None,
                Err(error) => {
                    Some(Finding::note(shown(&path), format!("the way to it is unknown ({error})")))
                }
            }
        });
        let count = listed(stopped, "places", "chainfs doctor as root", say);
        if count == 0 && !catalog.images.is_empty() {
            say(Finding::ok(shown(&target.filename), format!("{} can read every image", user.name)));
        }
    }
}

/// Whether there are watches for all directories of a store.
fn watched(host: &Host, directories: usize, say: &mut dyn FnMut(Finding)) {
    const LIMIT: &str = "/proc/sys/fs/inotify/max_user_watches";
    let Some(limit) = host.number(LIMIT).filter(|limit| (*limit as usize) < directories + 1) else { return };
    let wanted = (directories + 1).next_power_of_two() * 2;
    say(Finding::warning(
        "inotify",
        format!("fs.inotify.max_user_watches is {limit} for {directories} directories"),
    )
    .means("the store is scanned every few seconds instead of being watched")
    .fix(format!("sysctl -w fs.inotify.max_user_watches={wanted}")));
}

/// Says the first findings, and how many more there are; returns their number.
fn listed(
    findings: impl Iterator<Item = Finding>,
    what: &str,
    fix: &str,
    say: &mut dyn FnMut(Finding),
) -> usize {
    let (mut count, mut mark) = (0, Mark::Ok);
    for finding in findings {
        count += 1;
        mark = mark.max(finding.mark);
        if count <= MAX_LISTED {
            say(finding);
        }
    }
    if count > MAX_LISTED {
        say(Finding::new(mark, what, format!("{} more", count - MAX_LISTED)).fix(fix));
    }
    count
}

#[cfg(test)]
mod tests {
    use super::super::host::testing::machine;
    use super::*;

    #[test]
    fn long_lists_end_with_a_number() {
        let mut said = Vec::new();
        let findings = (0..12).map(|number| Finding::warning("x", number.to_string()));
        assert_eq!(listed(findings, "problems", "cat x", &mut |finding| said.push(finding)), 12);
        assert_eq!(said.len(), 11);
        assert_eq!((said[10].mark, said[10].found.as_str()), (Mark::Warning, "2 more"));
    }

    #[test]
    fn a_store_of_more_directories_than_watches_is_named() {
        let said = |limit: &str| {
            let (_root, host) = machine(0, &[("/proc/sys/fs/inotify/max_user_watches", limit)]);
            let mut said = Vec::new();
            watched(&host, 100, &mut |finding| said.push(finding));
            said
        };
        assert!(said("65536\n").is_empty());
        assert_eq!(said("100\n")[0].fix.as_deref(), Some("sysctl -w fs.inotify.max_user_watches=256"));
    }
}

//! The mount points that `AppArmor`'s profile of fusermount3 allows, as apparmor.d(5) writes them.
//!
//! Reads only what these rules need: `mount ... -> PATTERN,`, variables, alternatives and wildcards.

use std::path::Path;

use super::host::Host;

/// Ubuntu's profile, since 25.04.
pub(super) const PROFILE: &str = "/etc/apparmor.d/fusermount3";
const LOCAL: &str = "/etc/apparmor.d/local/fusermount3";
const DISABLED: &str = "/etc/apparmor.d/disable/fusermount3";
/// Alternatives of one pattern.
const MAX_ALTERNATIVES: usize = 1000;

/// The patterns of mount points.
#[derive(Debug)]
pub(super) struct Rules(Vec<String>);

impl Rules {
    /// Of the machine's profile; `None` if nothing confines fusermount3, or that cannot be read.
    pub(super) fn of(host: &Host) -> Option<Self> {
        let is_on = host.read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y");
        if !is_on || host.exists(DISABLED) {
            return None;
        }
        let profile = host.read(PROFILE).ok()?;
        let local = host.read(LOCAL).unwrap_or_default();
        let mut patterns: Vec<String> = profile.lines().chain(local.lines()).filter_map(pattern).collect();
        patterns.dedup();
        Some(Self(patterns))
    }

    /// The patterns, as they are written.
    pub(super) fn mount_points(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether one of them allows a mount on a directory.
    pub(super) fn allow(&self, directory: &Path) -> bool {
        let mut text = directory.to_string_lossy().into_owned();
        if !text.ends_with('/') {
            text.push('/');
        }
        self.0
            .iter()
            .flat_map(|pattern| alternatives(pattern))
            .any(|pattern| matches(pattern.as_bytes(), text.as_bytes()))
    }
}

/// The mount point of `mount fstype=... options=... -> "PATTERN",`; `None` for other lines.
fn pattern(line: &str) -> Option<String> {
    let rule = line.trim().strip_prefix("mount")?.split('#').next()?.trim().strip_suffix(',')?;
    let place = match rule.split_once("->") {
        Some((_, place)) => place.trim().trim_matches('"'),
        // A rule without a mount point allows all.
        None => "/**",
    };
    Some(place.to_owned())
}

/// The pattern without variables and braces.
fn alternatives(pattern: &str) -> Vec<String> {
    let known = [
        ("@{HOME}", "{/home/*,/root}"),
        ("@{HOMEDIRS}", "/home"),
        ("@{run}", "{/run,/var/run}"),
        ("@{uid}", "*"),
        ("@{user_share_dirs}", "{/home/*,/root}/.local/share"),
    ];
    let mut text = pattern.to_owned();
    for (name, value) in known {
        text = text.replace(name, value);
    }
    let mut found = vec![text.replace("//", "/")];
    // Innermost braces first: none is left within.
    while let Some(at) = found.iter().position(|text| braces(text).is_some()) {
        let text = found.swap_remove(at);
        let Some((open, close)) = braces(&text) else { continue };
        let words = text[open + 1..close].split(',');
        found.extend(words.map(|word| format!("{}{word}{}", &text[..open], &text[close + 1..])));
        if found.len() > MAX_ALTERNATIVES {
            return Vec::new();
        }
    }
    found.into_iter().map(|text| text.replace("//", "/")).collect()
}

/// The first pair of braces that has none within.
fn braces(text: &str) -> Option<(usize, usize)> {
    let close = text.find('}')?;
    Some((text[..close].rfind('{')?, close))
}

/// `*` is any text without a slash, `**` any text, `?` one character.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', b'*', rest @ ..] => (0..=text.len()).any(|at| matches(rest, &text[at..])),
        [b'*', rest @ ..] => {
            let end = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=end).any(|at| matches(rest, &text[at..]))
        }
        [b'?', rest @ ..] => text.first().is_some_and(|byte| *byte != b'/') && matches(rest, &text[1..]),
        [byte, rest @ ..] => text.first() == Some(byte) && matches(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(line: &str, place: &str) -> bool {
        Rules(pattern(line).into_iter().collect()).allow(Path::new(place))
    }

    #[test]
    fn the_rules_of_ubuntus_profile_are_understood() {
        let rule = |place: &str| format!("  mount fstype=@{{fuse_types}} options=(nosuid,nodev) -> {place},");
        for (place, directory, allowed) in [
            ("@{HOME}/**/", "/home/ann/images", true),
            ("@{HOME}/**/", "/root/a/b", true),
            ("@{HOME}/**/", "/home/ann", false),
            ("/mnt/{,**/}", "/mnt", true),
            ("/mnt/{,**/}", "/mnt/images", true),
            ("/mnt/{,**/}", "/mntx", false),
            ("@{run}/user/@{uid}/**/", "/run/user/1000/x", true),
            ("/tmp/**/", "/srv/x", false),
            ("\"/srv/a b/\"", "/srv/a b", true),
        ] {
            assert_eq!(allows(&rule(place), directory), allowed, "{place} {directory}");
        }
        assert!(allows("mount fstype=fuse.chainfs,", "/anywhere"));
        assert!(!allows("umount /mnt/,", "/mnt"));
        assert!(!allows("# mount -> /mnt/,", "/mnt"));
    }

    #[test]
    fn a_pattern_of_very_many_alternatives_has_an_end() {
        let hostile = "{a,b}".repeat(40);
        assert!(!allows(&format!("mount -> /{hostile}/,"), "/a"));
    }
}

//! Each setting in words, once: for chainfs.toml, chainfs.toml(5) and mount.chainfs(8).

/// A setting, as manuals and the template of the configuration file show it.
pub(in crate::cli) struct SettingText {
    /// Its name in `-o`, and its key.
    pub(in crate::cli) name: &'static str,
    /// What follows its name in `-o`: `=SIZE`, or nothing.
    pub(in crate::cli) value: &'static str,
    /// A value for chainfs.toml; the usual one where there is one.
    pub(in crate::cli) example: &'static str,
    /// What it does.
    pub(in crate::cli) meaning: &'static str,
}

const fn text(
    name: &'static str,
    value: &'static str,
    example: &'static str,
    meaning: &'static str,
) -> SettingText {
    SettingText { name, value, example, meaning }
}

/// In the order of the settings.
pub(in crate::cli) const TEXTS: [SettingText; super::SETTINGS.len()] = [
    text("ro", "", "false", "Never open an image for writing. Commands are refused."),
    text(
        "allow_other",
        "",
        "false",
        "Let other users enter the mount; the kernel enforces the modes shown. Ordinary users may set it only if \
         /etc/fuse.conf has user_allow_other. Virtual machines of libvirt need it.",
    ),
    text("uid", "=N", "1000", "The owner shown for all files, instead of the images' own."),
    text("gid", "=N", "1000", "The group shown for all files, instead of the images' own."),
    text("umask", "=BITS", "\"027\"", "Permission bits that no file shows, in octal."),
    text("threads", "=N", "4", "The number of threads that serve requests, 1 to 64."),
    text("cache", "=SIZE", "\"128M\"", "Memory for tables and decompressed clusters."),
    text(
        "backing_dir",
        "=DIR",
        "[\"/srv/templates\"]",
        "A directory outside of the store that may hold backing files. It must exist. Nothing in it is written.",
    ),
    text(
        "map",
        "=OLD=NEW",
        "[\"/old/images=/srv/images\"]",
        "Look in NEW for backing files that headers name under OLD.",
    ),
    text("readonly", "=GLOB", "[\"golden*.qcow2\"]", "Images that never become writable."),
    text(
        "format",
        "=GLOB:FORMAT",
        "[\"*.img:raw\"]",
        "The format, raw or qcow2, of images whose name and header do not say.",
    ),
    text(
        "standalone",
        "=GLOB",
        "[\"lost+found\"]",
        "Unreadable files and directories that are known to have no backing file.",
    ),
    text(
        "name",
        "=GLOB:NAME",
        "[\"vm.snap*:vm\"]",
        "The name of the chain of a leaf, instead of the one that follows from its file.",
    ),
    text(
        "domains",
        "=DIR",
        "[\"/etc/libvirt/qemu\"]",
        "Where libvirt's definitions of domains are, instead of the usual directories.",
    ),
    text("nodomains", "", "false", "Do not read libvirt's definitions of domains."),
    text("auto_unmount", "", "false", "Unmount when the daemon ends, however it ends."),
    text(
        "probe",
        "",
        "false",
        "Detect the format where a header names no backing format. A guest can write what looks like a header, so \
         use it only with guests that you trust.",
    ),
    text(
        "force_share",
        "",
        "false",
        "Show images that another process is writing. What is read may be mixed up.",
    ),
    text(
        "salvage",
        "",
        "false",
        "If a layer is missing, read the others. Data of the missing layer is an error.",
    ),
    text(
        "nolock",
        "",
        "false",
        "Write images even on file systems without file locks. No other program may use them meanwhile.",
    ),
    text("nofiles", "", "false", "Do not show the guests' partitions and files."),
    text(
        "keys",
        "=FILE",
        "\"/etc/chainfs/keys.toml\"",
        "The table of keys of encrypted volumes (LUKS). FILE must give other users no right.",
    ),
    text(
        "symlinks",
        "=HOW",
        "\"inside\"",
        "How links of guests are shown: inside keeps them in their volume, verbatim leaves them as they are.",
    ),
    text("rescan", "=SECONDS", "30", "How often a store is scanned that cannot be watched."),
    text(
        "trash",
        "=DAYS",
        "7",
        "How long layers that commands remove can be restored. Without it they are removed at once.",
    ),
    text(
        "nopassthrough",
        "",
        "false",
        "Serve every read by the daemon, though the kernel could read raw layers itself.",
    ),
    text(
        "kernelmap",
        "=HOW",
        "\"auto\"",
        "Whether the kernel reads the chains of snapshots by itself, as fast as plain files: auto where it can (root, \
         Linux 6.12 with EROFS), on or not at all, off. No overlayfs can be put on the mount then.",
    ),
    text(
        "map_dir",
        "=DIR",
        "\"/var/cache/chainfs\"",
        "Where the files lie that the kernel needs for that, unnamed and at most 1 GiB. It must be on a disk: a tmpfs \
         will not do.",
    ),
    text(
        "cache_dir",
        "=DIR",
        "\"/var/cache/chainfs/objects\"",
        "Where what was fetched from a remote store is kept. Mounts of one user share it. By default \
         /var/cache/chainfs/objects for root, and chainfs/objects in the user's cache directory for others.",
    ),
    text("cache_size", "=SIZE", "\"20G\"", "The space that the files in cache_dir may have."),
    text(
        "offline",
        "",
        "false",
        "Show a remote store from cache_dir alone: no request is sent, and what is not there is an error.",
    ),
    text("timeout", "=SECONDS", "30", "The time after which a request to a remote store fails."),
    text("noparallelwrites", "", "false", "Let the kernel send one write to a disk at a time."),
    text("nosharedmapping", "", "false", "Let active disks be mapped privately only."),
    text("noacl", "", "false", "Show the access control lists of guests, but do not enforce them."),
    text(
        "noxattr",
        "",
        "false",
        "Show no extended attributes; ls -l of guests' files then costs no request for each file.",
    ),
    text(
        "noseccomp",
        "",
        "false",
        "Let the processes that parse guests' file systems run without seccomp filter.",
    ),
    text("noinotify", "", "false", "Scan the store every rescan seconds instead of watching it."),
    text("noreadahead", "", "false", "Leave the kernel's read-ahead size as it is."),
    text(
        "noiouring",
        "",
        "false",
        "Take all requests through /dev/fuse, though the kernel has FUSE over io_uring.",
    ),
    text(
        "noexec",
        "",
        "false",
        "Let no program in the mount be executed. That is so unless -o exec is given.",
    ),
];

#[cfg(test)]
mod tests {
    use super::super::{SETTINGS, Takes};
    use super::*;

    #[test]
    fn every_setting_is_explained_in_its_place() {
        for ((name, takes), text) in SETTINGS.iter().zip(&TEXTS) {
            assert_eq!(*name, text.name);
            assert_eq!(*takes == Takes::Nothing, text.value.is_empty(), "{name}");
            assert_eq!(*takes == Takes::Values, text.example.starts_with('['), "{name}");
            assert!(text.meaning.ends_with('.'), "{name}");
        }
    }
}

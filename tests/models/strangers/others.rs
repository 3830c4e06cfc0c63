//! Changes by other programs to the store.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use super::damage::Damage;
use super::reader::is_raw;
use super::world::{MAX_IMAGES, OPTIONS, World, is_without};
use support::{Outcome as _, tool};

impl World {
    pub(super) fn base(&mut self) {
        let content = self.content();
        let name = self.next("b");
        if self.rng.below(2) == 0 {
            self.raw_base(format!("{name}.raw"), content);
        } else {
            let (name, plain) = (format!("{name}.qcow2"), self.scratch.path().join("plain"));
            fs::write(&plain, &content).expect("the content");
            let plain = plain.to_str().expect("a plain path");
            self.img(&["convert", "-f", "raw", "-O", "qcow2", "-o", OPTIONS, plain, &name]);
            self.say(format!("a new base {name}"));
            self.disks.insert(name, content);
        }
    }

    pub(super) fn raw_base(&mut self, name: String, content: Vec<u8>) {
        fs::write(self.root.join(&name), &content).expect("a base");
        self.say(format!("a new base {name}"));
        self.disks.insert(name, content);
    }

    /// Another program makes an overlay on any image, in any of the ways in which QEMU can name a file.
    pub(super) fn overlay(&mut self) {
        let sound: Vec<String> = self.names().into_iter().filter(|name| self.is_sound(name)).collect();
        let Some(base) = self.pick(&sound) else { return };
        let Some(disk) = self.reader().disk(&base) else { return };
        let format = if is_raw(&base) { "raw" } else { "qcow2" };
        let stem = self.next("o");
        let (name, kind) = match if is_without("foreign") { 9 } else { self.rng.below(12) } {
            0 => (format!("{stem}.qed"), "qed"),
            1 => (format!("{stem}.qcow"), "qcow"),
            _ => (format!("{stem}.qcow2"), "qcow2"),
        };
        let backing = match if is_without("odd") { 7 } else { self.rng.below(8) } {
            0 => self.root.join(&base).display().to_string(),
            1 => {
                let link = format!("{stem}-link.{format}");
                symlink(self.root.join(&base), self.root.join(&link)).expect("a link");
                link
            }
            2 => {
                let link = format!("{stem}-link.{format}");
                symlink(&base, self.root.join(&link)).expect("a link");
                link
            }
            3 if kind == "qcow2" => {
                format!(r#"json:{{"driver":"{format}","file":{{"driver":"file","filename":"{base}"}}}}"#)
            }
            _ => base.clone(),
        };
        let size = disk.len().to_string();
        let mut args = vec!["create", "-q", "-u", "-f", kind, "-b", &backing, "-F", format];
        if kind == "qcow2" {
            args.extend(["-o", OPTIONS]);
        }
        args.extend([name.as_str(), size.as_str()]);
        self.img(&args);
        self.say(format!("another program: {name} on {base} by {backing}"));
        if backing.starts_with("json:") || backing.contains("-link") {
            self.odd.insert(name.clone());
        }
        if kind == "qcow2" {
            let Some(disk) = self.reader().disk(&name) else { self.fail("the model cannot read an overlay") };
            self.disks.insert(name, disk);
        } else {
            fs::write(self.beside(&name), &base).expect("a note");
            self.foreign.insert(name, (kind, disk));
        }
    }

    pub(super) fn damage(&mut self) {
        let whole: Vec<String> = self
            .names()
            .into_iter()
            .filter(|name| !is_raw(name) && !self.damage.contains_key(name))
            .filter(|name| fs::metadata(self.root.join(name)).is_ok_and(|found| found.nlink() == 1))
            .collect();
        let Some(name) = self.pick(&whole) else { return };
        let is_leaf = self.overlays_of(&name).is_empty() && self.is_named_plainly(&name);
        let damage = Damage::cause(&self.root, &name, is_leaf, &mut self.rng);
        self.say(format!("damage: {name}: {damage:?}"));
        self.damage.insert(name, damage);
        self.tally.damaged += 1;
    }

    /// Whether no link of the store leads to it.
    pub(super) fn is_named_plainly(&self, name: &str) -> bool {
        let entries =
            fs::read_dir(&self.root).expect("the store").map(|entry| entry.expect("an entry").path());
        entries.filter_map(|path| fs::read_link(path).ok()).all(|target| !target.ends_with(name))
    }

    pub(super) fn mend(&mut self) {
        let damaged: Vec<String> = self.damage.keys().cloned().collect();
        let Some(name) = self.pick(&damaged) else { return };
        self.say(format!("mended: {name}"));
        self.damage.remove(&name).expect("its damage").undo(&self.root, &name);
    }

    /// Files without overlays.
    pub(super) fn free(&self) -> Vec<String> {
        let is_free = |name: &String| self.overlays_of(name).is_empty() && !self.damage.contains_key(name);
        self.names().into_iter().filter(is_free).collect()
    }

    /// A file without overlays is removed, and perhaps another of that name is created.
    pub(super) fn replace(&mut self) {
        let free = self.free();
        if let Some(name) = self.pick(&free) {
            let is_gone = self.rng.below(2) == 0;
            self.replace_this(name, is_gone);
        }
    }

    /// Foreign files replace all files of an interrupted command that have no overlay.
    pub(super) fn replace_all(&mut self) {
        for name in self.free().into_iter().filter(|name| self.focus.contains(name)).collect::<Vec<_>>() {
            self.replace_this(name, false);
        }
    }

    pub(super) fn replace_this(&mut self, name: String, is_gone: bool) {
        let path = self.root.join(&name);
        self.disks.remove(&name);
        self.frozen.remove(&name);
        if is_gone {
            fs::remove_file(&path).expect("a file of the store");
            return self.say(format!("another program removes {name}"));
        }
        let content = self.content();
        let mut bytes = content.clone();
        if !is_raw(&name) {
            let [plain, image] = ["plain", "image"].map(|name| self.scratch.path().join(name));
            fs::write(&plain, &content).expect("the content");
            let [plain, image] = [&plain, &image].map(|path| path.to_str().expect("a plain path"));
            self.img(&["convert", "-f", "raw", "-O", "qcow2", "-o", OPTIONS, plain, image]);
            bytes = fs::read(image).expect("another image");
        }
        // At once: some file systems then give it the same inode number.
        fs::remove_file(&path).expect("a file of the store");
        fs::write(&path, bytes).expect("another file");
        self.say(format!("another program puts another {name} in its place"));
        self.replaced.insert(name.clone());
        self.disks.insert(name, content);
    }

    /// A raw disk is frozen by a snapshot, and another program removes all its overlays: it is a leaf again.
    pub(super) fn strand(&mut self) {
        let is_raw_leaf = |world: &Self, chain: &String| {
            world
                .layers(chain)
                .first()
                .is_some_and(|leaf| is_raw(&leaf.1) && world.disks.contains_key(&leaf.1))
        };
        let mut chains: Vec<String> =
            self.chains().into_iter().filter(|chain| is_raw_leaf(self, chain)).collect();
        if chains.is_empty() && self.disks.len() < MAX_IMAGES {
            let (content, stem) = (self.content(), self.next("b"));
            self.raw_base(format!("{stem}.raw"), content);
            let (store, ..) = self.store.as_ref().expect("an open store");
            store.rescan().unwrap_or_else(|error| self.fail(&format!("scanning: {error}")));
            chains.push(stem);
        }
        if let Some(chain) = self.pick(&chains) {
            let name = self.next("s");
            self.give_this(&chain, &format!("snapshot {name}"));
        }
        let frozen: Vec<String> = self.frozen.iter().cloned().collect();
        let Some(name) = self.pick(&frozen) else { return };
        let overlays = self.overlays_of(&name);
        let is_free = |world: &Self, other: &String| {
            world.disks.contains_key(other)
                && !world.damage.contains_key(other)
                && world.overlays_of(other).is_empty()
        };
        if !overlays.iter().all(|other| is_free(self, other)) {
            return;
        }
        for other in &overlays {
            fs::remove_file(self.root.join(other)).expect("an overlay");
            self.disks.remove(other);
            self.odd.remove(other);
        }
        self.say(format!("another program removes all that stands on {name}: {overlays:?}"));
        self.tally.stranded += 1;
        if self.freeze_list.is_none() && self.rng.below(2) == 0 {
            self.spoil_freeze_list();
        }
    }

    pub(super) fn protect(&mut self) {
        let names = self.names();
        let Some(name) = self.pick(&names) else { return };
        let path = self.root.join(self.damage.get(&name).and_then(Damage::present_name).unwrap_or(&name));
        let Ok(found) = fs::metadata(&path) else { return };
        if self.rng.below(3) == 0 {
            let number = self.next("h");
            if found.nlink() == 1 && !self.damage.contains_key(&name) {
                fs::hard_link(&path, self.scratch.path().join(number)).expect("another name");
                self.say(format!("another program gives {name} a second name"));
            }
            return;
        }
        let mode = if found.permissions().mode() & 0o222 == 0 { 0o644 } else { 0o444 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("another mode");
        self.say(format!("another program: mode of {name} is {mode:o}"));
    }

    pub(super) fn spoil_freeze_list(&mut self) {
        let list = self.root.join(".chainfs/frozen.toml");
        if let Some((saved, damaged)) = self.freeze_list.take() {
            if fs::read(&list).ok() != damaged {
                // Its remaining data was usable, and has been used since.
                return;
            }
            fs::write(&list, saved).expect("the list");
            return self.say("the list of frozen files is mended");
        }
        let Ok(saved) = fs::read(&list) else { return };
        match self.rng.below(4) {
            0 => fs::write(&list, "][").expect("the list"),
            1 => fs::write(&list, "").expect("the list"),
            2 => fs::write(&list, &saved[..saved.len() / 2]).expect("the list"),
            _ => fs::remove_file(&list).expect("the list"),
        }
        self.say("the list of frozen files is damaged");
        self.freeze_list = Some((saved, fs::read(&list).ok()));
    }

    /// An intent is damaged: the files that it names are unknown.
    pub(super) fn spoil_intent(&mut self) {
        let Ok(entries) = fs::read_dir(self.root.join(".chainfs/intents")) else { return };
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let Some(path) = paths.filter(|path| path.extension().is_some_and(|found| found == "toml")).min()
        else {
            return;
        };
        let Ok(text) = fs::read(&path) else { return };
        let what = match self.rng.below(4) {
            0 => Vec::new(),
            1 => text[..text.len() / 2].to_vec(),
            2 => text[..text.len() - text.len() / 8].to_vec(),
            _ => String::from_utf8_lossy(&text).replacen("version = ", "version = 9", 1).into_bytes(),
        };
        fs::write(&path, what).expect("the note");
        self.say("the note of what was begun is damaged");
    }

    /// The whole store is copied, with chainfs' own files, and the copy takes its place. It has to be closed.
    pub(super) fn copy(&mut self) {
        let other = self.scratch.path().join("copy");
        tool("cp").arg("-a").arg(&self.root).arg(&other).succeeds();
        // Links, and names in headers, speak of the old place.
        fs::remove_dir_all(&self.root).expect("the store");
        fs::rename(&other, &self.root).expect("the copy");
        self.tally.copied += 1;
        self.say("the store is copied");
    }
}

//! One change of an image, as a whole or not at all: cut at every point, and with every call failing.

use chainfs::error::{ErrorKind, Result};
use chainfs::image::check::check;
use chainfs::image::write::WriterOptions;

use super::crash::each_state;
use super::disk::{Calls, Event, Hit};
use super::ledger::{Ledger, Tolerance, Views, judge, judge_by_qemu};
use super::{Failure, Fault, IMAGE, KIB, Machine, Pages, Random, StartImage, is_long, mix, seed};
use crate::oracle::Scratch;

/// One state of so many is repaired by QEMU.
const QEMU_ONE_IN: u64 = 25;

/// The change of an image.
pub struct Change<'a> {
    pub name: &'a str,
    pub image: &'a StartImage,
    pub options: WriterOptions,
    /// The earlier operations on the disk; not flushed.
    pub before: &'a dyn Fn(&mut Ledger),
    pub act: &'a dyn Fn(&mut Ledger) -> Result<()>,
    /// It can be done again when it is done already, and has to be after a crash.
    pub again: bool,
    /// COPIED may be missing after a crash where a count is 1.
    pub missing_flags: bool,
}

/// The result.
#[derive(Debug, Default)]
pub struct Outcome {
    pub states: u64,
    /// Of them, as before.
    pub old: u64,
    pub by_qemu: u64,
    pub calls: u64,
    /// Calls whose failure poisoned the disk.
    pub poisoned: u64,
    /// After whose failure it was tried again.
    pub retried: u64,
}

impl Change<'_> {
    fn begin(&self, machine: &std::sync::Arc<Machine>) -> Ledger {
        let mut ledger = Ledger::new(self.image, machine, self.options);
        (self.before)(&mut ledger);
        ledger.writer.flush().unwrap();
        ledger
    }

    fn crashed(&self) -> Tolerance {
        Tolerance { leaks: u64::MAX, missing_flags: self.missing_flags }
    }

    /// Crashes it everywhere, `limit` states of it, and continues from there.
    pub fn survives_crashes(&self, limit: usize) -> Outcome {
        let name = self.name;
        let machine = Machine::honest();
        let mut ledger = self.begin(&machine);
        let old = ledger.views.clone();
        let begun = machine.mark(Event::Mark);
        (self.act)(&mut ledger).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ended = machine.mark(Event::Flushed);
        ledger.writer.close().unwrap();
        ledger.verify().unwrap_or_else(|sentence| panic!("{name}: {sentence}"));
        let new = ledger.views.clone();
        judge(self.image, &ledger.files(), &[&new], Tolerance::default())
            .unwrap_or_else(|sentence| panic!("{name}, at the end: {sentence}"));
        judge_by_qemu(self.image, &ledger.files(), &new);

        let mut outcome = Outcome::default();
        let limit = if is_long() { usize::MAX } else { limit };
        each_state(&machine.tape()[begun..], &self.at(&machine, begun), limit, |cut, files| {
            let legal: &[&Views] = if begun + cut > ended { &[&new] } else { &[&old, &new] };
            let complain = |what: &str, sentence: String| -> ! {
                files[0].save(std::env::temp_dir().join("chainfs-change-state.qcow2"));
                panic!("{name}, cut after {cut} of {}: {what}: {sentence}", ended - begun)
            };
            let found = judge(self.image, &files, legal, self.crashed());
            let found = found.unwrap_or_else(|sentence| complain("looked at", sentence));
            let is_old = legal.len() == 2 && found == 0;
            outcome.states += 1;
            outcome.old += u64::from(is_old);
            if outcome.states % QEMU_ONE_IN == QEMU_ONE_IN / 2 {
                outcome.by_qemu += 1;
                self.repair(&files, legal[found]);
            }
            let gone_on = self.go_on(&files, legal[found].clone(), is_old || self.again);
            gone_on.unwrap_or_else(|sentence| complain("going on", sentence));
        });
        outcome
    }

    /// The files as they were at a point of the tape, all of it durable.
    fn at(&self, machine: &Machine, point: usize) -> Vec<Pages> {
        let mut files = self.image.files.clone();
        for event in &machine.tape()[..point] {
            if let Event::Did { file, action } = event {
                action.apply(&mut files[*file]);
            }
        }
        files
    }

    /// After a crash: does it (again), writes, and leaves no more leaks than there were.
    fn go_on(&self, files: &[Pages], views: Views, change: bool) -> std::result::Result<(), String> {
        let text = |error: chainfs::error::Error| error.to_string();
        let machine = Machine::forgetful();
        let mut ledger = Ledger::with(self.image, &machine, self.options, files, views).map_err(text)?;
        ledger.verify()?;
        if change {
            (self.act)(&mut ledger).map_err(text)?;
        }
        let mut random = Random::new(mix(seed()));
        for _ in 0..4 {
            ledger.step(&mut random, 20 * KIB).map_err(text)?;
        }
        match ledger.take("after") {
            Err(error) if error.kind() != ErrorKind::Unsupported => return Err(text(error)),
            _ => {}
        }
        ledger.step(&mut random, 20 * KIB).map_err(text)?;
        ledger.verify()?;
        ledger.writer.close().map_err(text)?;
        let after = ledger.files();
        // Counts of clusters past the end of the file are no leaks until the file grows over them.
        let mut before = files[0].clone();
        before.set_len(before.len().max(after[0].len()));
        let leaks = check(&before, IMAGE).map_err(text)?.leaks;
        // The next opening repairs the flags.
        let tolerance = Tolerance { leaks, missing_flags: false };
        judge(self.image, &after, &[&ledger.views], tolerance).map(drop)
    }

    /// QEMU's repair finds nothing but leaks and flags, and changes no view.
    fn repair(&self, files: &[Pages], views: &Views) {
        let scratch: &Scratch = &self.image.scratch;
        files[0].save(scratch.path(IMAGE));
        if let Some(data) = files.get(1) {
            data.save(scratch.path(super::images::DATA_FILE));
        }
        scratch.run("qemu-img", &["check", "-q", "-r", "all", IMAGE]);
        let repaired: Vec<_> =
            std::iter::once(Pages::load(scratch.path(IMAGE))).chain(files.get(1).cloned()).collect();
        judge_by_qemu(self.image, &repaired, views);
    }

    /// Lets each call fail, one run for each.
    pub fn survives_faults(&self) -> Outcome {
        let mut outcome = Outcome::default();
        for calls in [Calls::Changes, Calls::Reads] {
            for number in 0.. {
                let failure = match (calls, number % 2) {
                    (Calls::Changes, 0) => Failure::NoSpace,
                    _ => Failure::Io,
                };
                let fault = Fault { calls, number, failure, lasting: number % 3 == 2 };
                if !self.one_fault(fault, &mut outcome) {
                    break;
                }
                outcome.calls += 1;
            }
        }
        outcome
    }

    /// One run; whether the call came.
    fn one_fault(&self, fault: Fault, outcome: &mut Outcome) -> bool {
        let machine = Machine::forgetful();
        let mut ledger = self.begin(&machine);
        let old = ledger.views.clone();
        let from = if fault.calls == Calls::Reads { machine.reads() } else { machine.changes() };
        machine.arm(Some(Fault { number: from + fault.number, ..fault }));
        let done = (self.act)(&mut ledger);
        let hit = machine.hit();
        machine.arm(None);
        let complain = |what: &str, sentence: String| -> ! {
            panic!("{}: {fault:?} hit {hit:?}, said {done:?}: {what}: {sentence}", self.name)
        };
        let poison = ledger.writer.poison();
        if hit == Some(Hit::Sync) && poison.is_none() {
            complain("a sync failed", "and the writer goes on".into());
        }
        if poison.is_some() {
            outcome.poisoned += 1;
            let new = {
                let mut ledger = self.begin(&Machine::forgetful());
                (self.act)(&mut ledger).unwrap();
                ledger.views
            };
            // Without room, the flags are repaired at once.
            let is_mended = fault.failure == Failure::NoSpace && !fault.lasting && hit != Some(Hit::Sync);
            let tolerance = Tolerance { missing_flags: self.missing_flags && !is_mended, ..self.crashed() };
            let seen = judge(self.image, &ledger.files(), &[&old, &new], tolerance);
            seen.unwrap_or_else(|sentence| complain("poisoned", sentence));
            return true;
        }
        if done.is_err() {
            outcome.retried += 1;
            // A shorter disk may only have to be trimmed.
            ledger.views.disk.truncate(ledger.writer.size() as usize);
            ledger.verify().unwrap_or_else(|sentence| complain("it failed", sentence));
            (self.act)(&mut ledger).unwrap_or_else(|error| complain("tried again", error.to_string()));
        }
        ledger.verify().unwrap_or_else(|sentence| complain("done", sentence));
        ledger.writer.close().unwrap_or_else(|error| complain("closing", error.to_string()));
        let end = judge(self.image, &ledger.files(), &[&ledger.views], Tolerance::default());
        end.unwrap_or_else(|sentence| complain("at the end", sentence));
        hit.is_some()
    }
}

//! Repairs what an audit has found, as `qemu-img check -r` does it, but without losing data.
//!
//! Promises: no view of the image changes at any moment (except with [`Scope::Loss`], where errors become
//! zeroes); a crash or a failing write leaves an image that the same repair repairs when it is called again.
//! Hence the order, each step durable before the next: counts that are too low are raised, COPIED flags
//! follow, counts that are too high are lowered, the dirty and corrupt bits go last. If the refcounts
//! themselves overlap other structures or are missing, all of them are rewritten at the end of the file,
//! where nothing else can be, and one write within a sector of the header puts them in force.
//!
//! More careful than QEMU: while an entry points nowhere, no cluster is freed, since one that seems unused
//! may be its target; freed clusters keep their bytes; a table is written only if nothing but an L1 entry
//! refers to it and all of it is valid. Memory is bounded by the windows, as in the audit.

use std::fmt;

mod counts;
mod entries;
mod loss;
mod rebuild;
mod stage;
mod survey;

use super::audited::Audited;
use super::window::WINDOW_CLUSTERS;
use super::{CheckReport, FindingKind, MAX_FINDINGS, References, check_in_windows};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Version;
use crate::format::feature;
use crate::format::header::{AUTOCLEAR_AT, INCOMPATIBLE_AT};
use crate::io::{Storage, WriteStorage};
use rebuild::Rebuilt;
use stage::{CountPolicy, Stage};
use survey::Survey;

/// The scope of a repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Leaked clusters; COPIED flags if nothing else is wrong.
    Leaks,
    /// Everything that can be repaired without guessing.
    All,
    /// As [`Scope::All`]; and data beyond the end of a truncated file, which is an error to read, becomes
    /// zeroes for good: each place is reported.
    Loss,
}

/// The result of a repair.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// The audit after it, with the numbers of repairs. Decides the exit code.
    pub report: CheckReport,
    /// Whether that audit was a second one: something was repaired.
    pub is_mended: bool,
    /// The repairs, a line for each of the first [`MAX_FINDINGS`] places.
    pub actions: Actions,
    /// Sentences on facts that the numbers do not show.
    pub notes: Vec<String>,
    /// Data that was lost and reads as zeroes from now on, a line for each of the first [`MAX_FINDINGS`]
    /// ranges.
    pub lost: Actions,
}

/// Lines on the repairs, in `qemu-img`'s words.
#[derive(Clone, Debug, Default)]
pub struct Actions {
    /// The first of them.
    pub lines: Vec<String>,
    /// How many more there were.
    pub suppressed: u64,
}

impl Actions {
    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.lines.len() < MAX_FINDINGS {
            self.lines.push(line());
        } else {
            self.suppressed += 1;
        }
    }
}

impl fmt::Display for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        if self.suppressed > 0 {
            writeln!(f, "... and {} more", self.suppressed)?;
        }
        Ok(())
    }
}

/// Audits the image and repairs it. `found` receives the findings before anything is changed, and may stop
/// the repair with an error.
///
/// No other process may use the image meanwhile: the caller holds QEMU's writer locks.
///
/// # Errors
/// Those of [`super::check`], and with [`Scope::Leaks`] an image whose refcounts cannot be trusted at all:
/// nothing has been changed then. After an error of the storage the image is as sound as before, and may be
/// repaired again.
pub fn repair(
    storage: &dyn WriteStorage,
    name: &str,
    scope: Scope,
    found: &mut dyn FnMut(&CheckReport) -> Result<()>,
) -> Result<Repaired> {
    repair_in_windows(storage, name, scope, found, WINDOW_CLUSTERS)
}

/// Makes an image that was not closed properly writable: recounts its clusters and clears its dirty bit. Does
/// nothing to other images.
///
/// # Errors
/// `Corrupt` if the image is marked as corrupt, or still is after that. Then the dirty bit stays.
pub fn repair_dirty(storage: &dyn WriteStorage, name: &str) -> Result<CheckReport> {
    let header = Audited::open(storage, name)?.header;
    let refusal = |fact: &str| {
        let remedy = "run chainfs check, and repair a copy of it with chainfs check --repair all";
        Error::new(ErrorKind::Corrupt, format!("{name} {fact}; {remedy}"))
    };
    if header.corrupt() {
        return Err(refusal("is marked as corrupt"));
    }
    if !header.dirty() {
        return Ok(CheckReport { filename: name.to_owned(), format: "qcow2", ..CheckReport::default() });
    }
    let report = repair(storage, name, Scope::All, &mut |_| Ok(()))?.report;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(refusal("was not closed properly, and is damaged beyond its refcounts"));
    }
    Ok(report)
}

/// Repairs COPIED flags that an interrupted command has left, and frees the clusters that it has counted;
/// does nothing to an image with any other damage.
pub fn repair_flags(storage: &dyn WriteStorage, name: &str) -> Result<()> {
    let report = check_in_windows(storage, name, WINDOW_CLUSTERS)?;
    let flags = report.count_of(FindingKind::Flag);
    if flags == 0 || report.corruptions > flags || report.check_errors > 0 {
        return Ok(());
    }
    repair(storage, name, Scope::Leaks, &mut |_| Ok(())).map(drop)
}

pub(super) fn repair_in_windows(
    storage: &dyn WriteStorage,
    name: &str,
    scope: Scope,
    found: &mut dyn FnMut(&CheckReport) -> Result<()>,
    window_clusters: u64,
) -> Result<Repaired> {
    // Windows begin at whole bytes of every width of refcounts.
    assert!(window_clusters.is_multiple_of(8));
    let before = check_in_windows(storage, name, window_clusters)?;
    found(&before)?;
    let mut repair = Repair {
        storage,
        name,
        window_clusters,
        leaks_fixed: 0,
        corruptions_fixed: 0,
        actions: Actions::default(),
        notes: Vec::new(),
        lost: Actions::default(),
    };
    repair.apply(scope, &before)?;
    let is_mended = repair.leaks_fixed + repair.corruptions_fixed > 0;
    let mut report = if is_mended { check_in_windows(storage, name, window_clusters)? } else { before };
    report.leaks_fixed = repair.leaks_fixed;
    report.corruptions_fixed = repair.corruptions_fixed;
    repair.clear_bits(&report)?;
    Ok(Repaired { report, is_mended, actions: repair.actions, notes: repair.notes, lost: repair.lost })
}

/// A running repair.
struct Repair<'a> {
    storage: &'a dyn WriteStorage,
    name: &'a str,
    window_clusters: u64,
    leaks_fixed: u64,
    corruptions_fixed: u64,
    actions: Actions,
    notes: Vec<String>,
    lost: Actions,
}

impl<'a> Repair<'a> {
    fn stage(&self) -> Result<Stage<'a>> {
        let storage: &dyn Storage = self.storage;
        let audited = Audited::open(storage, self.name)?;
        // The damage has been reported.
        let references = References::gather(&audited, &mut CheckReport::default())?;
        Ok(Stage { storage: self.storage, audited, references, window_clusters: self.window_clusters })
    }

    fn apply(&mut self, scope: Scope, before: &CheckReport) -> Result<()> {
        let is_whole = scope != Scope::Loss || self.is_whole()?;
        if before.corruptions == 0 && before.check_errors == 0 && before.leaks == 0 && is_whole {
            return self.clear_unknown_features();
        }
        let mut stage = self.stage()?;
        let mut survey = Survey::take(&stage)?;
        if scope == Scope::Leaks && (!survey.is_sound || before.count_of(FindingKind::Uncounted) > 0) {
            let fact = "its refcounts do not cover what is in use, so that leaks cannot be told; nothing was \
                changed";
            let remedy = "repair it with --repair all";
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: {fact}; {remedy}", self.name)));
        }
        self.clear_unknown_features()?;
        let mut report = before.clone();
        let is_loss_accepted = scope == Scope::Loss;
        if is_loss_accepted {
            let repaired = stage.accept_loss(&survey, &mut self.lost, &mut self.notes)?;
            if repaired > 0 {
                self.storage.sync()?;
                self.corruptions_fixed += repaired;
                report = check_in_windows(self.storage, self.name, self.window_clusters)?;
                stage = self.stage()?;
                survey = Survey::take(&stage)?;
            }
        }
        // R5: each step is durable before the next, and none changes what a reader sees.
        // From here on flags and counts agree.
        let scope = if scope == Scope::Loss { Scope::All } else { scope };
        if scope == Scope::All && report.count_of(FindingKind::KeptPlace) > 0 {
            let repaired = stage.drop_bad_preallocations(&survey, &mut self.actions)?;
            if repaired > 0 {
                self.storage.sync()?;
                self.corruptions_fixed += repaired;
                report = check_in_windows(self.storage, self.name, self.window_clusters)?;
                stage = self.stage()?;
                survey = Survey::take(&stage)?;
            }
        }
        let is_cut = report.count_of(FindingKind::Dangling) > 0;
        let in_doubt =
            is_cut || report.count_of(FindingKind::Doubt) > 0 || report.count_of(FindingKind::KeptPlace) > 0;
        let snapshots = scope == Scope::All && report.count_of(FindingKind::Incomplete) > 0 && !is_cut;
        let too_low = report.count_of(FindingKind::TooLow) + report.count_of(FindingKind::Uncounted);
        let policy = if in_doubt { CountPolicy::NeverLower } else { CountPolicy::References };
        let mut leaks = if in_doubt { 0 } else { report.leaks };
        if !survey.is_sound && is_cut {
            self.notes.push(
                "The refcounts were left as they are: to write them anew, the file would have to grow over \
                    what \
                 it seems to have lost. Restore it from a backup."
                    .to_owned(),
            );
            return Ok(());
        }
        if in_doubt && report.leaks > 0 {
            self.notes.push("Leaked clusters were not freed: invalid entries may refer to them.".to_owned());
        }
        if !survey.is_sound || snapshots {
            if snapshots {
                self.actions.note(|| "Rebuilding snapshot table".to_owned());
            }
            self.actions.note(|| "Rebuilding refcount structure".to_owned());
            stage.rebuild(
                policy,
                if snapshots { Rebuilt::RefcountsAndSnapshotTable } else { Rebuilt::Refcounts },
            )?;
            self.corruptions_fixed += too_low + report.count_of(FindingKind::Structure);
            self.corruptions_fixed += if snapshots { report.count_of(FindingKind::Incomplete) } else { 0 };
            self.leaks_fixed += leaks;
            leaks = 0;
            stage = self.stage()?;
            survey = Survey::take(&stage)?;
        } else if scope == Scope::All && too_low > 0 {
            let raised = stage.store_counts(u32::max, &mut self.actions)?;
            self.storage.sync()?;
            self.corruptions_fixed += raised;
        }
        let only_flags = report.corruptions == report.count_of(FindingKind::Flag) && report.check_errors == 0;
        if scope == Scope::All || only_flags {
            let repaired = stage.repair_flags(&survey, policy, &mut self.actions)?;
            if repaired.count > 0 {
                self.storage.sync()?;
                self.corruptions_fixed += repaired.count;
            }
            if repaired.used_twice > 0 {
                self.notes.push(format!(
                    "{} entries share their clusters with something else, though no snapshot does. They are \
                        no longer \
                     written in place, but what one of the users had there is lost. Compare with a backup.",
                    repaired.used_twice
                ));
            }
        }
        if leaks > 0 {
            self.leaks_fixed += stage.store_counts(u32::min, &mut self.actions)?;
            self.storage.sync()?;
        }
        if is_loss_accepted && !in_doubt {
            // Data counted there is lost; the file may grow over it again.
            self.stage()?.clear_counts_beyond_end()?;
            self.storage.sync()?;
        }
        Ok(())
    }

    /// Whether the file ends at a cluster boundary: else the audit, like QEMU's, lets a reference cross its
    /// end.
    fn is_whole(&self) -> Result<bool> {
        let audited = Audited::open(self.storage as &dyn Storage, self.name)?;
        Ok(audited.file_len.is_multiple_of(audited.header.cluster.size()))
    }

    /// A writer clears the feature bits that it does not know: that is their purpose.
    fn clear_unknown_features(&self) -> Result<()> {
        let header = Audited::open(self.storage, self.name)?.header;
        let known = header.autoclear & feature::KNOWN_AUTOCLEAR;
        if header.autoclear == known {
            return Ok(());
        }
        self.storage.write_at(AUTOCLEAR_AT, &known.to_be_bytes())?;
        self.storage.sync()
    }

    fn clear_bits(&mut self, report: &CheckReport) -> Result<()> {
        let header = Audited::open(self.storage, self.name)?.header;
        let bits = header.incompatible & (feature::DIRTY | feature::CORRUPT);
        if bits == 0 || report.corruptions > 0 || report.check_errors > 0 {
            return Ok(());
        }
        assert_eq!(header.version, Version::V3, "version 2 has no bits");
        // The cleared bits vouch for all earlier writes.
        self.storage.sync()?;
        self.storage.write_at(INCOMPATIBLE_AT, &(header.incompatible & !bits).to_be_bytes())?;
        self.storage.sync()?;
        for (bit, name) in [(feature::DIRTY, "dirty"), (feature::CORRUPT, "corrupt")] {
            if bits & bit != 0 {
                self.notes.push(format!("The image is no longer marked as {name}."));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! The findings of a check, in `qemu-img check`'s words.

use std::fmt;

use serde::Serialize;

/// Maximum number of findings that are kept as text; further ones are only counted.
pub const MAX_FINDINGS: usize = 1000;

/// The kind of a finding: how to repair it, and what else may be wrong because of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FindingKind {
    /// A cluster has more references than its count.
    TooLow,
    /// Of those, one whose count is 0: the next writer would allocate it.
    Uncounted,
    /// A COPIED flag of the active tables is wrong.
    Flag,
    /// A COPIED flag where there must be none.
    CompressedFlag,
    /// The refcount table or a block is at an unusable offset.
    Structure,
    /// The preallocated cluster of a zero entry is invalid.
    KeptPlace,
    /// An entry of the snapshot table lacks a field that version 3 requires.
    Incomplete,
    /// A reference points beyond the end of the file.
    Dangling,
    /// Anything else: the intended reference is unknown.
    Doubt,
}

const FINDING_KIND_COUNT: usize = FindingKind::Doubt as usize + 1;

/// The result of a check. Serializes as `qemu-img check --output=json` prints it: zero fields are left out,
/// except for `check-errors`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// The image's name, as given to the check.
    pub filename: String,
    /// Always `qcow2`.
    pub format: &'static str,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Where the image ends, by its references and counts.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    /// Places where data is, or may become, damaged.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Corruptions that a repair has repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaked clusters that a repair has freed.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Clusters of the active tables that are allocated in the file.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Those that do not follow the one before.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// A sentence for each of the first [`MAX_FINDINGS`] problems.
    #[serde(skip)]
    pub findings: Vec<String>,
    /// Problems beyond those.
    #[serde(skip)]
    pub findings_suppressed: u64,
    /// Corruptions and errors by [`FindingKind`].
    #[serde(skip)]
    pub(super) tally: [u64; FINDING_KIND_COUNT],
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl CheckReport {
    /// 0 fine, 1 something could not be checked, 2 corrupt, 3 leaks only.
    pub fn exit_code(&self) -> u8 {
        match (self.check_errors, self.corruptions, self.leaks) {
            (0, 0, 0) => 0,
            (0, 0, _) => 3,
            (0, _, _) => 2,
            _ => 1,
        }
    }

    /// How many problems are of `kind`.
    pub(super) fn count_of(&self, kind: FindingKind) -> u64 {
        self.tally[kind as usize]
    }

    fn tally(&mut self, kind: FindingKind, count: u64) {
        let tally = &mut self.tally[kind as usize];
        *tally = tally.saturating_add(count);
    }

    pub(super) fn check_errors(&mut self, kind: FindingKind, count: u64, finding: impl FnOnce() -> String) {
        self.tally(kind, count);
        self.check_errors = self.check_errors.saturating_add(count);
        self.note("ERROR", finding);
    }

    pub(super) fn corruptions(&mut self, kind: FindingKind, count: u64, finding: impl FnOnce() -> String) {
        self.tally(kind, count);
        self.corruptions = self.corruptions.saturating_add(count);
        self.note("ERROR", finding);
    }

    pub(super) fn leak(&mut self, finding: impl FnOnce() -> String) {
        self.leaks += 1;
        self.note("Leaked", finding);
    }

    fn note(&mut self, mark: &str, finding: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(format!("{mark} {}", finding()));
        } else {
            self.findings_suppressed += 1;
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        if self.findings_suppressed > 0 {
            writeln!(f, "... and {} more", self.findings_suppressed)?;
        }
        if self.exit_code() == 0 {
            writeln!(f, "No errors were found on the image.")?;
        }
        if self.corruptions > 0 {
            writeln!(f, "\n{} errors were found on the image.", self.corruptions)?;
            writeln!(f, "Data may be corrupted, or further writes to the image may corrupt it.")?;
        }
        if self.leaks > 0 {
            writeln!(f, "\n{} leaked clusters were found on the image.", self.leaks)?;
            writeln!(f, "This means waste of disk space, but no harm to data.")?;
        }
        if self.check_errors > 0 {
            writeln!(f, "\n{} internal errors have occurred during the check.", self.check_errors)?;
        }
        if self.total_clusters > 0 && self.allocated_clusters > 0 {
            let of = |part: u64, whole: u64| {
                #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
                let percent = part as f64 * 100.0 / whole as f64;
                percent
            };
            writeln!(
                f,
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
                self.allocated_clusters,
                self.total_clusters,
                of(self.allocated_clusters, self.total_clusters),
                of(self.fragmented_clusters, self.allocated_clusters),
                of(self.compressed_clusters, self.allocated_clusters),
            )?;
        }
        if self.image_end_offset > 0 {
            writeln!(f, "Image end offset: {}", self.image_end_offset)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out_of_json_except_check_errors() {
        let report =
            CheckReport { filename: "a".into(), format: "qcow2", leaks: 2, ..CheckReport::default() };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(json, r#"{"filename":"a","format":"qcow2","check-errors":0,"leaks":2}"#);
    }

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        let code = |check_errors, corruptions, leaks| {
            CheckReport { check_errors, corruptions, leaks, ..CheckReport::default() }.exit_code()
        };
        assert_eq!((code(0, 0, 0), code(0, 0, 1), code(0, 1, 1), code(1, 1, 1)), (0, 3, 2, 1));
    }

    #[test]
    fn findings_beyond_the_limit_are_counted() {
        let mut report = CheckReport::default();
        for index in 0..MAX_FINDINGS + 5 {
            report.corruptions(FindingKind::Doubt, 1, || format!("number {index}"));
        }
        assert_eq!((report.findings.len(), report.findings_suppressed, report.corruptions), (1000, 5, 1005));
        assert!(report.to_string().contains("... and 5 more\n\n1005 errors were found on the image.\n"));
    }
}

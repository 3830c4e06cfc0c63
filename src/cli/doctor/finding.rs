//! What a check has found: the fact, what it means, and the command that fixes it. One line of text each.

use serde::{Deserialize, Serialize};

use crate::report::safe::terminal;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mark {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Something will work less well, or not for everybody.
    Warning,
    /// Something stops the user.
    Problem,
}

impl Mark {
    /// The word at the start of a line.
    pub(super) fn word(self) -> &'static str {
        match self {
            Mark::Ok => "ok",
            Mark::Note => "note",
            Mark::Warning => "warning",
            Mark::Problem => "problem",
        }
    }
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) mark: Mark,
    /// What was looked at: a file, a program, a property of the kernel.
    pub(super) subject: String,
    /// The fact.
    pub(super) found: String,
    /// What follows from it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) meaning: Option<String>,
    /// The command, or the change, that mends it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn new(mark: Mark, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self { mark, subject: subject.into(), found: found.into(), meaning: None, fix: None }
    }

    pub(super) fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Mark::Ok, subject, found)
    }

    pub(super) fn note(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Mark::Note, subject, found)
    }

    pub(super) fn warning(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Mark::Warning, subject, found)
    }

    pub(super) fn problem(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Mark::Problem, subject, found)
    }

    /// With what follows from it.
    pub(super) fn means(mut self, meaning: impl Into<String>) -> Self {
        self.meaning = Some(meaning.into());
        self
    }

    /// With what mends it.
    pub(super) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// The line that shows it.
    pub(super) fn line(&self) -> String {
        let meaning = self.meaning.as_ref().map(|meaning| format!(": {meaning}")).unwrap_or_default();
        let fix = self.fix.as_ref().map(|fix| format!("; fix: {fix}")).unwrap_or_default();
        let text = format!("{}: {}{meaning}{fix}", self.subject, self.found);
        format!("{:<8} {}\n", self.mark.word(), terminal(&text))
    }
}

/// A word for sh(1): quoted if it needs it.
pub(super) fn quoted(path: &std::path::Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let text = String::from_utf8_lossy(path.as_os_str().as_bytes());
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "/._-+:@%,=".contains(char);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_finding_is_one_line_without_control_characters() {
        let finding = Finding::problem("/dev/fuse", "is\nmissing").means("nothing").fix("modprobe fuse");
        assert_eq!(finding.line(), "problem  /dev/fuse: is\\x0amissing: nothing; fix: modprobe fuse\n");
        assert_eq!(Finding::ok("kernel", "6.18").line(), "ok       kernel: 6.18\n");
    }

    #[test]
    fn words_of_a_command_are_quoted_for_the_shell() {
        for (path, word) in [("/mnt/a", "/mnt/a"), ("/mnt/a b", "'/mnt/a b'"), ("/it's", "'/it'\\''s'")] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}

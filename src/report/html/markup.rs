//! Small pieces of markup. All text from outside goes through [`text`] or [`name`], all paths through
//! [`LinkBase::to`].

use std::time::SystemTime;

use jiff::tz::TimeZone;

use crate::report::safe::{clipped, terminal, xml};
use crate::report::time::{minute, rfc3339};
use crate::units::brief_size;

/// Columns of a name; a tooltip has more of it.
const NAME_WIDTH: usize = 80;
/// Columns of a tooltip.
const TITLE_WIDTH: usize = 1000;
/// Columns of a sentence.
const SENTENCE_WIDTH: usize = 2000;

/// A text of any length, escaped.
pub(super) fn text(text: &str) -> String {
    xml(&clipped(text, SENTENCE_WIDTH))
}

/// A name, escaped and cut, whole in the tooltip.
pub(super) fn name(whole: &str) -> String {
    let short = clipped(whole, NAME_WIDTH);
    if short == terminal(whole) {
        return xml(whole);
    }
    format!("<span title=\"{}\">{}</span>", xml(&clipped(whole, TITLE_WIDTH)), xml(&short))
}

/// A size, with the exact number in the tooltip.
pub(super) fn size(bytes: u64) -> String {
    format!("<span title=\"{bytes} bytes\">{}</span>", brief_size(bytes))
}

/// A date in the page's time zone.
pub(super) fn date(at: SystemTime, zone: &TimeZone) -> String {
    match rfc3339(at) {
        Some(machine) => format!("<time datetime=\"{machine}\">{}</time>", minute(at, zone)),
        None => "?".to_owned(),
    }
}

/// A number, or "no".
pub(super) fn count_of(count: usize) -> String {
    if count == 0 { "no".to_owned() } else { count.to_string() }
}

/// Where links begin: the mount's root, as seen from the page.
#[derive(Clone, Copy)]
pub(super) struct LinkBase<'a>(pub(super) &'a str);

impl LinkBase<'_> {
    /// The link to a path of the mount, which is percent-encoded already.
    pub(super) fn to(self, path: &str) -> String {
        xml(&format!("{}{path}", self.0))
    }

    /// A link. `content` is markup.
    pub(super) fn link(self, path: &str, content: &str, title: &str) -> String {
        let title = if title.is_empty() { String::new() } else { format!(" title=\"{}\"", xml(title)) };
        format!("<a href=\"{}\"{title}>{content}</a>", self.to(path))
    }
}

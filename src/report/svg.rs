//! The tree as a picture for browsers: the rows of the text, joined by lines.
//!
//! It contains no scripts and no external fonts or files; its colours follow the reader's light or dark
//! theme. It is well-formed XML for any names.

use super::layout::{Joint, Row, RowItem, rows};
use super::text::{Folded, TextOptions, flags, summary};
use super::tree::{BackingTree, Forest, NodeMark};
use super::{safe, time};
use crate::units::brief_size;
use jiff::tz::TimeZone;
use std::fmt::Write as _;
use unicode_width::UnicodeWidthStr;

const ROW: usize = 26;
const STEP: usize = 22;
const MARGIN: usize = 20;
/// Tenths of a pixel of one column of 13 px monospace, rounded up.
const CHAR_TENTHS: usize = 80;
/// The same of a title, which is larger.
const TITLE_CHAR_TENTHS: usize = 87;
const NAME_CHARS_MAX: usize = 48;

const STYLE: &str = "\
svg{background:#fff;color:#1f2328;font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}\
text{fill:currentColor;white-space:pre}.title{font-weight:700;font-size:14px}\
.dim{fill:#656d76}.flag{fill:#0969da}.line{fill:none;stroke:#8c959f;stroke-width:2}\
.frozen{fill:#6e7781}.internal{fill:#fff;stroke:#6e7781;stroke-width:2}\
.active{fill:#1a7f37}.broken{fill:none;stroke:#cf222e;stroke-width:3}\
.fold{fill:#fff;stroke:#8c959f;stroke-width:2;stroke-dasharray:2 3}\
@media(prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}.dim{fill:#8d96a0}.flag{fill:#58a6ff}\
.internal,.fold{fill:#0d1117}.active{fill:#3fb950}.broken{stroke:#f85149}}";

/// All trees of `forest` in one picture, one below the other.
pub fn forest(forest: &Forest, zone: &TimeZone, full: bool) -> String {
    let mut canvas = Canvas { body: String::new(), width: 0, y: MARGIN };
    for tree in &forest.trees {
        canvas.tree(tree, zone, full);
    }
    canvas.finish()
}

/// One tree as a picture.
pub fn tree(tree: &BackingTree, zone: &TimeZone, full: bool) -> String {
    let mut canvas = Canvas { body: String::new(), width: 0, y: MARGIN };
    canvas.tree(tree, zone, full);
    canvas.finish()
}

struct Canvas {
    body: String,
    width: usize,
    y: usize,
}

/// The text beside a mark.
struct Label {
    class: &'static str,
    name: String,
    kind: &'static str,
    date: String,
    size: String,
    flags: String,
}

impl Canvas {
    fn tree(&mut self, tree: &BackingTree, zone: &TimeZone, full: bool) {
        let options = TextOptions { full, ascii: false, color: false, zone: zone.clone() };
        let title = summary(tree, &options);
        self.y += ROW / 2;
        self.text(MARGIN, self.y, "title", &title);
        let rows = rows(tree, full);
        let labels: Vec<_> = rows.iter().map(|row| label(row, tree, zone)).collect();
        let names_end = rows
            .iter()
            .zip(&labels)
            .map(|(row, label)| x(row.column()) + 14 + chars(label.name.width().min(NAME_CHARS_MAX)))
            .max()
            .unwrap_or(0);
        let widest = |cell: fn(&Label) -> &str| {
            chars(labels.iter().map(|label| cell(label).width()).max().unwrap_or(0))
        };
        let kinds = names_end + 20;
        let dates = kinds + widest(|label| label.kind) + 20;
        let sizes_end = dates + widest(|label| &label.date) + 20 + widest(|label| &label.size);
        let flags_start = sizes_end + 24;
        let top = self.y + ROW;
        let y = |row: usize| top + row * ROW;
        for (index, row) in rows.iter().enumerate() {
            if let Some(parent) = row.parent {
                self.line(row, &rows[parent], y(parent), y(index));
            }
        }
        for (index, (row, label)) in rows.iter().zip(&labels).enumerate() {
            let (at, y) = (x(row.column()), y(index));
            // The full name of a clipped one, as a tooltip.
            let _ = write!(self.body, "<g><title>{}</title>", safe::xml(&label.name));
            let _ = match label.class {
                "internal" => {
                    write!(self.body, "<circle class=\"internal\" cx=\"{at}\" cy=\"{y}\" r=\"4\"/>")
                }
                "active" => {
                    let (left, right, up, down) = (at - 7, at + 7, y - 7, y + 7);
                    write!(
                        self.body,
                        "<path class=\"active\" d=\"M{at} {up}L{right} {y}L{at} {down}L{left} {y}z\"/>"
                    )
                }
                "broken" => {
                    let (left, right, up, down) = (at - 5, at + 5, y - 5, y + 5);
                    write!(
                        self.body,
                        "<path class=\"broken\" d=\"M{left} {up}L{right} {down}M{right} {up}L{left} \
                         {down}\"/>"
                    )
                }
                "fold" => write!(self.body, "<circle class=\"fold\" cx=\"{at}\" cy=\"{y}\" r=\"5\"/>"),
                class => write!(self.body, "<circle class=\"{class}\" cx=\"{at}\" cy=\"{y}\" r=\"5\"/>"),
            };
            let base = y + 4;
            self.text(at + 14, base, "", &safe::clipped(&label.name, NAME_CHARS_MAX));
            self.text(kinds, base, "dim", label.kind);
            self.text(dates, base, "dim", &label.date);
            let size_x = sizes_end.saturating_sub(chars(label.size.width()));
            self.text(size_x, base, "", &label.size);
            self.text(flags_start, base, "flag", &label.flags);
            self.body.push_str("</g>\n");
        }
        self.y = top + rows.len() * ROW;
    }

    /// A line from a row's mark down the column of its backing file.
    fn line(&mut self, row: &Row, parent: &Row, from: usize, to: usize) {
        let (px, cx) = (x(parent.column()), x(row.column()));
        let _ = match row.joint {
            Joint::Straight => writeln!(self.body, "<path class=\"line\" d=\"M{px} {from}V{to}\"/>"),
            Joint::Side { .. } => {
                let turn = to - 8;
                writeln!(
                    self.body,
                    "<path class=\"line\" d=\"M{px} {from}V{turn}Q{px} {to} {} {to}H{cx}\"/>",
                    px + 8
                )
            }
        };
    }

    fn text(&mut self, x: usize, y: usize, class: &str, text: &str) {
        if text.is_empty() {
            return;
        }
        let text = safe::terminal(text);
        let tenths = if class == "title" { TITLE_CHAR_TENTHS } else { CHAR_TENTHS };
        self.width = self.width.max(x + (text.width() * tenths).div_ceil(10));
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let _ = write!(self.body, "<text x=\"{x}\" y=\"{y}\"{class}>{}</text>", safe::xml(&text));
    }

    fn finish(self) -> String {
        let (width, height) = ((self.width + MARGIN).max(200), self.y + MARGIN);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n<style>{STYLE}</style>\n{}</svg>\n",
            self.body
        )
    }
}

fn label(row: &Row, tree: &BackingTree, zone: &TimeZone) -> Label {
    match &row.item {
        RowItem::Node(node) => {
            let node = &tree.nodes[*node];
            Label {
                class: match node.mark {
                    NodeMark::Frozen => "frozen",
                    NodeMark::Internal => "internal",
                    NodeMark::Active => "active",
                    NodeMark::Broken => "broken",
                },
                name: node.name.clone(),
                kind: node.kind.word(),
                date: node.date.map(|date| time::minute(date, zone)).unwrap_or_default(),
                size: node.own_size.map(brief_size).unwrap_or_default(),
                flags: flags(tree, node),
            }
        }
        RowItem::Fold(run) => {
            let folded = Folded::of(tree, run, zone);
            Label {
                class: "fold",
                name: format!("{} layers", run.len()),
                kind: folded.kind,
                date: folded.days,
                size: brief_size(folded.own_size),
                flags: format!("{} .. {}", folded.names.0, folded.names.1),
            }
        }
    }
}

fn x(column: usize) -> usize {
    MARGIN + 8 + column * STEP
}

fn chars(count: usize) -> usize {
    (count * CHAR_TENTHS).div_ceil(10)
}

#[cfg(test)]
mod tests {
    use super::super::tree::{TreeNode, TreeNodeKind, sample};
    use super::*;

    fn parsed(svg: &str) -> (usize, Vec<String>) {
        let document = roxmltree::Document::parse(svg).unwrap();
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        (document.descendants().filter(|node| node.has_tag_name("g")).count(), {
            texts.filter_map(|node| node.text().map(str::to_owned)).collect()
        })
    }

    #[test]
    fn the_picture_shows_the_same_rows_as_the_text() {
        let (rows, texts) = parsed(&tree(&sample::web01(), &TimeZone::UTC, false));
        assert_eq!(rows, 8);
        for text in ["base", "web02", "25 layers", "nightly-02 .. nightly-26", "2026-03-02 .. 26"] {
            assert!(texts.iter().any(|shown| shown == text), "{text} in {texts:?}");
        }
        assert!(texts[0].starts_with("web01 · 40 GiB virtual"));
    }

    #[test]
    fn hostile_names_leave_the_picture_well_formed() {
        let name = "</text><script>alert(1)</script>\u{0}\u{ffff}&\"'\x1b";
        let mut bad =
            BackingTree::new(name, TreeNode::new(NodeMark::Broken, TreeNodeKind::Missing, name.repeat(20)));
        bad.nodes[0].flags.push(name.into());
        let svg = forest(&Forest { trees: vec![bad.clone(), bad] }, &TimeZone::UTC, true);
        assert!(
            parsed(&svg)
                .1
                .iter()
                .any(|text| text.starts_with("</text><script>alert(1)</script>\\x00\\u{ffff}&"))
        );
        assert!(!svg.contains("<script"));
    }

    #[test]
    fn a_thousand_layers_and_no_trees_make_small_pictures() {
        let plain = |name: String| TreeNode::new(NodeMark::Frozen, TreeNodeKind::Qcow2, name);
        let mut deep = BackingTree::new("deep", plain("base".into()));
        for layer in 0..1_000 {
            deep.add(layer, plain(format!("nightly-{layer}")));
        }
        assert!(tree(&deep, &TimeZone::UTC, false).len() < 4_096);
        assert_eq!(parsed(&tree(&deep, &TimeZone::UTC, true)).0, 1_001);
        assert_eq!(parsed(&forest(&Forest::default(), &TimeZone::UTC, false)).0, 0);
    }
}

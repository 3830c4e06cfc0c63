//! The tree as text: base first, one line per layer, columns aligned by displayed width.
//!
//! A line is mark, name, kind, date, own size, flags. Only side branches are indented; internal snapshots
//! follow their layer. Long straight runs fold unless `full` is set. Colours repeat what marks and words say.

use super::layout::{Joint, Row, RowItem, rows};
use super::tree::{BackingTree, Forest, NodeMark, TreeNode, TreeNodeKind};
use super::{safe, time};
use crate::units::{brief_size, human_size};
use jiff::tz::TimeZone;
use unicode_width::UnicodeWidthStr;

/// A wider name overflows its column instead of widening it for all rows.
const NAME_WIDTH_MAX: usize = 48;

/// How a tree is written.
#[derive(Clone, Debug)]
pub struct TextOptions {
    /// One line for every layer: nothing folds.
    pub full: bool,
    /// Only ASCII, names included.
    pub ascii: bool,
    /// Whether marks and names are coloured by the escape sequences of terminals.
    pub color: bool,
    /// The time zone of dates.
    pub zone: TimeZone,
}

impl TextOptions {
    /// Folded, in Unicode, in local time.
    pub fn local() -> Self {
        Self { full: false, ascii: false, color: false, zone: TimeZone::system() }
    }
}

/// All trees, with an empty line between two.
pub fn forest(forest: &Forest, options: &TextOptions) -> String {
    let trees: Vec<_> = forest.trees.iter().map(|one| tree(one, options)).collect();
    trees.join("\n")
}

/// One tree under its summary line.
pub fn tree(tree: &BackingTree, options: &TextOptions) -> String {
    let marks = if options.ascii { &ASCII } else { &UNICODE };
    let mut lines: Vec<_> =
        rows(tree, options.full).iter().map(|row| TextLine::of(row, tree, options, marks)).collect();
    let has_sharing = tree.nodes.iter().any(|node| node.sharing.is_some());
    if has_sharing {
        lines.insert(0, TextLine::headings());
    }
    let width = |cell: fn(&TextLine) -> &str| lines.iter().map(|line| cell(line).width()).max().unwrap_or(0);
    let name = lines.iter().map(TextLine::name_width).max().unwrap_or(0).min(NAME_WIDTH_MAX);
    let (kind, date, size) = (width(|line| line.kind), width(|line| &line.date), width(|line| &line.size));
    let (shared, freed) = (width(|line| &line.shared), width(|line| &line.freed));
    let mut text = painted(&summary(tree, options), TITLE, options.color);
    for line in &lines {
        let rest = " ".repeat(name.saturating_sub(line.name_width()));
        let mut cells = vec![pad(line.kind, kind), pad(&line.date, date), pad_left(&line.size, size)];
        if has_sharing {
            cells.extend([pad_left(&line.shared, shared), pad_left(&line.freed, freed)]);
        }
        cells.push(line.flags.clone());
        let label = painted(&line.label, line.paint, options.color);
        let cells = cells.join("   ");
        text.push('\n');
        text.push_str(format!("{}{label}{rest}  {cells}", line.prefix).trim_end());
    }
    text.push('\n');
    text
}

/// A colour of the fixed palette of 256, or another attribute of text; empty is none.
type Paint = &'static str;

// Colours of the fixed palette that are readable on black and on white: a test computes their contrast. The
// sixteen basic ones are the theme's, and often not.
const TITLE: Paint = "1";
const ACTIVE: Paint = "38;5;28";
const INTERNAL: Paint = "38;5;30";
const BROKEN: Paint = "38;5;160";
const PLAIN: Paint = "";

/// Text in a colour.
fn painted(text: &str, paint: Paint, color: bool) -> String {
    if color && !paint.is_empty() { format!("\x1b[{paint}m{text}\x1b[0m") } else { text.to_owned() }
}

/// "web01 · 40 GiB virtual · 9.8 GiB on disk · 31 layers, 2 branches, 1 internal".
pub fn summary(tree: &BackingTree, options: &TextOptions) -> String {
    let mut counts =
        vec![format!("{} {}", tree.layer_count, if tree.layer_count == 1 { "layer" } else { "layers" })];
    if tree.branch_count > 1 {
        counts.push(format!("{} branches", tree.branch_count));
    }
    if tree.internal_count > 0 {
        counts.push(format!("{} internal", tree.internal_count));
    }
    let dot = if options.ascii { "-" } else { "·" };
    let sizes = (human_size(tree.virtual_size), brief_size(tree.on_disk));
    let title = shown(&tree.title, options);
    format!("{title} {dot} {} virtual {dot} {} on disk {dot} {}", sizes.0, sizes.1, counts.join(", "))
}

/// The cells of a folded run: its kind, days, size and names.
pub(super) struct Folded {
    pub(super) kind: &'static str,
    pub(super) days: String,
    pub(super) own_size: u64,
    pub(super) names: (String, String),
}

impl Folded {
    pub(super) fn of(tree: &BackingTree, run: &[usize], zone: &TimeZone) -> Self {
        let nodes = || run.iter().map(|node| &tree.nodes[*node]);
        let kind =
            nodes().map(|node| node.kind.word()).reduce(|a, b| if a == b { a } else { "" }).unwrap_or("");
        let dates = || nodes().filter_map(|node| node.date);
        let days = match (dates().min(), dates().max()) {
            (Some(from), Some(to)) => time::days(from, to, zone),
            _ => String::new(),
        };
        let own_size = nodes().filter_map(|node| node.own_size).fold(0, u64::saturating_add);
        let name =
            |node: Option<&usize>| node.map_or_else(String::new, |node| tree.nodes[*node].name.clone());
        Self { kind, days, own_size, names: (name(run.first()), name(run.last())) }
    }
}

/// The flags of a node. The chain whose leaf it is comes first, unless the tree or the node has the same
/// name.
pub(super) fn flags(tree: &BackingTree, node: &TreeNode) -> String {
    let chain = node.chain.iter().filter(|chain| **chain != tree.title && **chain != node.name);
    chain.chain(&node.flags).map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// The characters that draw the lines.
struct Marks {
    bar: &'static str,
    side: &'static str,
    last_side: &'static str,
    /// Between the column and the mark of a side branch.
    dash: &'static str,
    fold: &'static str,
    frozen: &'static str,
    internal: &'static str,
    active: &'static str,
    broken: &'static str,
}

const UNICODE: Marks = Marks {
    bar: "│",
    side: "├",
    last_side: "└",
    dash: "─",
    fold: "⋮",
    frozen: "●",
    internal: "○",
    active: "◆",
    broken: "✗",
};

const ASCII: Marks = Marks {
    bar: "|",
    side: "|",
    last_side: "`",
    dash: "-",
    fold: ":",
    frozen: "*",
    internal: "o",
    active: "@",
    broken: "x",
};

/// The cells of one line.
#[derive(Default)]
struct TextLine {
    /// The lines of the columns.
    prefix: String,
    /// Mark and name.
    label: String,
    paint: Paint,
    kind: &'static str,
    date: String,
    size: String,
    shared: String,
    freed: String,
    flags: String,
}

impl TextLine {
    /// The headings of the columns of sizes; the others explain themselves.
    fn headings() -> Self {
        Self {
            size: "own".to_owned(),
            shared: "shared".to_owned(),
            freed: "freed if deleted".to_owned(),
            ..Self::default()
        }
    }

    fn name_width(&self) -> usize {
        self.prefix.width() + self.label.width()
    }

    fn of(row: &Row, tree: &BackingTree, options: &TextOptions, marks: &Marks) -> Self {
        let mut prefix = String::new();
        for bar in &row.bars {
            prefix.push_str(if *bar { marks.bar } else { " " });
            prefix.push(' ');
        }
        match row.joint {
            Joint::Straight => {}
            Joint::Side { last } => prefix.push_str(if last { marks.last_side } else { marks.side }),
        }
        match &row.item {
            RowItem::Node(node) => {
                let node = &tree.nodes[*node];
                if matches!(row.joint, Joint::Side { .. }) && node.kind != TreeNodeKind::Internal {
                    prefix.push_str(marks.dash);
                }
                let (mark, paint) = match node.mark {
                    NodeMark::Frozen => (marks.frozen, PLAIN),
                    NodeMark::Internal => (marks.internal, INTERNAL),
                    NodeMark::Active => (marks.active, ACTIVE),
                    NodeMark::Broken => (marks.broken, BROKEN),
                };
                let freed = node.sharing.map(|sharing| sharing.freed.map_or("-".to_owned(), signed_size));
                Self {
                    prefix,
                    label: format!("{mark} {}", shown(&node.name, options)),
                    paint,
                    shared: node.sharing.map(|sharing| brief_size(sharing.shared)).unwrap_or_default(),
                    freed: freed.unwrap_or_default(),
                    kind: node.kind.word(),
                    date: node.date.map(|date| time::minute(date, &options.zone)).unwrap_or_default(),
                    size: node.own_size.map(brief_size).unwrap_or_default(),
                    flags: shown(&flags(tree, node), options),
                }
            }
            RowItem::Fold(run) => {
                let folded = Folded::of(tree, run, &options.zone);
                let (first, last) = (shown(&folded.names.0, options), shown(&folded.names.1, options));
                Self {
                    prefix,
                    label: format!("{} {} layers", marks.fold, run.len()),
                    kind: folded.kind,
                    date: folded.days,
                    size: brief_size(folded.own_size),
                    flags: format!("{first} .. {last}"),
                    ..Self::default()
                }
            }
        }
    }
}

fn shown(name: &str, options: &TextOptions) -> String {
    if options.ascii { safe::ascii(name) } else { safe::terminal(name) }
}

fn pad(cell: &str, width: usize) -> String {
    format!("{cell}{}", " ".repeat(width.saturating_sub(cell.width())))
}

fn pad_left(cell: &str, width: usize) -> String {
    format!("{}{cell}", " ".repeat(width.saturating_sub(cell.width())))
}

fn signed_size(len: i64) -> String {
    let size = brief_size(len.unsigned_abs());
    if len < 0 { format!("-{size}") } else { size }
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Sharing, sample};
    use super::*;

    fn utc() -> TextOptions {
        TextOptions { full: false, ascii: false, color: false, zone: TimeZone::UTC }
    }

    #[test]
    fn a_tree_matches_the_one_in_the_guide() {
        let expected = "\
web01 · 40 GiB virtual · 12 GiB on disk · 31 layers, 2 branches, 1 internal
● base               raw     2026-01-03 09:00   3.1 GiB
● installed          qcow2   2026-01-03 11:00   1.9 GiB
├─● try-php9         qcow2   2026-02-11 20:00   717 MiB   web02
│ └○ before-upgrade  int     2026-02-12 08:00
● nightly-01         qcow2   2026-03-01 02:00   205 MiB
⋮ 25 layers          qcow2   2026-03-02 .. 26   5.0 GiB   nightly-02 .. nightly-26
● nightly-27         qcow2   2026-03-27 02:00   205 MiB   job: commit 43 %
◆ active             qcow2   2026-03-28 02:00   1.0 GiB   writable, locked by qemu[4711]
";
        let text = tree(&sample::web01(), &utc());
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn ascii_includes_names() {
        let mut web01 = sample::web01();
        web01.nodes[2].name = "führung".into();
        let text = tree(&web01, &TextOptions { ascii: true, ..utc() });
        assert!(text.is_ascii(), "{text}");
        for line in
            ["* installed ", "|-* f\\u{fc}hrung ", "| `o before-upgrade ", ": 25 layers ", "@ active "]
        {
            assert!(text.lines().any(|l| l.starts_with(line)), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn sharing_adds_two_columns_with_headings() {
        let mut tree = BackingTree::new("web01", sample::layer("base", TreeNodeKind::Raw, 2, 9, 31));
        tree.nodes[0].sharing = Some(Sharing { shared: 5 << 20, freed: Some(-(3 << 20)) });
        let active = TreeNode {
            sharing: Some(Sharing::default()),
            ..sample::layer("a", TreeNodeKind::Qcow2, 2, 9, 7)
        };
        tree.add(0, active);
        tree.count();
        let expected = "\
web01 · 0 B virtual · 3.8 GiB on disk · 2 layers
                                       own    shared   freed if deleted
● base  raw     2026-01-03 09:00   3.1 GiB   5.0 MiB           -3.0 MiB
● a     qcow2   2026-01-03 09:00   717 MiB       0 B                  -
";
        let text = super::tree(&tree, &utc());
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn colours_say_nothing_that_the_text_does_not_say() {
        let web01 = sample::web01();
        let plain = tree(&web01, &utc());
        let mut coloured = tree(&web01, &TextOptions { color: true, ..utc() });
        assert!(coloured.contains("\x1b[38;5;28m◆ active\x1b[0m  "), "{coloured}");
        while let Some(start) = coloured.find('\x1b') {
            let end = start + coloured[start..].find('m').unwrap();
            coloured.replace_range(start..=end, "");
        }
        assert_eq!(coloured, plain);
    }

    /// The contrast of WCAG 2: 3 is the least for graphics and large text.
    #[test]
    fn colours_are_readable_on_black_and_on_white() {
        let linear = |level: u8| {
            let level = f64::from(level) / 255.0;
            if level <= 0.040_45 { level / 12.92 } else { ((level + 0.055) / 1.055).powf(2.4) }
        };
        let luminance =
            |red, green, blue| 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
        for paint in [ACTIVE, INTERNAL, BROKEN] {
            let number: u8 = paint.strip_prefix("38;5;").and_then(|number| number.parse().ok()).unwrap();
            // The cube of six by six by six colours.
            let level = |index: u8| [0, 95, 135, 175, 215, 255][usize::from(index % 6)];
            let cube = number - 16;
            let own = luminance(level(cube / 36), level(cube / 6), level(cube));
            let (on_black, on_white) = ((own + 0.05) / 0.05, 1.05 / (own + 0.05));
            assert!(on_black > 3.8 && on_white > 3.8, "{paint}: {on_black} {on_white}");
        }
    }

    #[test]
    fn full_shows_every_layer() {
        let web01 = sample::web01();
        let text = tree(&web01, &TextOptions { full: true, ..utc() });
        assert_eq!(text.lines().count(), 1 + web01.nodes.len());
    }

    #[test]
    fn wide_characters_keep_the_columns_aligned() {
        let mut web01 = BackingTree::new("日本", sample::layer("日本語", TreeNodeKind::Raw, 0, 0, 10));
        web01.add(0, sample::layer("plain", TreeNodeKind::Qcow2, 1, 0, 10));
        web01.count();
        let text = tree(&web01, &utc());
        let kinds: Vec<_> =
            text.lines().skip(1).map(|line| line.split(['r', 'q']).next().unwrap().width()).collect();
        assert_eq!(kinds[0], kinds[1], "{text}");
    }

    #[test]
    fn hostile_names_stay_on_their_line() {
        let web01 = BackingTree::new(
            "a\nb",
            TreeNode::new(NodeMark::Broken, TreeNodeKind::Missing, "\x1b[31mred\r\n"),
        );
        let text = tree(&web01, &utc());
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("✗ \\x1b[31mred\\x0d\\x0a  ?"), "{text}");
    }

    #[test]
    fn an_empty_line_separates_trees() {
        let one = BackingTree::new("one", TreeNode::new(NodeMark::Active, TreeNodeKind::Raw, "active"));
        let text = forest(&Forest { trees: vec![one.clone(), one] }, &utc());
        assert_eq!(text.matches("\n\none ·").count(), 1, "{text}");
    }
}

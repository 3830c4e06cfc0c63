//! Pages of plain values. The pages of real stores are tested with the models' builder and through mounts.

use std::time::{Duration, SystemTime};

use jiff::tz::TimeZone;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::report::tree::{NodeMark, TreeNodeKind};

const HOSTILE: &str = "</span><script>alert(1)</script><b onclick='x'>\" &amp;\u{202e}\u{0}\u{ffff}\x1b[2J";

fn page_of(chains: Vec<ChainLine>, trees: Vec<PageTree>) -> Page {
    Page {
        chain: None,
        chain_path: String::new(),
        store: "/srv/images".into(),
        to_root: "../".into(),
        made: SystemTime::UNIX_EPOCH,
        zone: TimeZone::UTC,
        totals: Totals { chains: chains.len(), ..Totals::default() },
        running: Vec::new(),
        problems: Listed::default(),
        chains: Listed::of(chains, usize::MAX),
        trees: Listed::of(trees, usize::MAX),
        single_images: 0,
        snapshots: Listed::default(),
        commands: Vec::new(),
        documents: vec![(".chainfs/tree.txt".into(), "the trees")],
    }
}

fn chain(name: &str) -> ChainLine {
    ChainLine {
        name: name.into(),
        path: format!("{}/", crate::report::safe::url(name.as_bytes())),
        is_active: true,
        virtual_size: Some(1 << 30),
        sizes: ChainSizes { own: 4096, shared: 8192 },
        snapshot_count: 3,
        latest: Some(SystemTime::UNIX_EPOCH),
        system: GuestSystem::Known(name.into()),
        has_files: true,
        has_problem: true,
        is_busy: true,
    }
}

fn layer(name: &str) -> LayerCells {
    LayerCells {
        mark: NodeMark::Frozen,
        name: name.into(),
        kind: TreeNodeKind::Qcow2,
        date: Some(SystemTime::UNIX_EPOCH + Duration::from_hours(24)),
        own_size: Some(4096),
        flags: name.into(),
        links: Some(ViewLinks { disk: "a.raw".into(), files: Some("f/".into()) }),
    }
}

fn tree_of(rows: Vec<TreeRow>) -> PageTree {
    let rows = Listed::of(rows, usize::MAX);
    PageTree {
        title: "web01".into(),
        summary: "1 layer".into(),
        page: Some("web01/info/index.html".into()),
        rows,
    }
}

fn row(item: RowContent) -> TreeRow {
    TreeRow {
        lines: RowLines { bars: vec![true, false], joint: RowJoint::Side(false), continues: true },
        item,
    }
}

fn hostile_page() -> Page {
    let fold = RowContent::Fold {
        label: HOSTILE.into(),
        names: (HOSTILE.into(), HOSTILE.into()),
        kind: "",
        days: HOSTILE.into(),
        own_size: 1,
        layers: Listed { shown: vec![layer(HOSTILE)], count: 3 },
    };
    let rows = vec![row(RowContent::Layer(layer(HOSTILE))), row(fold)];
    let tree = PageTree { title: HOSTILE.into(), summary: HOSTILE.into(), ..tree_of(rows) };
    Page {
        chain: None,
        store: HOSTILE.into(),
        running: vec![RunningCommand {
            chain: HOSTILE.into(),
            progress: HOSTILE.into(),
            per_mille: 432,
            status: "web01/control/status".into(),
        }],
        problems: Listed::of(
            [ProblemLine { path: HOSTILE.into(), sentence: format!("{HOSTILE}; {HOSTILE}") }],
            9,
        ),
        snapshots: Listed::of(
            [SnapshotLine {
                date: SystemTime::UNIX_EPOCH,
                name: HOSTILE.into(),
                chain: HOSTILE.into(),
                chain_path: "x/".into(),
                is_internal: true,
                own_size: None,
                links: None,
            }],
            9,
        ),
        commands: vec![("what", HOSTILE.into())],
        ..page_of(vec![chain(HOSTILE)], vec![tree])
    }
}

/// Parses a page as XML: another parser than that of browsers, and a stricter one.
fn parsed(html: &str) -> roxmltree::Document<'_> {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..roxmltree::ParsingOptions::default() };
    roxmltree::Document::parse_with_options(html, options).unwrap_or_else(|error| panic!("{error}:\n{html}"))
}

#[test]
fn the_policy_names_the_style_by_its_digest() {
    let digest = Sha256::digest(STYLE.as_bytes());
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let base64: String = digest
        .chunks(3)
        .map(|chunk| {
            let bits =
                chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            let digit = |place: usize| char::from(digits[(bits >> (18 - 6 * place) & 63) as usize]);
            (0..4).map(|place| if place <= chunk.len() { digit(place) } else { '=' }).collect::<String>()
        })
        .collect();
    assert_eq!(STYLE_DIGEST, format!("sha256-{base64}"), "the style was changed; write its digest there");
    let html = page(&page_of(Vec::new(), Vec::new()));
    assert!(html.contains(&format!("default-src 'none'; style-src '{STYLE_DIGEST}'")));
}

#[test]
fn hostile_names_are_text_wherever_they_are() {
    for page_made in [hostile_page(), Page { chain: Some(HOSTILE.into()), ..hostile_page() }] {
        let html = page(&page_made);
        let document = parsed(&html);
        for node in document.descendants().filter(roxmltree::Node::is_element) {
            assert!(!matches!(node.tag_name().name(), "script" | "img"), "{html}");
            assert!(node.attributes().all(|found| !found.name().starts_with("on")), "{html}");
        }
        assert!(!html.contains("<script") && !html.contains("alert(1)</script>"), "{html}");
        let strange = html.chars().find(|c| c.is_control() && *c != '\n' || "\u{202e}\u{ffff}".contains(*c));
        assert_eq!(strange, None);
        let texts: String = document.descendants().filter_map(|node| node.text()).collect();
        assert!(texts.matches("<script>alert(1)</script>").count() >= 10, "names are shown as they are");
    }
}

#[test]
fn a_page_loads_and_runs_nothing() {
    let html = page(&hostile_page());
    let document = parsed(&html);
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        let name = node.tag_name().name();
        assert!(!matches!(name, "script" | "link" | "img" | "iframe" | "object" | "form" | "base"), "{name}");
        assert!(node.attributes().all(|found| !matches!(found.name(), "style" | "src")), "{name}");
        if let Some(target) = node.attribute("href") {
            let is_inner = target.starts_with('#') || target.starts_with("../");
            assert!(is_inner, "{target} leads out");
        }
    }
    assert!(!STYLE.contains("url(") && !STYLE.contains("@import"));
}

#[test]
fn ids_are_unique_and_marks_exist() {
    let html = page(&hostile_page());
    let document = parsed(&html);
    let elements = || document.descendants().filter(roxmltree::Node::is_element);
    let mut ids: Vec<&str> = elements().filter_map(|node| node.attribute("id")).collect();
    ids.sort_unstable();
    let count = ids.len();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id is given twice");
    let inner = elements().filter_map(|node| node.attribute("href")?.strip_prefix('#'));
    for target in inner {
        assert!(ids.binary_search(&target).is_ok(), "there is no #{target}");
    }
}

#[test]
fn lists_end_where_a_page_would_become_too_long() {
    let long = "x".repeat(200) + &"\u{202e}".repeat(18);
    let chains: Vec<ChainLine> = (0..20_000).map(|_| chain(&long)).collect();
    let rows = (0..20_000).map(|_| row(RowContent::Layer(layer(&long)))).collect();
    let made =
        Page { problems: Listed { shown: Vec::new(), count: 7 }, ..page_of(chains, vec![tree_of(rows)]) };
    let html = page(&made);
    assert!(html.len() < 3 << 20, "{} bytes", html.len());
    parsed(&html);
    for what in ["more chains: ", "more rows: ", "7 more problems: "] {
        assert!(html.contains(what), "{what}");
    }
}

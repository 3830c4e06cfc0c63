//! The backing trees: rows of text, with lines and marks beside them.

use std::fmt::Write as _;

use crate::report::tree::NodeMark;

use super::markup::{LinkBase, date, name, size, text};
use super::model::{LayerCells, Page, PageTree, RowContent, RowJoint, RowLines, TreeRow};

/// Bytes of all trees of a page; the last one may go beyond it by one row.
const TREES_LEN: usize = 1 << 20;

/// The section of the trees.
pub(super) fn trees(html: &mut String, page: &Page, links: LinkBase<'_>) {
    if page.trees.count == 0 {
        return;
    }
    let several = page.chain.is_none();
    let heading = if several { "Backing trees" } else { "Backing tree" };
    let _ = writeln!(
        html,
        "<section id=\"trees\">\n<h2>{heading}</h2>\n<p class=\"legend\">{} a disk that guests write{}</p>",
        mark(NodeMark::Active),
        [
            (NodeMark::Frozen, "a frozen layer"),
            (NodeMark::Internal, "an internal snapshot"),
            (NodeMark::Broken, "cannot be read")
        ]
        .map(|(kind, what)| format!(" <span>{} {what}</span>", mark(kind)))
        .concat()
    );
    let (start, mut shown) = (html.len(), 0);
    for (number, tree) in page.trees.shown.iter().enumerate() {
        if html.len() - start > TREES_LEN {
            break;
        }
        one_tree(html, page, tree, number, several, links, start);
        shown += 1;
    }
    if shown < page.trees.count {
        let _ = writeln!(
            html,
            "<p class=\"more\">{} more trees: {}, or the page of a chain</p>",
            page.trees.count - shown,
            links.link(".chainfs/tree.txt", "tree.txt", "")
        );
    }
    if page.single_images > 0 {
        let (count, word) =
            (page.single_images, if page.single_images == 1 { "chain is" } else { "chains are" });
        let _ = writeln!(html, "<p class=\"more\">{count} more {word} one image without snapshots.</p>");
    }
    html.push_str("</section>\n");
}

fn one_tree(
    html: &mut String,
    page: &Page,
    tree: &PageTree,
    number: usize,
    has_heading: bool,
    links: LinkBase<'_>,
    start: usize,
) {
    if has_heading {
        let title = name(&tree.title);
        let title = match &tree.page {
            Some(page) => links.link(page, &title, "the page of this chain"),
            None => title,
        };
        let _ = write!(html, "<section class=\"tree\" id=\"t{number}\">\n<h3>{title}</h3>\n");
    } else {
        html.push_str("<section class=\"tree\">\n");
    }
    let _ = writeln!(html, "<p class=\"summary\">{}</p>\n<ol class=\"rows\">", text(&tree.summary));
    let mut shown = 0;
    for row in &tree.rows.shown {
        if html.len() - start > TREES_LEN {
            break;
        }
        one_row(html, page, row, links);
        shown += 1;
    }
    html.push_str("</ol>\n");
    if shown < tree.rows.count {
        let more = tree.rows.count - shown;
        let place = match &tree.page {
            Some(page) => links.link(page, "the page of this chain", ""),
            None => links.link(".chainfs/tree.txt", "tree.txt", ""),
        };
        let _ = writeln!(html, "<p class=\"more\">{more} more rows: {place}</p>");
    }
    html.push_str("</section>\n");
}

fn one_row(html: &mut String, page: &Page, row: &TreeRow, links: LinkBase<'_>) {
    match &row.item {
        RowContent::Layer(layer) => {
            html.push_str("<li>");
            layer_row(html, page, &row.lines, layer, links);
            html.push_str("</li>\n");
        }
        RowContent::Fold { label, names, kind, days, own_size, layers } => {
            html.push_str("<li><details><summary class=\"row\">");
            gutter(html, &row.lines, "fold");
            let _ = write!(
                html,
                "<span class=\"body\"><span class=\"name\"><span class=\"open\">{}</span> <span \
                 class=\"range\">{} … {}</span></span><span class=\"kind\">{kind}</span><span \
                 class=\"date\">{}</span><span class=\"size\">{}</span><span class=\"links\"></span></span>\
                 </summary>\n<ol class=\"rows\">\n",
                text(label),
                name(&names.0),
                name(&names.1),
                text(days),
                size(*own_size)
            );
            let inner = RowLines { joint: RowJoint::Straight, continues: true, ..row.lines.clone() };
            for layer in &layers.shown {
                html.push_str("<li>");
                layer_row(html, page, &inner, layer, links);
                html.push_str("</li>\n");
            }
            let more = layers.count - layers.shown.len();
            if more > 0 {
                html.push_str("<li><div class=\"row\">");
                gutter(html, &inner, "fold");
                let _ = writeln!(html, "<span class=\"body more\">{more} more layers</span></div></li>");
            }
            html.push_str("</ol></details></li>\n");
        }
    }
}

/// The row of an image or internal snapshot.
fn layer_row(html: &mut String, page: &Page, drawn: &RowLines, layer: &LayerCells, links: LinkBase<'_>) {
    let _ = write!(html, "<div class=\"row {}\">", layer.mark.word());
    gutter(html, drawn, layer.mark.word());
    let _ = write!(html, "<span class=\"body\"><span class=\"name\">{}", name(&layer.name));
    if !layer.flags.is_empty() {
        let _ = write!(html, " <span class=\"flags\">{}</span>", name(&layer.flags));
    }
    let _ = write!(
        html,
        "</span><span class=\"kind\">{}</span><span class=\"date\">{}</span><span class=\"size\">{}</span>",
        layer.kind.word(),
        layer.date.map(|at| date(at, &page.zone)).unwrap_or_default(),
        layer.own_size.map(size).unwrap_or_default()
    );
    html.push_str("<span class=\"links\">");
    if let Some(view) = &layer.links {
        html.push_str(&super::lists::view_links(view, &layer.name, links));
    }
    html.push_str("</span></span></div>");
}

/// The lines and the mark at the left of a row.
fn gutter(html: &mut String, lines: &RowLines, kind: &str) {
    html.push_str("<span class=\"gutter\">");
    for bar in &lines.bars {
        html.push_str(if *bar { "<i class=\"bar\"></i>" } else { "<i></i>" });
    }
    let above = match lines.joint {
        RowJoint::Base => "",
        RowJoint::Straight => " up",
        RowJoint::Side(is_last) => {
            html.push_str(if is_last { "<i class=\"side\"></i>" } else { "<i class=\"bar side\"></i>" });
            " left"
        }
    };
    let below = if lines.continues { " down" } else { "" };
    let _ = write!(html, "<i class=\"at{above}{below}\">{}</i></span>", symbol(kind));
}

fn mark(kind: NodeMark) -> String {
    symbol(kind.word())
}

fn symbol(kind: &str) -> String {
    let what = match kind {
        "active" => "active disk",
        "internal" => "internal snapshot",
        "broken" => "cannot be read",
        "fold" => "several layers",
        _ => "frozen layer",
    };
    format!(
        "<svg class=\"mark {kind}\" role=\"img\" aria-label=\"{what}\" \
         xmlns=\"http://www.w3.org/2000/svg\"><use href=\"#{kind}\"/></svg>"
    )
}

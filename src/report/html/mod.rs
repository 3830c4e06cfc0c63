//! The pages `.chainfs/index.html` and `info/index.html`: plain values in, one self-contained file out.
//!
//! Promises: a page loads nothing and runs nothing. Its policy forbids a browser to do either, and its only
//! style is the one that this policy names by its digest. All names are escaped, whatever they are. Its
//! length is bounded: every list ends in a line that says how many items it leaves out and where they are. It
//! is well-formed XML as well as HTML.
//!
//! The tree is drawn by rows, of text with a picture of its lines and marks beside it. So it is as wide as
//! the window, and what is folded can be unfolded without a script.

mod lists;
mod markup;
mod model;
mod tree_rows;

use std::fmt::Write as _;

use super::time::{minute, rfc3339};
use crate::units::brief_size;

use markup::{LinkBase, count_of, text};
pub use model::{
    ChainLine, ChainSizes, GuestSystem, LayerCells, Listed, Page, PageTree, ProblemLine, RowContent,
    RowJoint, RowLines, RunningCommand, SnapshotLine, Totals, TreeRow, ViewLinks,
};

const STYLE: &str = include_str!("page.css");
/// The digest of [`STYLE`], for the policy.
const STYLE_DIGEST: &str = "sha256-Xo5lm5Abf1XW9FrmiPOQf2ZzhG3u5xuvKMbiv/L/WTQ=";

/// The page.
pub fn page(page: &Page) -> String {
    let links = LinkBase(&page.to_root);
    let title = match &page.chain {
        Some(chain) => format!("{} · chainfs", text(chain)),
        None => format!("{} · chainfs", text(&page.store)),
    };
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n\
         <meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         '{STYLE_DIGEST}'; base-uri 'none'; form-action 'none'\"/>\n\
         <meta name=\"referrer\" content=\"no-referrer\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{MARKS}\n"
    );
    header(&mut html, page);
    html.push_str("<main>\n");
    lists::running(&mut html, page, links);
    lists::problems(&mut html, page, links);
    lists::chains(&mut html, page, links);
    tree_rows::trees(&mut html, page, links);
    lists::snapshots(&mut html, page, links);
    lists::commands(&mut html, page);
    lists::documents(&mut html, page, links);
    html.push_str("</main>\n");
    let _ = write!(
        html,
        "<footer><p>Made by chainfs {} on {}. Reload the page for what has changed since.</p></footer>\n\
         </body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        moment(page),
    );
    html
}

/// The symbols of the marks, drawn once.
const MARKS: &str = "<svg class=\"defs\" width=\"0\" height=\"0\" aria-hidden=\"true\" \
     xmlns=\"http://www.w3.org/2000/svg\">\
     <symbol id=\"frozen\" viewBox=\"0 0 16 16\"><circle cx=\"8\" cy=\"8\" r=\"5.5\"/></symbol>\
     <symbol id=\"internal\" viewBox=\"0 0 16 16\"><circle cx=\"8\" cy=\"8\" r=\"4\"/></symbol>\
     <symbol id=\"active\" viewBox=\"0 0 16 16\"><path d=\"M8 .5 15.5 8 8 15.5.5 8z\"/></symbol>\
     <symbol id=\"broken\" viewBox=\"0 0 16 16\"><path d=\"M3.5 3.5l9 9m0-9l-9 9\"/></symbol>\
     <symbol id=\"fold\" viewBox=\"0 0 16 16\"><circle cx=\"8\" cy=\"8\" r=\"5.5\"/></symbol></svg>";

/// The name of the page, its figures, and links to its parts.
fn header(html: &mut String, page: &Page) {
    let links = LinkBase(&page.to_root);
    html.push_str("<header>\n");
    let _ = match &page.chain {
        Some(chain) => writeln!(
            html,
            "<p class=\"above\"><a href=\"{}\">chainfs · {}</a></p>\n<h1>{}</h1>",
            links.to(".chainfs/index.html"),
            text(&page.store),
            text(chain)
        ),
        None => {
            writeln!(html, "<p class=\"above\">chainfs · disk images of</p>\n<h1>{}</h1>", text(&page.store))
        }
    };
    let Totals { chains, images, snapshots, on_disk } = page.totals;
    html.push_str("<ul class=\"figures\">\n");
    let mut figure = |value: &str, what: &str, class: &str, target: Option<&str>| {
        let body = format!("<b>{value}</b> <span>{what}</span>");
        let body = target.map_or(body.clone(), |target| format!("<a href=\"#{target}\">{body}</a>"));
        let _ = writeln!(html, "<li{class}>{body}</li>");
    };
    if page.chain.is_none() {
        figure(&chains.to_string(), plural(chains, "chain"), "", Some("chains"));
    }
    figure(&images.to_string(), plural(images, "image"), "", None);
    figure(&snapshots.to_string(), plural(snapshots, "snapshot"), "", Some("snapshots"));
    figure(&text(&brief_size(on_disk)), "on disk", "", None);
    let problems = page.problems.count;
    let (class, target) =
        if problems == 0 { (" class=\"good\"", None) } else { (" class=\"bad\"", Some("problems")) };
    figure(&count_of(problems), plural(problems, "problem"), class, target);
    if !page.running.is_empty() {
        let count = page.running.len();
        figure(&count.to_string(), plural(count, "command"), " class=\"busy\"", Some("running"));
    }
    html.push_str("</ul>\n</header>\n");
}

/// The word, in the plural if the number asks for it.
fn plural(count: usize, word: &'static str) -> &'static str {
    match (count, word) {
        (1, word) => word,
        (_, "chain") => "chains",
        (_, "image") => "images",
        (_, "snapshot") => "snapshots",
        (_, "problem") => "problems",
        (_, "command") => "commands running",
        (_, word) => word,
    }
}

/// When the page was made.
fn moment(page: &Page) -> String {
    let machine = rfc3339(page.made).unwrap_or_default();
    format!("<time datetime=\"{machine}\">{}</time>", text(&minute(page.made, &page.zone)))
}

#[cfg(test)]
mod tests;

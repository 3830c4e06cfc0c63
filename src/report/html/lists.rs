//! The lists of a page: running commands, problems, chains, snapshots, commands to copy, and files.

use std::fmt::Write as _;

use super::markup::{LinkBase, date, name, size, text};
use super::model::{ChainLine, GuestSystem, Page, SnapshotLine, ViewLinks};

/// Bytes of one list; its last item may go beyond it.
const LIST_LEN: usize = 1 << 20;

/// The commands that are running.
pub(super) fn running(html: &mut String, page: &Page, links: LinkBase<'_>) {
    if page.running.is_empty() {
        return;
    }
    html.push_str("<section id=\"running\" class=\"card\">\n<h2>Running</h2>\n<ul class=\"plain\">\n");
    for command in &page.running {
        let _ = writeln!(
            html,
            "<li><b>{}</b> <progress max=\"1000\" value=\"{}\">{}</progress> <a href=\"{}\">status</a></li>",
            name(&command.chain),
            command.per_mille,
            text(&command.progress),
            links.to(&command.status)
        );
        let _ = writeln!(html, "<li class=\"dim\">{}</li>", text(&command.progress));
    }
    html.push_str("</ul>\n</section>\n");
}

/// The problems, each with its remedy.
pub(super) fn problems(html: &mut String, page: &Page, links: LinkBase<'_>) {
    if page.problems.count == 0 {
        return;
    }
    html.push_str("<section id=\"problems\" class=\"card bad\">\n<h2>Problems</h2>\n<ul class=\"plain\">\n");
    let (start, mut shown) = (html.len(), 0);
    for problem in &page.problems.shown {
        if html.len() - start > LIST_LEN {
            break;
        }
        // The remedy follows the first semicolon, in all sentences of problems.
        let (fact, remedy) = match problem.sentence.split_once("; ") {
            Some((fact, remedy)) => (fact, Some(remedy)),
            None => (problem.sentence.as_str(), None),
        };
        let _ = write!(html, "<li><b>{}</b> {}", name(&problem.path), text(fact));
        if let Some(remedy) = remedy {
            let _ = write!(html, "<br/><span class=\"remedy\">{}</span>", text(remedy));
        }
        html.push_str("</li>\n");
        shown += 1;
    }
    html.push_str("</ul>\n");
    more(
        html,
        page.problems.count - shown,
        "problems",
        &links.link(".chainfs/problems.txt", "problems.txt", ""),
    );
    html.push_str("</section>\n");
}

/// The table of all chains.
pub(super) fn chains(html: &mut String, page: &Page, links: LinkBase<'_>) {
    let heading = if page.chain.is_none() { "Chains" } else { "At a glance" };
    let _ = writeln!(html, "<section id=\"chains\">\n<h2>{heading}</h2>");
    if page.chains.count == 0 {
        html.push_str("<p>There is none that you may read.</p>\n</section>\n");
        return;
    }
    html.push_str(
        "<table>\n<thead><tr><th scope=\"col\">chain</th><th scope=\"col\" class=\"number\">disk</th>\
         <th scope=\"col\" class=\"number\" title=\"on disk, of images that no other chain has: \
         what is freed if the chain is removed\">freed if removed</th>\
         <th scope=\"col\" class=\"number\" title=\"on disk, of images that other chains have as well\">\
         shared</th><th scope=\"col\" class=\"number\">snapshots</th><th scope=\"col\">latest</th>\
         <th scope=\"col\">guest</th><th scope=\"col\">look inside</th></tr></thead>\n<tbody>\n",
    );
    let (start, mut shown) = (html.len(), 0);
    for chain in &page.chains.shown {
        if html.len() - start > LIST_LEN {
            break;
        }
        chain_row(html, page, chain, links);
        shown += 1;
    }
    html.push_str("</tbody>\n</table>\n");
    more(html, page.chains.count - shown, "chains", &links.link(".chainfs/chains.json", "chains.json", ""));
    html.push_str("</section>\n");
}

fn chain_row(html: &mut String, page: &Page, chain: &ChainLine, links: LinkBase<'_>) {
    let at = |rest: &str| format!("{}{rest}", chain.path);
    let _ = write!(
        html,
        "<tr><th scope=\"row\">{}",
        links.link(&at("info/index.html"), &name(&chain.name), "the page of this chain")
    );
    let mut badge = |class: &str, word: &str| {
        let _ = write!(html, " <span class=\"badge {class}\">{word}</span>");
    };
    if chain.has_problem {
        badge(
            "bad",
            &links.link(&at("info/index.html#problems"), "problem", "what is wrong, and what to do"),
        );
    }
    if chain.is_busy {
        badge("busy", "running");
    }
    if !chain.is_active {
        badge("", "read-only");
    }
    let system = match &chain.system {
        GuestSystem::Known(system) => links.link(&at("info/os.txt"), &name(system), "more about it"),
        GuestSystem::NotYet => links.link(&at("info/os.txt"), "find out", "reads the guest's disk"),
        GuestSystem::None => String::new(),
    };
    let mut inside = vec![links.link(&at("snapshots/"), "snapshots", "the disks of earlier states")];
    if chain.has_files {
        inside.push(links.link(&at("files/"), "files", "the guest's files, in each state"));
    }
    inside.push(links.link(&at("info/"), "info", "texts about the chain"));
    // The labels are for narrow windows, which show no head of the table, and no empty cell.
    let cell = |class: &str, label: &str, content: &str| {
        let label =
            if content.is_empty() { String::new() } else { format!("<span class=\"label\">{label} </span>") };
        format!("<td class=\"{class}\">{label}{content}</td>")
    };
    html.push_str("</th>");
    html.push_str(&cell("number", "disk", &chain.virtual_size.map(size).unwrap_or_default()));
    html.push_str(&cell("number", "freed if removed", &size(chain.sizes.own)));
    let shared = if chain.sizes.shared == 0 { "–".to_owned() } else { size(chain.sizes.shared) };
    html.push_str(&cell("number", "shared", &shared));
    html.push_str(&cell("number", "snapshots", &chain.snapshot_count.to_string()));
    let latest = chain.latest.map(|at| date(at, &page.zone)).unwrap_or_default();
    html.push_str(&cell("date", "latest", &latest));
    html.push_str(&cell("system", "guest", &system));
    let _ = writeln!(html, "<td class=\"inside\">{}</td></tr>", inside.join(" "));
}

/// The latest snapshots of a store, or all of a chain, the latest first.
pub(super) fn snapshots(html: &mut String, page: &Page, links: LinkBase<'_>) {
    html.push_str("<section id=\"snapshots\">\n<h2>Snapshots by date</h2>\n");
    if page.snapshots.count == 0 {
        html.push_str("<p>There is none yet; the commands below take one.</p>\n</section>\n");
        return;
    }
    let several = page.chain.is_none();
    html.push_str("<table>\n<thead><tr><th scope=\"col\">taken</th><th scope=\"col\">snapshot</th>");
    if several {
        html.push_str("<th scope=\"col\">chain</th>");
    }
    html.push_str(
        "<th scope=\"col\" class=\"number\" title=\"bytes on disk of its file; deleting the snapshot frees \
         at most these, because what later layers show of it is kept\">own size</th><th scope=\"col\">open\
         </th></tr></thead>\n<tbody>\n",
    );
    let (start, mut shown) = (html.len(), 0);
    for snapshot in &page.snapshots.shown {
        if html.len() - start > LIST_LEN {
            break;
        }
        snapshot_row(html, page, snapshot, several, links);
        shown += 1;
    }
    html.push_str("</tbody>\n</table>\n");
    let place = match &page.chain {
        Some(_) => links.link(&format!("{}snapshots/", page.chain_path), "snapshots/", ""),
        None => "see the pages of the chains".to_owned(),
    };
    more(html, page.snapshots.count - shown, "snapshots", &place);
    html.push_str(
        "<p class=\"note\">Deleting a snapshot frees at most its own size: what later layers show of it is \
         kept. <code>chainfs tree --sizes</code> says what each would free.</p>\n</section>\n",
    );
}

fn snapshot_row(
    html: &mut String,
    page: &Page,
    snapshot: &SnapshotLine,
    has_chain: bool,
    links: LinkBase<'_>,
) {
    let kind = if snapshot.is_internal { " <span class=\"badge\">internal</span>" } else { "" };
    let _ = write!(
        html,
        "<tr><td class=\"date\">{}</td><th scope=\"row\">{}{kind}</th>",
        date(snapshot.date, &page.zone),
        name(&snapshot.name)
    );
    if has_chain {
        let path = format!("{}info/index.html", snapshot.chain_path);
        let _ =
            write!(html, "<td>{}</td>", links.link(&path, &name(&snapshot.chain), "the page of this chain"));
    }
    let _ = writeln!(
        html,
        "<td class=\"number\">{}</td><td class=\"inside\">{}</td></tr>",
        snapshot.own_size.map_or("–".to_owned(), size),
        snapshot.links.as_ref().map(|view| view_links(view, &snapshot.name, links)).unwrap_or_default()
    );
}

/// The links to a view's files and disk; `view_name` tells screen readers which view is meant.
pub(super) fn view_links(view: &ViewLinks, view_name: &str, links: LinkBase<'_>) -> String {
    let whose = |what: &str| format!("{what} of {}", crate::report::safe::clipped(view_name, 100));
    let files =
        view.files.as_ref().map(|files| links.link(files, "files", &whose("the guest's files")) + " ");
    files.unwrap_or_default() + &links.link(&view.disk, "disk", &whose("the whole disk as one file"))
}

/// Commands to copy.
pub(super) fn commands(html: &mut String, page: &Page) {
    if page.commands.is_empty() {
        return;
    }
    html.push_str("<section id=\"commands\">\n<h2>Commands</h2>\n<ul class=\"commands\">\n");
    for (what, command) in &page.commands {
        let _ = writeln!(html, "<li>{}<br/><code>{}</code></li>", text(what), text(command));
    }
    html.push_str("</ul>\n</section>\n");
}

/// Other files about the same.
pub(super) fn documents(html: &mut String, page: &Page, links: LinkBase<'_>) {
    html.push_str(
        "<section id=\"more\">\n<h2>The same for programs and terminals</h2>\n<ul class=\"documents\">\n",
    );
    for (path, what) in &page.documents {
        let file = path.rsplit('/').next().unwrap_or(path);
        let _ = writeln!(
            html,
            "<li>{} <span class=\"dim\">{}</span></li>",
            links.link(path, &text(file), ""),
            text(what)
        );
    }
    html.push_str("</ul>\n</section>\n");
}

/// How many items a list leaves out, and where they are. `place` is markup.
fn more(html: &mut String, count: usize, what: &str, place: &str) {
    if count > 0 {
        let _ = writeln!(html, "<p class=\"more\">{count} more {what}: {place}</p>");
    }
}

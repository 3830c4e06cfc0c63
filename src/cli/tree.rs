//! `chainfs tree`: draws the backing tree.

use jiff::tz::TimeZone;

use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::args::{ChainOrder, ColorChoice, TreeArgs, TreeOutput};
use super::offline::planned;
use super::output::print;
use super::store_options::variable;
use super::target::{Target, TargetKind};
use super::tree_watch;
use super::warn;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{Engine, Request, quote};
use crate::report::store::{
    Shares, add_sharing, chain_forest_with_progress, chain_problem, forest_with_progress, no_images,
    problems_text,
};
use crate::report::text::TextOptions;
use crate::report::tree::{Forest, TreeOrder};
use crate::report::{dot, json, plan_tree, svg, text};
use crate::store::{Catalog, ImageIndex, Store, shown};

/// Runs the command.
pub(super) fn run(args: &TreeArgs) -> Result<u8> {
    if args.sizes && matches!(args.output, TreeOutput::Dot | TreeOutput::Svg) {
        let fact = "--sizes is for --output human and json; leave it out";
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    if !args.dry_run.is_empty() {
        return before_and_after(args);
    }
    if args.watch {
        return tree_watch::run(args);
    }
    let target = Target::find(&args.path, None, &args.image)?;
    let (store, catalog) = (&target.store, &target.catalog);
    let leaf = leaf(&target);
    let engine = args.sizes.then(|| Engine::beside_mount(store));
    let forest = found(store, catalog, leaf, engine.as_ref(), args.sort, &|_| None)?;
    print(&drawn(&forest, args, is_coloured(args.color)))?;
    if args.output == TreeOutput::Human {
        for line in remarks(store, catalog, leaf, &forest) {
            warn(&line);
        }
    }
    Ok(0)
}

/// The leaf of the chain that the target names; `None` if it is a whole store.
pub(super) fn leaf(target: &Target) -> Option<ImageIndex> {
    match &target.what {
        TargetKind::Store => None,
        TargetKind::Chain(leaf) => Some(*leaf),
        // The tree of the base shows all disks of the chain.
        TargetKind::Disk(disk) => disk.layers.last().copied(),
    }
}

/// The trees of a store, or the one that has this image.
pub(super) fn found(
    store: &Store,
    catalog: &Catalog,
    leaf: Option<ImageIndex>,
    sizes: Option<&Arc<Engine>>,
    order: ChainOrder,
    shares: &Shares<'_>,
) -> Result<Forest> {
    let mut forest = match leaf {
        None => forest_with_progress(store, catalog, shares),
        Some(leaf) => chain_forest_with_progress(store, catalog, leaf, shares),
    };
    if let Some(engine) = sizes {
        add_sharing(engine, catalog, &mut forest)?;
    }
    forest.sort(match order {
        ChainOrder::Name => TreeOrder::Name,
        ChainOrder::Date => TreeOrder::Date,
        ChainOrder::Size => TreeOrder::Size,
    });
    Ok(forest)
}

/// Problems of what is shown, one to a line; and that there is nothing to show.
pub(super) fn remarks(
    store: &Store,
    catalog: &Catalog,
    leaf: Option<ImageIndex>,
    forest: &Forest,
) -> Vec<String> {
    let problems = match leaf {
        None => problems_text(catalog),
        Some(leaf) => chain_problem(catalog, leaf).unwrap_or_default(),
    };
    let mut lines: Vec<String> = problems.lines().map(str::to_owned).collect();
    if forest.trees.is_empty() {
        let otherwise = || format!("{} holds no disk images", shown(store.given()));
        lines.push(no_images(store, catalog).unwrap_or_else(otherwise));
    }
    lines
}

/// Whether text on standard output is coloured.
pub(super) fn is_coloured(wanted: ColorChoice) -> bool {
    match wanted {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        // https://no-color.org: set, and not empty.
        ColorChoice::Auto => {
            let is_refused = variable("NO_COLOR").is_some_and(|value| !value.as_os_str().is_empty());
            let is_dumb = variable("TERM").is_none_or(|term| term.as_os_str() == "dumb");
            std::io::stdout().is_terminal() && !is_refused && !is_dumb
        }
    }
}

pub(super) fn drawn(forest: &Forest, args: &TreeArgs, color: bool) -> String {
    let zone = TimeZone::system();
    match args.output {
        TreeOutput::Human => {
            let full = args.full || args.sizes;
            text::forest(forest, &TextOptions { full, ascii: args.ascii, color, zone })
        }
        TreeOutput::Json => json::forest(forest),
        TreeOutput::Dot => dot::forest(forest, &zone, args.full),
        TreeOutput::Svg => svg::forest(forest, &zone, args.full),
    }
}

/// Shows the chain before and after a command; 1 if the command would be refused.
fn before_and_after(args: &TreeArgs) -> Result<u8> {
    // One line in the syntax of control files; the arguments are quoted again because the shell removed the
    // quotes.
    let words: Vec<Vec<u8>> = args.dry_run.iter().map(|word| quote(word.as_bytes())).collect();
    let request = Request::parse_command(&words.join(&b' '))?;
    let (store, plan) = planned(&args.path, &request, &args.image.options)?;
    print(&drawn(&plan_tree::forest(&plan, &store.catalog()), args, is_coloured(args.color)))?;
    plan.notes.iter().for_each(|note| warn(note));
    plan.refusals.iter().for_each(|refusal| warn(&format!("refused: {refusal}")));
    Ok(u8::from(!plan.refusals.is_empty()))
}

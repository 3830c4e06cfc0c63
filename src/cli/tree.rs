//! `chainfs tree`: draws the backing tree.

use jiff::tz::TimeZone;

use std::os::unix::ffi::OsStrExt;

use super::args::{TreeArgs, TreeOutput};
use super::offline::planned;
use super::output::print;
use super::target::{Target, TargetKind};
use super::warn;
use crate::error::Result;
use crate::ops::{Request, quote};
use crate::report::store::{chain_forest, chain_problem, forest, no_images, problems_text};
use crate::report::text::TextOptions;
use crate::report::tree::Forest;
use crate::report::{dot, json, plan_tree, svg, text};
use crate::store::shown;

/// Runs the command.
pub(super) fn run(args: &TreeArgs) -> Result<u8> {
    if !args.dry_run.is_empty() {
        return before_and_after(args);
    }
    let Target { store, catalog, what, filename } = Target::find(&args.path, None, &args.image)?;
    let leaf = match what {
        TargetKind::Store => None,
        TargetKind::Chain(leaf) => Some(leaf),
        // The tree of the base shows all disks of the chain.
        TargetKind::Disk(disk) => disk.layers.last().copied(),
    };
    let forest = match leaf {
        None => forest(&store, &catalog),
        Some(leaf) => chain_forest(&store, &catalog, leaf),
    };
    print(&drawn(&forest, args))?;
    if args.output == TreeOutput::Human {
        let problems = match leaf {
            None => problems_text(&catalog),
            Some(leaf) => chain_problem(&catalog, leaf).unwrap_or_default(),
        };
        problems.lines().for_each(warn);
        if forest.trees.is_empty() {
            warn(
                &no_images(&store, &catalog)
                    .unwrap_or_else(|| format!("{} holds no disk images", shown(&filename))),
            );
        }
    }
    Ok(0)
}

fn drawn(forest: &Forest, args: &TreeArgs) -> String {
    let zone = TimeZone::system();
    match args.output {
        TreeOutput::Human => text::forest(forest, &TextOptions { full: args.full, ascii: args.ascii, zone }),
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
    print(&drawn(&plan_tree::forest(&plan, &store.catalog()), args))?;
    plan.notes.iter().for_each(|note| warn(note));
    plan.refusals.iter().for_each(|refusal| warn(&format!("refused: {refusal}")));
    Ok(u8::from(!plan.refusals.is_empty()))
}

//! `chainfs tree`: who stands on whom.

use jiff::tz::TimeZone;

use super::args::{TreeArgs, TreeOutput};
use super::output::print;
use super::target::{Target, What};
use super::warn;
use crate::error::Result;
use crate::report::store::{chain_forest, chain_problem, forest, problems_text};
use crate::report::text::TextOptions;
use crate::report::{dot, json, svg, text};
use crate::store::shown;

/// Runs the command.
pub(super) fn run(args: &TreeArgs) -> Result<u8> {
    let Target { store, catalog, what, filename } = Target::find(&args.path, None, &args.image)?;
    let leaf = match what {
        What::Store => None,
        What::Chain(leaf) => Some(leaf),
        // All disks of a chain are in the tree of its base.
        What::Disk(disk) => disk.layers.last().copied(),
    };
    let forest = match leaf {
        None => forest(&store, &catalog),
        Some(leaf) => chain_forest(&store, &catalog, leaf),
    };
    let zone = TimeZone::system();
    let drawn = match args.output {
        TreeOutput::Human => text::forest(&forest, &TextOptions { full: args.full, ascii: args.ascii, zone }),
        TreeOutput::Json => json::forest(&forest),
        TreeOutput::Dot => dot::forest(&forest, &zone, args.full),
        TreeOutput::Svg => svg::forest(&forest, &zone, args.full),
    };
    print(&drawn)?;
    if args.output == TreeOutput::Human {
        let problems = match leaf {
            None => problems_text(&catalog),
            Some(leaf) => chain_problem(&catalog, leaf).unwrap_or_default(),
        };
        problems.lines().for_each(warn);
        if forest.trees.is_empty() {
            warn(&format!("{} holds no disk images", shown(&filename)));
        }
    }
    Ok(0)
}

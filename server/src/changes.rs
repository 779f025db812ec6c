//! What this node's own WAL says it changed.

use data_dir::DataDir;
use data_dir::wal::LocalWal;
use data_dir::window::Window;
use data_dir::window_scan::scan_changes;
use pg_format::{Lsn, TimelineHistory};
use proto::Refusal;
use proto::fetch::{Change, Covered};
use proto::model::Node;

use crate::node;

/// WAL that is read before what it says is sent: a slow disk reads it in the time a client waits for a sign
/// of life, and what it says fits in memory.
const STEP_BYTES: u64 = 64 << 20;
/// The same with `--max-rate`, which all of a client's streams share.
const STEP_BYTES_LIMITED: u64 = 4 << 20;

/// Reads the records of this node's history that begin in `[from, to)` and gives away what they change.
/// Tells how far the answer reaches: less than `to` if the WAL is not there or not whole. `give` is told
/// how many bytes were read, too.
pub(crate) fn changes(
    (directory, node, history): (&DataDir, &Node, &TimelineHistory),
    (from, to, limited): (Lsn, Lsn, bool),
    give: &mut dyn FnMut(u64, Change) -> Result<(), Refusal>,
) -> Result<Lsn, Refusal> {
    let context = node::wal_context(&node.control);
    let size = context.segment_size;
    let segments = directory.wal_segments(size).map_err(node::control_refusal)?;
    let last = segments.iter().map(|name| name.number).max().unwrap_or(0);
    let wal = LocalWal { directory, history, context };
    let mut covered = Covered { from, to: from, minimal_at: None, unknown_at: None };
    let bytes = if limited { STEP_BYTES_LIMITED } else { STEP_BYTES };
    while covered.to < to {
        let step = (covered.to, covered.to.plus(bytes).min(to));
        let (window, next) = scan_changes(&wal, context, step, last)
            .map_err(|error| node::internal("its WAL", &error))?;
        let read = step.1.distance_from(step.0);
        let Some(next) = next else {
            break;
        };
        covered.minimal_at = covered.minimal_at.or(window.minimal_at);
        covered.unknown_at = covered.unknown_at.or(window.unknown_at);
        for change in pieces(window) {
            give(0, change)?;
        }
        covered.to = next;
        give(read, Change::Covered(covered))?;
    }
    Ok(covered.to)
}

fn pieces(window: Window) -> impl Iterator<Item = Change> {
    let Window { pages, truncated, created, directories, .. } = window;
    let blocks = pages.into_segments().map(|(segment, blocks)| Change::Blocks { segment, blocks });
    let created = created.into_iter().map(|relation| Change::Relation {
        relation,
        created: true,
        cut_to: None,
    });
    let cut = truncated.into_iter().map(|(relation, blocks)| Change::Relation {
        relation,
        created: false,
        cut_to: Some(blocks),
    });
    let directories = directories
        .into_iter()
        .map(|(tablespace, database)| Change::Directory { tablespace, database });
    blocks.chain(created).chain(cut).chain(directories)
}

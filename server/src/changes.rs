//! What this node's own WAL says it changed.

use data_dir::DataDir;
use data_dir::wal::LocalWal;
use data_dir::window::Window;
use data_dir::window_scan::{scan_changes, scan_covered};
use pg_format::{Covered, Lsn, TimelineHistory};
use proto::Refusal;
use proto::fetch::{Change, Reached};
use proto::model::Node;

use crate::node;

/// WAL that is read before what it says is sent: a slow disk reads it in the time a client waits for a sign
/// of life, and what it says fits in memory.
const STEP_BYTES: u64 = 64 << 20;
/// The same with `--max-rate`, which all of a client's streams share.
const STEP_BYTES_LIMITED: u64 = 4 << 20;

/// Receives what is found, and is told how many bytes were read.
pub(crate) type Give<'g> = dyn FnMut(u64, Change) -> Result<(), Refusal> + 'g;

/// A range that is read in steps.
pub(crate) struct Steps {
    reached: Reached,
    to: Lsn,
    bytes: u64,
}

impl Steps {
    /// The records that begin in `[from, to)`; `limited` if their reading is slowed.
    pub(crate) fn new((from, to): (Lsn, Lsn), limited: bool) -> Self {
        let reached =
            Reached { from, to: from, minimal_at: None, unknown_at: None, extension_at: None };
        Self { reached, to, bytes: if limited { STEP_BYTES_LIMITED } else { STEP_BYTES } }
    }

    fn next(&self) -> Option<(Lsn, Lsn)> {
        let from = self.reached.to;
        (from < self.to).then(|| (from, from.plus(self.bytes).min(self.to)))
    }

    /// Tells how far the answer reaches.
    fn reach(&mut self, next: Lsn, give: &mut Give<'_>) -> Result<(), Refusal> {
        let read = next.distance_from(self.reached.to);
        self.reached.to = next;
        give(read, Change::Reached(self.reached))
    }
}

/// Gives away what the records of this node's history that begin in a range change. Tells how far the
/// answer reaches: less than the range if the WAL is not there or not whole.
pub(crate) fn changes(
    node: (&DataDir, &Node, &TimelineHistory),
    mut steps: Steps,
    give: &mut Give<'_>,
) -> Result<Lsn, Refusal> {
    let (wal, last) = wal_of(node)?;
    while let Some(step) = steps.next() {
        let (window, next) = scan_changes(&wal, wal.context, step, last)
            .map_err(|error| node::internal("its WAL", &error))?;
        let Some(next) = next else {
            break;
        };
        let reached = &mut steps.reached;
        reached.minimal_at = reached.minimal_at.or(window.minimal_at);
        reached.unknown_at = reached.unknown_at.or(window.unknown_at);
        reached.extension_at = reached.extension_at.or(window.extension_at);
        pieces(window).try_for_each(|change| give(0, change))?;
        steps.reach(next, give)?;
    }
    Ok(steps.reached.to)
}

/// The same with the blocks that replay of the range rebuilds whatever they hold.
pub(crate) fn rebuilt(
    node: (&DataDir, &Node, &TimelineHistory),
    mut steps: Steps,
    give: &mut Give<'_>,
) -> Result<Lsn, Refusal> {
    let (wal, last) = wal_of(node)?;
    let mut covered = Covered::new(steps.reached.to);
    while let Some(step) = steps.next() {
        let (part, next) = scan_covered(&wal, wal.context, step, last)
            .map_err(|error| node::internal("its WAL", &error))?;
        covered.absorb(part);
        let Some(next) = next else {
            break;
        };
        if next < steps.to {
            steps.reach(next, give)?;
            continue;
        }
        for (segment, blocks) in covered.into_blocks().into_segments() {
            give(0, Change::Blocks { segment, blocks })?;
        }
        steps.reach(next, give)?;
        break;
    }
    Ok(steps.reached.to)
}

/// The node's WAL and the newest segment of it.
fn wal_of<'n>(
    (directory, node, history): (&'n DataDir, &Node, &'n TimelineHistory),
) -> Result<(LocalWal<'n>, u64), Refusal> {
    let context = node::wal_context(&node.control);
    let segments = directory.wal_segments(context.segment_size).map_err(node::control_refusal)?;
    let last = segments.iter().map(|name| name.number).max().unwrap_or(0);
    Ok((LocalWal { directory, history, context }, last))
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

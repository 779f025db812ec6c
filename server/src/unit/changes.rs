//! What this node's own WAL says it changed.

use std::ops::Range;

use data_dir::wal::LocalWal;
use data_dir::wal::summarize::{scan_changes, scan_covered};
use data_dir::wal::summary::WalSummary;
use pg_format::{Covered, Lsn};
use proto::fetch::{Change, Item, ItemBody, Reached};
use proto::{Reason, Refusal};

use super::{Answered, proof};
use crate::node;
use crate::reply_stream::ReplyStream;

/// WAL that is read before what it says is sent: a slow disk reads it in the time a client waits for a sign
/// of life, and what it says fits in memory.
const STEP_BYTES: u64 = 64 << 20;
/// The same with `--max-rate`, which all of a client's streams share.
const STEP_BYTES_LIMITED: u64 = 4 << 20;

/// What is asked of a range of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangesWanted {
    /// What its records change.
    Changes,
    /// The blocks that replay of it rebuilds whatever they hold.
    Rebuilt,
}

/// Sends what the records of this node's history that begin in a range change. Says how far the answer
/// reaches: less than the range if the WAL is not there or not whole.
pub(crate) fn answer(
    wal: &LocalWal<'_>,
    output: &mut ReplyStream,
    unit: u64,
    range: Range<Lsn>,
    wanted: ChangesWanted,
) -> Result<Answered, Refusal> {
    let size = wal.context.segment_size;
    let most = proof::PROOF_SEGMENTS_MAX.saturating_mul(size.bytes());
    if range.end.distance_from(range.start) > most {
        return Err(Refusal::new(
            Reason::InvalidRequest,
            "changes of too many WAL segments were requested",
        ));
    }
    let segments = wal.directory.wal_segments(size).map_err(node::control_refusal)?;
    let last = segments.iter().map(|name| name.number).max().unwrap_or(0);
    let steps = ScanSteps::new(range, output.is_limited());
    let give: &mut SendChange<'_> = &mut |read, change| {
        output.read("changes", read);
        output.send(Item { unit, body: ItemBody::Change(change) })
    };
    let end = match wanted {
        ChangesWanted::Changes => changes(wal, last, steps, give),
        ChangesWanted::Rebuilt => rebuilt(wal, last, steps, give),
    };
    end.map(|end| Answered::of(end.as_u64()))
}

/// Receives what is found, and how many bytes were read for it.
type SendChange<'g> = dyn FnMut(u64, Change) -> Result<(), Refusal> + 'g;

/// A range that is read in steps.
struct ScanSteps {
    reached: Reached,
    to: Lsn,
    bytes: u64,
}

impl ScanSteps {
    /// The records that begin in the range; `limited` if their reading is slowed.
    fn new(range: Range<Lsn>, limited: bool) -> Self {
        let Range { start: from, end: to } = range;
        let reached =
            Reached { from, to: from, minimal_at: None, unknown_at: None, extension_at: None };
        Self { reached, to, bytes: if limited { STEP_BYTES_LIMITED } else { STEP_BYTES } }
    }

    fn next(&self) -> Option<Range<Lsn>> {
        let from = self.reached.to;
        (from < self.to).then(|| from..from.plus(self.bytes).min(self.to))
    }

    /// Says how far the answer reaches.
    fn reach(&mut self, next: Lsn, give: &mut SendChange<'_>) -> Result<(), Refusal> {
        let read = next.distance_from(self.reached.to);
        self.reached.to = next;
        give(read, Change::Reached(self.reached))
    }
}

fn changes(
    wal: &LocalWal<'_>,
    last: u64,
    mut steps: ScanSteps,
    give: &mut SendChange<'_>,
) -> Result<Lsn, Refusal> {
    while let Some(step) = steps.next() {
        let (wal_summary, next) = scan_changes(wal, wal.context, step, last)
            .map_err(|error| node::internal("its WAL", &error))?;
        let Some(next) = next else {
            break;
        };
        let reached = &mut steps.reached;
        reached.minimal_at = reached.minimal_at.or(wal_summary.minimal_at);
        reached.unknown_at = reached.unknown_at.or(wal_summary.unknown_at);
        reached.extension_at = reached.extension_at.or(wal_summary.extension_at);
        pieces(wal_summary).try_for_each(|change| give(0, change))?;
        steps.reach(next, give)?;
    }
    Ok(steps.reached.to)
}

fn rebuilt(
    wal: &LocalWal<'_>,
    last: u64,
    mut steps: ScanSteps,
    give: &mut SendChange<'_>,
) -> Result<Lsn, Refusal> {
    let mut covered = Covered::new(steps.reached.to);
    while let Some(step) = steps.next() {
        let (part, next) = scan_covered(wal, wal.context, step, last)
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

fn pieces(wal_summary: WalSummary) -> impl Iterator<Item = Change> {
    let WalSummary { pages, truncated, created, directories, .. } = wal_summary;
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

//! Answers units that ask what this node's WAL says was changed.

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

/// Bytes of WAL that are read before the changes in them are sent. Even a slow disk reads them before the
/// client's time-out, and the changes fit in memory.
const STEP_BYTES: u64 = 64 << 20;
/// [`STEP_BYTES`] with `--max-rate`, which all streams share.
const STEP_BYTES_LIMITED: u64 = 4 << 20;

/// What is asked of a range of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangesWanted {
    /// What its records change.
    Changes,
    /// The blocks that replay of this WAL rebuilds whatever their old content is.
    Rebuilt,
}

/// Sends what the records that begin in a range of this node's history change. The answer says how far it
/// reaches, which is less than the range if WAL is missing or not valid.
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

/// Receives the number of bytes that were read, and the change found in them.
type SendChange<'g> = dyn FnMut(u64, Change) -> Result<(), Refusal> + 'g;

/// A range that is read in steps.
struct ScanSteps {
    reached: Reached,
    to: Lsn,
    bytes: u64,
}

impl ScanSteps {
    /// The records that begin in the range; `limited` if `--max-rate` is set.
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

    /// Sends how far the answer reaches.
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

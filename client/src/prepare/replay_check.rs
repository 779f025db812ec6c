//! The WAL exactly as it will lie in `pg_wal`, what its replay will do, and whether that is what was planned.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use data_dir::wal::parallel_scan::{How, Runs, ValueSink, scan_runs};
use data_dir::wal::{LocalWal, Segments, WalError};
use pg_format::wal::effect::effect;
use pg_format::wal::{SegmentName, Start, WalContext};
use pg_format::{Covered, FormatError, Lsn, RelationSegment, TimelineHistory};
use proto::model::{Role, Sealed};

use crate::error::{Class, RewindError};
use crate::plan::Planned;
use crate::plan::replay_hazards::Hazard;
use crate::source::Snapshot;
use crate::staging::disk::Disk;
use crate::staging::layout;
use crate::target::{Target, local_wal};
use crate::task::{Context, Signals, blocking};

/// Bytes of WAL one processor reads at a time.
const RUN_BYTES: u64 = 16 << 20;

/// The WAL as it will be replayed: staged segments, and the target's own WAL before the fork point.
pub struct FutureWal<'a> {
    /// Where staged segments are.
    pub disk: &'a dyn Disk,
    /// Staged segments.
    pub staged: &'a BTreeSet<SegmentName>,
    /// The target's own WAL.
    pub local: LocalWal<'a>,
    /// First segment that is not common.
    pub fork_segment: Option<u64>,
    /// Ends the reading when the run must stop.
    pub signals: &'a Signals,
}

impl std::fmt::Debug for FutureWal<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FutureWal").field("staged", &self.staged).finish_non_exhaustive()
    }
}

impl Segments for FutureWal<'_> {
    fn open(&self, number: u64) -> io::Result<Option<File>> {
        if self.signals.stop() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if let Some(name) = self.staged.iter().find(|name| name.number == number) {
            let path = layout::staged_wal(&name.file_name(self.local.context.segment_size));
            return self.disk.open(&path).map(Some);
        }
        match self.fork_segment {
            Some(fork) if number < fork => self.local.open(number),
            Some(_) | None => Ok(None),
        }
    }
}

/// What replay of the WAL will do.
#[derive(Debug)]
pub struct Replayed {
    /// What it would get wrong.
    pub hazards: Vec<Hazard>,
    /// Blocks it rebuilds whatever they hold.
    pub covered: Covered,
    /// End of the last record.
    pub end: Lsn,
}

/// The result of one run of segments.
struct ReplayPart {
    hazards: Vec<Hazard>,
    covered: Covered,
    fault: Option<FormatError>,
}

/// Decodes the records from `from` to `to` as they will be replayed.
fn replay(
    wal: &(dyn Segments + Sync),
    context: WalContext,
    range: Range<Lsn>,
) -> Result<Replayed, WalError> {
    let Range { start: from, end: to } = range;
    let size = context.segment_size;
    let last = size.segment_of(Lsn::new(to.as_u64().saturating_sub(1)));
    let segments = (RUN_BYTES / size.bytes()).max(1);
    let runs = Runs { start: Start::Record(from), last, segments, end: to };
    let new = || ReplayPart { hazards: Vec::new(), covered: Covered::new(from), fault: None };
    let sink: &ValueSink<'_, ReplayPart> = &|part, record, body| {
        part.covered.note(body);
        match effect(record, body, context.format) {
            Ok(effect) => part.hazards.extend(Hazard::of(record.lsn, &effect)),
            Err(error) => drop(part.fault.get_or_insert(error)),
        }
    };
    let merge = |whole: &mut ReplayPart, later: ReplayPart| {
        whole.hazards.extend(later.hazards);
        whole.covered.absorb(later.covered);
        whole.fault = whole.fault.take().or(later.fault);
    };
    let how = How { new: &new, sink, merge: &merge };
    let (ReplayPart { hazards, covered, fault }, scanned) = scan_runs(wal, context, runs, how)?;
    match fault {
        Some(error) => Err(error.into()),
        None => Ok(Replayed { hazards, covered, end: scanned.end }),
    }
}

/// Decodes the WAL up to `to` as it will be replayed, of which `staged` segments are staged and the others are the
/// target's own.
pub async fn read(
    cx: &Context,
    target: &Arc<Target>,
    planned: &Planned,
    staged: BTreeSet<SegmentName>,
    to: Lsn,
) -> Result<Replayed, RewindError> {
    let (target, signals) = (Arc::clone(target), Arc::clone(&cx.stop.signals));
    let from = planned.start.redo;
    let fork_segment = planned.fork_segment(target.control.file.wal_segment_size);
    let read = blocking(move || {
        let local = local_wal(&target);
        let (context, disk) = (local.context, &*target.disk);
        let wal = FutureWal { disk, staged: &staged, local, fork_segment, signals: &signals };
        replay(&wal, context, from..to).map_err(|error| {
            RewindError::because(Class::Other, "the WAL to be replayed is not usable", error)
        })
    });
    let read = read.await;
    cx.stop.signals.check()?;
    read
}

/// R7: checks that replay can reach the end, and that the end lies on the timeline that the source reports
/// for it.
pub fn check_end(
    history: &TimelineHistory,
    sealed: &Sealed,
    checkpoint: Lsn,
) -> Result<(), RewindError> {
    let last = Lsn::new(sealed.end.as_u64().saturating_sub(1));
    let refuse = |message: String| Err(RewindError::new(Class::Other, message));
    if history.timeline_of(last) != sealed.end_timeline {
        return refuse(format!(
            "the source reports {} as the end of its WAL, on timeline {}, but its history has \
             another timeline there",
            sealed.end, sealed.end_timeline
        ));
    }
    if sealed.end <= checkpoint {
        return refuse(format!(
            "the source's end of WAL {} lies before the checkpoint replay starts from",
            sealed.end
        ));
    }
    Ok(())
}

/// What replay must do.
#[derive(Debug)]
pub struct Expected<'a> {
    /// Position that it must reach.
    pub end: Lsn,
    /// Blocks that it must rebuild, because they were left to replay.
    pub covered: &'a Covered,
    /// Blocks that it must rebuild, because they were torn at every attempt to read them.
    pub torn: &'a [(RelationSegment, u32)],
}

/// Whether replay will do what it must.
pub fn check(
    replayed: &Replayed,
    expected: &Expected<'_>,
    source: &Snapshot,
    source_redo: Lsn,
) -> Result<(), RewindError> {
    let Expected { end, covered, torn } = *expected;
    if replayed.end < end {
        let message = format!(
            "the WAL to be replayed stops at {} although it must reach {end}",
            replayed.end
        );
        return Err(RewindError::new(Class::Other, message));
    }
    if !replayed.covered.confirms(covered) {
        let message = "the staged WAL changed after pages were left out because of it (a bug, or disk damage)";
        return Err(RewindError::new(Class::Other, message));
    }
    let rebuilt = |(segment, block): &&(_, _)| replayed.covered.contains(segment, *block);
    if let Some((segment, block)) = torn.iter().find(|block| !rebuilt(block)) {
        let message = format!(
            "block {block} of relation {} on the source was torn whenever it was read and \
             replay does not rebuild it: check the source for corruption, or try again later",
            segment.relation
        );
        return Err(RewindError::transient(message));
    }
    let switched = switches_timeline(&source.history, source_redo, end);
    if source.description.node.role == Role::Standby && switched {
        // Full images are relative to the promoted node's restartpoint, not to this standby's.
        let checked = source.control().has_checksums() && torn.is_empty();
        if !checked {
            let message = "the source is a standby that changed timelines since its last \
                           restartpoint: run CHECKPOINT on the primary, then on the source, \
                           and try again";
            return Err(RewindError::transient(message));
        }
    }
    Ok(())
}

/// Whether the source switched timelines inside a range.
fn switches_timeline(history: &TimelineHistory, from: Lsn, to: Lsn) -> bool {
    history.spans().iter().any(|span| span.begin > from && span.begin <= to)
}

#[cfg(test)]
mod tests {
    use pg_format::{Fork, RelationPath, TimelineId};

    use super::*;
    use crate::test_values::{control, control_bytes, node, snapshot};

    const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position)
    }

    fn block(number: u32) -> (RelationSegment, u32) {
        RelationSegment::of_block(RELATION, Fork::Main, number)
    }

    /// WAL up to `end` that rebuilds these blocks.
    fn replayed(end: u64, blocks: &[u32]) -> Replayed {
        let mut covered = Covered::new(lsn(100));
        let mut named = pg_format::PageMap::default();
        for number in blocks {
            named.insert(RELATION, *number);
        }
        covered.absorb_blocks(named);
        Replayed { hazards: Vec::new(), covered, end: lsn(end) }
    }

    fn source() -> Snapshot {
        snapshot(0..1, lsn(100))
    }

    fn judge(replayed: &Replayed, torn: &[(RelationSegment, u32)]) -> Result<(), RewindError> {
        let covered = Covered::new(lsn(100));
        let expected = Expected { end: lsn(200), covered: &covered, torn };
        check(replayed, &expected, &source(), lsn(100))
    }

    #[test]
    fn replay_must_reach_its_end() {
        assert!(judge(&replayed(200, &[]), &[]).is_ok());
        let error = judge(&replayed(199, &[]), &[]).unwrap_err();
        assert_eq!(error.class(), Class::Other);
        assert!(error.to_string().contains("stops at"), "{error}");
    }

    #[test]
    fn a_page_that_is_always_torn_must_be_rebuilt() {
        assert!(judge(&replayed(200, &[7]), &[block(7)]).is_ok());
        let error = judge(&replayed(200, &[8]), &[block(7)]).unwrap_err();
        assert_eq!(error.class(), Class::Transient, "it may be whole later");
        assert!(error.to_string().contains("block 7"), "{error}");
    }

    #[test]
    fn what_was_left_to_replay_must_be_confirmed() {
        let before = replayed(200, &[7]).covered;
        let expected = Expected { end: lsn(200), covered: &before, torn: &[] };
        let confirm = |now: &Replayed| check(now, &expected, &source(), lsn(100));
        assert!(confirm(&replayed(200, &[7, 8])).is_ok(), "more is rebuilt by later WAL");
        assert!(confirm(&replayed(200, &[8])).is_err());
    }

    #[test]
    fn a_standby_that_changed_timelines_is_no_source_for_torn_pages() {
        let two = TimelineId::new(2).unwrap();
        let mut source = source();
        source.history = TimelineHistory::parse(two, b"1\t0/96\tx\n").unwrap();
        let judge = |source: &Snapshot| {
            let covered = Covered::new(lsn(100));
            let expected = Expected { end: lsn(200), covered: &covered, torn: &[] };
            check(&replayed(200, &[]), &expected, source, lsn(100))
        };
        // 0/96 is 150: it switched between the checkpoint and the end.
        assert!(judge(&source).is_ok(), "a primary");
        source.description.node.role = Role::Standby;
        source.description.node.control.data_checksum_version = 0;
        assert!(judge(&source).is_err(), "nothing tells a torn page");
        source.description.node.control.data_checksum_version = 1;
        assert!(judge(&source).is_ok(), "none was torn");
        source.description.node.control.data_checksum_version = 0;
        source.history = TimelineHistory::parse(two, b"1\t0/50\tx\n").unwrap();
        assert!(judge(&source).is_ok(), "it switched before");
    }

    fn sealed(end: u64, timeline: u32) -> Sealed {
        Sealed {
            end: lsn(end),
            end_timeline: TimelineId::new(timeline).unwrap(),
            node: proto::model::Node {
                control: control(),
                control_bytes: control_bytes(),
                ..node([1; 16])
            },
        }
    }

    #[test]
    fn the_end_lies_on_its_timeline_and_past_the_checkpoint() {
        let two = TimelineId::new(2).unwrap();
        let history = TimelineHistory::parse(two, b"1\t0/96\tx\n").unwrap();
        assert!(check_end(&history, &sealed(200, 2), lsn(120)).is_ok());
        assert!(check_end(&history, &sealed(200, 1), lsn(120)).is_err());
        assert!(check_end(&history, &sealed(150, 1), lsn(120)).is_ok(), "the last byte is on it");
        assert!(check_end(&history, &sealed(150, 2), lsn(120)).is_err());
        assert!(check_end(&history, &sealed(120, 1), lsn(120)).is_err(), "no checkpoint record");
    }
}

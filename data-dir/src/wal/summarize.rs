//! Reads WAL and summarizes what its records changed and where its checkpoints are.

use std::ops::{ControlFlow, Range};

use pg_format::control_file::WalLevel;
use pg_format::wal::effect::effect;
use pg_format::wal::{Effect, Record, RecordBody, Start, WalContext};
use pg_format::{Covered, Fork, FormatError, Lsn};

use crate::wal::parallel_scan::{How, Runs, ValueSink, scan_runs};
use crate::wal::summary::{Checkpoint, WalSummary};
use crate::wal::{Scanned, Segments, WalError, scan};

/// `info` bit of records that change files in ways block references do not show.
const SPECIAL_REL_UPDATE: u8 = 0x01;
/// The resource manager of transaction ends, which carry that bit when relations were dropped.
const TRANSACTIONS: u8 = 1;

/// Bytes of WAL one processor reads at a time: enough that joining the parts costs nothing beside it.
const RUN_BYTES: u64 = 32 << 20;

/// A part of a WAL summary, and the first error in it.
#[derive(Default)]
struct ScanPart {
    wal_summary: WalSummary,
    fault: Option<FormatError>,
}

/// Summarizes the WAL from the record at `start` to its valid end. Segments up to `last` are known to exist.
/// Created relations and commits are noted only from `fork` on.
pub fn scan_summary(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    start: Lsn,
    fork: Lsn,
    last: u64,
) -> Result<(WalSummary, Scanned), WalError> {
    let runs = runs(context, Start::Record(start), Lsn::MAX, last);
    scan_summary_in(segments, context, runs, fork)
}

fn runs(context: WalContext, start: Start, end: Lsn, last: u64) -> Runs {
    let segments = (RUN_BYTES / context.segment_size.bytes()).max(1);
    Runs { start, last, segments, end }
}

/// Summarizes the records that begin in `[from, to)`. Also returns where the next record begins; `None` if
/// valid WAL ends before that: the summary then covers only a part of the range.
pub fn scan_changes(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    range: Range<Lsn>,
    last: u64,
) -> Result<(WalSummary, Option<Lsn>), WalError> {
    let Range { start: from, end: to } = range;
    // The scan begins at a page boundary. A record before `from` is common to both nodes, or one more than is
    // needed.
    let start = Start::FirstAfter(from.page_start());
    let (wal_summary, scanned) =
        scan_summary_in(segments, context, runs(context, start, to, last), from)?;
    if scanned.stopped_by.is_some() {
        return Ok((wal_summary, None));
    }
    let behind = scanned.last_record.map_or(start, |_| Start::Record(scanned.end));
    let mut next = None;
    scan(segments, context, behind, &mut |record, _| {
        next = Some(record.lsn);
        ControlFlow::Break(())
    })?;
    Ok((wal_summary, next))
}

/// The blocks that replay of the records that begin in `[from, to)` rebuilds, and the end of these records,
/// at least `to`; `None` if valid WAL ends before `to`.
pub fn scan_covered(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    range: Range<Lsn>,
    last: u64,
) -> Result<(Covered, Option<Lsn>), WalError> {
    let Range { start: from, end: to } = range;
    let start = Start::FirstAfter(from.page_start());
    let sink: &ValueSink<'_, Covered> = &|covered, record, body| {
        if record.lsn >= from {
            covered.note(body);
        }
    };
    let (new, merge) = (|| Covered::new(from), Covered::absorb);
    let how = How { new: &new, sink, merge: &merge };
    let (covered, scanned) = scan_runs(segments, context, runs(context, start, to, last), how)?;
    let whole = scanned.stopped_by.is_none() || scanned.end >= to;
    Ok((covered, whole.then(|| scanned.end.max(to))))
}

/// [`scan_summary`] with the given division into runs.
pub fn scan_summary_in(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    runs: Runs,
    fork: Lsn,
) -> Result<(WalSummary, Scanned), WalError> {
    let (Start::Record(start) | Start::FirstAfter(start)) = runs.start;
    let sink: &ValueSink<'_, ScanPart> =
        &|part, record, body| match effect(record, body, context.format) {
            Ok(effect) => note(&mut part.wal_summary, record, body, &effect, fork),
            Err(error) => drop(part.fault.get_or_insert(error)),
        };
    let merge = |whole: &mut ScanPart, later: ScanPart| {
        // What comes behind an error is not used.
        if whole.fault.is_none() {
            whole.wal_summary.absorb(later.wal_summary);
            whole.fault = later.fault;
        }
    };
    let how = How { new: &ScanPart::default, sink, merge: &merge };
    let (ScanPart { wal_summary, fault }, scanned) = scan_runs(segments, context, runs, how)?;
    match fault {
        Some(error) => Err(error.into()),
        None => Ok((WalSummary { start, end: scanned.end, ..wal_summary }, scanned)),
    }
}

fn note(
    wal_summary: &mut WalSummary,
    record: &Record<'_>,
    body: &RecordBody,
    effect: &Effect,
    fork: Lsn,
) {
    for reference in &body.blocks {
        if reference.fork == Fork::Main {
            wal_summary.pages.insert(reference.relation, reference.block);
        }
    }
    let known = !matches!(effect, Effect::None) || record.resource_manager() == TRANSACTIONS;
    if record.info() & SPECIAL_REL_UPDATE != 0 && !known {
        wal_summary.unknown_at.get_or_insert(record.lsn);
    }
    if !note_files(wal_summary, effect, record.lsn >= fork) {
        note_state(wal_summary, effect, record.lsn);
    }
    if matches!(effect, Effect::Commit) && record.lsn >= fork {
        wal_summary.first_commit.get_or_insert(record.lsn);
    }
}

/// Notes what a record did to files. Returns whether it did anything to files.
fn note_files(wal_summary: &mut WalSummary, effect: &Effect, after_fork: bool) -> bool {
    match effect {
        Effect::CreateRelation { relation, .. } => {
            if after_fork {
                wal_summary.created.insert(*relation);
            }
        }
        Effect::Truncate { relation, blocks, main_fork } => {
            if *main_fork {
                let smallest = wal_summary.truncated.entry(*relation).or_insert(*blocks);
                *smallest = (*blocks).min(*smallest);
            }
        }
        Effect::CopyDatabase { database, tablespace, source_database, source_tablespace } => {
            wal_summary.directories.insert((*tablespace, *database));
            // Moved, not copied: the old directory is gone.
            if source_database == database {
                wal_summary.directories.insert((*source_tablespace, *source_database));
            }
        }
        Effect::CreateDatabase { database, tablespace } => {
            wal_summary.directories.insert((*tablespace, *database));
        }
        Effect::DropDatabase { database, tablespaces } => {
            wal_summary.directories.extend(tablespaces.iter().map(|space| (*space, *database)));
        }
        _ => return false,
    }
    true
}

/// Notes changes of the server as a whole: checkpoints, promotions, settings.
fn note_state(wal_summary: &mut WalSummary, effect: &Effect, at: Lsn) {
    match *effect {
        Effect::Checkpoint { shutdown, checkpoint } => {
            wal_summary.checkpoints.push(Checkpoint { lsn: at, shutdown, checkpoint });
        }
        Effect::EndOfRecovery { .. } => wal_summary.promotions.push(at),
        Effect::ParameterChange { wal_level, .. } => {
            if wal_level == WalLevel::Minimal {
                wal_summary.minimal_at.get_or_insert(at);
            }
            wal_summary.settings_changed_at.get_or_insert(at);
        }
        Effect::ChecksumsChanged => {
            wal_summary.checksums_changed_at.get_or_insert(at);
        }
        Effect::Extension => {
            wal_summary.extension_at.get_or_insert(at);
        }
        _ => {}
    }
}

/// Hands the checkpoints below `before` to `visit`, newest first, reading the WAL backwards segment
/// by segment until `visit` breaks. Returns whether it broke: if not, older WAL is missing.
pub fn checkpoints_before(
    segments: &dyn Segments,
    context: WalContext,
    before: Lsn,
    visit: &mut dyn FnMut(&Checkpoint) -> ControlFlow<()>,
) -> Result<bool, WalError> {
    let size = context.segment_size;
    let last = size.segment_of(Lsn::new(before.as_u64().saturating_sub(1)));
    for number in (0..=last).rev() {
        let io = |source| WalError::Io { at: size.start_of(number), source };
        if segments.open(number).map_err(io)?.is_none() {
            return Ok(false);
        }
        let mut found = Vec::new();
        let mut fault: Option<FormatError> = None;
        let (start, end) = (size.start_of(number), size.start_of(number + 1).min(before));
        scan(segments, context, Start::FirstAfter(start), &mut |record, body| {
            if record.lsn >= end {
                return ControlFlow::Break(());
            }
            match effect(record, body, context.format) {
                Ok(Effect::Checkpoint { shutdown, checkpoint }) => {
                    found.push(Checkpoint { lsn: record.lsn, shutdown, checkpoint });
                    ControlFlow::Continue(())
                }
                Ok(_) => ControlFlow::Continue(()),
                Err(error) => {
                    fault = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = fault {
            return Err(error.into());
        }
        for checkpoint in found.iter().rev() {
            if visit(checkpoint).is_break() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

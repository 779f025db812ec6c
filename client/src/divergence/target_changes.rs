//! What the target changed around the fork point, as its WAL says.

use std::ops::ControlFlow;

use data_dir::wal::summarize::{checkpoints_before, scan_summary};
use data_dir::wal::summary::{Checkpoint, WalSummary};
use data_dir::wal::{LocalWal, records_after};
use pg_format::backup_label::ReplayStart;
use pg_format::{Lsn, TimelineId};

use super::fork_point::{self, Early};
use super::hint_logging::{Past, before_open_transactions, check_promotion, check_summary};
use super::search::Search;
use super::undecided::Undecided;
use super::{Divergence, TargetChanges};
use crate::error::{Class, NotPossible, RewindError};
use crate::plan::ForkPoint;
use crate::target::wal_archive::{Elsewhere, TargetWal};
use crate::target::{changed_without_wal, wal_context};

/// The target's own WAL from its last checkpoint on.
struct OwnWal {
    wal_summary: WalSummary,
    /// Where it ends.
    end: Lsn,
    /// The source's digests of the same range, asked for before.
    early: Option<Early>,
}

/// Finds the fork point and what the target changed since the checkpoint before it.
pub fn find(search: &Search<'_>) -> Result<Divergence, RewindError> {
    let target = search.target;
    let ancestor = target.history.common_ancestor(&search.source.snapshot.history);
    let Some(ancestor) = ancestor else {
        return Err(RewindError::new(
            Class::Rebuild,
            "source and target have no timeline in common: take a new base backup",
        ));
    };
    let context = wal_context(&target.control.file);
    let size = context.segment_size;
    let from_source = |number| search.fetch_segment(number);
    // So far, only WAL before the point where the history files part is known to be common.
    let end = if ancestor.end == Lsn::MAX { 0 } else { size.segment_of(ancestor.end) };
    let elsewhere = Elsewhere {
        archive: search.wal_archive.clone(),
        restore_command: search.restore_command.clone(),
        source: Some((&from_source, end)),
    };
    let local = LocalWal { directory: &target.directory, history: &target.history, context };
    let wal = TargetWal::new(local, elsewhere);
    let found = with_wal(search, &wal, ancestor.timeline, ancestor.end);
    let mut divergence = match found {
        Ok(divergence) => divergence,
        Err(Undecided::NotPossible(why) | Undecided::Unreadable(why)) => {
            return Ok(Divergence::unknown(why));
        }
        Err(Undecided::Failed(error)) => return Err(error),
    };
    divergence.restored = wal.restored().map_err(|error| {
        RewindError::because(Class::Target, "could not read the target's WAL", error)
    })?;
    Ok(divergence)
}

fn with_wal(
    search: &Search<'_>,
    wal: &TargetWal<'_>,
    timeline: TimelineId,
    forked_at: Lsn,
) -> Result<Divergence, Undecided> {
    let OwnWal { wal_summary, end, early } = own_wal(search, wal, forked_at)?;
    let known = Divergence {
        target_end: Some(end),
        ..Divergence::unknown(NotPossible::new("the fork point is not proven"))
    };
    let lsn = match fork_point::prove(search, wal, &wal_summary, forked_at.min(end), early) {
        Ok(lsn) => lsn,
        Err(Undecided::NotPossible(why)) => {
            return Ok(Divergence { target_changes: Err(why), ..known });
        }
        Err(failed) => return Err(failed),
    };
    let target_changes = match changes_since(search, wal, &wal_summary, lsn) {
        Ok(changes) => Ok(changes),
        // An error in this part of the target's WAL does not make the fork point less proven.
        Err(Undecided::NotPossible(why)) => Err(why),
        Err(other) => return Err(other),
    };
    Ok(Divergence { fork: Some(ForkPoint { lsn, timeline }), target_changes, ..known })
}

/// Reads the target's WAL from its last checkpoint on. Only this WAL says which of the target's pages were
/// written since.
fn own_wal(search: &Search<'_>, wal: &TargetWal<'_>, forked_at: Lsn) -> Result<OwnWal, Undecided> {
    let context = wal.local().context;
    let control = &search.target.control.file;
    let redo = control.checkpoint_copy.redo;
    let early = fork_point::ask_early(search, wal, redo, forked_at);
    let last = search.last_here(redo);
    let (wal_summary, scanned) = scan_summary(wal, context, redo, Lsn::MAX, last)?;
    if scanned.last_record.is_none() {
        let why = scanned.stopped_by.map_or("nothing was read", |end| end.why);
        return Err(Undecided::new(format!(
            "the target's WAL from its last checkpoint at {redo} is not available: {why}"
        )));
    }
    if let Some(end) = scanned.stopped_by {
        let segments = search.target.directory.wal_segments(context.segment_size)?;
        let last = segments.iter().map(|name| name.number).max().unwrap_or(0);
        if let Some(at) = records_after(wal, context, end, last)? {
            return Err(Undecided::new(format!(
                "the target's WAL is damaged at {} ({}): intact records follow at {at}",
                end.at, end.why
            )));
        }
    }
    let end = scanned.end;
    if end <= control.checkpoint {
        return Err(Undecided::new(format!(
            "the target's WAL ends at {end}, before its last checkpoint at {}",
            control.checkpoint
        )));
    }
    if end < control.min_recovery_point {
        return Err(Undecided::new(format!(
            "the target's WAL ends at {end}, before its minimum recovery point {}",
            control.min_recovery_point
        )));
    }
    Ok(OwnWal { wal_summary, end, early })
}

/// R1: finds where the WAL summary must begin, reads it, and checks that it names every page that was
/// changed.
fn changes_since(
    search: &Search<'_>,
    wal: &TargetWal<'_>,
    own: &WalSummary,
    fork: Lsn,
) -> Result<TargetChanges, Undecided> {
    let control = &search.target.control.file;
    let context = wal.local().context;
    let mut checkpoint = own.last_checkpoint_before(fork).copied();
    if checkpoint.is_none() {
        let newest = &mut |found: &Checkpoint| {
            checkpoint = Some(*found);
            ControlFlow::Break(())
        };
        checkpoints_before(wal, context, fork, newest)?;
    }
    let Some(checkpoint) = checkpoint else {
        let why = format!("no WAL with a checkpoint before the fork point {fork} was found");
        return Err(Undecided::new(why));
    };
    let start = replay_start(search, &checkpoint, fork);
    let read = |from| scan_summary(wal, context, from, fork, search.last_here(from));
    let (mut wal_summary, mut scanned) = read(start.redo)?;
    let past = Past::since(start.redo, fork, control, &wal_summary, &search.target.history);
    if past.was_standby {
        let Some(last) = checkpoint_at(wal, start.checkpoint)? else {
            let why = format!("the checkpoint at {} is not in the target's WAL", start.checkpoint);
            return Err(Undecided::new(why));
        };
        let redo = before_open_transactions(wal, last)?;
        if redo < start.redo {
            (wal_summary, scanned) = read(redo)?;
        }
    }
    if wal_summary.end < own.end {
        let why = scanned.stopped_by.map_or("nothing was read", |end| end.why);
        let (first, end) = (wal_summary.start, wal_summary.end);
        let why =
            format!("the target's WAL from {first} on is not complete: it stops at {end}: {why}");
        return Err(Undecided::new(why));
    }
    check_promotion(past, &wal_summary)?;
    check_summary(&wal_summary, search.target)?;
    let indexes = changed_without_wal(search.target);
    for relation in indexes.map_err(Undecided::unreadable("the target's relations"))? {
        wal_summary.pages.insert(relation, 0);
    }
    Ok(TargetChanges { wal_summary, start })
}

/// Where replay from the fork begins: the oldest of the last common checkpoint, the target's own if that
/// is common, and the source's.
fn replay_start(search: &Search<'_>, checkpoint: &Checkpoint, fork: Lsn) -> ReplayStart {
    let control = &search.target.control.file;
    let mut start = ReplayStart {
        redo: checkpoint.checkpoint.redo,
        checkpoint: checkpoint.lsn,
        timeline: checkpoint.checkpoint.timeline,
    };
    if control.checkpoint < fork && control.checkpoint_copy.redo < start.redo {
        start = ReplayStart {
            redo: control.checkpoint_copy.redo,
            checkpoint: control.checkpoint,
            timeline: control.checkpoint_copy.timeline,
        };
    }
    let theirs = search.source.snapshot.checkpoint();
    if theirs.redo < start.redo { theirs } else { start }
}

/// The checkpoint record that begins at `lsn`, if the WAL has it.
fn checkpoint_at(wal: &TargetWal<'_>, lsn: Lsn) -> Result<Option<Checkpoint>, Undecided> {
    let mut found = None;
    let newest = &mut |checkpoint: &Checkpoint| {
        found = Some(*checkpoint).filter(|checkpoint| checkpoint.lsn == lsn);
        ControlFlow::Break(())
    };
    checkpoints_before(wal, wal.local().context, lsn.plus(1), newest)?;
    Ok(found)
}

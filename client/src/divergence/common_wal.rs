//! Where the histories part, proven by content, and what the target did since.
//!
//! Blocks: reads much WAL. Runs on a blocking thread and asks the source through a handle.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use data_dir::wal::{LocalWal, records_after};
use data_dir::window::{Checkpoint, Window};
use data_dir::window_scan::{checkpoints_before, scan_window};
use pg_format::backup_label::ReplayStart;
use pg_format::wal::SegmentName;
use pg_format::{Lsn, TimelineHistory, TimelineId};
use proto::fetch::{Item, ItemBody, Unit, UnitKind};
use proto::limits::UNIT_BYTES_MAX;
use proto::model::Description;
use tokio::runtime::Handle;

use crate::divergence::hint_logging::{
    NotRewindable, Past, before_open_transactions, check_promotion, check_window,
};
use crate::error::{Class, RewindError};
use crate::source::Session;
use crate::target::wal_archive::{Elsewhere, TargetWal, nameless_file};
use crate::target::{Target, changed_without_wal, wal_context};

/// What is known about where the two nodes parted.
#[derive(Debug)]
pub struct Analysis {
    /// Where the histories part, if it is proven.
    pub fork: Option<Fork>,
    /// End of the target's valid WAL, if it could be read.
    pub target_end: Option<Lsn>,
    /// What strategy *fork* needs, or why it cannot be.
    pub rewindable: Result<Rewindable, NotRewindable>,
    /// Segments of the common part that came from an archive or the source.
    pub fetched: Vec<(SegmentName, File)>,
}

impl Analysis {
    /// Nothing is known, for this reason.
    pub fn not_rewindable(why: &str) -> Self {
        let rewindable = Err(NotRewindable::new(why));
        Self { fork: None, target_end: None, rewindable, fetched: Vec::new() }
    }
}

/// A proven fork point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// First position at which the histories differ, or can.
    pub lsn: Lsn,
    /// The timeline they share up to there.
    pub timeline: TimelineId,
}

/// What strategy *fork* works from.
#[derive(Debug)]
pub struct Rewindable {
    /// What the target did.
    pub window: Window,
    /// Where replay would begin.
    pub start: ReplayStart,
}

/// What the analysis works on.
#[derive(Debug)]
pub struct Subject<'a> {
    /// The target.
    pub target: &'a Target,
    /// The source.
    pub source: &'a Description,
    /// The source's history.
    pub source_history: &'a TimelineHistory,
    /// For asking the source.
    pub session: Session,
    /// The runtime it is asked on.
    pub runtime: Handle,
    /// `--wal-archive`
    pub wal_archive: Option<PathBuf>,
    /// `--restore-command`, else the target's own.
    pub restore_command: Option<String>,
}

pub(crate) fn wal_error(error: io::Error) -> RewindError {
    RewindError::because(Class::Target, "could not read the target's WAL", error)
}

/// The source's file for a segment, found along its history as the server would.
pub fn source_segment(
    source: &Description,
    history: &TimelineHistory,
    number: u64,
) -> Option<SegmentName> {
    let size = source.node.control.wal_segment_size;
    history
        .spans()
        .iter()
        .rev()
        .filter(|span| size.segment_of(span.begin) <= number)
        .map(|span| SegmentName { timeline: span.timeline, number })
        .find(|name| source.wal_segments.binary_search(name).is_ok())
}

impl Subject<'_> {
    /// Asks the source, from a blocking thread.
    pub(crate) fn ask(&self, unit: UnitKind) -> Result<Vec<Item>, RewindError> {
        let mut session = self.session.clone();
        let units = vec![Unit { id: 0, kind: unit }];
        self.runtime.block_on(async move { session.collect(units).await })
    }

    /// A whole segment of the source, in memory.
    fn fetch_segment(&self, name: SegmentName) -> io::Result<Option<File>> {
        let Some(name) = source_segment(self.source, self.source_history, name.number) else {
            return Ok(None);
        };
        let size = self.source.node.control.wal_segment_size;
        let file = nameless_file()?;
        let mut offset = 0;
        while offset < size.bytes() {
            let length = UNIT_BYTES_MAX.min(size.bytes() - offset);
            let SegmentName { timeline, number } = name;
            let items = self.ask(UnitKind::Wal { timeline, number, offset, length });
            for item in items.map_err(|error| io::Error::other(error.chain()))? {
                match item.body {
                    ItemBody::Chunk(chunk) => file.write_all_at(chunk.data(), chunk.offset())?,
                    ItemBody::End { vanished: true, .. } => return Ok(None),
                    _ => {}
                }
            }
            offset += length;
        }
        file.set_len(size.bytes())?;
        Ok(Some(file))
    }

    /// Last of the segments that follow each other in the target's `pg_wal` from `start` on.
    fn last_here(&self, start: Lsn) -> u64 {
        let size = self.target.control.file.wal_segment_size;
        let names = self.target.directory.wal_segments(size).unwrap_or_default();
        let numbers: std::collections::BTreeSet<u64> = names.iter().map(|n| n.number).collect();
        let first = size.segment_of(start);
        let here = (first..).take_while(|number| numbers.contains(number));
        here.last().unwrap_or(first)
    }

    /// Finds the fork and reads the window.
    pub fn analyse(&self) -> Result<Analysis, RewindError> {
        let ancestor = self.target.history.common_ancestor(self.source_history);
        let Some(ancestor) = ancestor else {
            return Err(RewindError::new(
                Class::Rebuild,
                "source and target have no timeline in common: take a new base backup",
            ));
        };
        let context = wal_context(&self.target.control.file);
        let directory = &self.target.directory;
        let history = &self.target.history;
        let size = context.segment_size;
        let from_source = |name: SegmentName| self.fetch_segment(name);
        // Only what lies before the fork of the histories is known to be common already.
        let end = if ancestor.end == Lsn::MAX { 0 } else { size.segment_of(ancestor.end) };
        let elsewhere = Elsewhere {
            archive: self.wal_archive.clone(),
            restore_command: self.restore_command.clone(),
            source: Some((&from_source, end)),
        };
        let wal = TargetWal::new(LocalWal { directory, history, context }, elsewhere);
        match self.with_wal(&wal, ancestor.timeline, ancestor.end) {
            Ok(analysis) => Ok(Analysis { fetched: wal.fetched().map_err(wal_error)?, ..analysis }),
            // A disk that has lost some of it, or a record of an unknown kind: the nodes can still be
            // compared.
            Err(error) if error.class() == Class::Target => Ok(Analysis {
                fork: None,
                target_end: None,
                rewindable: Err(NotRewindable::new(error.chain())),
                fetched: Vec::new(),
            }),
            Err(error) => Err(error),
        }
    }

    fn with_wal(
        &self,
        wal: &TargetWal<'_>,
        timeline: TimelineId,
        forked_at: Lsn,
    ) -> Result<Analysis, RewindError> {
        let none = |fork, target_end, why: String| {
            Ok(Analysis {
                fork,
                target_end,
                rewindable: Err(NotRewindable::new(why)),
                fetched: Vec::new(),
            })
        };
        let context = wal.local().context;
        let control = &self.target.control.file;
        let redo = control.checkpoint_copy.redo;
        let early = self.ask_early(wal, (redo, forked_at));
        let (own, scanned) = scan_window(wal, context, redo, (Lsn::MAX, self.last_here(redo)))?;
        if scanned.last_record.is_none() {
            let why = scanned.stopped_by.map_or("nothing was read", |end| end.why);
            return none(
                None,
                None,
                format!(
                    "the target's WAL from its last checkpoint at {redo} is not available: {why}"
                ),
            );
        }
        if let Some(end) = scanned.stopped_by {
            let segments = self.target.directory.wal_segments(context.segment_size)?;
            let last = segments.iter().map(|name| name.number).max().unwrap_or(0);
            if let Some(at) = records_after(wal, context, end, last)? {
                let why = format!(
                    "the target's WAL is damaged at {} ({}): intact records follow at {at}",
                    end.at, end.why
                );
                return none(None, None, why);
            }
        }
        // Whatever is on disk since is in that WAL alone: without it nobody knows what was changed.
        if scanned.end <= control.checkpoint {
            let why = format!(
                "the target's WAL ends at {}, before its last checkpoint at {}",
                scanned.end, control.checkpoint
            );
            return none(None, None, why);
        }
        if scanned.end < control.min_recovery_point {
            let why = format!(
                "the target's WAL ends at {}, before its minimum recovery point {}",
                scanned.end, control.min_recovery_point
            );
            return none(None, None, why);
        }
        let fork = match self.prove(wal, &own, forked_at.min(scanned.end), early)? {
            Ok(lsn) => Fork { lsn, timeline },
            Err(why) => return none(None, Some(scanned.end), why.to_string()),
        };
        let rewindable = self.window(wal, &own, fork.lsn)?;
        Ok(Analysis {
            fork: Some(fork),
            target_end: Some(scanned.end),
            rewindable,
            fetched: Vec::new(),
        })
    }

    /// R1: finds where the window must begin, reads it, and checks that it tells everything.
    fn window(
        &self,
        wal: &TargetWal<'_>,
        own: &Window,
        fork: Lsn,
    ) -> Result<Result<Rewindable, NotRewindable>, RewindError> {
        let control = &self.target.control.file;
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
            return Ok(Err(NotRewindable::new(format!(
                "no WAL holds a checkpoint before the fork at {fork}"
            ))));
        };
        let start = self.start(&checkpoint, fork);
        let read = |from| scan_window(wal, context, from, (fork, self.last_here(from)));
        let (mut window, mut scanned) = read(start.redo)?;
        let past = Past::since(start.redo, fork, control, &window, &self.target.history);
        if past.was_standby {
            let Some(last) = checkpoint_at(wal, start.checkpoint)? else {
                let why =
                    format!("the checkpoint at {} is not in the target's WAL", start.checkpoint);
                return Ok(Err(NotRewindable::new(why)));
            };
            match before_open_transactions(wal, last)? {
                Ok(redo) if redo < start.redo => (window, scanned) = read(redo)?,
                Ok(_) => {}
                Err(why) => return Ok(Err(why)),
            }
        }
        if window.end < own.end {
            let why = scanned.stopped_by.map_or("nothing was read", |end| end.why);
            let (first, end) = (window.start, window.end);
            let why = format!("the WAL from {first} is not complete: it stops at {end}: {why}");
            return Ok(Err(NotRewindable::new(why)));
        }
        if let Err(why) = check_promotion(past, &window) {
            return Ok(Err(why));
        }
        if let Err(why) = check_window(&window, self.target)? {
            return Ok(Err(why));
        }
        for relation in changed_without_wal(self.target)? {
            window.pages.insert(relation, 0);
        }
        Ok(Ok(Rewindable { window, start }))
    }

    /// Where replay from the fork begins: the oldest of the last common checkpoint, the target's own if that
    /// is common, and the source's.
    fn start(&self, checkpoint: &Checkpoint, fork: Lsn) -> ReplayStart {
        let control = &self.target.control.file;
        let mut start = start_of(checkpoint);
        if control.checkpoint < fork && control.checkpoint_copy.redo < start.redo {
            start = ReplayStart {
                redo: control.checkpoint_copy.redo,
                checkpoint: control.checkpoint,
                timeline: control.checkpoint_copy.timeline,
            };
        }
        let theirs = source_start(self.source);
        if theirs.redo < start.redo { theirs } else { start }
    }
}

/// The checkpoint record that begins at `lsn`, if the WAL has it.
fn checkpoint_at(wal: &TargetWal<'_>, lsn: Lsn) -> Result<Option<Checkpoint>, RewindError> {
    let mut found = None;
    let newest = &mut |checkpoint: &Checkpoint| {
        found = Some(*checkpoint).filter(|checkpoint| checkpoint.lsn == lsn);
        ControlFlow::Break(())
    };
    checkpoints_before(wal, wal.local().context, lsn.plus(1), newest)?;
    Ok(found)
}

fn start_of(checkpoint: &Checkpoint) -> ReplayStart {
    ReplayStart {
        redo: checkpoint.checkpoint.redo,
        checkpoint: checkpoint.lsn,
        timeline: checkpoint.checkpoint.timeline,
    }
}

/// Replay from the source's newest completed checkpoint or restartpoint.
pub fn source_start(source: &Description) -> ReplayStart {
    let control = &source.node.control;
    ReplayStart {
        redo: control.checkpoint_copy.redo,
        checkpoint: control.checkpoint,
        timeline: control.checkpoint_copy.timeline,
    }
}

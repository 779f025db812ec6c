//! The WAL exactly as it will lie in `pg_wal`, and what its replay will do.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;

use data_dir::runs::{How, Runs, ValueSink, scan_runs};
use data_dir::wal::{LocalWal, Segments, WalError};
use pg_format::wal::effect::effect;
use pg_format::wal::{SegmentName, Start, WalContext};
use pg_format::{Covered, FormatError, Lsn, TimelineHistory};

use crate::plan::replay_hazards::Hazard;
use crate::staging::disk::Disk;
use crate::staging::layout;
use crate::task::Signals;

/// Bytes of WAL one processor reads at a time.
const RUN_BYTES: u64 = 16 << 20;

/// What is staged, and the target's own common part.
pub struct FutureWal<'a> {
    /// Where staged segments are.
    pub disk: &'a dyn Disk,
    /// Staged segments.
    pub staged: &'a BTreeSet<SegmentName>,
    /// The target's own WAL.
    pub local: LocalWal<'a>,
    /// First segment that is not common.
    pub fork_segment: u64,
    /// Whether nobody waits for what is read any more.
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
        if number < self.fork_segment { self.local.open(number) } else { Ok(None) }
    }
}

/// What replay will meet.
#[derive(Debug)]
pub struct Replayed {
    /// What it would get wrong.
    pub hazards: Vec<Hazard>,
    /// Blocks it rebuilds whatever they hold.
    pub covered: Covered,
    /// End of the last record.
    pub end: Lsn,
}

/// What one run of segments brings.
struct Part {
    hazards: Vec<Hazard>,
    covered: Covered,
    fault: Option<FormatError>,
}

/// Decodes the records from `from` to `to` as they will be replayed.
pub fn replay(
    wal: &(dyn Segments + Sync),
    context: WalContext,
    (from, to): (Lsn, Lsn),
) -> Result<Replayed, WalError> {
    let size = context.segment_size;
    let last = size.segment_of(Lsn::new(to.as_u64().saturating_sub(1)));
    let segments = (RUN_BYTES / size.bytes()).max(1);
    let runs = Runs { start: Start::Record(from), last, segments, end: to };
    let new = || Part { hazards: Vec::new(), covered: Covered::new(from), fault: None };
    let sink: &ValueSink<'_, Part> = &|part, record, body| {
        part.covered.note(body);
        match effect(record, body, context.format) {
            Ok(effect) => part.hazards.extend(Hazard::of(record.lsn, &effect)),
            Err(error) => drop(part.fault.get_or_insert(error)),
        }
    };
    let merge = |whole: &mut Part, later: Part| {
        whole.hazards.extend(later.hazards);
        whole.covered.absorb(later.covered);
        whole.fault = whole.fault.take().or(later.fault);
    };
    let how = How { new: &new, sink, merge: &merge };
    let (Part { hazards, covered, fault }, scanned) = scan_runs(wal, context, runs, how)?;
    match fault {
        Some(error) => Err(error.into()),
        None => Ok(Replayed { hazards, covered, end: scanned.end }),
    }
}

/// Whether the source switched timelines inside a range.
pub fn switches_timeline(history: &TimelineHistory, from: Lsn, to: Lsn) -> bool {
    history.spans().iter().any(|span| span.begin > from && span.begin <= to)
}

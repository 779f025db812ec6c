//! Reading WAL on several processors: the segments are divided into runs, each is decoded on its own,
//! and the parts are joined where they fit together.
//!
//! A page's header says where the first record that begins on it is, so a run needs nothing of the one
//! before; whether it follows it is told by its first record, which names its predecessor. Where the
//! parts do not fit, everything behind is read again as if there were no runs: the result is that of
//! [`scan`], whatever the WAL holds.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pg_format::Lsn;
use pg_format::wal::{EndOfWal, Start, WalContext};

use crate::wal::{Scanned, Segments, Sink, WalError, scan};

/// Threads at most: more would wait for the disk.
const THREADS_MAX: usize = 8;

/// What is read, and how it is divided.
#[derive(Debug, Clone, Copy)]
pub struct Runs {
    /// First record.
    pub start: Start,
    /// Last segment that is known to be there: what lies behind is read by one thread.
    pub last: u64,
    /// Segments in a run.
    pub segments: u64,
}

/// What one run brought.
struct Part<T> {
    value: T,
    /// Its first record and that one's predecessor.
    first: Option<(Lsn, Lsn)>,
    scanned: Scanned,
}

/// A place for each run; empty if it was not read because the WAL ended before.
type Parts<T> = Vec<Option<Result<Part<T>, WalError>>>;

/// Reads every record once, as [`scan`] does, but gives them to as many values of `T` as there are
/// runs, each in order; the values come back in the order of the WAL. The position is where the part
/// of a value ends.
pub fn scan_runs<T: Send>(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    runs: Runs,
    (new, sink): (&(dyn Fn() -> T + Sync), &ValueSink<'_, T>),
) -> Result<(Vec<T>, Scanned), WalError> {
    let bounds = bounds(context, runs);
    let parts: Mutex<Parts<T>> = Mutex::new((0..bounds.len()).map(|_| None).collect());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(THREADS_MAX).min(bounds.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((start, end)) = bounds.get(index).copied() else {
                        return;
                    };
                    let part = run(segments, context, (start, end), (new(), sink));
                    // Nothing behind the end of the WAL is of use.
                    if !matches!(&part, Ok(part) if part.scanned.stopped_by.is_none()) {
                        next.store(bounds.len(), Ordering::Relaxed);
                    }
                    let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(place) = parts.get_mut(index) {
                        *place = Some(part);
                    }
                }
            });
        }
    });
    let parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    join(segments, context, parts, (new, sink))
}

/// Receives the records of a scan for a value.
pub type ValueSink<'s, T> =
    dyn Fn(&mut T, &pg_format::wal::Record<'_>, &pg_format::wal::RecordBody) + Sync + 's;

/// Where each run begins, and the position from which on records belong to the next.
fn bounds(context: WalContext, runs: Runs) -> Vec<(Start, Lsn)> {
    let size = context.segment_size;
    let Runs { start, last, segments } = runs;
    let (Start::Record(at) | Start::FirstAfter(at)) = start;
    let mut bounds = Vec::new();
    let mut start = start;
    let mut number = size.segment_of(at);
    while number.saturating_add(segments) <= last {
        number += segments.max(1);
        let end = size.start_of(number);
        bounds.push((start, end));
        start = Start::FirstAfter(end);
    }
    bounds.push((start, Lsn::MAX));
    bounds
}

fn run<T>(
    segments: &dyn Segments,
    context: WalContext,
    (start, end): (Start, Lsn),
    (mut value, sink): (T, &ValueSink<'_, T>),
) -> Result<Part<T>, WalError> {
    let mut first = None;
    let mut last: Option<(Lsn, Lsn)> = None;
    let give: &mut Sink<'_> = &mut |record, body| {
        if record.lsn >= end {
            return ControlFlow::Break(());
        }
        first.get_or_insert((record.lsn, record.previous()));
        sink(&mut value, record, body);
        last = Some((record.lsn, record.end));
        ControlFlow::Continue(())
    };
    let scanned = scan(segments, context, start, give)?;
    // The record that stopped it is the next run's.
    let scanned = match (scanned.stopped_by, last) {
        (None, Some((lsn, end))) => Scanned { end, last_record: Some(lsn), ..scanned },
        (None, None) => Scanned { last_record: None, ..scanned },
        (Some(_), _) => scanned,
    };
    Ok(Part { value, first, scanned })
}

/// Puts the parts together as far as each follows the one before, and reads the rest in one go.
fn join<T>(
    segments: &dyn Segments,
    context: WalContext,
    parts: Parts<T>,
    (new, sink): (&(dyn Fn() -> T + Sync), &ValueSink<'_, T>),
) -> Result<(Vec<T>, Scanned), WalError> {
    let mut values = Vec::new();
    let mut so_far: Option<Scanned> = None;
    for part in parts {
        let follows = |part: &Part<T>| match (&so_far, part.first) {
            (None, _) => true,
            (Some(before), Some((lsn, previous))) => {
                before.last_record == Some(previous) && lsn >= before.end
            }
            (Some(_), None) => false,
        };
        match part {
            // An error of the first part is one of the whole; of a later one it may lie behind the end.
            Some(Err(error)) if so_far.is_none() => return Err(error),
            Some(Ok(part)) if follows(&part) => {
                values.push(part.value);
                let ended = part.scanned.stopped_by.is_some();
                so_far = Some(part.scanned);
                if ended {
                    break;
                }
            }
            _ => break,
        }
    }
    let Some(before) = so_far else {
        // There is always a first part.
        return Err(WalError::Io {
            at: Lsn::INVALID,
            source: std::io::Error::other("nothing was read"),
        });
    };
    if before.stopped_by.is_some() {
        return Ok((values, before));
    }
    let rest = run(segments, context, (Start::Record(before.end), Lsn::MAX), (new(), sink))?;
    // A record left over at the right place is none of this WAL's.
    if let Some((_, previous)) = rest.first
        && before.last_record.is_some_and(|last| last != previous)
    {
        let why = "record does not follow the one before it";
        let end = EndOfWal { at: before.end, page: before.end.page_start(), why };
        return Ok((values, Scanned { stopped_by: Some(end), ..before }));
    }
    values.push(rest.value);
    let last_record = rest.scanned.last_record.or(before.last_record);
    Ok((values, Scanned { last_record, ..rest.scanned }))
}

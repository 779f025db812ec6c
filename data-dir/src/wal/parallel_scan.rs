//! Reads WAL on several processors: the segments are divided into runs, each run is decoded on its own, and
//! the results are joined where they fit together.
//!
//! A page's header says where the first record begins on it, so a run can be decoded without the run before
//! it. Whether it follows that run is decided by its first record, which names its predecessor. Where it does
//! not follow, everything behind is read again without runs: the result is always that of [`scan`], whatever
//! the WAL contains.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use parking_lot::{Condvar, Mutex, MutexGuard};
use pg_format::Lsn;
use pg_format::wal::{EndOfWal, Start, WalContext};

use crate::wal::{RecordSink, Scanned, Segments, WalError, scan};

/// Threads at most: more would wait for the disk.
const THREADS_MAX: usize = 8;

/// What is read, and how it is divided.
#[derive(Debug, Clone, Copy)]
pub struct Runs {
    /// First record.
    pub start: Start,
    /// Last segment that is known to exist: WAL behind it is read by one thread.
    pub last: u64,
    /// Segments in a run.
    pub segments: u64,
    /// Only records that begin before it are read.
    pub end: Lsn,
}

/// The result of one run.
struct RunPart<T> {
    value: T,
    /// Start of the first record, and the start of its predecessor.
    first: Option<(Lsn, Lsn)>,
    scanned: Scanned,
}

/// Number of runs, for each thread, that may be read ahead of the run that is joined next: their results wait
/// in memory until then.
const AHEAD: usize = 2;

/// Reads every record once, as [`scan`] does, but gives them to as many values of `T` as there are
/// runs, each in order, and merges those in the order of the WAL.
pub fn scan_runs<T: Send>(
    segments: &(dyn Segments + Sync),
    context: WalContext,
    runs: Runs,
    how: How<'_, T>,
) -> Result<(T, Scanned), WalError> {
    let bounds = bounds(context, runs);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(THREADS_MAX).min(bounds.len());
    let joiner = Mutex::new(Joiner::default());
    let moved = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(index) = take(&joiner, &moved, threads * AHEAD) {
                    let Some((start, end)) = bounds.get(index).copied() else {
                        return;
                    };
                    let part = run(segments, context, start, end, how);
                    lock(&joiner).offer(index, part, how.merge);
                    moved.notify_all();
                }
            });
        }
    });
    let joiner = joiner.into_inner();
    joiner.finish(segments, context, runs.end, how)
}

/// What is done with records.
pub struct How<'s, T> {
    /// Makes a value that has received no record.
    pub new: &'s (dyn Fn() -> T + Sync),
    /// Gives a record to a value.
    pub sink: &'s ValueSink<'s, T>,
    /// Adds the second value, which received the WAL behind that of the first, to the first.
    pub merge: &'s (dyn Fn(&mut T, T) + Sync),
}

impl<T> Clone for How<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for How<'_, T> {}

impl<T> std::fmt::Debug for How<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("How").finish_non_exhaustive()
    }
}

/// Joins the results of runs as long as each run follows the one before.
struct Joiner<T> {
    whole: Option<(T, Scanned)>,
    /// An error of the first run, which is an error of the whole scan.
    error: Option<WalError>,
    /// Number of the run whose result is joined next.
    next: usize,
    /// The run that is to be read next.
    taken: usize,
    waiting: BTreeMap<usize, Result<RunPart<T>, WalError>>,
    /// Nothing more is joined: the WAL ends, or the next part does not follow.
    over: bool,
}

impl<T> Default for Joiner<T> {
    fn default() -> Self {
        Self { whole: None, error: None, next: 0, taken: 0, waiting: BTreeMap::new(), over: false }
    }
}

fn lock<T>(joiner: &Mutex<Joiner<T>>) -> MutexGuard<'_, Joiner<T>> {
    joiner.lock()
}

/// The next run to be read, once it is not too far ahead; `None` if no more are of use.
fn take<T>(joiner: &Mutex<Joiner<T>>, moved: &Condvar, ahead: usize) -> Option<usize> {
    let mut joiner = lock(joiner);
    while !joiner.over && joiner.taken >= joiner.next + ahead {
        moved.wait(&mut joiner);
    }
    if joiner.over {
        return None;
    }
    joiner.taken += 1;
    Some(joiner.taken - 1)
}

impl<T> Joiner<T> {
    fn offer(
        &mut self,
        index: usize,
        part: Result<RunPart<T>, WalError>,
        merge: &dyn Fn(&mut T, T),
    ) {
        self.waiting.insert(index, part);
        while let Some(part) = self.waiting.remove(&self.next) {
            self.next += 1;
            if !self.over {
                self.join(part, merge);
            }
        }
    }

    fn join(&mut self, part: Result<RunPart<T>, WalError>, merge: &dyn Fn(&mut T, T)) {
        let part = match (part, &self.whole) {
            (Ok(part), _) => part,
            (Err(error), None) => {
                (self.over, self.error) = (true, Some(error));
                return;
            }
            // The error may lie behind the end of the WAL.
            (Err(_), Some(_)) => {
                self.over = true;
                return;
            }
        };
        self.over = part.scanned.stopped_by.is_some();
        match (&mut self.whole, part.first) {
            (None, _) => self.whole = Some((part.value, part.scanned)),
            (Some((value, before)), Some((lsn, previous)))
                if before.last_record == Some(previous) && lsn >= before.end =>
            {
                merge(value, part.value);
                *before = part.scanned;
            }
            (Some(_), _) => self.over = true,
        }
    }

    /// Reads the WAL that was not joined, without runs.
    fn finish(
        self,
        segments: &dyn Segments,
        context: WalContext,
        end: Lsn,
        how: How<'_, T>,
    ) -> Result<(T, Scanned), WalError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let Some((mut value, before)) = self.whole else {
            // There is always a first part.
            let source = std::io::Error::other("nothing was read");
            return Err(WalError::Io { at: Lsn::INVALID, source });
        };
        if before.stopped_by.is_some() {
            return Ok((value, before));
        }
        let rest = run(segments, context, Start::Record(before.end), end, how)?;
        if rest.first.is_none() && rest.scanned.stopped_by.is_none() {
            return Ok((value, before));
        }
        // A record at the right position that names another predecessor is left over from older WAL.
        if let Some((_, previous)) = rest.first
            && before.last_record.is_some_and(|last| last != previous)
        {
            let why = "record does not follow the one before it";
            let end = EndOfWal { at: before.end, page: before.end.page_start(), why };
            return Ok((value, Scanned { stopped_by: Some(end), ..before }));
        }
        (how.merge)(&mut value, rest.value);
        let last_record = rest.scanned.last_record.or(before.last_record);
        Ok((value, Scanned { last_record, ..rest.scanned }))
    }
}

/// Receives the records of a scan for a value.
pub type ValueSink<'s, T> =
    dyn Fn(&mut T, &pg_format::wal::Record<'_>, &pg_format::wal::RecordBody) + Sync + 's;

/// Where each run begins, and the position from which on records belong to the next.
fn bounds(context: WalContext, runs: Runs) -> Vec<(Start, Lsn)> {
    let size = context.segment_size;
    let Runs { start, last, segments, end: last_end } = runs;
    let (Start::Record(at) | Start::FirstAfter(at)) = start;
    let mut bounds = Vec::new();
    let mut start = start;
    let mut number = size.segment_of(at);
    while number.saturating_add(segments) <= last {
        number += segments.max(1);
        let end = size.start_of(number);
        if end >= last_end {
            break;
        }
        bounds.push((start, end));
        start = Start::FirstAfter(end);
    }
    bounds.push((start, last_end));
    bounds
}

fn run<T>(
    segments: &dyn Segments,
    context: WalContext,
    start: Start,
    end: Lsn,
    how: How<'_, T>,
) -> Result<RunPart<T>, WalError> {
    let mut value = (how.new)();
    let mut first = None;
    let mut last: Option<(Lsn, Lsn)> = None;
    let give: &mut RecordSink<'_> = &mut |record, body| {
        if record.lsn >= end {
            return ControlFlow::Break(());
        }
        first.get_or_insert((record.lsn, record.previous()));
        (how.sink)(&mut value, record, body);
        last = Some((record.lsn, record.end));
        ControlFlow::Continue(())
    };
    let scanned = scan(segments, context, start, give)?;
    // The record that stopped the scan belongs to the next run.
    let scanned = match (scanned.stopped_by, last) {
        (None, Some((lsn, end))) => Scanned { end, last_record: Some(lsn), ..scanned },
        (None, None) => Scanned { last_record: None, ..scanned },
        (Some(_), _) => scanned,
    };
    Ok(RunPart { value, first, scanned })
}

//! What all connections of a pool share.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::fetch::Unit;

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::source::in_flight::{Outstanding, cost};
use crate::source::prepare::Prepare;

/// When a rate was measured last, and what had arrived by then.
#[derive(Debug)]
pub(crate) struct Measurement {
    since: Instant,
    received: u64,
}

impl Measurement {
    /// Begins now, before anything has arrived.
    pub(crate) fn begin() -> Self {
        Self { since: Instant::now(), received: 0 }
    }
}

/// What all connections together have done so far.
pub(crate) struct FetchProgress {
    /// Payload bytes over all connections.
    pub(crate) received: AtomicU64,
    /// Frames over all connections.
    pub(crate) frames: AtomicU64,
    /// Times a connection was lost and made again.
    pub(crate) reconnects: AtomicU64,
    /// Units there were, and those that came to their end.
    pub(crate) units: AtomicUsize,
    pub(crate) ended: AtomicUsize,
    /// Cost of what has come, and of all units.
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    /// When something came last.
    last: Mutex<Instant>,
    monitor: Arc<dyn Monitor>,
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) waiting: Mutex<VecDeque<Unit>>,
    /// Connections that may ask for more.
    pub(crate) limit: AtomicUsize,
    /// Whether more units become known when some of these are answered.
    pub(crate) pending: AtomicBool,
    pub(crate) prepare: Arc<dyn Prepare>,
    /// Why a unit could not be completed.
    pub(crate) fault: Mutex<Option<RewindError>>,
    pub(crate) progress: FetchProgress,
}

impl FetchProgress {
    fn new(units: usize, bytes: u64, monitor: Arc<dyn Monitor>) -> Self {
        Self {
            received: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            units: AtomicUsize::new(units),
            ended: AtomicUsize::new(0),
            total_bytes: AtomicU64::new(bytes),
            done_bytes: AtomicU64::new(0),
            last: Mutex::new(Instant::now()),
            monitor,
        }
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn progressed(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.monitor.progress(done.min(self.total_bytes()), self.total_bytes());
        *self.last.lock() = Instant::now();
    }

    /// Payload bytes a second since it was asked last.
    pub(crate) fn rate(&self, measured: &mut Measurement) -> f64 {
        let now = self.received.load(Ordering::Relaxed);
        let bytes = now.saturating_sub(std::mem::replace(&mut measured.received, now));
        let elapsed = std::mem::replace(&mut measured.since, Instant::now()).elapsed();
        bytes as f64 / elapsed.as_secs_f64().max(f64::EPSILON)
    }

    /// Payload bytes that are probably still to come, if the rest compresses as well as what has come.
    pub(crate) fn left(&self) -> f64 {
        let done = self.done_bytes.load(Ordering::Relaxed).max(1);
        let received = self.received.load(Ordering::Relaxed);
        self.total_bytes().saturating_sub(done) as f64 * received as f64 / done as f64
    }

    /// Fails unless every unit was answered: an incomplete set must not be sealed.
    pub(crate) fn check_all_came(&self) -> Result<(), RewindError> {
        let ended = self.ended.load(Ordering::Relaxed);
        let units = self.units.load(Ordering::Relaxed);
        if ended == units {
            return Ok(());
        }
        let message = format!("the source answered only {ended} of {units} requests");
        Err(RewindError::new(Class::Other, message))
    }

    pub(crate) fn silent_for(&self) -> Duration {
        self.last.lock().elapsed()
    }
}

impl Shared {
    pub(crate) fn new(
        units: Vec<Unit>,
        later_cost: Option<u64>,
        prepare: Arc<dyn Prepare>,
        connections: usize,
        monitor: Arc<dyn Monitor>,
    ) -> Self {
        let bytes = costs(&units) + later_cost.unwrap_or(0);
        Self {
            progress: FetchProgress::new(units.len(), bytes, monitor),
            pending: AtomicBool::new(later_cost.is_some()),
            waiting: Mutex::new(units.into()),
            limit: AtomicUsize::new(connections),
            prepare,
            fault: Mutex::new(None),
        }
    }

    pub(crate) fn waiting(&self) -> parking_lot::MutexGuard<'_, VecDeque<Unit>> {
        self.waiting.lock()
    }

    /// Whether there are units that were not asked for yet, in the list or still to be added.
    pub(crate) fn has_more(&self) -> bool {
        let waiting = self.waiting();
        !waiting.is_empty() || self.is_pending(&waiting)
    }

    /// Whether units are still to be added to the list, whose lock the caller must hold.
    pub(crate) fn is_pending(&self, _waiting: &VecDeque<Unit>) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Adds the units that were still to come, whose cost was taken to be `expected`.
    pub(crate) fn add(&self, units: Vec<Unit>, expected: u64) {
        let mut waiting = self.waiting();
        self.progress.units.fetch_add(units.len(), Ordering::Relaxed);
        let less = expected.saturating_sub(costs(&units));
        self.progress.total_bytes.fetch_sub(less, Ordering::Relaxed);
        waiting.extend(units);
        self.pending.store(false, Ordering::Relaxed);
    }

    /// Adds units that the answers to other units have made necessary.
    pub(crate) fn add_more(&self, units: Vec<Unit>) {
        let mut waiting = self.waiting();
        self.progress.units.fetch_add(units.len(), Ordering::Relaxed);
        self.progress.total_bytes.fetch_add(costs(&units), Ordering::Relaxed);
        waiting.extend(units);
    }

    pub(crate) fn take_fault(&self) -> Option<RewindError> {
        self.fault.lock().take()
    }
}

fn costs(units: &[Unit]) -> u64 {
    units.iter().map(|unit| cost(&unit.kind)).sum()
}

pub(crate) type SharedOutstanding = Arc<Mutex<Outstanding>>;

pub(crate) fn lock(outstanding: &SharedOutstanding) -> parking_lot::MutexGuard<'_, Outstanding> {
    outstanding.lock()
}

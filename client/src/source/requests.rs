//! Asks for the units of one connection: as many as its window holds, each completed just before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::fetch::Unit;
use proto::limits::UNITS_PER_MESSAGE_MAX;
use tokio::sync::mpsc;

use crate::error::{Class, RewindError};
use crate::source::in_flight::cost;
use crate::source::pool::shared::{Shared, SharedOutstanding, lock};
use crate::source::prepare::Announce;

/// When something was asked for last: the source's silence is counted from then on.
#[derive(Debug)]
pub(crate) struct LastAsked(Mutex<AskedState>);

#[derive(Debug)]
struct AskedState {
    at: Instant,
    completing: bool,
}

impl Default for LastAsked {
    fn default() -> Self {
        Self(Mutex::new(AskedState { at: Instant::now(), completing: false }))
    }
}

impl LastAsked {
    fn note(&self, completing: bool) {
        *self.0.lock() = AskedState { at: Instant::now(), completing };
    }

    /// How long the source has been asked for nothing more; no time at all while this node itself
    /// works on the next question.
    pub(crate) fn silent_for(&self) -> Duration {
        let state = self.0.lock();
        if state.completing { Duration::ZERO } else { state.at.elapsed() }
    }
}

/// A connection's number, and how much it asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Counts the connections.
    pub(crate) number: usize,
    /// Bytes that it keeps asked for.
    pub(crate) window: u64,
}

/// Keeps `window` bytes asked for until no unit is waiting, or the connection is one too many; then
/// the stream's requests end.
pub(crate) async fn ask(
    shared: Arc<Shared>,
    asked: Arc<LastAsked>,
    outstanding: SharedOutstanding,
    requests: mpsc::Sender<Vec<Unit>>,
    place: Place,
) {
    let Place { number, window } = place;
    /// How often a full window is checked; short compared with the time in which it empties.
    const PAUSE: Duration = Duration::from_millis(5);
    loop {
        if number >= shared.limit.load(Ordering::Relaxed) {
            return;
        }
        // Space in the queue first: a unit that was taken from the list must always be sent.
        let Ok(permit) = requests.reserve().await else {
            return;
        };
        let batch = {
            let mut waiting = shared.waiting();
            let mut outstanding = lock(&outstanding);
            let mut room =
                window.saturating_sub(outstanding.cost()).min(shared.prepare.cost_at_once());
            let mut batch = Vec::new();
            while batch.len() < UNITS_PER_MESSAGE_MAX && room > 0 {
                let Some(unit) = waiting.pop_front() else {
                    break;
                };
                room = room.saturating_sub(cost(&unit.kind));
                outstanding.insert(unit.clone());
                batch.push(unit);
            }
            if batch.is_empty() && waiting.is_empty() && !shared.is_pending(&waiting) {
                return;
            }
            batch
        };
        if batch.is_empty() {
            drop(permit);
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        asked.note(true);
        match complete(&shared, batch).await {
            // There is no await from here on, so the task is ended before or after all of it.
            Ok((batch, announce)) => {
                announce.into_iter().for_each(|announce| announce());
                lock(&outstanding).update(&batch);
                permit.send(batch);
                asked.note(false);
            }
            Err(error) => {
                *shared.fault.lock() = Some(error);
                asked.note(false);
                return;
            }
        }
    }
}

async fn complete(
    shared: &Arc<Shared>,
    batch: Vec<Unit>,
) -> Result<(Vec<Unit>, Vec<Announce>), RewindError> {
    let prepare = Arc::clone(&shared.prepare);
    let completed = tokio::task::spawn_blocking(move || {
        let mut batch = batch;
        let announce: Result<Vec<_>, _> =
            batch.iter_mut().map(|unit| prepare.prepare(unit)).collect();
        announce.map(|announce| (batch, announce))
    });
    completed.await.map_err(|error| {
        RewindError::because(
            Class::Other,
            "internal error: a thread that prepares requests failed",
            error,
        )
    })?
}

//! Works through many units over several connections and survives their loss.
//!
//! Units wait in one list, in the order in which they are best asked for. Each connection keeps more of them
//! requested than the link can carry, so it never waits for a round trip. Frames are checked and given to a
//! sink on a blocking thread of each connection. When a connection breaks, what had arrived is kept, the rest
//! goes back to the list, and a new connection is made.

pub mod shared;
pub mod sink;
mod worker;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto::fetch::Unit;
use proto::limits::CONNECTIONS_DEFAULT;
use shared::{Measurement, Shared};
use tokio::task::JoinSet;
use worker::ConnectionWorker;

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::source::Session;
use crate::source::connect::Connection;
use crate::source::connection_count::Adapt;
use crate::source::prepare::Prepare;

pub use sink::Sink;

/// Which connections must be open before the first unit is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolStart {
    /// All: one that is opened late would find that the other connections have taken its share.
    Together,
    /// None: little is asked for, so round trips take most of the time.
    AsTheyCome,
}

/// Units that become known only after some others are answered.
pub struct Later {
    /// Their cost, at most.
    pub cost: u64,
    /// Resolves to the units.
    pub units: Pin<Box<dyn Future<Output = Result<Vec<Unit>, RewindError>> + Send>>,
}

impl std::fmt::Debug for Later {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Later").field("cost", &self.cost).finish_non_exhaustive()
    }
}

/// What is fetched.
pub struct Work {
    /// In the order in which they are asked for.
    pub units: Vec<Unit>,
    /// Units that follow these.
    pub later: Option<Later>,
    /// Completes each unit before it is asked for.
    pub prepare: Arc<dyn Prepare>,
    /// Which connections are waited for.
    pub start: PoolStart,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("units", &self.units).finish_non_exhaustive()
    }
}

/// What the connections carried.
#[derive(Debug, Clone, Default)]
pub struct Carried {
    /// Payload bytes, by connection.
    pub payload_bytes: Vec<u64>,
    /// Frames, over all connections.
    pub frames: u64,
    /// Times a connection was lost and made again.
    pub reconnects: u64,
}

impl Carried {
    fn note(&mut self, number: usize, bytes: u64) {
        self.payload_bytes.resize(self.payload_bytes.len().max(number + 1), 0);
        if let Some(known) = self.payload_bytes.get_mut(number) {
            *known = bytes;
        }
    }

    /// Adds what was carried later.
    pub fn absorb(&mut self, later: &Self) {
        for (number, bytes) in later.payload_bytes.iter().enumerate() {
            let before = self.payload_bytes.get(number).copied().unwrap_or(0);
            self.note(number, before + bytes);
        }
        self.frames += later.frames;
        self.reconnects += later.reconnects;
    }

    /// Payload bytes over all connections.
    pub fn total(&self) -> u64 {
        self.payload_bytes.iter().sum()
    }
}

/// How a connection ended.
struct Finished {
    number: usize,
    payload_bytes: Result<u64, RewindError>,
}

/// The connections that were begun.
struct Workers<'a> {
    session: &'a Session,
    shared: &'a Arc<Shared>,
    sink: &'a mut (dyn FnMut(usize) -> Result<Box<dyn Sink>, RewindError> + Send),
    running: JoinSet<Finished>,
    begun: usize,
}

impl Workers<'_> {
    /// Begins one more. The run fails without the first ones and those that are `needed`.
    fn begin(&mut self, opened: Option<Connection>, needed: bool) -> Result<(), RewindError> {
        let number = self.begun;
        let needed = needed || number < CONNECTIONS_DEFAULT;
        let worker = ConnectionWorker::new(self.session, self.shared, number, needed, opened);
        let sink = (self.sink)(number)?;
        self.begun += 1;
        self.running
            .spawn(async move { Finished { number, payload_bytes: worker.work(sink).await } });
        Ok(())
    }
}

/// Fetches all of `work`; `sink` is called with the number of each connection.
pub async fn run(
    session: &Session,
    work: Work,
    mut sink: impl FnMut(usize) -> Result<Box<dyn Sink>, RewindError> + Send,
    monitor: Arc<dyn Monitor>,
) -> Result<Carried, RewindError> {
    let Work { units, mut later, prepare, start } = work;
    let first = session.first_connections();
    if !units.is_empty() {
        session.waited();
    }
    let later_cost = later.as_ref().map(|later| later.cost);
    let shared = Arc::new(Shared::new(units, later_cost, prepare, first, monitor));
    let mut opened = match start {
        PoolStart::Together => open_all(session, &shared).await?,
        PoolStart::AsTheyCome => Vec::new(),
    };
    let mut workers =
        Workers { session, shared: &shared, sink: &mut sink, running: JoinSet::new(), begun: 0 };
    while workers.begun < first {
        workers.begin(opened.pop(), false)?;
    }
    let mut carried = Carried::default();
    let mut adapt = Adapt::new(session.connections(), session.round_trip());
    let mut interval = tokio::time::interval(Adapt::interval(session.round_trip()));
    interval.tick().await;
    let mut measured = Measurement::begin();
    loop {
        let finished = tokio::select! {
            finished = workers.running.join_next() => finished,
            units = units_of(&mut later), if later.is_some() => {
                let expected = later.take().map_or(0, |later| later.cost);
                shared.add(units?, expected);
                continue;
            }
            _ = interval.tick() => {
                if let Some(limit) = adapt.observe(shared.progress.rate(&mut measured), shared.progress.left()) {
                    tracing::debug!(limit, "number of data connections changes");
                    shared.limit.store(limit, Ordering::Relaxed);
                    while workers.begun < limit {
                        workers.begin(None, false)?;
                    }
                }
                continue;
            }
        };
        let Some(finished) = finished else {
            if let Some(Later { cost, units }) = later.take() {
                shared.add(units.await?, cost);
            }
            if shared.waiting().is_empty() {
                break;
            }
            // A connection was lost after the others had ended, and its units are in the list again.
            shared.limit.store(workers.begun + 1, Ordering::Relaxed);
            workers.begin(None, true)?;
            continue;
        };
        let Finished { number, payload_bytes } = finished.map_err(|error| {
            RewindError::because(
                Class::Other,
                "internal error: the task of a connection failed",
                error,
            )
        })?;
        carried.note(number, payload_bytes?);
    }
    shared.progress.check_all_came()?;
    carried.frames = shared.progress.frames.load(Ordering::Relaxed);
    carried.reconnects = shared.progress.reconnects.load(Ordering::Relaxed);
    Ok(carried)
}

async fn units_of(later: &mut Option<Later>) -> Result<Vec<Unit>, RewindError> {
    match later {
        Some(later) => later.units.as_mut().await,
        None => Ok(Vec::new()),
    }
}

/// Opens every connection before the first unit is asked for.
async fn open_all(session: &Session, shared: &Shared) -> Result<Vec<Connection>, RewindError> {
    let mut opened = Vec::new();
    if !shared.has_more() {
        return Ok(opened);
    }
    let mut opening = JoinSet::new();
    for number in 0..session.first_connections() {
        let session = session.clone();
        opening.spawn(async move {
            let needed = number < CONNECTIONS_DEFAULT;
            if needed {
                session.take(number).await.map(Some)
            } else {
                session.try_take(number).await
            }
        });
    }
    while let Some(connection) = opening.join_next().await {
        opened.extend(connection.map_err(|error| {
            RewindError::because(
                Class::Other,
                "internal error: the task of a connection failed",
                error,
            )
        })??);
    }
    Ok(opened)
}

#[cfg(test)]
mod tests;

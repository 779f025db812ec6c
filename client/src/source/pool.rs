//! Works through many units over several connections and survives their loss.
//!
//! Units wait in one list, in the order in which they are best asked for. Each connection keeps more of them asked for than the link
//! can hold, so no round trip is waited for. Frames are checked and given to a sink on a blocking
//! thread of each connection. When a connection breaks, what had arrived is kept, the rest goes back
//! to the list, and a new connection is made.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::fetch::{Item, ItemBody, Unit};
use proto::frame::Frame;
use proto::limits::{CONNECTIONS_DEFAULT, PROGRESS_TIMEOUT, RECEIVE_BUDGET_BYTES};
use proto::status::CallError;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::source::Session;
use crate::source::connect::Connection;
use crate::source::connection_count::Adapt;
use crate::source::in_flight::{Outstanding, cost, is_finished};
use crate::source::requests::{Asked, Prepare, ask};

/// Pause before a lost connection is made again: a server that refuses must not be hammered.
const PAUSE: Duration = Duration::from_millis(200);
/// Least that is kept asked for on a connection.
const WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Round trip of a link on which waiting for one costs more than connections that end unevenly.
const LONG: Duration = Duration::from_millis(5);

/// Takes what arrives on one connection. Runs on a blocking thread.
pub trait Sink: Send {
    /// A frame and the checked replies in it, all of them asked for. Returns what must be asked for
    /// because of them; it may have the number of a unit that has ended.
    fn receive(&mut self, frame: &Frame, items: &[Item]) -> Result<Vec<Unit>, RewindError>;
    /// Nothing more comes.
    fn finish(&mut self) -> Result<(), RewindError>;
}

/// Which connections are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// All: one that came late would find that the others have taken its share.
    Together,
    /// None: little is asked for, and round trips are what it costs.
    AsTheyCome,
}

/// Units that are known only when some of the others have come.
pub struct Later {
    /// What they cost at most.
    pub cost: u64,
    /// Brings them.
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
    /// What comes behind them.
    pub later: Option<Later>,
    /// Completes each before it is asked for.
    pub prepare: Arc<dyn Prepare>,
    /// Which connections are waited for.
    pub start: Start,
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

/// What all connections share.
pub(crate) struct Shared {
    waiting: Mutex<VecDeque<Unit>>,
    /// Connections that may ask for more.
    pub(crate) limit: AtomicUsize,
    /// Payload bytes over all connections.
    received: AtomicU64,
    /// What the units cost, and what of it has come.
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    /// Units there were, and those that came to their end.
    units: AtomicUsize,
    ended: AtomicUsize,
    /// Whether more units come when some of these have.
    pending: AtomicBool,
    last_progress: Mutex<Instant>,
    reconnects: AtomicU64,
    frames: AtomicU64,
    pub(crate) prepare: Arc<dyn Prepare>,
    /// Why a unit could not be completed.
    pub(crate) fault: Mutex<Option<RewindError>>,
    monitor: Arc<dyn Monitor>,
}

impl Shared {
    fn new(
        units: Vec<Unit>,
        later: Option<&Later>,
        prepare: Arc<dyn Prepare>,
        connections: usize,
        monitor: Arc<dyn Monitor>,
    ) -> Self {
        let bytes = costs(&units) + later.map_or(0, |later| later.cost);
        Self {
            total_bytes: AtomicU64::new(bytes),
            units: AtomicUsize::new(units.len()),
            ended: AtomicUsize::new(0),
            pending: AtomicBool::new(later.is_some()),
            waiting: Mutex::new(units.into()),
            limit: AtomicUsize::new(connections),
            received: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            last_progress: Mutex::new(Instant::now()),
            reconnects: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            prepare,
            fault: Mutex::new(None),
            monitor,
        }
    }

    pub(crate) fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<Unit>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is more to ask for than what is asked for, now or later.
    pub(crate) fn has_more(&self) -> bool {
        let waiting = self.waiting();
        !waiting.is_empty() || self.is_pending(&waiting)
    }

    /// Whether units come that are not in the list yet. Looked at with the list in hand.
    pub(crate) fn is_pending(&self, _waiting: &VecDeque<Unit>) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Adds the units that were to come, of which `expected` was the cost.
    fn add(&self, units: Vec<Unit>, expected: u64) {
        let mut waiting = self.waiting();
        self.units.fetch_add(units.len(), Ordering::Relaxed);
        let less = expected.saturating_sub(costs(&units));
        self.total_bytes.fetch_sub(less, Ordering::Relaxed);
        waiting.extend(units);
        self.pending.store(false, Ordering::Relaxed);
    }

    /// Adds what some of the units turned out to need.
    fn add_more(&self, units: Vec<Unit>) {
        let mut waiting = self.waiting();
        self.units.fetch_add(units.len(), Ordering::Relaxed);
        self.total_bytes.fetch_add(costs(&units), Ordering::Relaxed);
        waiting.extend(units);
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    fn progressed(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.monitor.progress(done.min(self.total_bytes()), self.total_bytes());
        *self.last_progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Payload bytes a second since it was asked last.
    fn rate(&self, (since, before): &mut (Instant, u64)) -> f64 {
        let now = self.received.load(Ordering::Relaxed);
        let bytes = now.saturating_sub(std::mem::replace(before, now));
        let elapsed = std::mem::replace(since, Instant::now()).elapsed();
        bytes as f64 / elapsed.as_secs_f64().max(f64::EPSILON)
    }

    /// Payload bytes that are likely still to come, if they shrink as the others did.
    fn left(&self) -> f64 {
        let done = self.done_bytes.load(Ordering::Relaxed).max(1);
        let received = self.received.load(Ordering::Relaxed);
        self.total_bytes().saturating_sub(done) as f64 * received as f64 / done as f64
    }

    /// Whatever went wrong, a plan that was not fetched whole must not be sealed.
    fn check_all_came(&self) -> Result<(), RewindError> {
        let ended = self.ended.load(Ordering::Relaxed);
        let units = self.units.load(Ordering::Relaxed);
        if ended == units {
            return Ok(());
        }
        let message = format!("only {ended} of {units} things asked for came");
        Err(RewindError::new(Class::Other, message))
    }

    fn take_fault(&self) -> Option<RewindError> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn silent_for(&self) -> Duration {
        self.last_progress.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

fn costs(units: &[Unit]) -> u64 {
    units.iter().map(|unit| cost(&unit.kind)).sum()
}

/// Fetches all of `work`; `sink` is called with the number of each connection.
pub async fn run(
    session: &Session,
    work: Work,
    mut sink: impl FnMut(usize) -> Result<Box<dyn Sink>, RewindError>,
    monitor: Arc<dyn Monitor>,
) -> Result<Carried, RewindError> {
    let Work { units, mut later, prepare, start } = work;
    let first = session.first_connections();
    if !units.is_empty() {
        session.waited();
    }
    let shared = Arc::new(Shared::new(units, later.as_ref(), prepare, first, monitor));
    let mut opened = match start {
        Start::Together => open_all(session, &shared).await?,
        Start::AsTheyCome => Vec::new(),
    };
    let mut workers = JoinSet::new();
    let mut begun = 0;
    let mut begin = |workers: &mut JoinSet<_>, opened: Option<Connection>, needed: bool| {
        let needed = needed || begun < CONNECTIONS_DEFAULT;
        let worker = Worker::new(session, &shared, (begun, needed), opened);
        let (number, sink) = (begun, sink(begun)?);
        begun += 1;
        workers.spawn(async move { (number, worker.work(sink).await) });
        Ok::<usize, RewindError>(begun)
    };
    let mut number = 0;
    while number < first {
        number = begin(&mut workers, opened.pop(), false)?;
    }
    let mut carried = Carried::default();
    let mut adapt = Adapt::new(session.connections(), session.round_trip());
    let mut interval = tokio::time::interval(Adapt::interval(session.round_trip()));
    interval.tick().await;
    let mut measured = (Instant::now(), 0);
    loop {
        let finished = tokio::select! {
            finished = workers.join_next() => finished,
            units = units_of(&mut later), if later.is_some() => {
                let expected = later.take().map_or(0, |later| later.cost);
                shared.add(units?, expected);
                continue;
            }
            _ = interval.tick() => {
                if let Some(limit) = adapt.observe(shared.rate(&mut measured), shared.left()) {
                    tracing::debug!(limit, "number of data connections changes");
                    shared.limit.store(limit, Ordering::Relaxed);
                    while number < limit {
                        number = begin(&mut workers, None, false)?;
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
            // What a connection gave back that was lost after the others had ended.
            shared.limit.store(number + 1, Ordering::Relaxed);
            number = begin(&mut workers, None, true)?;
            continue;
        };
        let (number, result) = finished.map_err(|error| {
            RewindError::because(Class::Other, "a connection's task failed", error)
        })?;
        carried.note(number, result?);
    }
    shared.check_all_came()?;
    carried.frames = shared.frames.load(Ordering::Relaxed);
    carried.reconnects = shared.reconnects.load(Ordering::Relaxed);
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
            RewindError::because(Class::Other, "a connection's task failed", error)
        })??);
    }
    Ok(opened)
}

pub(crate) type SharedOutstanding = Arc<Mutex<Outstanding>>;

pub(crate) fn lock(outstanding: &SharedOutstanding) -> std::sync::MutexGuard<'_, Outstanding> {
    outstanding.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    session: Session,
    /// Counts the connections of this run.
    number: usize,
    /// Whether the run fails without it; others only make it faster.
    needed: bool,
    /// The connection it begins with.
    first: Option<Connection>,
    shared: Arc<Shared>,
    outstanding: SharedOutstanding,
    payload_bytes: u64,
}

/// How a stream ended.
enum Ended {
    Done,
    Broken(CallError),
}

impl Worker {
    fn new(
        session: &Session,
        shared: &Arc<Shared>,
        (number, needed): (usize, bool),
        first: Option<Connection>,
    ) -> Self {
        let (session, shared) = (session.clone(), Arc::clone(shared));
        let outstanding = Arc::default();
        Self { session, number, needed, first, shared, outstanding, payload_bytes: 0 }
    }

    /// Works until no unit is waiting; returns the payload bytes received.
    async fn work(mut self, mut sink: Box<dyn Sink>) -> Result<u64, RewindError> {
        let wanted = |worker: &Self| {
            let limit = worker.shared.limit.load(Ordering::Relaxed);
            worker.number < limit && worker.shared.has_more()
        };
        while wanted(&self) {
            let connection = match self.first.take() {
                Some(connection) => connection,
                None if self.needed => self.session.take(self.number).await?,
                None => match self.session.try_take(self.number).await? {
                    Some(connection) => connection,
                    None => break,
                },
            };
            let (sender, receiver) = mpsc::channel(self.session.buffers().frames);
            let checker = self.checker(sink, receiver);
            let ended = self.stream(connection.client.clone(), sender).await;
            let (returned, checked) = checker.await.map_err(|error| {
                RewindError::because(Class::Other, "a checking thread failed", error)
            })?;
            sink = returned;
            checked?;
            if let Some(fault) = self.shared.take_fault() {
                return Err(fault);
            }
            let early = CallError::Broken("the stream ended before all replies came".to_owned());
            let lost = self.give_back();
            let ended = match (lost, ended) {
                (true, Ended::Done) => Ended::Broken(early),
                (_, ended) => ended,
            };
            match ended {
                Ended::Done => self.session.give(self.number, connection),
                Ended::Broken(error) => {
                    // The source ends a stream on which nothing is asked for long, as while units are
                    // still to come. Whoever it refuses for another reason is refused again.
                    if !lost && self.shared.pending.load(Ordering::Relaxed) {
                        tracing::debug!(%error, "idle data connection lost");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                    if !error.is_transient() {
                        return Err(error.into());
                    }
                    if self.shared.silent_for() > self.session.patience() {
                        return Err(error.into());
                    }
                    self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%error, "data connection lost");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        if let Some(unused) = self.first.take() {
            self.session.give(self.number, unused);
        }
        tokio::task::spawn_blocking(move || sink.finish()).await.map_err(|error| {
            RewindError::because(Class::Other, "a checking thread failed", error)
        })??;
        Ok(self.payload_bytes)
    }

    /// Checks frames and feeds the sink, on a blocking thread.
    fn checker(
        &self,
        mut sink: Box<dyn Sink>,
        mut frames: mpsc::Receiver<Frame>,
    ) -> tokio::task::JoinHandle<(Box<dyn Sink>, Result<(), RewindError>)> {
        let (outstanding, shared) = (Arc::clone(&self.outstanding), Arc::clone(&self.shared));
        let rate = self.session.rate().cloned();
        tokio::task::spawn_blocking(move || {
            let mut check = |frame: &Frame| -> Result<(), RewindError> {
                // What is not taken fills the window, and the source waits.
                if let Some(rate) = &rate {
                    rate.wait(frame.payload.len());
                }
                let invalid = |error: &dyn std::error::Error| {
                    let message = format!("the source sent an invalid reply: {error}");
                    RewindError::new(Class::Other, message)
                };
                let items = frame.items().map_err(|error| invalid(&error))?;
                // A peer must not keep a run alive with nothing.
                if items.is_empty() {
                    let message = "the source sent a frame with nothing in it";
                    return Err(RewindError::new(Class::Other, message));
                }
                let done = {
                    let mut outstanding = lock(&outstanding);
                    let before = outstanding.cost();
                    for item in &items {
                        outstanding.receive(item).map_err(|error| invalid(&error))?;
                        if matches!(item.body, ItemBody::End { .. }) {
                            shared.ended.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    before.saturating_sub(outstanding.cost())
                };
                shared.add_more(sink.receive(frame, &items)?);
                shared.frames.fetch_add(1, Ordering::Relaxed);
                shared.progressed(done);
                Ok(())
            };
            let mut result = Ok(());
            while let Some(frame) = frames.blocking_recv() {
                result = check(&frame);
                if result.is_err() {
                    break;
                }
            }
            (sink, result)
        })
    }

    /// Asks and receives on one connection until nothing is left or it breaks.
    async fn stream(
        &mut self,
        mut client: proto::client::Client,
        checked: mpsc::Sender<Frame>,
    ) -> Ended {
        let (requests, queue) = mpsc::channel(self.session.buffers().requests);
        let asked = Arc::new(Asked::default());
        let asking = tokio::spawn(ask(
            (Arc::clone(&self.shared), Arc::clone(&asked)),
            Arc::clone(&self.outstanding),
            requests,
            (self.number, self.window()),
        ));
        let ended = match client.fetch(queue).await {
            Ok(mut frames) => self.receive(&mut frames, (&checked, &asked)).await,
            Err(error) => Ended::Broken(error),
        };
        drop(checked);
        asking.abort();
        // Aborted or finished, both are fine: what it had taken is outstanding.
        drop(asking.await);
        ended
    }

    /// Bytes this connection keeps asked for: its part of the receive budget, but of a small plan no
    /// more than half of its share, so that no connection takes what others could carry; on a long
    /// link all of its share, since whoever asked for more later would wait for a round trip.
    fn window(&self) -> u64 {
        let connections = self.shared.limit.load(Ordering::Relaxed).max(1) as u64;
        let budget = u64::from(RECEIVE_BUDGET_BYTES) / connections;
        let parts = if self.session.round_trip() > LONG { 1 } else { 2 };
        budget.min((self.shared.total_bytes() / connections / parts).max(WINDOW_BYTES_MIN))
    }

    async fn receive(
        &mut self,
        frames: &mut proto::client::Frames,
        (checked, asked): (&mpsc::Sender<Frame>, &Asked),
    ) -> Ended {
        let limit = PROGRESS_TIMEOUT.min(self.session.patience());
        loop {
            match tokio::time::timeout(limit, frames.next()).await {
                Ok(Ok(Some(frame))) => {
                    let bytes = frame.payload.len() as u64;
                    self.payload_bytes += bytes;
                    self.shared.received.fetch_add(bytes, Ordering::Relaxed);
                    if checked.send(frame).await.is_err() {
                        // The checker found a fault and reports it.
                        return Ended::Done;
                    }
                }
                Ok(Ok(None)) => return Ended::Done,
                Ok(Err(error)) => return Ended::Broken(error),
                // It is this node that was slow: nothing was asked for all that time.
                Err(_) if asked.silent_for() < limit => {}
                // Nor does the source owe anything while more is waited for.
                Err(_) if lock(&self.outstanding).is_empty() => {}
                Err(_) => {
                    let seconds = limit.as_secs();
                    let message = format!("the source has sent nothing for {seconds} seconds");
                    return Ended::Broken(CallError::Broken(message));
                }
            }
        }
    }

    /// Puts what was asked for and did not arrive back to the front of the list; tells whether
    /// there was any.
    fn give_back(&self) -> bool {
        let left = lock(&self.outstanding).take();
        let mut waiting = self.shared.waiting();
        let before = waiting.len();
        for unit in left.into_iter().rev() {
            match is_finished(&unit) {
                // All of it came; only the word that it is the end was lost.
                true => drop(self.shared.ended.fetch_add(1, Ordering::Relaxed)),
                false => waiting.push_front(unit),
            }
        }
        waiting.len() > before
    }
}

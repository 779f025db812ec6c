//! A session with one source: its connections, and how long it is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::fetch::{Item, ItemBody, Unit};
use proto::model::{Description, Node, Sealed};
use proto::rate::RateLimit;
use proto::refusal::CallError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Connections;
use crate::error::{Remedy, Replan, RewindError};
use crate::plan::SourceFiles;
use crate::source::connect::{Connection, connect, secure};
use crate::source::dial::Dial;
use crate::source::in_flight::{Outstanding, Unexpected};
use crate::source::link::{Buffers, Link};
use crate::source::listing::{Listing, ReceivedList, listed, within};
use crate::source::pace::Pace;
use crate::source_checks::check_list;

/// Longest time the first call may take: a source that does not answer this is stalled.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pauses between attempts to get a connection back grow from the first to the second.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// See [`BACKOFF_MIN`].
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Clone)]
pub struct Session {
    source: Arc<dyn Dial>,
    link: Link,
    /// The link's round trip, measured by the first connection. The number of connections and their windows
    /// are derived from it, so it must not change.
    round_trip: Duration,
    control: Connection,
    rate: Option<Arc<RateLimit>>,
    /// What the source was at first; every connection must reach the same life of the same node.
    first: Arc<Node>,
    /// The file list, asked for together with what the source is.
    early: Arc<Mutex<Option<Listing>>>,
    spare: Arc<Mutex<Spare>>,
    waits: Arc<AtomicU32>,
}

/// Round trips from the first packet to the answer of the first call: TCP, TLS, the call.
const WAITS_TO_BEGIN: u32 = 3;

/// Data connections nobody uses just now.
#[derive(Debug, Default)]
struct Spare {
    open: Vec<Connection>,
    opening: Vec<JoinHandle<Result<(Connection, Node), RewindError>>>,
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.opening.iter().for_each(JoinHandle::abort);
    }
}

impl Session {
    /// Connects and asks the source what it is. Fails at the first error: whoever starts a rewind
    /// against a source that is not there wants to know at once.
    pub async fn open(
        source: Arc<dyn Dial>,
        link: Link,
    ) -> Result<(Self, Description), RewindError> {
        let Link { connections, patience, max_rate, .. } = link;
        // The window of the control connection must be set before the round trip is known. It only carries
        // small requests.
        let share = link.window(0, connections.first(Duration::MAX));
        let reached = source.reach().await?;
        // The data connections are opened as soon as their number is known.
        let number = connections.first(reached.round_trip);
        let opening = (0..number).map(|n| {
            let (source, share) = (Arc::clone(&source), link.window(n, number));
            tokio::spawn(async move { open(&*source, share, patience).await })
        });
        let spare = Spare { open: Vec::new(), opening: opening.collect() };
        let mut control = secure(reached, &source.address(), share, patience).await?;
        let early = AbortOnDropHandle::new(tokio::spawn(listed(control.clone(), patience)));
        let description = control.describe(DESCRIBE_TIMEOUT.min(patience)).await?;
        let early = Arc::new(Mutex::new(Some(early)));
        let first = Arc::new(description.node.clone());
        let rate = max_rate.map(|rate| Arc::new(RateLimit::new(rate)));
        let spare = Arc::new(Mutex::new(spare));
        let waits = Arc::new(AtomicU32::new(WAITS_TO_BEGIN));
        let round_trip = control.round_trip;
        let session = Self { source, link, round_trip, control, rate, first, early, spare, waits };
        Ok((session, description))
    }

    /// [`Self::open`] for a run that has begun: a source between two roles is waited for.
    pub async fn open_again(
        source: Arc<dyn Dial>,
        link: Link,
    ) -> Result<(Self, Description), RewindError> {
        let (since, patience) = (Instant::now(), link.patience);
        loop {
            let opened = Self::open(Arc::clone(&source), link).await;
            match opened {
                Err(error) if error.remedy() == Remedy::Retry && since.elapsed() < patience => {
                    tracing::debug!(error = %error.chain(), "source not ready, trying again");
                    tokio::time::sleep(BACKOFF_MIN).await;
                }
                opened => return opened,
            }
        }
    }

    /// How many data connections there may be.
    pub fn connections(&self) -> Connections {
        self.link.connections
    }

    /// Bounds of the queues.
    pub fn buffers(&self) -> Buffers {
        self.link.buffers
    }

    /// The link's round trip, as the first connection met it.
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Notes that nothing else was done while an answer was on its way.
    pub fn waited(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Round trips that were waited for so far.
    pub fn waits(&self) -> u32 {
        self.waits.load(Ordering::Relaxed)
    }

    fn spare(&self) -> parking_lot::MutexGuard<'_, Spare> {
        self.spare.lock()
    }

    /// How many data connections there are at first.
    pub fn first_connections(&self) -> usize {
        self.link.connections.first(self.round_trip())
    }

    /// A data connection: one that is open already, or a new one.
    pub async fn take(&self, number: usize) -> Result<Connection, RewindError> {
        match self.take_spare(number).await? {
            Some(open) => Ok(open),
            None => self.reconnect(number).await,
        }
    }

    /// The same for a connection that would only make the run faster: tried once.
    pub async fn try_take(&self, number: usize) -> Result<Option<Connection>, RewindError> {
        if let Some(open) = self.take_spare(number).await? {
            return Ok(Some(open));
        }
        match self.connect_once(number).await {
            Ok(connection) => Ok(Some(connection)),
            Err(error) if matches!(error.remedy(), Remedy::Replan(_)) => Err(error),
            Err(error) => {
                tracing::debug!(error = %error.chain(), "one more connection is not to be had");
                Ok(None)
            }
        }
    }

    /// A data connection that is open or being opened. These have the windows of the first connections and
    /// are only for them, because the receive budget is divided by number.
    async fn take_spare(&self, number: usize) -> Result<Option<Connection>, RewindError> {
        if number >= self.first_connections() {
            return Ok(None);
        }
        let (open, opening) = {
            let mut spare = self.spare();
            let open = spare.open.pop();
            let opening = if open.is_none() { spare.opening.pop() } else { None };
            (open, opening)
        };
        // An error of a connection that was opened in advance was temporary, or occurs again.
        match (open, opening) {
            (None, Some(opening)) => match opening.await {
                Ok(Ok((open, node))) => self.check(&node).map(|()| Some(open)),
                _ => Ok(None),
            },
            (open, _) => Ok(open),
        }
    }

    /// Returns a connection that works and is not needed any more: whoever takes it next need not begin
    /// slowly.
    pub fn give(&self, number: usize, connection: Connection) {
        if number < self.first_connections() {
            self.spare().open.push(connection);
        }
    }

    /// The limit on received bytes, if there is one.
    pub fn rate(&self) -> Option<&Arc<RateLimit>> {
        self.rate.as_ref()
    }

    /// How long the source may be silent.
    pub fn patience(&self) -> Duration {
        self.link.patience
    }

    /// A new connection, tried for as long as the source may be silent.
    pub async fn reconnect(&self, number: usize) -> Result<Connection, RewindError> {
        let since = Instant::now();
        let mut pause = BACKOFF_MIN;
        loop {
            let error = match self.connect_once(number).await {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            if error.remedy() != Remedy::Retry || since.elapsed() + pause > self.link.patience {
                return Err(error);
            }
            tracing::debug!(error = %error.chain(), "source not reachable, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    async fn connect_once(&self, number: usize) -> Result<Connection, RewindError> {
        let share = self.link.window(number, self.first_connections());
        let (connection, node) = open(&*self.source, share, self.link.patience).await?;
        self.check(&node)?;
        Ok(connection)
    }

    /// Checks that a connection reaches the same life of the same node as the first one.
    fn check(&self, node: &Node) -> Result<(), RewindError> {
        let first = &self.first;
        // Behind one address there may be several nodes.
        if node.control.system_identifier != first.control.system_identifier
            || !node.same_life(first)
        {
            let message = "the source was restarted, promoted or stopped while it was read, or \
                           another node answers at its address";
            return Err(RewindError::replan(Replan::SourceChanged, message));
        }
        Ok(())
    }

    /// Makes a call on the control connection; a broken connection is replaced and the call made
    /// again. Only for calls that change nothing.
    async fn call<T, F>(&mut self, make: impl Fn(Connection) -> F) -> Result<T, RewindError>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let since = Instant::now();
        loop {
            let error = match make(self.control.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // Broken, or between two roles: a source that was restarted is back in a moment.
            if !error.is_transient() || since.elapsed() > self.link.patience {
                return Err(error.into());
            }
            tracing::debug!(%error, "control connection lost");
            tokio::time::sleep(BACKOFF_MIN).await;
            self.control = self.reconnect(0).await?;
        }
    }

    /// What the source is now.
    pub async fn describe(&mut self) -> Result<Description, RewindError> {
        let limit = DESCRIBE_TIMEOUT.min(self.link.patience);
        self.call(|mut connection| async move { connection.client.describe(limit).await }).await
    }

    /// Where replay must end for everything fetched so far.
    pub async fn seal(&mut self) -> Result<Sealed, RewindError> {
        self.call(|mut connection| async move { connection.client.seal().await }).await
    }

    /// Everything the source serves.
    pub async fn list(&mut self) -> Result<SourceFiles, RewindError> {
        let listed = match self.listed_early().await {
            Some(listed) => listed,
            None => {
                let patience = self.link.patience;
                self.call(|connection| listed(connection, patience)).await?
            }
        };
        check_list(listed.entries, &self.first.control)
    }

    /// The list that was asked for together with the first description, if it is not older than the
    /// checkpoint that replay may begin at. An error shows again when the list is asked for anew.
    async fn listed_early(&self) -> Option<ReceivedList> {
        let early = self.early.lock().take();
        let listed = early?.await.ok()?.ok()?;
        (listed.redo == self.first.control.checkpoint_copy.redo).then_some(listed)
    }

    /// All replies to a few units, on the control connection; nothing else is done meanwhile.
    pub async fn collect(&mut self, units: Vec<Unit>) -> Result<Vec<Item>, RewindError> {
        self.waited();
        self.ask(units).await.map(|answer| answer.items)
    }

    /// All replies to a few units, while other things are done.
    pub async fn ask(&mut self, units: Vec<Unit>) -> Result<Answer, RewindError> {
        let keep = |items: &mut Vec<Item>, item| {
            items.push(item);
            Ok(())
        };
        let (items, payload_bytes) = self.fold(units, keep).await?;
        Ok(Answer { items, payload_bytes })
    }

    /// Replies that may be too many to be kept: `take` receives each of them once. Begins anew on another
    /// connection if this one is lost. Also returns the number of bytes in which the replies came.
    pub async fn fold<T: Default>(
        &mut self,
        units: Vec<Unit>,
        take: impl Fn(&mut T, Item) -> Result<(), Unexpected>,
    ) -> Result<(T, u64), RewindError> {
        let patience = self.link.patience;
        let rate = self.rate.clone();
        let take = &take;
        self.call(move |connection| fold(connection, units.clone(), patience, rate.clone(), take))
            .await
    }
}

/// The answer to a few units.
#[derive(Debug, Default)]
pub struct Answer {
    /// The replies.
    pub items: Vec<Item>,
    /// Bytes they travelled in.
    pub payload_bytes: u64,
}

/// Opens a connection and asks the node at its other end to describe itself.
async fn open(
    source: &dyn Dial,
    window: u32,
    patience: Duration,
) -> Result<(Connection, Node), RewindError> {
    let mut connection = connect(source, window, patience).await?;
    let node = connection.describe(DESCRIBE_TIMEOUT.min(patience)).await?.node;
    Ok((connection, node))
}

async fn fold<T: Default>(
    mut connection: Connection,
    units: Vec<Unit>,
    patience: Duration,
    rate: Option<Arc<RateLimit>>,
    take: impl Fn(&mut T, Item) -> Result<(), Unexpected>,
) -> Result<(T, u64), CallError> {
    let mut outstanding = Outstanding::default();
    units.iter().cloned().for_each(|unit| outstanding.insert(unit));
    let (requests, queue) = mpsc::channel(1);
    // The only message: the channel has room for it.
    drop(requests.try_send(units));
    let mut frames = connection.client.fetch(queue).await?;
    let (mut value, mut payload_bytes, mut pace) = (T::default(), 0, Pace::default());
    while !outstanding.is_empty() {
        let frame = within(patience, frames.next()).await?;
        let frame = frame.ok_or_else(|| {
            CallError::Broken("the stream ended before all replies came".to_owned())
        })?;
        payload_bytes += frame.payload.len() as u64;
        if let Some(rate) = &rate {
            let pause = rate.reserve(frame.payload.len());
            tokio::time::sleep(pause).await;
            pace.excuse(pause);
        }
        let items = frame.items().map_err(|e| CallError::InvalidReply(e.to_string()))?;
        // A peer must not keep a run alive with frames that bring nothing.
        if items.is_empty() {
            return Err(CallError::InvalidReply("a frame is empty".to_owned()));
        }
        pace.take(&items).map_err(|e| CallError::Broken(e.to_string()))?;
        for item in items {
            outstanding.receive(&item).map_err(|e| CallError::InvalidReply(e.to_string()))?;
            if matches!(item.body, ItemBody::Waiting) {
                continue;
            }
            take(&mut value, item).map_err(|e| CallError::InvalidReply(e.to_string()))?;
        }
    }
    Ok((value, payload_bytes))
}

#[cfg(test)]
mod tests;

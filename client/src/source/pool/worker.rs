//! One connection of a pool: asks, receives, checks, and begins again where it is lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::fetch::ItemBody;
use proto::frame::Frame;
use proto::limits::{PROGRESS_TIMEOUT, RECEIVE_BUDGET_BYTES};
use proto::refusal::CallError;
use tokio::sync::mpsc;

use super::shared::{Shared, SharedOutstanding, lock};
use super::sink::Sink;
use crate::error::{Class, RewindError};
use crate::source::Session;
use crate::source::connect::Connection;
use crate::source::in_flight::is_finished;
use crate::source::pace::Pace;
use crate::source::requests::{LastAsked, Place, ask};

/// Pause before a lost connection is made again: a server that refuses must not be hammered.
const PAUSE: Duration = Duration::from_millis(200);

/// Least number of bytes that a connection keeps requested.
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// On a link with a longer round trip, waiting for one costs more than connections that do not end at the
/// same time.
const LONG: Duration = Duration::from_millis(5);

pub(super) struct ConnectionWorker {
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

impl ConnectionWorker {
    pub(super) fn new(
        session: &Session,
        shared: &Arc<Shared>,
        number: usize,
        needed: bool,
        first: Option<Connection>,
    ) -> Self {
        let (session, shared) = (session.clone(), Arc::clone(shared));
        let outstanding = Arc::default();
        Self { session, number, needed, first, shared, outstanding, payload_bytes: 0 }
    }

    /// Works until no unit is waiting; returns the payload bytes received.
    pub(super) async fn work(mut self, mut sink: Box<dyn Sink>) -> Result<u64, RewindError> {
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
                RewindError::because(
                    Class::Other,
                    "internal error: a thread that checks replies failed",
                    error,
                )
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
                    // The source ends a stream on which nothing was asked for a long time, which happens
                    // while units are still to be added. If it refuses for another reason, it will do so
                    // again.
                    if !lost && self.shared.pending.load(Ordering::Relaxed) {
                        tracing::debug!(%error, "idle data connection lost");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                    if !error.is_transient() {
                        return Err(error.into());
                    }
                    if self.shared.progress.silent_for() > self.session.patience() {
                        return Err(error.into());
                    }
                    self.shared.progress.reconnects.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%error, "data connection lost");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        if let Some(unused) = self.first.take() {
            self.session.give(self.number, unused);
        }
        tokio::task::spawn_blocking(move || sink.finish()).await.map_err(|error| {
            RewindError::because(
                Class::Other,
                "internal error: a thread that checks replies failed",
                error,
            )
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
            let mut pace = Pace::default();
            let mut check = |frame: &Frame| -> Result<(), RewindError> {
                // While this waits, what is not taken fills the receive window, and the source waits too.
                if let Some(rate) = &rate {
                    let pause = rate.reserve(frame.payload.len());
                    std::thread::sleep(pause);
                    pace.excuse(pause);
                }
                let invalid = |error: &dyn std::error::Error| {
                    let message = format!("the source sent an invalid reply: {error}");
                    RewindError::new(Class::Other, message)
                };
                let items = frame.items().map_err(|error| invalid(&error))?;
                // A peer must not keep a run alive with empty frames.
                if items.is_empty() {
                    let message = "the source sent an empty frame";
                    return Err(RewindError::new(Class::Other, message));
                }
                pace.take(&items).map_err(|error| RewindError::transient(error.to_string()))?;
                let done = {
                    let mut outstanding = lock(&outstanding);
                    let before = outstanding.cost();
                    for item in &items {
                        outstanding.receive(item).map_err(|error| invalid(&error))?;
                        if matches!(item.body, ItemBody::End { .. }) {
                            shared.progress.ended.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    if outstanding.is_empty() {
                        pace.rest();
                    }
                    before.saturating_sub(outstanding.cost())
                };
                // A sign of life is in a frame of its own, and nothing of it is kept.
                if !items.iter().all(|item| matches!(item.body, ItemBody::Waiting)) {
                    shared.add_more(sink.receive(frame, &items)?);
                }
                shared.progress.frames.fetch_add(1, Ordering::Relaxed);
                shared.progress.progressed(done);
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
        let asked = Arc::new(LastAsked::default());
        let asking = tokio::spawn(ask(
            Arc::clone(&self.shared),
            Arc::clone(&asked),
            Arc::clone(&self.outstanding),
            requests,
            Place { number: self.number, window: self.window() },
        ));
        let ended = match client.fetch(queue).await {
            Ok(mut frames) => self.receive(&mut frames, &checked, &asked).await,
            Err(error) => Ended::Broken(error),
        };
        drop(checked);
        asking.abort();
        // Whether the task is aborted or finished: all units that it has taken are in `outstanding`.
        drop(asking.await);
        ended
    }

    /// Bytes that this connection keeps requested: its part of the receive budget. Of a small plan it is no
    /// more than half of the connection's share of the plan, so that no connection takes what others could
    /// transfer. On a long link it is the whole share, since asking for more later would cost a round trip.
    fn window(&self) -> u64 {
        let connections = self.shared.limit.load(Ordering::Relaxed).max(1) as u64;
        let budget = u64::from(RECEIVE_BUDGET_BYTES) / connections;
        let parts = if self.session.round_trip() > LONG { 1 } else { 2 };
        budget.min((self.shared.progress.total_bytes() / connections / parts).max(WINDOW_BYTES_MIN))
    }

    async fn receive(
        &mut self,
        frames: &mut proto::client::Frames,
        checked: &mpsc::Sender<Frame>,
        asked: &LastAsked,
    ) -> Ended {
        let limit = PROGRESS_TIMEOUT.min(self.session.patience());
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(limit, frames.next()) => next,
                // The checker found a fault and reports it; nothing more need come.
                () = checked.closed() => return Ended::Done,
            };
            match next {
                Ok(Ok(Some(frame))) => {
                    let bytes = frame.payload.len() as u64;
                    self.payload_bytes += bytes;
                    self.shared.progress.received.fetch_add(bytes, Ordering::Relaxed);
                    if checked.send(frame).await.is_err() {
                        return Ended::Done;
                    }
                }
                Ok(Ok(None)) => return Ended::Done,
                Ok(Err(error)) => return Ended::Broken(error),
                // This node was slow: it has asked for nothing in that time.
                Err(_) if asked.silent_for() < limit => {}
                // Nothing is outstanding: more units are still to be added.
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
                // All of it came; only the reply that ends the unit was lost.
                true => drop(self.shared.progress.ended.fetch_add(1, Ordering::Relaxed)),
                false => waiting.push_front(unit),
            }
        }
        waiting.len() > before
    }
}

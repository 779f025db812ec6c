//! How work is run beside other work, waited for, and told to stop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::monitor::steps::Steps;

/// How many signals have asked the run to stop.
///
/// The first one ends work that has changed nothing. While the target is being changed, that work goes on to
/// its end, which is near: a partly changed node cannot be started. The second one ends that work, too.
#[derive(Debug, Default)]
pub struct Signals(AtomicUsize);

impl Signals {
    /// The state after so many signals.
    pub fn received(count: usize) -> Self {
        Self(AtomicUsize::new(count))
    }

    /// Counts another signal.
    pub fn receive(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether work that has changed nothing must end.
    pub fn stop(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Whether work that has begun to change the target must end.
    pub fn stop_at_once(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }

    /// An error if work that has changed nothing is to end.
    pub fn check(&self) -> Result<(), RewindError> {
        if self.stop() { Err(interrupted()) } else { Ok(()) }
    }
}

/// How a run learns that it must stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Cancelled by the first signal: work that has not changed the target ends at once.
    pub cancelled: CancellationToken,
    /// The same signals, counted, for blocking work.
    pub signals: Arc<Signals>,
}

impl Stop {
    /// Does `work` unless a signal has come or comes before its end.
    pub async fn unless<T, E: From<RewindError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            done = work => done,
            () = self.cancelled.cancelled() => Err(interrupted().into()),
        }
    }
}

/// What every step of a run needs besides its input.
#[derive(Debug, Clone)]
pub struct Context {
    /// Receives what the run reports.
    pub monitor: Arc<dyn Monitor>,
    /// Times the steps.
    pub steps: Steps,
    /// Whether the run must stop.
    pub stop: Stop,
}

impl Context {
    /// The context of a run that reports to `monitor`.
    pub fn new(monitor: Arc<dyn Monitor>, stop: Stop) -> Self {
        Self { steps: Steps::new(Arc::clone(&monitor)), monitor, stop }
    }
}

/// The error of a run that a signal has ended before it changed the target.
pub fn interrupted() -> RewindError {
    RewindError::interrupted("stopped by a signal; the target is unchanged")
}

/// The answer to a request that was made while other things are done. Dropping this cancels the request.
pub type Pending<T> = AbortOnDropHandle<Result<T, RewindError>>;

/// Starts a request while other things are done.
pub fn begin<T: Send + 'static>(
    work: impl Future<Output = Result<T, RewindError>> + Send + 'static,
) -> Pending<T> {
    AbortOnDropHandle::new(tokio::spawn(work))
}

/// Waits for a request that was made before.
pub async fn joined<T>(pending: Pending<T>) -> Result<T, RewindError> {
    pending.await.map_err(|error| {
        RewindError::because(Class::Other, "internal error: a task failed", error)
    })?
}

/// Runs blocking work on a thread of its own and waits for it.
pub async fn blocking<T: Send + 'static, E: From<RewindError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        RewindError::because(Class::Other, "internal error: a worker thread failed", error)
    })?
}

/// Guards some work: once the gate is closed, the work is not begun any more, and what was in progress has
/// ended.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    inside: RwLock<()>,
}

/// Proof that a [`Gate`] was open when the work began. Closing the gate waits until this is dropped.
#[derive(Debug)]
pub struct Inside<'g> {
    gate: &'g Gate,
    _held: RwLockReadGuard<'g, ()>,
}

impl Gate {
    /// Begins the work, unless the gate is closed.
    ///
    /// # Errors
    /// The gate is closed (`ErrorKind::Interrupted`).
    pub fn enter(&self) -> io::Result<Inside<'_>> {
        let inside = Inside { gate: self, _held: self.inside.read() };
        inside.check()?;
        Ok(inside)
    }

    /// Closes the gate. When this returns, all work that was in progress has ended.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        drop(self.inside.write());
    }
}

impl Inside<'_> {
    /// Whether the gate is still open. Long work calls this now and then.
    ///
    /// # Errors
    /// The gate was closed (`ErrorKind::Interrupted`).
    pub fn check(&self) -> io::Result<()> {
        match self.gate.closed.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

/// Closes a gate when it is dropped.
#[derive(Debug, Default)]
pub struct Closing(pub Arc<Gate>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_ends_what_has_changed_nothing() {
        let signals = Signals::default();
        assert!(signals.check().is_ok() && !signals.stop_at_once());
        signals.receive();
        assert_eq!(signals.check().unwrap_err().class(), Class::Interrupted);
        assert!(!signals.stop_at_once(), "what has begun to change the target goes on");
        signals.receive();
        assert!(signals.stop_at_once());
    }

    #[tokio::test]
    async fn work_ends_at_the_signal_and_not_before() {
        let stop = Stop::default();
        let done = stop.unless(async { Ok::<_, RewindError>(5) }).await;
        assert_eq!(done.unwrap(), 5);
        stop.cancelled.cancel();
        let waiting = std::future::pending::<Result<(), RewindError>>();
        let ended = stop.unless(waiting).await.unwrap_err();
        assert_eq!(ended.class(), Class::Interrupted);
    }

    #[tokio::test]
    async fn a_request_that_nobody_waits_for_any_more_ends() {
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let pending: Pending<()> = begin(async move {
            let _kept = sender;
            std::future::pending().await
        });
        drop(pending);
        assert!(receiver.await.is_err(), "its sender is gone");
        assert_eq!(joined(begin(async { Ok(7) })).await.unwrap(), 7);
    }

    #[test]
    fn a_gate_lets_nobody_pass_once_it_is_closed() {
        let gate = Arc::<Gate>::default();
        let inside = gate.enter().unwrap();
        let closing = Closing(Arc::clone(&gate));
        let closed = std::thread::spawn(move || drop(closing));
        // Whoever is inside learns of it and is waited for.
        while inside.check().is_ok() {
            std::thread::yield_now();
        }
        assert!(!closed.is_finished());
        drop(inside);
        closed.join().unwrap();
        assert_eq!(gate.enter().unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}

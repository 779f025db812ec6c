//! How work is run beside other work, waited for, and told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Class, RewindError};

/// How often the operator has asked for an end.
///
/// The first time ends work that has changed nothing. While the target is changed that goes on to its end, which
/// is near: half changed a node cannot be started. The second time ends that too.
#[derive(Debug, Default)]
pub struct Signals(AtomicUsize);

impl Signals {
    /// As if so many had come.
    pub fn received(count: usize) -> Self {
        Self(AtomicUsize::new(count))
    }

    /// One more has come.
    pub fn receive(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether work that has changed nothing ends.
    pub fn stop(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Whether work that has begun to change the target ends.
    pub fn stop_at_once(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

/// What a run may be told while it works.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Cancelled by the first signal: work that has not changed the target ends at once.
    pub cancelled: CancellationToken,
    /// Counted with it, for blocking work.
    pub signals: Arc<Signals>,
}

/// Runs blocking work and waits for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RewindError> + Send + 'static,
) -> Result<T, RewindError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| RewindError::because(Class::Other, "a worker failed", error))?
}

/// What a task brought.
pub(crate) async fn joined<T>(
    task: impl Future<Output = Result<Result<T, RewindError>, tokio::task::JoinError>>,
) -> Result<T, RewindError> {
    task.await.map_err(|error| RewindError::because(Class::Other, "a task failed", error))?
}

/// What comes of a question that was asked beside others.
pub(crate) type Asked<T> = AbortOnDropHandle<Result<T, RewindError>>;

//! The source: connections, requests, and what survives a broken link.

pub mod compare;
pub mod connect;
pub mod connection_count;
pub mod dial;
pub mod in_flight;
pub mod link;
mod listing;
pub mod page_delta;
pub mod pool;
pub mod prepare;
pub mod requests;
pub mod session;
pub mod snapshot;

use std::sync::Arc;

use dial::Dial;
use link::{Buffers, Link};
use proto::model::Description;

use crate::config::Config;
use crate::error::RewindError;
use crate::source_checks::check_description;

pub use session::Session;
pub use snapshot::Snapshot;

/// A source that is connected to and has said what it is.
#[derive(Debug, Clone)]
pub struct Source {
    /// For requests.
    pub session: Session,
    /// What it said of itself.
    pub snapshot: Arc<Snapshot>,
}

/// How much patience there is with a source that cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// The first error ends it: whoever begins wants to know at once.
    None,
    /// A source between two roles is waited for.
    UntilTimeout,
}

/// A source that has answered. What it said of itself is not judged yet.
#[derive(Debug)]
pub struct Answering {
    session: Session,
    /// What it said.
    pub description: Description,
}

/// Connects, and asks the source what it is.
///
/// # Errors
/// The source cannot be reached, or does not accept this node.
pub async fn connect(config: Config, patience: Patience) -> Result<Answering, RewindError> {
    let link = Link {
        connections: config.connections,
        patience: config.timeout,
        max_rate: config.max_rate,
        buffers: Buffers::default(),
    };
    connect_by(Arc::new(config.source), link, patience).await
}

/// The same of a source that is reached by `dial`.
///
/// # Errors
/// See [`connect()`].
pub async fn connect_by(
    dial: Arc<dyn Dial>,
    link: Link,
    patience: Patience,
) -> Result<Answering, RewindError> {
    let opened = match patience {
        Patience::None => Session::open(dial, link).await,
        Patience::UntilTimeout => Session::open_again(dial, link).await,
    };
    let (session, mut description) = opened?;
    description.wal_segments.sort_unstable();
    Ok(Answering { session, description })
}

impl Answering {
    /// The source, if what it said makes sense.
    ///
    /// # Errors
    /// It does not, or its history is not usable yet.
    pub fn judged(self) -> Result<Source, RewindError> {
        let Self { session, description } = self;
        let history = description.node.history().map_err(|error| {
            RewindError::transient_because("the source's timeline history is not usable", error)
        })?;
        check_description(&description, &history)?;
        Ok(Source { session, snapshot: Arc::new(Snapshot { description, history }) })
    }
}

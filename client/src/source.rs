//! The source: connections, requests, and what survives a broken link.

pub mod compare;
pub mod connect;
pub mod connection_count;
pub mod dial;
pub mod in_flight;
pub mod link;
mod listing;
pub mod pace;
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

/// A source that is connected and has described itself.
#[derive(Debug, Clone)]
pub struct Source {
    /// For requests.
    pub session: Session,
    /// The source's description.
    pub snapshot: Arc<Snapshot>,
}

/// How long a source that cannot be reached is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Not at all: the first error is reported, so that the operator knows at once.
    None,
    /// Until the time-out, as long as the source is between two roles.
    UntilTimeout,
}

/// A source that has described itself. The description is not checked yet.
#[derive(Debug)]
pub struct Answering {
    session: Session,
    /// The source's description.
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

/// Connects to a source that is reached by `dial`, and asks it what it is.
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
    /// The source, if its description is consistent.
    ///
    /// # Errors
    /// The description is not consistent, or the source's history is not usable yet.
    pub fn judged(self) -> Result<Source, RewindError> {
        let Self { session, description } = self;
        let history = description.node.history().map_err(|error| {
            RewindError::transient_because("the source's timeline history is not usable", error)
        })?;
        check_description(&description, &history)?;
        Ok(Source { session, snapshot: Arc::new(Snapshot { description, history }) })
    }
}

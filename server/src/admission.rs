//! Decides which connections with a valid certificate are accepted, and how many of each client.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::limits::{
    CONNECTION_IDLE_MIN, CONNECTIONS_MAX, CONNECTIONS_PER_IDENTITY_MAX, STRANGER_LIFE,
    STRANGERS_MAX,
};
use proto::tls::Peer;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;

use crate::allow::AllowList;
use crate::audit::{AuditSession, AuditSessions};
use crate::connection::{AcceptedConnection, Ends, Places};
use crate::identities::{Identities, IdentitySlot};

/// How long a connection waits for the place of one that gives way.
const PLACE_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection is closed after this time in any case: its client makes another one.
const LIFE_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Why a connection is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAdmitted {
    #[error("there are too many clients that are not on the allow list")]
    Strangers,
    #[error("this client has {CONNECTIONS_PER_IDENTITY_MAX} connections already")]
    Identity,
    #[error("all {CONNECTIONS_MAX} connections are taken, and each has a call")]
    Full,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Admission {
    allow: Arc<AllowList>,
    sessions: Arc<AuditSessions>,
    identities: Identities,
    strangers: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Admission {
    pub(crate) fn new(allow: Arc<AllowList>, sessions: Arc<AuditSessions>) -> Self {
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        Self { allow, sessions, identities: Identities::default(), strangers, places }
    }

    /// Accepts a connection of a client whose certificate is valid.
    pub(crate) async fn admit(
        &self,
        stream: TlsStream<TcpStream>,
        peer: Peer,
    ) -> Result<AcceptedConnection, NotAdmitted> {
        let allowed_by = self.allow.check(&peer).ok();
        let stranger = match allowed_by {
            Some(_) => None,
            // The connection is accepted only so that the refusal and its advice can be sent.
            None => Some(
                Arc::clone(&self.strangers)
                    .try_acquire_owned()
                    .map_err(|_| NotAdmitted::Strangers)?,
            ),
        };
        let of_identity =
            IdentitySlot::take(&self.identities, &peer.fingerprint).ok_or(NotAdmitted::Identity)?;
        let of_all = self.place().await?;
        let life = if allowed_by.is_some() { LIFE_MAX } else { STRANGER_LIFE };
        let deadline = Box::pin(tokio::time::sleep(life.min(valid_for(peer.expires))));
        let peer = Arc::new(peer);
        let session = self.sessions.open(&peer, allowed_by);
        let closed = Box::pin(session.close().clone().cancelled_owned());
        Ok(AcceptedConnection {
            stream,
            peer,
            ends: Ends { deadline, closed },
            _places: Places { _of_all: of_all, _of_identity: of_identity, _of_strangers: stranger },
            _session: session,
        })
    }

    /// A place for one more connection; if all are taken, that of one without a call.
    async fn place(&self) -> Result<OwnedSemaphorePermit, NotAdmitted> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(place);
        }
        let idle = least_needed(&self.sessions.all()).ok_or(NotAdmitted::Full)?;
        idle.close().cancel();
        let place = Arc::clone(&self.places).acquire_owned();
        match tokio::time::timeout(PLACE_TIMEOUT, place).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(NotAdmitted::Full),
        }
    }
}

/// Of the connections without a call, the one that waits longest of the client that has most.
fn least_needed(sessions: &[Arc<AuditSession>]) -> Option<Arc<AuditSession>> {
    let mut idle: HashMap<&str, Vec<(Duration, &Arc<AuditSession>)>> = HashMap::new();
    for session in sessions {
        if let Some(time) = session.idle_for().filter(|time| *time >= CONNECTION_IDLE_MIN) {
            idle.entry(&session.peer().fingerprint).or_default().push((time, session));
        }
    }
    let most = idle.into_values().max_by_key(Vec::len)?;
    most.into_iter().max_by_key(|(time, _)| *time).map(|(_, session)| Arc::clone(session))
}

/// How long a certificate is still valid that expires at this second.
fn valid_for(expires: i64) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(u64::try_from(expires).unwrap_or(0)).saturating_sub(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_ends_at_its_second() {
        assert_eq!(valid_for(0), Duration::ZERO);
        assert_eq!(valid_for(-1), Duration::ZERO);
        assert!(valid_for(i64::MAX) > LIFE_MAX);
    }
}

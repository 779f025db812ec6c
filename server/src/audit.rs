//! The open connections, and a line in the log for each when it ends: who read what, and how much.
//!
//! A session is a connection. Its line is written when the last of its calls has ended and the connection is
//! gone.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::tls::Peer;
use tokio_util::sync::CancellationToken;

/// What one connection was given.
#[derive(Debug)]
pub(crate) struct AuditSession {
    peer: Arc<Peer>,
    /// The entry of the allow list that let the client in; `None` if none did.
    allowed_by: Option<String>,
    began: Instant,
    /// Bytes read, by kind, and calls made, by name.
    served: Mutex<BTreeMap<&'static str, u64>>,
    sent_bytes: AtomicU64,
    /// Calls that have not ended.
    calls: AtomicUsize,
    /// When the last of them ended.
    idle_since: Mutex<Instant>,
    /// Cancelled when the connection must be closed.
    close: CancellationToken,
}

/// A call that has not ended, as long as this value lives.
#[derive(Debug)]
pub(crate) struct OpenCall(Arc<AuditSession>);

impl OpenCall {
    /// The session that it belongs to.
    pub(crate) fn session(&self) -> &Arc<AuditSession> {
        &self.0
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        *self.0.idle_since.lock() = Instant::now();
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AuditSession {
    fn new(peer: Arc<Peer>, allowed_by: Option<String>) -> Self {
        let began = Instant::now();
        Self {
            peer,
            allowed_by,
            began,
            served: Mutex::default(),
            sent_bytes: AtomicU64::new(0),
            calls: AtomicUsize::new(0),
            idle_since: Mutex::new(began),
            close: CancellationToken::new(),
        }
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Cancelled when the connection must be closed.
    pub(crate) fn close(&self) -> &CancellationToken {
        &self.close
    }

    /// How long it has had no call; `None` if it has one.
    pub(crate) fn idle_for(&self) -> Option<Duration> {
        (self.calls.load(Ordering::Relaxed) == 0).then(|| self.idle_since.lock().elapsed())
    }

    /// Notes bytes of one kind as read, or one call.
    pub(crate) fn served(&self, kind: &'static str, amount: u64) {
        if amount > 0 {
            *self.served.lock().entry(kind).or_default() += amount;
        }
    }

    /// Notes bytes as sent, compressed.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Drop for AuditSession {
    fn drop(&mut self) {
        let served = self.served.lock();
        let kinds: Vec<String> =
            served.iter().map(|(kind, amount)| format!("{kind}={amount}")).collect();
        tracing::info!(
            target: "audit",
            client = %self.peer.names().join(", "),
            allowed_by = self.allowed_by.as_deref().unwrap_or("nothing"),
            fingerprint = %self.peer.fingerprint,
            address = %self.peer.address,
            read = %kinds.join(" "),
            sent_bytes = self.sent_bytes.load(Ordering::Relaxed),
            seconds = self.began.elapsed().as_secs(),
            "session ended"
        );
    }
}

/// The open sessions, found by the address of the client's end, which no two share.
#[derive(Debug, Default)]
pub(crate) struct AuditSessions(Mutex<HashMap<SocketAddr, Weak<AuditSession>>>);

impl AuditSessions {
    /// A new connection; it must hold the session as long as it lives.
    pub(crate) fn open(&self, peer: &Arc<Peer>, allowed_by: Option<String>) -> Arc<AuditSession> {
        tracing::debug!(
            target: "audit",
            client = %peer.names().join(", "),
            allowed_by = allowed_by.as_deref().unwrap_or("nothing"),
            fingerprint = %peer.fingerprint,
            address = %peer.address,
            "session began"
        );
        let session = Arc::new(AuditSession::new(Arc::clone(peer), allowed_by));
        let mut open = self.0.lock();
        open.retain(|_, session| session.strong_count() > 0);
        open.insert(peer.address, Arc::downgrade(&session));
        session
    }

    /// All open sessions.
    pub(crate) fn all(&self) -> Vec<Arc<AuditSession>> {
        self.0.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// Begins a call on the session that it belongs to.
    pub(crate) fn call(&self, peer: &Arc<Peer>) -> OpenCall {
        let found = self.0.lock().get(&peer.address).and_then(Weak::upgrade);
        // A call outlives its connection only while both are being torn down.
        let session = found.unwrap_or_else(|| Arc::new(AuditSession::new(Arc::clone(peer), None)));
        session.calls.fetch_add(1, Ordering::Relaxed);
        OpenCall(session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Arc<Peer> {
        Arc::new(Peer {
            alternative_names: None,
            common_name: Some("node1".to_owned()),
            fingerprint: String::new(),
            expires: i64::MAX,
            chain: Vec::new(),
            address: ([127, 0, 0, 1], 1).into(),
            congestion_control: None,
        })
    }

    #[test]
    fn a_connection_is_idle_between_its_calls() {
        let (sessions, peer) = (AuditSessions::default(), peer());
        let session = sessions.open(&peer, None);
        assert!(session.idle_for().is_some());
        let (one, other) = (sessions.call(&peer), sessions.call(&peer));
        assert!(Arc::ptr_eq(one.session(), &session));
        drop(one);
        assert!(session.idle_for().is_none(), "another call is open");
        drop(other);
        assert!(session.idle_for().is_some());
        drop(session);
        assert!(sessions.all().is_empty());
    }
}

//! One line for every session: who read what, and how much.
//!
//! A session is a connection. Its line is written when the last of its streams has ended and the
//! connection is gone.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use proto::tls::Peer;

/// What one connection was given.
#[derive(Debug)]
pub(crate) struct AuditSession {
    peer: Arc<Peer>,
    /// Bytes read, by kind, and calls made, by name.
    served: Mutex<BTreeMap<&'static str, u64>>,
    sent_bytes: AtomicU64,
}

impl AuditSession {
    pub(crate) fn new(peer: Arc<Peer>) -> Self {
        Self { peer, served: Mutex::default(), sent_bytes: AtomicU64::new(0) }
    }

    /// Notes bytes of one kind as read, or one call.
    pub(crate) fn served(&self, kind: &'static str, amount: u64) {
        let mut served = self.served.lock();
        *served.entry(kind).or_default() += amount;
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
            peer = self.peer.name(),
            fingerprint = %self.peer.fingerprint,
            address = %self.peer.address,
            read = %kinds.join(" "),
            sent_bytes = self.sent_bytes.load(Ordering::Relaxed),
            "session ended"
        );
    }
}

/// The open sessions, found by the address of the client's end, which no two share.
#[derive(Debug, Default)]
pub(crate) struct AuditSessions(Mutex<HashMap<SocketAddr, Weak<AuditSession>>>);

impl AuditSessions {
    /// A new connection; it must hold the session as long as it lives.
    pub(crate) fn open(&self, peer: &Arc<Peer>) -> Arc<AuditSession> {
        let session = Arc::new(AuditSession::new(Arc::clone(peer)));
        let mut open = self.0.lock();
        open.retain(|_, session| session.strong_count() > 0);
        open.insert(peer.address, Arc::downgrade(&session));
        session
    }

    /// The session a call belongs to.
    pub(crate) fn of(&self, peer: &Arc<Peer>) -> Arc<AuditSession> {
        let open = self.0.lock();
        let found = open.get(&peer.address).and_then(Weak::upgrade);
        // A call outlives its connection only while both are being torn down.
        found.unwrap_or_else(|| Arc::new(AuditSession::new(Arc::clone(peer))))
    }
}

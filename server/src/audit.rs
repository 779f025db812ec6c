//! One line for every data stream: who read what, and how much.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::tls::Peer;

/// Counts what a stream served and logs it when the stream ends, however it ends.
#[derive(Debug)]
pub(crate) struct Audit {
    peer: Arc<Peer>,
    served: BTreeMap<&'static str, u64>,
    sent_bytes: u64,
}

impl Audit {
    pub(crate) fn new(peer: Arc<Peer>) -> Self {
        Self { peer, served: BTreeMap::new(), sent_bytes: 0 }
    }

    /// Notes bytes of one kind, as read.
    pub(crate) fn served(&mut self, kind: &'static str, bytes: u64) {
        *self.served.entry(kind).or_default() += bytes;
    }

    /// Notes bytes as sent, compressed.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.sent_bytes += bytes as u64;
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let kinds: Vec<String> =
            self.served.iter().map(|(kind, bytes)| format!("{kind}={bytes}")).collect();
        tracing::info!(
            target: "audit",
            peer = self.peer.name(),
            fingerprint = %self.peer.fingerprint,
            address = %self.peer.address,
            read_bytes = %kinds.join(" "),
            sent_bytes = self.sent_bytes,
            "data stream ended"
        );
    }
}

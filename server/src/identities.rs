//! How many connections each client has open.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use proto::limits::CONNECTIONS_PER_IDENTITY_MAX;

/// Connections each identity has open, by certificate fingerprint.
pub(crate) type Identities = Arc<Mutex<HashMap<String, usize>>>;

/// Counts a connection of an identity as long as it lives.
pub(crate) struct IdentitySlot {
    identities: Identities,
    fingerprint: String,
}

impl IdentitySlot {
    /// Counts one more, unless the identity has as many as it may.
    pub(crate) fn take(identities: &Identities, fingerprint: &str) -> Option<Self> {
        let mut open = identities.lock();
        let count = open.entry(fingerprint.to_owned()).or_default();
        if *count >= CONNECTIONS_PER_IDENTITY_MAX {
            return None;
        }
        *count += 1;
        Some(Self { identities: Arc::clone(identities), fingerprint: fingerprint.to_owned() })
    }
}

impl Drop for IdentitySlot {
    fn drop(&mut self) {
        let mut open = self.identities.lock();
        if let Some(count) = open.get_mut(&self.fingerprint) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.fingerprint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_a_share_of_the_connections_and_gives_it_back() {
        let identities = Identities::default();
        let take = || IdentitySlot::take(&identities, "one");
        let slots: Vec<_> = std::iter::from_fn(take).collect();
        assert_eq!(slots.len(), CONNECTIONS_PER_IDENTITY_MAX);
        assert!(IdentitySlot::take(&identities, "another").is_some());
        drop(slots);
        assert!(take().is_some());
        assert!(identities.lock().is_empty(), "nothing is kept of a client without connections");
    }
}

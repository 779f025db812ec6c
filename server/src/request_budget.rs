//! Memory for requests: how many bytes of them are held, of each client and of all.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use proto::limits::{REQUEST_BYTES_MAX, REQUEST_BYTES_PER_IDENTITY_MAX};
use proto::{Reason, Refusal};

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct RequestBudget(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    all: usize,
    /// By certificate fingerprint; without those that hold nothing.
    identities: HashMap<String, usize>,
}

/// Bytes that are held as long as this value lives.
#[derive(Debug)]
pub(crate) struct HeldBytes {
    budget: RequestBudget,
    fingerprint: String,
    bytes: usize,
}

impl RequestBudget {
    /// Nothing yet, of this client.
    pub(crate) fn of(&self, fingerprint: &str) -> HeldBytes {
        HeldBytes { budget: self.clone(), fingerprint: fingerprint.to_owned(), bytes: 0 }
    }
}

impl HeldBytes {
    /// Holds so many bytes more.
    ///
    /// # Errors
    /// The client, or all clients together, hold too much.
    pub(crate) fn add(&mut self, bytes: usize) -> Result<(), Refusal> {
        let mut held = self.budget.0.lock();
        let own = held.identities.get(&self.fingerprint).copied().unwrap_or(0);
        if own.saturating_add(bytes) > REQUEST_BYTES_PER_IDENTITY_MAX
            || held.all.saturating_add(bytes) > REQUEST_BYTES_MAX
        {
            let why = "the server holds too many bytes of requests: try again later";
            return Err(Refusal::new(Reason::Overloaded, why));
        }
        held.all += bytes;
        *held.identities.entry(self.fingerprint.clone()).or_default() += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// Gives all of it back.
    pub(crate) fn release(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes == 0 {
            return;
        }
        let mut held = self.budget.0.lock();
        held.all -= bytes;
        if let Some(own) = held.identities.get_mut(&self.fingerprint) {
            *own -= bytes;
            if *own == 0 {
                held.identities.remove(&self.fingerprint);
            }
        }
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_does_not_take_what_others_need() {
        let budget = RequestBudget::default();
        let mut greedy = budget.of("greedy");
        assert!(greedy.add(REQUEST_BYTES_PER_IDENTITY_MAX).is_ok());
        assert!(greedy.add(1).is_err());
        assert!(budget.of("greedy").add(1).is_err(), "on another stream");
        assert!(budget.of("honest").add(1).is_ok());
        greedy.release();
        assert!(budget.of("greedy").add(REQUEST_BYTES_PER_IDENTITY_MAX).is_ok());
    }

    #[test]
    fn all_clients_together_are_bounded_and_all_of_it_comes_back() {
        let budget = RequestBudget::default();
        let clients = REQUEST_BYTES_MAX / REQUEST_BYTES_PER_IDENTITY_MAX;
        let mut all: Vec<_> = (0..=clients).map(|client| budget.of(&client.to_string())).collect();
        let given = |held: &mut HeldBytes| held.add(REQUEST_BYTES_PER_IDENTITY_MAX).is_ok();
        assert_eq!(all.iter_mut().filter_map(|held| given(held).then_some(())).count(), clients);
        drop(all);
        let held = budget.0.lock();
        assert_eq!((held.all, held.identities.len()), (0, 0));
    }
}

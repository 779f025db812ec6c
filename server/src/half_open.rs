//! Connections whose TLS handshake is not finished. Nobody has proven anything yet, so their number is bounded, in
//! all and for each address, and the oldest gives way: whoever opens many silent connections closes his own.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use proto::limits::{HANDSHAKES_MAX, HANDSHAKES_PER_ADDRESS_MAX};
use tokio_util::sync::CancellationToken;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct HalfOpen(Arc<Mutex<Registry>>);

#[derive(Debug, Default)]
struct Registry {
    /// In the order of their arrival.
    open: BTreeMap<u64, HalfOpenEntry>,
    next: u64,
}

#[derive(Debug)]
struct HalfOpenEntry {
    address: IpAddr,
    give_way: CancellationToken,
}

/// A connection that is counted as long as this value lives.
#[derive(Debug)]
pub(crate) struct HalfOpenSlot {
    registry: HalfOpen,
    number: u64,
    /// Cancelled when the connection must give way to another one.
    pub(crate) give_way: CancellationToken,
}

impl Drop for HalfOpenSlot {
    fn drop(&mut self) {
        self.registry.0.lock().open.remove(&self.number);
    }
}

impl HalfOpen {
    /// Counts a connection that has arrived. Where there are too many, the oldest one gives way: of the same
    /// address if that has too many, else of the address that has most.
    pub(crate) fn enter(&self, address: IpAddr) -> HalfOpenSlot {
        let mut registry = self.0.lock();
        let crowded = registry.crowded(address);
        if let Some(crowded) = crowded {
            registry.evict_oldest(crowded);
        }
        let number = registry.next;
        registry.next += 1;
        let give_way = CancellationToken::new();
        registry.open.insert(number, HalfOpenEntry { address, give_way: give_way.clone() });
        HalfOpenSlot { registry: self.clone(), number, give_way }
    }
}

impl Registry {
    /// The address that must make room for another connection of `newcomer`.
    fn crowded(&self, newcomer: IpAddr) -> Option<IpAddr> {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for HalfOpenEntry { address, .. } in self.open.values() {
            *counts.entry(*address).or_default() += 1;
        }
        if counts.get(&newcomer).is_some_and(|count| *count >= HANDSHAKES_PER_ADDRESS_MAX) {
            return Some(newcomer);
        }
        if self.open.len() < HANDSHAKES_MAX {
            return None;
        }
        counts.into_iter().max_by_key(|(_, count)| *count).map(|(address, _)| address)
    }

    fn evict_oldest(&mut self, address: IpAddr) {
        let oldest = self.open.iter().find(|(_, waiting)| waiting.address == address);
        if let Some(number) = oldest.map(|(number, _)| *number)
            && let Some(waiting) = self.open.remove(&number)
        {
            waiting.give_way.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn gone(slots: &[HalfOpenSlot]) -> usize {
        slots.iter().filter(|slot| slot.give_way.is_cancelled()).count()
    }

    #[test]
    fn an_address_that_opens_too_many_closes_its_own_oldest() {
        let half_open = HalfOpen::default();
        let other = half_open.enter(address(2));
        let slots: Vec<_> =
            (0..=HANDSHAKES_PER_ADDRESS_MAX).map(|_| half_open.enter(address(1))).collect();
        assert_eq!(gone(&slots), 1);
        assert!(slots.first().is_some_and(|oldest| oldest.give_way.is_cancelled()));
        assert!(!other.give_way.is_cancelled());
    }

    #[test]
    fn where_all_places_are_taken_the_address_with_most_gives_way() {
        let half_open = HalfOpen::default();
        let honest = half_open.enter(address(200));
        let mut many = Vec::new();
        for last in 0..10 {
            for _ in 0..HANDSHAKES_PER_ADDRESS_MAX {
                many.push(half_open.enter(address(last)));
            }
        }
        let late = half_open.enter(address(201));
        assert!(!honest.give_way.is_cancelled() && !late.give_way.is_cancelled());
        assert_eq!(many.len() - gone(&many) + 2, HANDSHAKES_MAX);
    }

    #[test]
    fn a_finished_handshake_makes_room() {
        let half_open = HalfOpen::default();
        for _ in 0..10 * HANDSHAKES_MAX {
            let slot = half_open.enter(address(1));
            assert!(!slot.give_way.is_cancelled());
        }
        assert!(half_open.0.lock().open.is_empty());
    }
}

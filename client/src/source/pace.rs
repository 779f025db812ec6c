//! A floor under the pace of a source: one that always brings something, and never anything that counts, must not
//! keep a run alive.

use std::time::{Duration, Instant};

use pg_format::{BLOCK_BYTES, Lsn};
use proto::fetch::{Change, Item, ItemBody, PageContent};
use proto::limits::{PACE_BYTES_MIN, PACE_WINDOW};

/// See the module. Measures one stream.
#[derive(Debug)]
pub struct Pace {
    since: Instant,
    /// Bytes that the answers since then stand for.
    bytes: u64,
    /// How far the answers about changes reach.
    reached: Lsn,
    /// Whether everything was answered, so that no time counts until more is asked for.
    rests: bool,
}

/// A source that is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the source has answered less than {} KiB in {} seconds",
    PACE_BYTES_MIN >> 10,
    PACE_WINDOW.as_secs()
)]
pub struct TooSlow;

impl Default for Pace {
    fn default() -> Self {
        Self { since: Instant::now(), bytes: 0, reached: Lsn::INVALID, rests: false }
    }
}

impl Pace {
    /// Takes answers that have come.
    ///
    /// # Errors
    /// In the last window too little has come.
    pub fn take(&mut self, items: &[Item]) -> Result<(), TooSlow> {
        self.take_at(items, Instant::now())
    }

    /// Does not count a time in which this node took nothing.
    pub fn excuse(&mut self, time: Duration) {
        self.since += time;
    }

    /// Notes that everything was answered.
    pub fn rest(&mut self) {
        self.rests = true;
    }

    fn take_at(&mut self, items: &[Item], now: Instant) -> Result<(), TooSlow> {
        if std::mem::take(&mut self.rests) {
            (self.since, self.bytes) = (now, 0);
        }
        for item in items {
            self.bytes = self.bytes.saturating_add(self.worth(&item.body));
        }
        if self.bytes >= PACE_BYTES_MIN {
            (self.since, self.bytes) = (now, 0);
        }
        match now.saturating_duration_since(self.since) > PACE_WINDOW {
            true => Err(TooSlow),
            false => Ok(()),
        }
    }

    /// Bytes of the source that an answer stands for.
    fn worth(&mut self, body: &ItemBody) -> u64 {
        match body {
            ItemBody::Page { content: PageContent::BeyondEnd, .. } | ItemBody::End { .. } => 0,
            ItemBody::Page { .. } => BLOCK_BYTES,
            ItemBody::PageHashes { hashes, .. } => BLOCK_BYTES.saturating_mul(hashes.len() as u64),
            ItemBody::Same { count, .. } => BLOCK_BYTES.saturating_mul(u64::from(*count)),
            ItemBody::Chunk(chunk) => chunk.data().len() as u64,
            ItemBody::SegmentDigest { .. } => PACE_BYTES_MIN,
            ItemBody::RecordCrc { .. } => 24,
            ItemBody::Change(Change::Reached(reached)) => {
                let before = std::mem::replace(&mut self.reached, reached.to);
                // The first says where the answer begins.
                if before.is_valid() { reached.to.distance_from(before.min(reached.to)) } else { 0 }
            }
            ItemBody::Change(_) | ItemBody::Waiting => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::fetch::Reached;

    use super::*;

    fn item(body: ItemBody) -> Item {
        Item { unit: 1, body }
    }

    fn reached(to: u64) -> Item {
        let (from, to) = (Lsn::new(1), Lsn::new(to));
        let reached = Reached { from, to, minimal_at: None, unknown_at: None, extension_at: None };
        item(ItemBody::Change(Change::Reached(reached)))
    }

    /// Whether a source that brings this every minute is believed for a day.
    fn lasts(mut each: impl FnMut(u64) -> Item) -> bool {
        let (begin, mut pace) = (Instant::now(), Pace::default());
        (1..=24 * 60).all(|minute| {
            pace.take_at(&[each(minute)], begin + Duration::from_secs(60 * minute)).is_ok()
        })
    }

    #[test]
    fn what_brings_nothing_does_not_last() {
        assert!(!lasts(|_| item(ItemBody::Page { block: 1, content: PageContent::BeyondEnd })));
        assert!(!lasts(|minute| reached(1000 + minute)), "a byte a minute");
        assert!(!lasts(|_| item(ItemBody::Change(Change::Directory {
            tablespace: 1,
            database: 2
        }))));
        assert!(!lasts(|_| item(ItemBody::RecordCrc { lsn: Lsn::new(1), crc: 1 })));
    }

    #[test]
    fn what_is_slow_lasts() {
        // One of twelve clients of a server with --max-rate 128k.
        let bytes = 10_000 * 60;
        assert!(lasts(|minute| reached(1000 + minute * bytes)));
        assert!(lasts(|_| item(ItemBody::Same { first: 0, count: 128 })));
    }

    #[test]
    fn time_in_which_nothing_was_asked_for_does_not_count() {
        let (begin, mut pace) = (Instant::now(), Pace::default());
        pace.rest();
        assert_eq!(pace.take_at(&[], begin + 2 * PACE_WINDOW), Ok(()));
    }

    #[test]
    fn time_in_which_this_node_was_slow_does_not_count() {
        let (begin, mut pace) = (Instant::now(), Pace::default());
        let late = begin + 2 * PACE_WINDOW;
        assert_eq!(pace.take_at(&[], late), Err(TooSlow));
        pace.excuse(2 * PACE_WINDOW);
        assert_eq!(pace.take_at(&[], late), Ok(()));
    }
}

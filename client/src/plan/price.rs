//! What each way is likely to carry, both ways together and compressed, and which is the cheapest. Pure.
//!
//! Estimates: how far content shrinks is not known before it travels. They rank the ways, since all of
//! them carry the same kinds of content, and tell an operator what to expect within a factor of two.

use pg_format::BLOCK_BYTES;

use super::Plan;
use super::input::Strategy;

/// A page that comes as a difference: signature up, difference, hash and number down (measured on random
/// updates of wide rows with two indexes: 96 up, 60 to 250 down).
const DIFFERENCE_BYTES: u64 = 280;
/// Part of its size that a page takes of which the target has no other version: rows of hex digests.
const WHOLE_SHRINK: u64 = 2;
/// The same of WAL, much of which is full-page images.
const WAL_SHRINK: u64 = 3;
/// Pages under one hash of a comparison, and the bytes of a hash.
const RUN_PAGES: u64 = 128;
const HASH_BYTES: u64 = 16;

/// What one way is likely to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    /// Bytes of pages and files.
    pub blocks: u64,
    /// Bytes of page hashes.
    pub hashes: u64,
    /// Bytes of WAL.
    pub wal: u64,
}

impl Price {
    /// The price of a plan that needs so many bytes of the source's WAL, before compression.
    pub fn of(plan: &Plan, wal_bytes: u64) -> Self {
        let (mut known, mut whole) = (0, 0);
        for wanted in &plan.pages {
            for block in wanted.blocks.iter().take_while(|block| *block < wanted.end) {
                if block < wanted.known { known += 1 } else { whole += 1 }
            }
        }
        let files: u64 = plan.whole.iter().map(|wanted| wanted.bytes).sum();
        let whole = (whole * BLOCK_BYTES + files) / WHOLE_SHRINK;
        Self { blocks: known * DIFFERENCE_BYTES + whole, hashes: 0, wal: wal_bytes / WAL_SHRINK }
    }

    /// The same of a plan whose pages are found by comparing `pages`, of which at least those of the plan
    /// differ: one hash for each run goes up, and of those that differ one for each page comes down.
    pub fn of_comparing(plan: &Plan, wal_bytes: u64, pages: u64) -> Self {
        let runs = |blocks: u32| u64::from(blocks) / RUN_PAGES;
        let differing: u64 = plan
            .pages
            .iter()
            .map(|wanted| {
                let mut runs: Vec<u64> = wanted.blocks.iter().map(runs).collect();
                runs.dedup();
                runs.len() as u64
            })
            .sum();
        let up = pages.div_ceil(RUN_PAGES) * HASH_BYTES;
        let down = (differing * RUN_PAGES).min(pages) * HASH_BYTES;
        Self { hashes: up + down, ..Self::of(plan, wal_bytes) }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.blocks.saturating_add(self.hashes).saturating_add(self.wal)
    }

    /// Whether most of it is WAL: what a newer checkpoint of the source would save.
    pub fn is_mostly_wal(&self) -> bool {
        self.wal > self.total() / 2
    }
}

/// The prices of all ways, or why one cannot be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prices {
    /// Replay from the last common checkpoint.
    pub fork: Result<Price, String>,
    /// Replay from the source's newest checkpoint.
    pub latest: Result<Price, String>,
    /// Comparing everything; always possible, and a guess where nothing is known of what changed.
    pub compare: Price,
}

impl Prices {
    /// The price of one way.
    pub fn of(&self, strategy: Strategy) -> Option<Price> {
        match strategy {
            Strategy::Fork => self.fork.as_ref().ok().copied(),
            Strategy::Latest => self.latest.as_ref().ok().copied(),
            Strategy::Compare => Some(self.compare),
        }
    }

    /// The cheapest way. Comparing reads all of both nodes, and is the cheapest only where nothing else is
    /// possible.
    pub fn cheapest(&self) -> Strategy {
        match (&self.fork, &self.latest) {
            (Ok(fork), Ok(latest)) if latest.total() < fork.total() => Strategy::Latest,
            (Ok(_), _) => Strategy::Fork,
            (Err(_), Ok(_)) => Strategy::Latest,
            (Err(_), Err(_)) => Strategy::Compare,
        }
    }
}

#[cfg(test)]
mod tests {
    use pg_format::BlockSet;

    use super::*;
    use crate::plan::decide::{BytesWanted, PagesWanted};

    /// A plan with pages as differences, whole pages, and bytes of files.
    fn plan(known: u32, whole: u32, bytes: u64) -> Plan {
        let mut blocks = BlockSet::default();
        blocks.insert_range(0, known + whole);
        let pages = vec![PagesWanted { file: 0, blocks, end: known + whole, known }];
        let whole = vec![BytesWanted { file: 1, bytes }];
        Plan { pages, whole, ..Plan::default() }
    }

    const MB: u64 = 1 << 20;

    /// What a way carries: differences, whole pages, and megabytes of WAL; `None` if it cannot be gone.
    type Way = Option<(u32, u32, u64)>;

    #[test]
    fn situations_have_the_way_an_operator_would_expect() {
        use Strategy::{Compare, Fork, Latest};
        let situations: [(&str, Way, Way, Strategy); 14] = [
            ("just promoted: both are the same", Some((900, 0, 30)), Some((900, 0, 30)), Fork),
            ("little WAL, the source changed much", Some((100, 0, 1)), Some((9000, 0, 0)), Fork),
            ("an hour after the fork", Some((900, 0, 4000)), Some((60_000, 0, 20)), Latest),
            (
                "a checkpoint after the last change",
                Some((9000, 0, 110)),
                Some((13_000, 0, 1)),
                Latest,
            ),
            (
                "under load, checkpoint a minute old",
                Some((9000, 0, 300)),
                Some((14_000, 0, 120)),
                Latest,
            ),
            ("bulk load on the source", Some((10, 25_000, 250)), Some((10, 25_000, 0)), Latest),
            (
                "bulk load before a checkpoint and WAL after",
                Some((10, 0, 900)),
                Some((10, 25_000, 20)),
                Latest,
            ),
            ("a database copied file by file", None, Some((10, 2000, 5)), Latest),
            ("tablespaces that replay cannot make", None, Some((10, 200, 5)), Latest),
            ("the source's WAL has minimal parts", Some((10, 0, 50)), None, Fork),
            ("no WAL is kept on the source", None, None, Compare),
            ("the target's WAL is damaged", None, None, Compare),
            ("hints were not logged", None, None, Compare),
            ("nothing happened on the source", Some((500, 0, 0)), Some((500, 0, 0)), Fork),
        ];
        for (situation, fork, latest, expected) in situations {
            let price = |way: Way| {
                let way = way.ok_or_else(|| "not possible".to_owned());
                way.map(|(known, whole, wal)| Price::of(&plan(known, whole, 1000), wal * MB))
            };
            let compare = Price::of_comparing(&plan(20_000, 0, 1000), MB, 1 << 20);
            let prices = Prices { fork: price(fork), latest: price(latest), compare };
            assert_eq!(prices.cheapest(), expected, "{situation}: {prices:?}");
        }
    }

    #[test]
    fn comparing_costs_its_hashes_besides() {
        let pages = plan(1000, 0, 0);
        let compare = Price::of_comparing(&pages, 0, 100_000);
        assert_eq!(compare.blocks, Price::of(&pages, 0).blocks);
        // 782 runs up, eight of them differ.
        assert_eq!(compare.hashes, 782 * 16 + 8 * 128 * 16);
        assert!(Price::of(&plan(10, 0, 0), 50 * MB).is_mostly_wal());
        assert!(!Price::of(&plan(10, 900, 0), MB).is_mostly_wal());
    }
}

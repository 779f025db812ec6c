//! What each strategy is likely to transfer, in both directions and compressed, and which is the cheapest.
//! Pure.
//!
//! How far content can be compressed is not known before it is transferred. Typical rates rank the
//! strategies, since all of them transfer the same kinds of content; rates that were measured on a sample
//! tell an operator what to expect.

use pg_format::{BLOCK_BYTES, Covered, FileClass};

use crate::error::NotPossible;
use crate::plan::Plan;
use crate::plan::input::Strategy;

/// Bytes that are transferred for a file besides its content: its name, its hash and the end of its unit.
pub const FILE_BYTES: u64 = 64;
/// Pages under one hash of a comparison, and the bytes of a hash.
const RUN_PAGES: u64 = 128;
const HASH_BYTES: u64 = 16;

/// Bytes transferred for each page, or for each byte of a file or of WAL; in 1/1024 of a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// The rate of `bytes` transferred for so many things; 0 things count as 1.
    pub fn new(bytes: u64, things: u64) -> Self {
        Self(bytes.saturating_mul(1024) / things.max(1))
    }

    /// The rate with so many more bytes for each thing.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes.saturating_mul(1024)))
    }

    fn of(self, things: u64) -> u64 {
        things.saturating_mul(self.0) / 1024
    }
}

/// Bytes transferred for each kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// For a page that comes as a difference: its signature and the difference.
    pub difference: Rate,
    /// For a page of which the target has no other version.
    pub whole: Rate,
    /// For a byte of a file, of which each has [`FILE_BYTES`] more.
    pub file: Rate,
    /// For a byte of WAL.
    pub wal: Rate,
}

impl Default for Rates {
    /// Measured on random updates of wide rows with two indexes: for a page that comes as a difference, the
    /// signature has 96 bytes and the difference 60 to 250. Rows of hex digests shrink to half, WAL with many
    /// full-page images to a third.
    fn default() -> Self {
        Self {
            difference: Rate::new(280, 1),
            whole: Rate::new(BLOCK_BYTES, 2),
            file: Rate::new(1, 2),
            wal: Rate::new(1, 3),
        }
    }
}

impl Rates {
    /// Typical rates where replay starts at the fork point: pages of which the target has no other version
    /// are rebuilt by replay and not transferred.
    pub fn from_the_fork() -> Self {
        Self { whole: Rate::new(0, 1), ..Self::default() }
    }
}

/// What one strategy is likely to transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of pages and files.
    pub blocks: u64,
    /// Bytes of page hashes.
    pub hashes: u64,
    /// Bytes of WAL.
    pub wal: u64,
}

impl Estimate {
    /// The estimate of a plan that needs so many bytes of the source's WAL, before compression. Blocks that
    /// replay of that WAL rebuilds cost nothing.
    pub fn of(plan: &Plan, wal_bytes: u64, rates: Rates, covered: Option<&Covered>) -> Self {
        let (mut known, mut whole) = (0, 0);
        for wanted in &plan.pages {
            let class = plan.files.get(wanted.file).map(|file| FileClass::of(&file.path));
            let covered = covered.zip(match class {
                Some(FileClass::Relation(segment)) => Some(segment),
                _ => None,
            });
            let blocks = wanted.blocks.iter().take_while(|block| *block < wanted.end);
            for block in blocks {
                let rebuilt = |(covered, segment): (&Covered, _)| covered.contains(&segment, block);
                match block < wanted.known {
                    _ if covered.is_some_and(rebuilt) => {}
                    true => known += 1,
                    false => whole += 1,
                }
            }
        }
        let files: u64 = plan.whole.iter().map(|wanted| wanted.bytes + FILE_BYTES).sum();
        let pages = rates.difference.of(known) + rates.whole.of(whole);
        Self { blocks: pages + rates.file.of(files), hashes: 0, wal: rates.wal.of(wal_bytes) }
    }

    /// The same estimate if the plan's pages are found by comparing `pages` pages, of which at least those of
    /// the plan differ: one hash is sent for each run, and for each run that differs one hash comes back for
    /// each page.
    pub fn of_comparing(self, plan: &Plan, pages: u64) -> Self {
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
        Self { hashes: up + down, ..self }
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.blocks.saturating_add(self.hashes).saturating_add(self.wal)
    }

    /// Whether most of it is WAL: what a newer checkpoint of the source would save.
    pub fn is_mostly_wal(&self) -> bool {
        self.wal > self.total() / 2
    }
}

/// The estimates of all strategies, or why one is not possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimates {
    /// Replay from the last common checkpoint.
    pub fork: Result<Estimate, NotPossible>,
    /// Replay from the source's newest checkpoint.
    pub latest: Result<Estimate, NotPossible>,
    /// Comparing everything; always possible, and a guess where nothing is known of what changed.
    pub compare: Estimate,
}

impl Estimates {
    /// The estimate of one strategy.
    pub fn of(&self, strategy: Strategy) -> Option<Estimate> {
        match strategy {
            Strategy::Fork => self.fork.as_ref().ok().copied(),
            Strategy::Latest => self.latest.as_ref().ok().copied(),
            Strategy::Compare => Some(self.compare),
        }
    }

    /// The cheapest strategy. Comparing reads all of both nodes, and is the cheapest only where nothing else is
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
    use crate::plan::file_actions::{BytesWanted, PagesWanted};

    /// A plan with pages as differences, whole pages, and bytes of files.
    fn plan(known: u32, whole: u32, bytes: u64) -> Plan {
        let mut blocks = BlockSet::default();
        blocks.insert_range(0, known + whole);
        let pages = vec![PagesWanted { file: 0, blocks, end: known + whole, known }];
        let whole = vec![BytesWanted { file: 1, bytes }];
        Plan { pages, whole, ..Plan::default() }
    }

    const MB: u64 = 1 << 20;

    fn price(plan: &Plan, wal_bytes: u64) -> Estimate {
        Estimate::of(plan, wal_bytes, Rates::default(), None)
    }

    /// What a way carries: differences, whole pages, and megabytes of WAL; `None` if it cannot be gone.
    type Way = Option<(u32, u32, u64)>;

    #[test]
    fn situations_have_the_way_an_operator_would_expect() {
        use Strategy::{Compare, Fork, Latest};
        let situations: [(&str, Way, Way, Strategy); 15] = [
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
            ("bulk load on the source", Some((10, 25_000, 250)), Some((10, 25_000, 0)), Fork),
            ("bulk load, then updates", Some((10, 25_000, 400)), Some((9000, 25_000, 0)), Latest),
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
            let priced = |way: Way, rates| {
                let way = way.ok_or_else(|| NotPossible::new("not possible"));
                let price = |plan, wal| Estimate::of(&plan, wal * MB, rates, None);
                way.map(|(known, whole, wal)| price(plan(known, whole, 1000), wal))
            };
            let fork = priced(fork, Rates::from_the_fork());
            let latest = priced(latest, Rates::default());
            let all = plan(20_000, 0, 1000);
            let compare = price(&all, MB).of_comparing(&all, 1 << 20);
            let prices = Estimates { fork, latest, compare };
            assert_eq!(prices.cheapest(), expected, "{situation}: {prices:?}");
        }
    }

    #[test]
    fn comparing_costs_its_hashes_besides() {
        let pages = plan(1000, 0, 0);
        let compare = price(&pages, 0).of_comparing(&pages, 100_000);
        assert_eq!(compare.blocks, price(&pages, 0).blocks);
        // 782 runs up, eight of them differ.
        assert_eq!(compare.hashes, 782 * 16 + 8 * 128 * 16);
        assert!(price(&plan(10, 0, 0), 50 * MB).is_mostly_wal());
        assert!(!price(&plan(10, 900, 0), MB).is_mostly_wal());
    }
}

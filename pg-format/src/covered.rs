//! Blocks that replay rebuilds whatever their old content is.
//!
//! Redo of an applied full-page image, or of a record that initialises the page, does not read the old page
//! (`XLogReadBufferForRedoExtended`, `RBM_ZERO_AND_LOCK`). If the first record that names a block in the
//! replayed WAL is of this kind, the block is correct after replay and need not be fetched. Only the first
//! record counts: a record without an image needs the page as the records before it left it.

use crate::wal::RecordBody;
use crate::{Fork, Lsn, PageMap, RelationSegment};

/// The main-fork blocks that the WAL from one position on names, divided into those that replay rebuilds and
/// those that it only changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Covered {
    start: Lsn,
    rebuilt: PageMap,
    changed: PageMap,
}

impl Covered {
    /// An empty set, for WAL that is replayed from `start` on.
    pub fn new(start: Lsn) -> Self {
        Self { start, rebuilt: PageMap::default(), changed: PageMap::default() }
    }

    /// The position where replay begins. Replay from another position rebuilds other blocks.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Adds the blocks of the next record. Records must be added in the order of the WAL.
    pub fn note(&mut self, body: &RecordBody) {
        for reference in body.blocks.iter().filter(|reference| reference.fork == Fork::Main) {
            let (segment, block) =
                RelationSegment::of_block(reference.relation, Fork::Main, reference.block);
            if self.rebuilt.contains(&segment, block) || self.changed.contains(&segment, block) {
                continue;
            }
            let map = if reference.rebuilds() { &mut self.rebuilt } else { &mut self.changed };
            map.insert(reference.relation, reference.block);
        }
    }

    /// Adds the result for the WAL that follows directly. Blocks that this value knows already stay as they
    /// are.
    pub fn absorb(&mut self, later: Self) {
        let Self { mut rebuilt, mut changed, .. } = later;
        for known in [&self.rebuilt, &self.changed] {
            rebuilt.remove(known);
            changed.remove(known);
        }
        self.rebuilt.absorb(rebuilt);
        self.changed.absorb(changed);
    }

    /// Whether replay rebuilds a block of a segment file.
    pub fn contains(&self, segment: &RelationSegment, block: u32) -> bool {
        segment.fork == Fork::Main && self.rebuilt.contains(segment, block)
    }

    /// Whether `other` was computed for the same start of replay, and every block that it calls rebuilt is
    /// rebuilt by this value too.
    pub fn confirms(&self, other: &Self) -> bool {
        self.start == other.start && other.rebuilt.is_within(&self.rebuilt)
    }

    /// The blocks that replay rebuilds.
    pub fn into_blocks(self) -> PageMap {
        self.rebuilt
    }

    /// Adds the blocks that replay of the following WAL rebuilds, where nothing else is known of that WAL.
    pub fn absorb_blocks(&mut self, rebuilt: PageMap) {
        self.absorb(Self { start: self.start, rebuilt, changed: PageMap::default() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RelationPath;
    use crate::wal::BlockReference;

    const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

    fn record(block: u32, restores_image: bool, initialises: bool) -> RecordBody {
        let reference = BlockReference {
            id: 0,
            relation: RELATION,
            fork: Fork::Main,
            block,
            restores_image,
            initialises,
        };
        let mut body = RecordBody::default();
        body.blocks.push(reference);
        body
    }

    fn covers(covered: &Covered, block: u32) -> bool {
        let (segment, block) = RelationSegment::of_block(RELATION, Fork::Main, block);
        covered.contains(&segment, block)
    }

    /// Blocks 1 to 3 in a record each: image, initialised, changed.
    fn seen() -> Covered {
        let mut covered = Covered::new(Lsn::new(100));
        for body in [record(1, true, false), record(2, false, true), record(3, false, false)] {
            covered.note(&body);
        }
        covered
    }

    #[test]
    fn the_first_reference_alone_decides() {
        let mut covered = seen();
        for body in [record(1, false, false), record(3, true, false), record(4, true, false)] {
            covered.note(&body);
        }
        let blocks: Vec<bool> = (0..6).map(|block| covers(&covered, block)).collect();
        assert_eq!(blocks, [false, true, true, false, true, false]);
    }

    #[test]
    fn parts_join_as_if_read_in_one_go() {
        let mut parts = seen();
        let mut later = Covered::new(Lsn::new(100));
        for body in [record(3, true, false), record(1, false, false), record(131_072, true, false)]
        {
            later.note(&body);
        }
        parts.absorb(later);
        assert!(covers(&parts, 1) && covers(&parts, 131_072));
        assert!(!covers(&parts, 3));
        let mut whole = seen();
        whole.note(&record(131_072, true, false));
        assert_eq!(parts, whole);
    }

    #[test]
    fn what_was_computed_for_another_start_is_not_confirmed() {
        assert!(seen().confirms(&seen()));
        let mut more = seen();
        more.note(&record(9, true, false));
        assert!(more.confirms(&seen()));
        assert!(!seen().confirms(&more));
        assert!(!Covered { start: Lsn::new(99), ..seen() }.confirms(&seen()));
    }
}

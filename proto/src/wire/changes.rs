//! Generated messages to domain types and back: what WAL records change.

use pg_format::{BlockSet, Fork, Lsn, RELATION_SEGMENT_BLOCKS, RelationPath, RelationSegment};

use crate::fetch::{Change, Reached};
use crate::frame::FrameError;
use crate::wire;

/// A set of blocks as pairs: the number of blocks that are skipped before each run, and the length of the
/// run.
fn runs(blocks: &BlockSet) -> Vec<u32> {
    let mut end = 0;
    let mut runs = Vec::new();
    for range in blocks.ranges(u32::MAX, u32::MAX) {
        runs.extend([range.first - end, range.count]);
        end = range.first + range.count;
    }
    runs
}

/// The set that [`runs`] describes; `None` if a segment file cannot have such blocks.
fn set(runs: &[u32]) -> Option<BlockSet> {
    let (pairs, rest) = runs.as_chunks::<2>();
    let mut blocks = BlockSet::default();
    let mut end = 0_u32;
    for [skipped, count] in pairs {
        let first = end.checked_add(*skipped)?;
        end = first.checked_add(*count)?;
        if end > RELATION_SEGMENT_BLOCKS {
            return None;
        }
        blocks.insert_range(first, end);
    }
    rest.is_empty().then_some(blocks)
}

fn position(lsn: Option<Lsn>) -> u64 {
    lsn.map_or(0, Lsn::as_u64)
}

fn known(position: u64) -> Option<Lsn> {
    (position > 0).then(|| Lsn::new(position))
}

pub(crate) fn body(change: Change) -> wire::item::Body {
    use wire::item::Body;
    match change {
        Change::Blocks { segment, blocks } => {
            let RelationPath { tablespace, database, number } = segment.relation;
            let segment =
                wire::RelationSegment { tablespace, database, number, segment: segment.segment };
            let (segment, runs) = (Some(segment), runs(&blocks));
            Body::ChangedBlocks(wire::ChangedBlocksItem { segment, runs })
        }
        Change::Relation { relation, created, cut_to } => {
            let RelationPath { tablespace, database, number } = relation;
            Body::ChangedRelation(wire::ChangedRelationItem {
                tablespace,
                database,
                number,
                created,
                cut_to,
            })
        }
        Change::Directory { tablespace, database } => {
            Body::ChangedDirectory(wire::ChangedDirectoryItem { tablespace, database })
        }
        Change::Reached(covered) => Body::ChangesCovered(wire::ChangesCoveredItem {
            from: covered.from.as_u64(),
            to: covered.to.as_u64(),
            minimal_at: position(covered.minimal_at),
            unknown_at: position(covered.unknown_at),
            extension_at: position(covered.extension_at),
        }),
    }
}

pub(crate) fn blocks(item: &wire::ChangedBlocksItem) -> Result<Change, FrameError> {
    let field = |field| FrameError::Field { field };
    let segment = item.segment.as_ref().ok_or_else(|| field("segment"))?;
    let wire::RelationSegment { tablespace, database, number, segment } = *segment;
    let relation = RelationPath { tablespace, database, number };
    let segment = RelationSegment { relation, fork: Fork::Main, segment };
    let blocks = set(&item.runs).ok_or_else(|| field("runs"))?;
    Ok(Change::Blocks { segment, blocks })
}

pub(crate) fn relation(item: &wire::ChangedRelationItem) -> Change {
    let wire::ChangedRelationItem { tablespace, database, number, created, cut_to } = *item;
    let relation = RelationPath { tablespace, database, number };
    Change::Relation { relation, created, cut_to }
}

pub(crate) fn directory(item: wire::ChangedDirectoryItem) -> Change {
    Change::Directory { tablespace: item.tablespace, database: item.database }
}

pub(crate) fn covered(item: &wire::ChangesCoveredItem) -> Change {
    Change::Reached(Reached {
        from: Lsn::new(item.from),
        to: Lsn::new(item.to),
        minimal_at: known(item.minimal_at),
        unknown_at: known(item.unknown_at),
        extension_at: known(item.extension_at),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sets_of_blocks_come_back(numbers in prop::collection::btree_set(0_u32..3000, 0..200)) {
            let mut blocks = BlockSet::default();
            numbers.iter().for_each(|number| blocks.insert(*number));
            let back = set(&runs(&blocks)).expect("valid runs");
            prop_assert_eq!(back.iter().collect::<BTreeSet<_>>(), numbers);
        }

        #[test]
        fn no_runs_lead_behind_a_segment(runs in prop::collection::vec(any::<u32>(), 0..8)) {
            if let Some(blocks) = set(&runs) {
                prop_assert!(blocks.iter().all(|block| block < RELATION_SEGMENT_BLOCKS));
            }
        }
    }
}

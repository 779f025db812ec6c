//! The units of a plan: what is asked for in one request, and the number by which its answer is known. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use pg_format::{BlockRange, BlockSet};
use proto::fetch::{Signatures, Unit, UnitKind};

use super::Plan;

/// Blocks and bytes in one unit: small enough that every connection gets its share of a small plan.
const UNIT_BLOCKS: u32 = 128;

/// See [`UNIT_BLOCKS`].
pub const UNIT_BYTES: u64 = 1 << 20;

/// Small files are asked for this much, so that one that grew since it was listed comes whole.
const SMALL_FILE_BYTES: u64 = 1 << 20;

/// The units of a plan, in the order of its files.
pub fn units(plan: &Plan) -> Vec<Unit> {
    let mut serials: BTreeMap<usize, u64> = BTreeMap::new();
    let mut units = Vec::new();
    let mut add = |file: usize, kind: UnitKind| {
        let serial = serials.entry(file).or_default();
        units.push(Unit { id: (file as u64) << 32 | *serial, kind });
        *serial += 1;
    };
    for wanted in &plan.pages {
        let Some(file) = plan.files.get(wanted.file) else {
            continue;
        };
        // The target has other versions of the first pages, so these are asked for as differences.
        for (part, signed) in [(0..wanted.known, true), (wanted.known..wanted.end, false)] {
            let part = part.start..part.end.min(wanted.end);
            for ranges in batches(&wanted.blocks, part) {
                let signatures = signed.then(|| Signatures { seed: 0, pages: Bytes::new() });
                add(wanted.file, UnitKind::Blocks { path: file.path.clone(), ranges, signatures });
            }
        }
    }
    for wanted in &plan.whole {
        let Some(file) = plan.files.get(wanted.file) else {
            continue;
        };
        let bytes = wanted.bytes.max(SMALL_FILE_BYTES);
        let mut offset = 0;
        while offset < bytes {
            let length = UNIT_BYTES.min(bytes - offset);
            add(wanted.file, UnitKind::File { path: file.path.clone(), offset, length });
            offset += length;
        }
    }
    units.sort_by_key(|unit| unit.id);
    units
}

/// Ranges of the blocks in `part`, as many together as one unit asks for.
fn batches(blocks: &BlockSet, part: Range<u32>) -> Vec<Vec<BlockRange>> {
    let mut batches: Vec<Vec<BlockRange>> = Vec::new();
    let mut room = 0;
    for range in blocks.ranges_in(part, UNIT_BLOCKS) {
        match batches.last_mut() {
            Some(batch) if range.count <= room => {
                room -= range.count;
                batch.push(range);
            }
            _ => {
                room = UNIT_BLOCKS - range.count;
                batches.push(vec![range]);
            }
        }
    }
    batches
}

/// The planned file a unit belongs to: the high half of its number.
pub fn file_of_unit(unit: u64) -> usize {
    usize::try_from(unit >> 32).unwrap_or(usize::MAX)
}

/// Ranges without some of their blocks.
pub(crate) fn without(ranges: &[BlockRange], out: impl Fn(u32) -> bool) -> Vec<BlockRange> {
    let mut left: Vec<BlockRange> = Vec::new();
    let wanted = ranges.iter().flat_map(|range| range.first..range.first + range.count);
    for block in wanted.filter(|block| !out(*block)) {
        match left.last_mut() {
            Some(last) if last.first + last.count == block => last.count += 1,
            _ => left.push(BlockRange { first: block, count: 1 }),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use pg_format::DataPath;

    use super::*;
    use crate::plan::file_actions::{BytesWanted, FileAction, PagesWanted, PlannedFile};

    fn file(name: &str) -> PlannedFile {
        let path = DataPath::new(name).unwrap();
        PlannedFile { path, action: FileAction::Patch { bytes: 0 } }
    }

    /// A plan for one file with these pages, of which the first `known` have other versions here.
    fn pages(blocks: Range<u32>, known: u32) -> Plan {
        let mut set = BlockSet::default();
        set.insert_range(blocks.start, blocks.end);
        let pages = vec![PagesWanted { file: 0, blocks: set, end: blocks.end, known }];
        Plan { files: vec![file("base/5/16384")], pages, ..Plan::default() }
    }

    /// Whether each unit asks with signatures, and for how many pages.
    fn asked(plan: &Plan) -> Vec<(bool, u32)> {
        let units = units(plan).into_iter().map(|unit| match unit.kind {
            UnitKind::Blocks { ranges, signatures, .. } => {
                (signatures.is_some(), ranges.iter().map(|range| range.count).sum())
            }
            other => panic!("{other:?}"),
        });
        units.collect()
    }

    #[test]
    fn a_unit_asks_for_a_bounded_number_of_pages() {
        assert_eq!(asked(&pages(0..300, 0)), [(false, 128), (false, 128), (false, 44)]);
        assert_eq!(asked(&pages(0..0, 0)), []);
    }

    #[test]
    fn pages_that_the_target_has_in_another_version_are_asked_for_with_signatures() {
        assert_eq!(asked(&pages(0..10, 4)), [(true, 4), (false, 6)]);
        assert_eq!(asked(&pages(0..10, 10)), [(true, 10)]);
        // The target's file may be longer than the source's.
        assert_eq!(asked(&pages(0..10, 50)), [(true, 10)]);
    }

    #[test]
    fn scattered_pages_travel_together() {
        let mut set = BlockSet::default();
        (0..100).for_each(|block| set.insert(block * 3));
        let pages = vec![PagesWanted { file: 0, blocks: set, end: 300, known: 0 }];
        let plan = Plan { files: vec![file("base/5/16384")], pages, ..Plan::default() };
        assert_eq!(asked(&plan), [(false, 100)]);
    }

    #[test]
    fn a_small_file_is_asked_for_with_room_to_grow_and_a_large_one_in_pieces() {
        let pieces = |bytes| {
            let whole = vec![BytesWanted { file: 0, bytes }];
            let plan = Plan { files: vec![file("PG_VERSION")], whole, ..Plan::default() };
            let units = units(&plan).into_iter().map(|unit| match unit.kind {
                UnitKind::File { offset, length, .. } => (offset, length),
                other => panic!("{other:?}"),
            });
            units.collect::<Vec<_>>()
        };
        assert_eq!(pieces(3), [(0, 1 << 20)]);
        assert_eq!(pieces((2 << 20) + 5), [(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 5)]);
    }

    #[test]
    fn a_number_tells_the_file_and_is_given_once() {
        let mut plan = pages(0..300, 0);
        plan.files.push(file("PG_VERSION"));
        plan.whole.push(BytesWanted { file: 1, bytes: 3 });
        let units = units(&plan);
        let files: Vec<usize> = units.iter().map(|unit| file_of_unit(unit.id)).collect();
        assert_eq!(files, [0, 0, 0, 1]);
        let numbers: std::collections::BTreeSet<u64> = units.iter().map(|unit| unit.id).collect();
        assert_eq!(numbers.len(), units.len());
    }

    #[test]
    fn what_the_plan_does_not_know_is_not_asked_for() {
        let mut plan = pages(0..10, 0);
        plan.files.clear();
        plan.whole.push(BytesWanted { file: 7, bytes: 3 });
        assert_eq!(units(&plan), []);
    }
}

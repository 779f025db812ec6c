//! The units of a plan: what is asked for at once, and by which number its answer is known. Pure.

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
        // Of the first ones the target has other versions.
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

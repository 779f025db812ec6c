//! Sets of blocks: which pages of which files.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Fork, RelationPath, RelationSegment};

/// Consecutive blocks of a segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// First block, counted from the start of the file.
    pub first: u32,
    /// Number of blocks, not 0.
    pub count: u32,
}

/// A set of blocks of one file, as a bitmap that grows with the highest block.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSet {
    words: Vec<u64>,
}

impl BlockSet {
    /// Adds a block.
    pub fn insert(&mut self, block: u32) {
        let word = (block / 64) as usize;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if let Some(word) = self.words.get_mut(word) {
            *word |= 1 << (block % 64);
        }
    }

    /// Adds the blocks from `first` up to, but not including, `end`.
    pub fn insert_range(&mut self, first: u32, end: u32) {
        for block in first..end {
            self.insert(block);
        }
    }

    /// Adds the blocks of another set.
    pub fn absorb(&mut self, other: &Self) {
        if other.words.len() > self.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// Removes the blocks of another set.
    pub fn remove(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= !other);
    }

    /// Whether all blocks of this set are in another set.
    pub fn is_within(&self, other: &Self) -> bool {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter().zip(others).all(|(word, other)| word & !other == 0)
    }

    /// Whether a block is in the set.
    pub fn contains(&self, block: u32) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    /// The blocks, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let base = u32::try_from(index * 64).unwrap_or(u32::MAX);
            (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| base + bit)
        })
    }

    /// Number of blocks.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The runs of consecutive blocks below `end`, each at most `count_max` blocks long.
    pub fn ranges(&self, end: u32, count_max: u32) -> Vec<BlockRange> {
        self.ranges_in(0..end, count_max)
    }

    /// The runs of consecutive blocks inside `part`, each at most `count_max` blocks long.
    pub fn ranges_in(&self, part: Range<u32>, count_max: u32) -> Vec<BlockRange> {
        let mut ranges: Vec<BlockRange> = Vec::new();
        let inside = self.iter().skip_while(|block| *block < part.start);
        for block in inside.take_while(|block| *block < part.end) {
            match ranges.last_mut() {
                Some(last) if last.first + last.count == block && last.count < count_max => {
                    last.count += 1;
                }
                _ => ranges.push(BlockRange { first: block, count: 1 }),
            }
        }
        ranges
    }
}

/// Blocks of main forks, by segment file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageMap {
    segments: BTreeMap<RelationSegment, BlockSet>,
}

impl PageMap {
    /// Adds a block of a relation.
    pub fn insert(&mut self, relation: RelationPath, block: u32) {
        let (segment, block) = RelationSegment::of_block(relation, Fork::Main, block);
        self.segments.entry(segment).or_default().insert(block);
    }

    /// Adds the blocks of another map.
    pub fn absorb(&mut self, other: Self) {
        for (segment, blocks) in other.segments {
            self.absorb_segment(segment, &blocks);
        }
    }

    /// Removes the blocks of another map.
    pub fn remove(&mut self, other: &Self) {
        for (segment, blocks) in &mut self.segments {
            if let Some(other) = other.segments.get(segment) {
                blocks.remove(other);
            }
        }
    }

    /// Whether a block of a segment file is in the map.
    pub fn contains(&self, segment: &RelationSegment, block: u32) -> bool {
        self.segments.get(segment).is_some_and(|blocks| blocks.contains(block))
    }

    /// Whether all blocks of this map are in another map.
    pub fn is_within(&self, other: &Self) -> bool {
        let none = BlockSet::default();
        let others = |segment| other.segments.get(segment).unwrap_or(&none);
        self.segments.iter().all(|(segment, blocks)| blocks.is_within(others(segment)))
    }

    /// The blocks of one segment file.
    pub fn segment(&self, segment: &RelationSegment) -> Option<&BlockSet> {
        self.segments.get(segment)
    }

    /// The segment files with their blocks.
    pub fn into_segments(self) -> impl Iterator<Item = (RelationSegment, BlockSet)> {
        self.segments.into_iter()
    }

    /// Adds blocks of one segment file.
    pub fn absorb_segment(&mut self, segment: RelationSegment, blocks: &BlockSet) {
        self.segments.entry(segment).or_default().absorb(blocks);
    }

    /// Number of blocks in all.
    pub fn len(&self) -> u64 {
        self.segments.values().map(BlockSet::len).sum()
    }

    /// Whether the map has no blocks.
    pub fn is_empty(&self) -> bool {
        self.segments.values().all(BlockSet::is_empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_neighbours_and_stop_at_the_end() {
        let mut set = BlockSet::default();
        for block in [0, 1, 2, 63, 64, 200] {
            set.insert(block);
        }
        let ranges: Vec<(u32, u32)> =
            set.ranges(200, 2).iter().map(|range| (range.first, range.count)).collect();
        assert_eq!(ranges, [(0, 2), (2, 1), (63, 2)]);
        assert_eq!(set.len(), 6);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(100_000));
    }
}

//! Segment files behind one that is not full.
//!
//! A relation ends at its first segment that is not full, whatever lies behind (`md.c`, `mdnblocks`). If the
//! source truncates a relation while it is read, an early segment can be fetched short and a later one full
//! of rows that no longer exist. Replay would truncate the early one only, and the rows of the later one
//! would reappear when the relation grows again.

use std::collections::{BTreeMap, BTreeSet};

use pg_format::{BLOCK_BYTES, DataPath, RELATION_SEGMENT_BLOCKS, RelationSegment};

use crate::plan::file_actions::{FileAction, PlannedFile};
use crate::plan::input::{SourceFiles, TargetFiles};

const FULL_BYTES: u64 = RELATION_SEGMENT_BLOCKS as u64 * BLOCK_BYTES;

/// Files that must be empty at the end: those behind a segment that was not full. `read` has the
/// lengths of files that were shorter, or gone, when they were read than when they were listed.
pub fn to_be_emptied(listed: &SourceFiles, read: &BTreeMap<DataPath, u64>) -> Vec<DataPath> {
    let mut short: BTreeMap<_, u32> = BTreeMap::new();
    let mut later = BTreeSet::new();
    for (path, bytes) in listed {
        let (Some(segment), Some(bytes)) = (RelationSegment::parse(path), bytes) else {
            continue;
        };
        let bytes = read.get(path).map_or(*bytes, |read| (*bytes).min(*read));
        if bytes < FULL_BYTES {
            let first = short.entry((segment.relation, segment.fork)).or_insert(segment.segment);
            *first = segment.segment.min(*first);
        }
        if segment.segment > 0 && bytes > 0 {
            later.insert((path, segment));
        }
    }
    later
        .into_iter()
        .filter(|(_, segment)| {
            let first = short.get(&(segment.relation, segment.fork));
            first.is_some_and(|first| *first < segment.segment)
        })
        .map(|(path, _)| path.clone())
        .collect()
}

/// What the source reported about planned files while they were read, by their index in the plan.
#[derive(Debug, Clone, Copy)]
pub struct Read<'a> {
    /// Files that were shorter than listed, with their length in bytes.
    pub shorter: &'a BTreeMap<usize, u64>,
    /// Files that no longer existed.
    pub vanished: &'a BTreeSet<usize>,
}

/// The planned files, with the files that must be emptied besides; and the lengths of files that end up
/// shorter than planned, by index.
pub fn final_lengths(
    planned: &[PlannedFile],
    listed: &SourceFiles,
    target: &TargetFiles,
    read: Read<'_>,
) -> (Vec<PlannedFile>, BTreeMap<usize, u64>) {
    let mut files = planned.to_vec();
    let mut shorter = read.shorter.clone();
    let path_of = |file: &usize| planned.get(*file).map(|file| file.path.clone());
    let gone = read.vanished.iter().map(|file| (file, 0));
    let lengths = read.shorter.iter().map(|(file, bytes)| (file, *bytes)).chain(gone);
    let lengths = lengths.filter_map(|(file, bytes)| Some((path_of(file)?, bytes))).collect();
    for path in to_be_emptied(listed, &lengths) {
        match files.iter().position(|file| file.path == path) {
            Some(file) => drop(shorter.insert(file, 0)),
            None if target.contains_key(&path) => {
                files.push(PlannedFile { path, action: FileAction::Patch { bytes: 0 } });
            }
            None => {}
        }
    }
    (files, shorter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> DataPath {
        DataPath::new(text).unwrap()
    }

    #[test]
    fn what_lies_behind_a_short_segment_is_emptied() {
        let full = Some(FULL_BYTES);
        let listed = SourceFiles::from([
            (path("base/5/10"), full),
            (path("base/5/10.1"), full),
            (path("base/5/10.2"), Some(8192)),
            (path("base/5/20"), full),
            (path("base/5/20.1"), Some(16384)),
            (path("base/5/30"), Some(8192)),
            (path("base/5/30.1"), full),
            (path("base/5/30_fsm"), Some(8192)),
        ]);
        assert_eq!(to_be_emptied(&listed, &BTreeMap::new()), [path("base/5/30.1")]);
        // Cut while it was read, to less than one segment; another was dropped.
        let read = BTreeMap::from([(path("base/5/10"), 81920), (path("base/5/20"), 0)]);
        let emptied = ["base/5/10.1", "base/5/10.2", "base/5/20.1", "base/5/30.1"].map(path);
        assert_eq!(to_be_emptied(&listed, &read), emptied);
    }
}

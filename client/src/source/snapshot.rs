//! What a source says of itself. Plain values.

use pg_format::backup_label::ReplayStart;
use pg_format::relation::tablespace_version_directory;
use pg_format::wal::SegmentName;
use pg_format::{ControlFile, Lsn, TimelineHistory, WalSegmentSize};
use proto::model::Description;

/// A source as it was when it was connected to.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// What it said. The names of WAL segments are sorted.
    pub description: Description,
    /// The history of its timeline.
    pub history: TimelineHistory,
}

impl Snapshot {
    /// Its `pg_control`.
    pub fn control(&self) -> &ControlFile {
        &self.description.node.control
    }

    /// The size of its WAL segments, which is the target's too.
    pub fn segment_size(&self) -> WalSegmentSize {
        self.control().wal_segment_size
    }

    /// Its newest completed checkpoint or restartpoint, as a start of replay.
    pub fn checkpoint(&self) -> ReplayStart {
        let control = self.control();
        ReplayStart {
            redo: control.checkpoint_copy.redo,
            checkpoint: control.checkpoint,
            timeline: control.checkpoint_copy.timeline,
        }
    }

    /// The name of this version's directories in tablespaces.
    pub fn version_directory(&self) -> String {
        tablespace_version_directory(self.control().major, self.control().catalog_version)
    }

    /// Its file for a segment, found along its history as PostgreSQL would; `None` if it has none.
    pub fn segment(&self, number: u64) -> Option<SegmentName> {
        let size = self.segment_size();
        self.history
            .spans()
            .iter()
            .rev()
            .filter(|span| size.segment_of(span.begin) <= number)
            .map(|span| SegmentName { timeline: span.timeline, number })
            .find(|name| self.description.wal_segments.binary_search(name).is_ok())
    }

    /// Where the first segment begins that it lacks of the WAL from `from` to `to`; `None` if it has all of it.
    pub fn first_missing_wal(&self, from: Lsn, to: Lsn) -> Option<Lsn> {
        let size = self.segment_size();
        let mut segments = size.segment_of(from)..=size.segment_of(to);
        segments.find(|number| self.segment(*number).is_none()).map(|number| size.start_of(number))
    }

    /// Whether it can send its WAL from a position on, as soon as it has more.
    pub fn has_wal_from(&self, from: Lsn) -> bool {
        let size = self.segment_size();
        let number = size.segment_of(from);
        // WAL that ends with a segment may have no next one yet.
        let newest = self.description.wal_segments.iter().map(|name| name.number).max();
        let is_next =
            size.offset_of(from) == 0 && newest.is_some_and(|newest| newest + 1 == number);
        is_next || self.segment(number).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::snapshot;

    const MB_16: u64 = 16 << 20;

    #[test]
    fn wal_that_ends_with_a_segment_has_no_next_one_yet() {
        let source = snapshot(3..6, Lsn::new(3 * MB_16 + 40));
        assert!(source.has_wal_from(Lsn::new(5 * MB_16 + 1000)));
        assert!(source.has_wal_from(Lsn::new(6 * MB_16)), "the end of the newest segment");
        assert!(!source.has_wal_from(Lsn::new(6 * MB_16 + 40)));
        assert!(!source.has_wal_from(Lsn::new(7 * MB_16)));
        assert!(!source.has_wal_from(Lsn::new(2 * MB_16)), "recycled");
    }

    #[test]
    fn the_first_missing_segment_is_named_by_where_it_begins() {
        let mut source = snapshot(3..9, Lsn::new(3 * MB_16 + 40));
        let missing = |source: &Snapshot, from: u64, to: u64| {
            source.first_missing_wal(Lsn::new(from * MB_16 + 5), Lsn::new(to * MB_16 + 7))
        };
        assert_eq!(missing(&source, 3, 8), None);
        assert_eq!(missing(&source, 2, 8), Some(Lsn::new(2 * MB_16)));
        assert_eq!(missing(&source, 3, 9), Some(Lsn::new(9 * MB_16)));
        source.description.wal_segments.retain(|name| name.number != 5);
        assert_eq!(missing(&source, 3, 8), Some(Lsn::new(5 * MB_16)));
        assert_eq!(missing(&source, 6, 8), None);
    }
}

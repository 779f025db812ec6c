//! The last segment of a timeline that ended in the middle of it, as a node that went through the switch has it.
//!
//! Replay reads such a segment under the name of the next timeline, which begins with a copy of it. The WAL
//! summarizer (17 and later) reads each timeline to its end under its own name (`SummarizeWAL`); without the file
//! it stops there for ever, and keeps all WAL from there on.

use std::collections::BTreeSet;

use data_dir::wal::Segments as _;
use pg_format::wal::SegmentName;
use pg_format::{Lsn, TimelineHistory, WalSegmentSize};

use super::local_wal::Copy;
use crate::error::RewindError;
use crate::staging::{layout, own_wal_error, read_back_error, staging_error};
use crate::target::{Target, local_wal};
use crate::task::Signals;

/// A segment that is complete up to where its timeline ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LastSegment {
    name: SegmentName,
    bytes: u64,
}

/// The last segments of the timelines that end behind `start`, where replay begins, and not behind `end`.
fn last_segments(
    history: &TimelineHistory,
    start: Lsn,
    end: Lsn,
    size: WalSegmentSize,
) -> Vec<LastSegment> {
    let ended = history.spans().iter().filter(|span| span.end > start && span.end <= end);
    let last = ended.map(|span| LastSegment {
        name: SegmentName { timeline: span.timeline, number: size.segment_of(span.end) },
        bytes: size.offset_of(span.end),
    });
    last.filter(|last| last.bytes > 0).collect()
}

/// Stages these segments, copied from staged ones or from the target's own WAL. Returns all segments that are
/// staged then.
pub fn stage(
    signals: &Signals,
    target: &Target,
    history: &TimelineHistory,
    staged: &BTreeSet<SegmentName>,
    start: Lsn,
    end: Lsn,
) -> Result<BTreeSet<SegmentName>, RewindError> {
    let (local, disk) = (local_wal(target), &*target.disk);
    let size = local.context.segment_size;
    let copy = Copy { signals, disk, size };
    let mut all = staged.clone();
    for last in last_segments(history, start, end, size) {
        let number = last.name.number;
        let replayed = SegmentName { timeline: history.timeline_of_segment(number, size), number };
        let file = if staged.contains(&replayed) {
            let path = layout::staged_wal(&replayed.file_name(size));
            Some(disk.open(&path).map_err(read_back_error)?)
        } else {
            local.open(number).map_err(own_wal_error)?
        };
        let Some(file) = file.filter(|_| replayed != last.name) else {
            continue;
        };
        copy.segment(last.name, &file, last.bytes)?;
        let path = layout::staged_wal(&last.name.file_name(size));
        for bytes in [last.bytes, size.bytes()] {
            disk.set_length(&path, bytes).map_err(staging_error)?;
        }
        disk.sync_file(&path).map_err(staging_error)?;
        all.insert(last.name);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use pg_format::TimelineId;

    use super::*;

    #[test]
    fn each_timeline_has_the_segment_it_ended_in() {
        let size = WalSegmentSize::new(16 << 20).unwrap();
        let timeline = |number| TimelineId::new(number).unwrap();
        let text = b"1\t0/3000100\tx\n2\t0/3000200\tx\n3\t0/5000000\tx\n4\t0/7000008\tx\n";
        let history = TimelineHistory::parse(timeline(5), text).unwrap();
        let last = |number, segment, bytes| LastSegment {
            name: SegmentName { timeline: timeline(number), number: segment },
            bytes,
        };
        let within = |start, end| last_segments(&history, Lsn::new(start), Lsn::new(end), size);
        // Timeline 3 ended with a segment: nothing is missing.
        let all = vec![last(1, 3, 0x100), last(2, 3, 0x200), last(4, 7, 8)];
        assert_eq!(within(0x200_0000, 0x800_0000), all);
        assert_eq!(within(0x300_0100, 0x800_0000), all[1..]);
        assert_eq!(within(0x200_0000, 0x300_0200), all[..2]);
        assert_eq!(within(0x700_0008, 0x800_0000), Vec::new());
    }
}

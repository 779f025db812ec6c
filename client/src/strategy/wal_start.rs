//! Where the WAL begins that is fetched for replay. Pure.

use pg_format::{Lsn, WalSegmentSize};

/// Where the WAL begins that is fetched for replay from `start` on: the target has what lies before the fork, and
/// the first segment comes whole. A node that is promoted before it ever streamed copies that segment to its
/// new timeline, and whoever follows it then gets it from there.
pub(crate) fn fetched_from(start: Lsn, fork: Lsn, size: WalSegmentSize) -> Lsn {
    let (redo, fork) = (start.page_start(), fork.page_start());
    if redo <= fork { fork } else { size.start_of(size.segment_of(redo)).max(fork) }
}

//! Where the WAL begins that is fetched for replay. Pure.

use pg_format::{Lsn, WalSegmentSize};

/// Where the WAL begins that is fetched for replay from `start` on: the target has what lies before the fork, and
/// the first segment comes whole. A node that is promoted before it ever streamed copies that segment to its
/// new timeline, and whoever follows it then gets it from there.
pub(crate) fn fetched_from(start: Lsn, fork: Lsn, size: WalSegmentSize) -> Lsn {
    let (redo, fork) = (start.page_start(), fork.page_start());
    if redo <= fork { fork } else { size.start_of(size.segment_of(redo)).max(fork) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB_16: u64 = 16 << 20;

    fn from(start: u64, fork: u64) -> u64 {
        let size = WalSegmentSize::new(16 << 20).unwrap();
        fetched_from(Lsn::new(start), Lsn::new(fork), size).as_u64()
    }

    #[test]
    fn the_target_has_what_lies_before_the_fork() {
        // Replay begins before it, in the same segment or an older one.
        assert_eq!(from(3 * MB_16 + 40, 3 * MB_16 + 20_000), 3 * MB_16 + 16_384);
        assert_eq!(from(MB_16, 3 * MB_16 + 20_000), 3 * MB_16 + 16_384);
    }

    #[test]
    fn the_first_segment_comes_whole_from_the_fork_on() {
        // Replay begins behind the fork: in another segment that comes from its start,
        assert_eq!(from(5 * MB_16 + 9000, 3 * MB_16 + 20_000), 5 * MB_16);
        // in the fork's own from the fork's page on.
        assert_eq!(from(3 * MB_16 + 90_000, 3 * MB_16 + 20_000), 3 * MB_16 + 16_384);
    }

    #[test]
    fn without_a_fork_nothing_is_known_to_be_common() {
        assert_eq!(from(5 * MB_16 + 9000, 0), 5 * MB_16);
    }
}

//! Names of WAL segment files.

use crate::{Lsn, TimelineId, WalSegmentSize};

/// A WAL segment: its timeline and its number counted from position 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline in the file's name.
    pub timeline: TimelineId,
    /// Segment number.
    pub number: u64,
}

impl SegmentName {
    /// The 24 hexadecimal digits PostgreSQL names the file with.
    pub fn file_name(self, size: WalSegmentSize) -> String {
        let per_id = 0x1_0000_0000 / size.bytes();
        let (high, low) = (self.number / per_id, self.number % per_id);
        format!("{:08X}{high:08X}{low:08X}", self.timeline.get())
    }

    /// The segment whose file has this name.
    pub fn parse(name: &str, size: WalSegmentSize) -> Option<Self> {
        let upper = name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        if name.len() != 24 || !upper {
            return None;
        }
        let part = |range| u32::from_str_radix(name.get(range)?, 16).ok();
        let per_id = 0x1_0000_0000 / size.bytes();
        let (high, low) = (u64::from(part(8..16)?), u64::from(part(16..24)?));
        let timeline = TimelineId::new(part(0..8)?).ok()?;
        (low < per_id).then_some(Self { timeline, number: high * per_id + low })
    }

    /// First position in the segment.
    pub fn start(self, size: WalSegmentSize) -> Lsn {
        size.start_of(self.number)
    }
}

/// The file that says that a WAL file was archived (`StatusFilePath` in `xlogarchive.h`).
pub fn archived_mark(name: &str) -> String {
    format!("pg_wal/archive_status/{name}.done")
}

/// The WAL file that waits to be archived, if that is what a name in `archive_status` says.
pub fn waiting_segment(status: &str) -> Option<&str> {
    status.strip_suffix(".ready")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_for_every_size() {
        for shift in 20..=30 {
            let size = WalSegmentSize::new(1 << shift).unwrap();
            for number in [0, 1, 255, 256, 4095, 4096, 1 << 20] {
                let segment = SegmentName { timeline: TimelineId::new(0xAB).unwrap(), number };
                assert_eq!(SegmentName::parse(&segment.file_name(size), size), Some(segment));
            }
        }
    }

    #[test]
    fn names_are_exact() {
        let size = WalSegmentSize::new(16 << 20).unwrap();
        let good = "00000001000000020000001F";
        let segment = SegmentName::parse(good, size).unwrap();
        assert_eq!(segment.number, 2 * 256 + 31);
        for bad in [
            "000000010000000200000100",
            "00000000000000020000001F",
            "00000001000000020000001f",
            "00000001000000020000001F.partial",
        ] {
            assert_eq!(SegmentName::parse(bad, size), None, "{bad}");
        }
    }
}

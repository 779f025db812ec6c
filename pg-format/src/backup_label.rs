//! `backup_label`: tells a starting server where replay begins.

use serde::{Deserialize, Serialize};

use crate::wal::SegmentName;
use crate::{Lsn, TimelineId, WalSegmentSize};

/// The checkpoint from which a rewound node replays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayStart {
    /// Redo position of the checkpoint: the first record replayed.
    pub redo: Lsn,
    /// The checkpoint record itself.
    pub checkpoint: Lsn,
    /// The timeline the checkpoint was written on.
    pub timeline: TimelineId,
}

/// The text of a `backup_label` (`read_backup_label` in `xlogrecovery.c`).
///
/// The method is not "streamed", so recovery does not wait for an end-of-backup record, and
/// "standby" makes it take the end of the backup from `pg_control`: both as `pg_rewind` writes.
pub fn backup_label(
    start: ReplayStart,
    size: WalSegmentSize,
    written: &str,
    label: &str,
) -> String {
    let segment = SegmentName { timeline: start.timeline, number: size.segment_of(start.redo) };
    format!(
        "START WAL LOCATION: {redo} (file {file})\n\
         CHECKPOINT LOCATION: {checkpoint}\n\
         BACKUP METHOD: pg_rewind\n\
         BACKUP FROM: standby\n\
         START TIME: {written}\n\
         LABEL: {label}\n",
        redo = start.redo,
        file = segment.file_name(size),
        checkpoint = start.checkpoint,
    )
}

/// The label in the text of a `backup_label`, if it has one.
pub fn label_of(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("LABEL: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_the_lines_that_recovery_scans_for() {
        let start = ReplayStart {
            redo: "0/2000028".parse().unwrap(),
            checkpoint: "0/2000060".parse().unwrap(),
            timeline: TimelineId::new(1).unwrap(),
        };
        let size = WalSegmentSize::new(16 << 20).unwrap();
        let label = backup_label(start, size, "2026-11-23 12:00:00 UTC", "of a test");
        let lines: Vec<&str> = label.lines().collect();
        assert_eq!(lines[0], "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)");
        assert_eq!(lines[1], "CHECKPOINT LOCATION: 0/2000060");
        assert_eq!(lines[3], "BACKUP FROM: standby");
        assert_eq!(label_of(&label), Some("of a test"));
    }
}

//! What happens in the target's `pg_wal` (R6). Pure.

use std::collections::BTreeSet;

use pg_format::wal::SegmentName;
use pg_format::wal::segment::{archived_mark, waiting_segment};
use pg_format::{DataPath, Lsn, TimelineHistory, TimelineId, WalSegmentSize};
use serde::{Deserialize, Serialize};

/// A small file with its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmallFile {
    /// Where it goes.
    pub path: DataPath,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// What happens in `pg_wal`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalChanges {
    /// Names of staged segments to put in place.
    pub place: Vec<String>,
    /// Names of files that hold lost transactions.
    pub diverged: Vec<String>,
    /// Name of the directory they are kept in; `None` if they are not kept.
    pub keep_as: Option<String>,
    /// Names of other files that are removed.
    pub remove: Vec<String>,
    /// Names of segments older than the start of replay that stay: those from the oldest one on that waits to be
    /// archived.
    pub waiting: Vec<String>,
    /// History files and archive marks to write.
    pub write: Vec<SmallFile>,
}

/// What is in a `pg_wal`.
#[derive(Debug, Clone, Default)]
pub struct WalNames {
    /// Names in it.
    pub names: Vec<String>,
    /// Names in its `archive_status`.
    pub statuses: Vec<String>,
    /// Names in its `summaries`.
    pub summaries: Vec<String>,
}

/// The facts.
#[derive(Debug)]
pub struct WalFacts<'a> {
    /// What is in the target's `pg_wal`.
    pub there: &'a WalNames,
    /// Segment size.
    pub size: WalSegmentSize,
    /// The source's history.
    pub history: &'a TimelineHistory,
    /// The source's history files.
    pub histories: &'a [(TimelineId, Vec<u8>)],
    /// The proven fork point; without one nothing in the target's `pg_wal` is known to be common.
    pub fork: Option<Lsn>,
    /// End of the target's WAL.
    pub target_end: Option<Lsn>,
    /// Where replay begins: older WAL is not needed, and a node that summarizes WAL must not find a gap behind it.
    pub start: Lsn,
    /// Segments staged.
    pub staged: &'a BTreeSet<SegmentName>,
    /// Where replay ends.
    pub end: Lsn,
    /// Directory for lost transactions; `None` if they are not kept.
    pub keep_as: Option<String>,
}

/// Decides what happens to each file in `pg_wal`.
///
/// # Errors
/// A name does not make a valid path.
pub fn changes(facts: &WalFacts<'_>) -> Result<WalChanges, pg_format::FormatError> {
    let fork_segment = facts.fork.map_or(0, |fork| facts.size.segment_of(fork));
    let start_segment = facts.size.segment_of(facts.start);
    let mut changes = WalChanges { keep_as: facts.keep_as.clone(), ..WalChanges::default() };
    let staged: BTreeSet<String> =
        facts.staged.iter().map(|name| name.file_name(facts.size)).collect();
    let first_waiting = first_waiting(facts);
    for name in &facts.there.names {
        if let Some(segment) = SegmentName::parse(name, facts.size) {
            if segment.number >= fork_segment && holds_lost_transactions(facts, segment) {
                changes.diverged.push(name.clone());
            } else if segment.number >= fork_segment || staged.contains(name) {
                // Also a common segment whose name a staged one takes: a rollback needs the old file.
                changes.remove.push(name.clone());
            } else if segment.number < start_segment {
                // Segments stay from the first one on that waits to be archived, so that there is no gap.
                match segment.number < first_waiting {
                    true => changes.remove.push(name.clone()),
                    false => changes.waiting.push(name.clone()),
                }
            }
        } else if let Some(timeline) = TimelineId::from_history_file_name(name) {
            // The history file of an abandoned timeline would make recovery look for that timeline.
            if !facts.history.contains(timeline) {
                changes.remove.push(name.clone());
            }
        } else if name.ends_with(".partial") {
            changes.remove.push(name.clone());
        }
    }
    statuses(facts, fork_segment, start_segment.min(first_waiting), &mut changes);
    // Summaries must be contiguous up to where the WAL summarizer goes on. Without any it begins with the
    // oldest segment (`GetOldestUnsummarizedLSN`).
    changes.remove.extend(facts.there.summaries.iter().map(|name| format!("summaries/{name}")));
    changes.place = staged.into_iter().collect();
    for (timeline, text) in facts.histories {
        if facts.history.contains(*timeline) {
            let name = timeline.history_file_name();
            changes.write.push(small(&format!("pg_wal/{name}"), text.clone())?);
            changes.write.push(small(&archived_mark(&name), Vec::new())?);
        }
    }
    // These segments are complete. The last segment of an older timeline is archived by the node that wrote
    // it.
    let last = facts.size.segment_of(facts.end);
    let is_over = |segment: &&SegmentName| {
        let replayed = facts.history.timeline_of_segment(segment.number, facts.size);
        segment.number < last || segment.timeline != replayed
    };
    for segment in facts.staged.iter().filter(is_over) {
        let name = segment.file_name(facts.size);
        changes.write.push(small(&archived_mark(&name), Vec::new())?);
    }
    Ok(changes)
}

fn small(path: &str, bytes: Vec<u8>) -> Result<SmallFile, pg_format::FormatError> {
    Ok(SmallFile { path: DataPath::new(path)?, bytes })
}

/// Whether a segment at or after the fork was written by the target, not only preallocated.
fn holds_lost_transactions(facts: &WalFacts<'_>, segment: SegmentName) -> bool {
    match (facts.fork, facts.target_end) {
        (Some(fork), Some(end)) => end > fork && segment.number <= facts.size.segment_of(end),
        // Nothing is known about it: it may be the only record of something.
        _ => true,
    }
}

/// The first segment that the target has not archived yet; `u64::MAX` without one.
fn first_waiting(facts: &WalFacts<'_>) -> u64 {
    let ready = facts.there.statuses.iter().filter_map(|status| waiting_segment(status));
    let there = ready.filter(|name| facts.there.names.iter().any(|other| other == name));
    let numbers = there.filter_map(|name| Some(SegmentName::parse(name, facts.size)?.number));
    numbers.min().unwrap_or(u64::MAX)
}

/// Also removes the archive status of files that are removed. A placed file keeps only the status that is
/// written for it.
fn statuses(facts: &WalFacts<'_>, fork: u64, first_kept: u64, changes: &mut WalChanges) {
    for status in &facts.there.statuses {
        let name = status.rsplit_once('.').map_or(status.as_str(), |(name, _)| name);
        let base = name.strip_suffix(".partial").unwrap_or(name);
        let goes = match SegmentName::parse(base, facts.size) {
            Some(segment) => segment.number >= fork || segment.number < first_kept,
            None => TimelineId::from_history_file_name(name).is_some(),
        };
        if goes {
            changes.remove.push(format!("archive_status/{status}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_replay_needs_of_the_new_history_stays() {
        let size = WalSegmentSize::new(16 << 20).unwrap();
        let two = TimelineId::new(2).unwrap();
        let history = TimelineHistory::parse(two, b"1\t0/3000100\tx\n").unwrap();
        let one = TimelineId::new(1).unwrap();
        let staged = BTreeSet::from([one, two].map(|timeline| SegmentName { timeline, number: 3 }));
        let names: Vec<String> = [
            "000000010000000000000000",
            "000000010000000000000001",
            "000000010000000000000002",
            "000000010000000000000003",
            "000000010000000000000004",
            "000000010000000000000005",
            "000000010000000000000003.partial",
            "00000003.history",
            "archive_status",
        ]
        .map(str::to_owned)
        .to_vec();
        let statuses = [
            "000000010000000000000000.done".to_owned(),
            "000000010000000000000001.ready".to_owned(),
            "000000010000000000000002.done".to_owned(),
            "000000010000000000000003.ready".to_owned(),
            "00000003.history.ready".to_owned(),
        ];
        let summaries = vec!["0000000100000000020000280000000002000100.summary".to_owned()];
        let there = WalNames { names, statuses: statuses.to_vec(), summaries };
        let changes = changes(&WalFacts {
            there: &there,
            size,
            history: &history,
            histories: &[(two, b"1\t0/3000100\tx\n".to_vec())],
            fork: Some(Lsn::new(0x300_0100)),
            target_end: Some(Lsn::new(0x400_1000)),
            start: Lsn::new(0x300_0028),
            staged: &staged,
            end: Lsn::new(0x300_2000),
            keep_as: Some("1-x".to_owned()),
        })
        .unwrap();
        assert_eq!(changes.diverged, ["000000010000000000000003", "000000010000000000000004"]);
        assert_eq!(
            changes.remove,
            [
                "000000010000000000000000",
                "000000010000000000000005",
                "000000010000000000000003.partial",
                "00000003.history",
                "archive_status/000000010000000000000000.done",
                "archive_status/000000010000000000000003.ready",
                "archive_status/00000003.history.ready",
                "summaries/0000000100000000020000280000000002000100.summary",
            ]
        );
        assert_eq!(changes.waiting, ["000000010000000000000001", "000000010000000000000002"]);
        assert_eq!(changes.place, ["000000010000000000000003", "000000020000000000000003"]);
        let written: Vec<&str> = changes.write.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(
            written,
            [
                "pg_wal/00000002.history",
                "pg_wal/archive_status/00000002.history.done",
                "pg_wal/archive_status/000000010000000000000003.done"
            ]
        );
    }
}

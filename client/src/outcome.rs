//! What a rewind did, for people and for programs.

use std::time::Duration;

use pg_format::{Lsn, TimelineId};
use proto::model::Description;
use serde_json::json;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::error::NotPossible;
use crate::monitor::Step;
use crate::plan::Strategy;
use crate::plan::cost::{Estimate, Estimates};
use crate::plan::summary::Totals;

/// The time as `backup_label` and messages show it.
pub fn utc_now() -> String {
    shown(OffsetDateTime::now_utc())
}

/// A time in seconds since 1970, shown in the same way.
pub fn utc(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).map_or_else(|_| String::new(), shown)
}

fn shown(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    time.format(format).unwrap_or_default()
}

/// The result of a run that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Result {
    /// The target follows the source's history already, or can.
    NothingToDo,
    /// A dry run found that the target would be rewound.
    WouldRewind,
    /// The target was rewound before, and not started since.
    AlreadyRewound,
    /// The target was rewound.
    Rewound,
    /// An interrupted rewind was finished.
    Resumed,
    /// An interrupted rewind was rolled back.
    RolledBack,
}

/// What was transferred, before and after compression.
#[derive(Debug, Clone, Default)]
pub struct Carriage {
    /// Payload bytes of page hashes.
    pub hashes: u64,
    /// Payload bytes of pages and files.
    pub data: u64,
    /// WAL bytes before compression.
    pub wal: u64,
    /// Payload bytes of the WAL that the source had announced; what it wrote since is not among them.
    pub wal_payload: u64,
    /// Bytes of signatures of this node's own pages, which went the other way.
    pub signatures: u64,
    /// Pages that arrived.
    pub pages: u64,
    /// Pages an earlier run that died had fetched.
    pub recovered: u64,
    /// Pages that replay rebuilds and that therefore did not travel.
    pub covered: u64,
    /// Frames of the data fetch.
    pub frames: u64,
    /// Connections lost and made again.
    pub reconnects: u64,
    /// Data connections that were used.
    pub connections: usize,
    /// Round trips from the first packet to the seal during which nothing else was done.
    pub round_trips: u32,
    /// Congestion control of the source's end, as its kernel says.
    pub congestion_control: Option<String>,
    /// Bytes of undo images on this node's disk, after compression.
    pub undo: u64,
}

/// How far the source is from its newest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpointed {
    /// Where replay from it begins.
    pub redo: Lsn,
    /// When it was made, by the source's clock: seconds since 1970.
    pub time: i64,
    /// Bytes of WAL since.
    pub wal: u64,
}

impl Checkpointed {
    /// The newest checkpoint of a source whose WAL ends at `end`.
    pub fn of(source: &Description, end: Lsn) -> Self {
        let checkpoint = &source.node.control.checkpoint_copy;
        let wal = end.distance_from(checkpoint.redo.min(end));
        Self { redo: checkpoint.redo, time: checkpoint.time, wal }
    }

    /// How old it is, by this node's clock: seconds.
    fn age(self) -> i64 {
        OffsetDateTime::now_utc().unix_timestamp().saturating_sub(self.time)
    }
}

/// What the source still has of the WAL that the node needs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceWal {
    /// Name of the oldest segment it has.
    pub oldest: String,
    /// Whether it has the segment that replay will end in, from which the node will stream.
    pub has_end: bool,
    /// How long it will keep that at its present rate: seconds; `None` if it writes nothing.
    pub lasts: Option<u64>,
}

impl SourceWal {
    /// The state of a source that was described at `now`, in seconds since 1970, and whose WAL had reached
    /// `end` by then. PostgreSQL removes a segment at a checkpoint whose redo position is as far ahead of the
    /// segment as the newest redo position is now ahead of the oldest segment.
    pub fn of(source: &Description, end: Lsn, now: i64) -> Option<Self> {
        let control = &source.node.control;
        let size = control.wal_segment_size;
        let oldest = source.wal_segments.iter().min_by_key(|name| name.number)?;
        let redo = control.checkpoint_copy.redo;
        let kept = redo.as_u64().saturating_sub(size.start_of(oldest.number).as_u64());
        let written = end.as_u64().saturating_sub(redo.as_u64());
        let seconds = now.saturating_sub(control.checkpoint_copy.time).max(1).unsigned_abs();
        let lasts = kept.saturating_mul(seconds).checked_div(written);
        let newest = source.wal_segments.iter().map(|name| name.number).max()?;
        let number = size.segment_of(end);
        let has_end = source.wal_segments.iter().any(|name| name.number == number)
            || size.offset_of(end) == 0 && newest < number;
        Some(Self { oldest: oldest.file_name(size), has_end, lasts })
    }

    fn text(&self) -> String {
        let oldest = &self.oldest;
        if !self.has_end {
            return format!(
                "the oldest WAL segment on the source is {oldest}, and the WAL that this node \
                 needs next is gone: provide it from an archive (restore_command), or rewind again"
            );
        }
        let lasts = match self.lasts {
            None => "as long as it writes no WAL".to_owned(),
            Some(seconds) => {
                format!(
                    "for about {seconds} s at its present rate, and at least until its next \
                     checkpoint"
                )
            }
        };
        format!(
            "the oldest WAL segment on the source is {oldest}; the source keeps the WAL that this \
             node needs next {lasts}: start the node now, or keep that WAL with a replication \
             slot, wal_keep_size or an archive"
        )
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// How it ended.
    pub result: Result,
    /// Why, in words.
    pub reason: String,
    /// Where the histories part.
    pub fork: Option<(Lsn, TimelineId)>,
    /// The strategy and why.
    pub strategy: Option<(&'static str, String)>,
    /// What each strategy would transfer, estimated by a dry run.
    pub estimates: Option<Estimates>,
    /// The source's newest checkpoint, reported by a dry run.
    pub checkpoint: Option<Checkpointed>,
    /// Totals of the plan.
    pub totals: Totals,
    /// What was transferred.
    pub carriage: Carriage,
    /// Where replay begins and ends.
    pub replay: Option<(Lsn, Lsn)>,
    /// What the source still had of its WAL at the end.
    pub source_wal: Option<SourceWal>,
    /// Time of each step.
    pub times: Vec<(Step, Duration)>,
    /// Messages about what was kept aside or removed.
    pub kept: Vec<String>,
}

impl Outcome {
    /// An outcome with a result and a reason only.
    pub fn new(result: Result, reason: impl Into<String>) -> Self {
        Self {
            result,
            reason: reason.into(),
            fork: None,
            strategy: None,
            estimates: None,
            checkpoint: None,
            totals: Totals::default(),
            carriage: Carriage::default(),
            replay: None,
            source_wal: None,
            times: Vec::new(),
            kept: Vec::new(),
        }
    }

    fn result_name(&self) -> &'static str {
        match self.result {
            Result::NothingToDo => "no_rewind_required",
            Result::WouldRewind => "would_rewind",
            Result::AlreadyRewound => "already_rewound",
            Result::Rewound => "rewound",
            Result::Resumed => "resumed",
            Result::RolledBack => "rolled_back",
        }
    }

    /// The outcome as text, for people.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.reason);
        let mut line = |label: &str, value: String| {
            text.push_str(&format!("  {label:<12}{value}\n"));
        };
        if let Some((lsn, timeline)) = self.fork {
            line("fork point", format!("{lsn} on timeline {timeline}"));
        }
        if let Some((name, why)) = &self.strategy {
            line("strategy", format!("{name}: {why}"));
            let totals = self.totals;
            line(
                "plan",
                format!(
                    "{} pages in {} files, {} files new or replaced, {} removed, {} bytes to fetch \
                     before compression",
                    totals.pages,
                    totals.patched,
                    totals.replaced,
                    totals.removed,
                    totals.bytes()
                ),
            );
        }
        for (label, value) in self.estimate_lines() {
            line(label, value);
        }
        if let Some((start, end)) = self.replay {
            line("replay", format!("from {start} to {end}"));
        }
        if let Some(wal) = &self.source_wal {
            line("source WAL", wal.text());
        }
        let carried = &self.carriage;
        if carried.hashes + carried.data + carried.wal > 0 {
            line(
                "received",
                format!(
                    "{} bytes of data, {} of page hashes, {} of WAL ({} before compression) in {} \
                     frames; {} bytes of signatures sent; {} pages left to replay; {} reconnects",
                    carried.data,
                    carried.hashes,
                    carried.wal_payload,
                    carried.wal,
                    carried.frames,
                    carried.signatures,
                    carried.covered,
                    carried.reconnects
                ),
            );
        }
        if carried.connections > 0 {
            let control = carried.congestion_control.as_deref().unwrap_or("unknown");
            line(
                "link",
                format!(
                    "{} data connections, congestion control {control}, {} round trips waited for",
                    carried.connections, carried.round_trips
                ),
            );
        }
        if !self.times.is_empty() {
            let times =
                self.times.iter().map(|(step, t)| format!("{step} {:.2}s", t.as_secs_f64()));
            line("times", times.collect::<Vec<_>>().join(", "));
        }
        for kept in &self.kept {
            line("note", kept.clone());
        }
        text
    }

    fn estimate_lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        for strategy in [Strategy::Fork, Strategy::Latest, Strategy::Compare] {
            let price = self.estimates.as_ref().map(|all| bytes_or_why(all, strategy));
            let name = strategy.name();
            lines.extend(price.map(|price| match price {
                Ok(bytes) => ("estimate", format!("{name}: about {bytes} bytes")),
                Err(why) => ("estimate", format!("{name}: not possible: {why}")),
            }));
        }
        lines.extend(self.checkpoint.map(|checkpoint| {
            let (redo, age, wal) = (checkpoint.redo, checkpoint.age(), checkpoint.wal);
            let since = format!(
                "the source's newest checkpoint is {age} s old (redo position {redo}, {wal} bytes \
                 of WAL ago)"
            );
            ("checkpoint", since)
        }));
        lines
    }

    /// The outcome as one JSON object, for programs.
    pub fn json(&self) -> serde_json::Value {
        let times: serde_json::Map<_, _> = self
            .times
            .iter()
            .map(|(step, time)| (step.to_string(), json!(time.as_secs_f64())))
            .collect();
        json!({
            "event": "result",
            "result": self.result_name(),
            "reason": self.reason,
            "fork_lsn": self.fork.map(|(lsn, _)| lsn.to_string()),
            "fork_timeline": self.fork.map(|(_, timeline)| timeline.get()),
            "strategy": self.strategy.as_ref().map(|(name, _)| name),
            "strategy_reason": self.strategy.as_ref().map(|(_, why)| why),
            "prices": self.estimates.as_ref().map(estimates_json),
            "source_checkpoint": self.checkpoint.map(|checkpoint| json!({
                "redo": checkpoint.redo.to_string(),
                "age_seconds": checkpoint.age(),
                "wal_since": checkpoint.wal,
            })),
            "pages": self.totals.pages,
            "files_patched": self.totals.patched,
            "files_replaced": self.totals.replaced,
            "files_removed": self.totals.removed,
            "bytes_planned": self.totals.bytes(),
            "bytes_data": self.carriage.data,
            "bytes_hashes": self.carriage.hashes,
            "bytes_signatures": self.carriage.signatures,
            "bytes_wal": self.carriage.wal,
            "bytes_wal_payload": self.carriage.wal_payload,
            "pages_received": self.carriage.pages,
            "pages_recovered": self.carriage.recovered,
            "pages_covered": self.carriage.covered,
            "frames": self.carriage.frames,
            "reconnects": self.carriage.reconnects,
            "connections": self.carriage.connections,
            "round_trips": self.carriage.round_trips,
            "congestion_control": self.carriage.congestion_control,
            "bytes_undo": self.carriage.undo,
            "replay_from": self.replay.map(|(start, _)| start.to_string()),
            "replay_to": self.replay.map(|(_, end)| end.to_string()),
            "source_oldest_wal": self.source_wal.as_ref().map(|wal| &wal.oldest),
            "source_wal_lasts_seconds": self.source_wal.as_ref().and_then(|wal| wal.lasts),
            "source_wal_is_gone": self.source_wal.as_ref().map(|wal| !wal.has_end),
            "seconds": times,
            "kept": self.kept,
        })
    }
}

fn bytes_or_why(
    estimates: &Estimates,
    strategy: Strategy,
) -> std::result::Result<u64, &NotPossible> {
    match strategy {
        Strategy::Fork => estimates.fork.as_ref().map(Estimate::total),
        Strategy::Latest => estimates.latest.as_ref().map(Estimate::total),
        Strategy::Compare => Ok(estimates.compare.total()),
    }
}

/// Bytes by strategy, or why it is not possible.
fn estimates_json(estimates: &Estimates) -> serde_json::Value {
    let all = [Strategy::Fork, Strategy::Latest, Strategy::Compare].map(|strategy| {
        let estimate = match bytes_or_why(estimates, strategy) {
            Ok(bytes) => json!(bytes),
            Err(why) => json!(why.to_string()),
        };
        (strategy.name().to_owned(), estimate)
    });
    serde_json::Value::Object(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::described;

    #[test]
    fn what_the_source_keeps_is_told_by_its_own_rate() {
        let size = described(0..1, Lsn::new(0), 0).node.control.wal_segment_size;
        let at = |segment: u64, offset: u64| size.start_of(segment).plus(offset);
        // Ten segments older than the checkpoint, one written in a hundred seconds since.
        let source = described(10..22, at(20, 0), 1000);
        let kept = SourceWal::of(&source, at(21, 0).plus(100), 1100).unwrap();
        assert!(kept.has_end);
        assert_eq!(kept.lasts, Some(999), "ten segments at one in a hundred seconds");
        // It writes nothing.
        assert_eq!(SourceWal::of(&source, at(20, 0), 1100).unwrap().lasts, None);
        // What replay ends in is gone already.
        assert!(!SourceWal::of(&source, at(9, 5), 1100).unwrap().has_end);
        // Its WAL ends with a segment, and there is no next one yet.
        assert!(SourceWal::of(&source, at(22, 0), 1100).unwrap().has_end);
        assert_eq!(SourceWal::of(&described(0..0, at(20, 0), 1000), at(21, 0), 1100), None);
    }
}

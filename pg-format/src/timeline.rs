//! Timelines: their numbers, their history files, and where two histories part.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{FormatError, Lsn};

/// A timeline's number, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TimelineId(u32);

impl TimelineId {
    /// Accepts any number but 0.
    pub fn new(number: u32) -> Result<Self, FormatError> {
        (number != 0).then_some(Self(number)).ok_or_else(|| FormatError::invalid("timeline", "0"))
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Name of this timeline's history file, inside `pg_wal`.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }

    /// The timeline whose history file has this name.
    pub fn from_history_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".history")?;
        let upper = digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        if digits.len() != 8 || !upper {
            return None;
        }
        u32::from_str_radix(digits, 16).ok().and_then(|number| Self::new(number).ok())
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One timeline's part in a history: it holds the WAL from `begin` up to `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// First position that belongs to it; 0 for the first of a history.
    pub begin: Lsn,
    /// First position that no longer does; [`Lsn::MAX`] for the last of a history.
    pub end: Lsn,
}

/// The timelines a node went through, oldest first. Never empty; begins and ends meet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineHistory {
    spans: Vec<TimelineSpan>,
}

/// Where two histories part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommonAncestor {
    /// The last timeline both went through.
    pub timeline: TimelineId,
    /// Where that timeline ends in the history that left it first; [`Lsn::MAX`] if neither did.
    pub end: Lsn,
}

impl TimelineHistory {
    /// The history of a node that is still on `timeline` and has no history file: only timeline 1
    /// may lack one.
    pub fn first(timeline: TimelineId) -> Self {
        Self { spans: vec![TimelineSpan { timeline, begin: Lsn::INVALID, end: Lsn::MAX }] }
    }

    /// Reads the history file of `tip`.
    ///
    /// A line is the parent's number, a tab, the switch point, and a reason; blank lines and lines
    /// that begin with `#` are skipped (`backend/access/transam/timeline.c`).
    pub fn parse(tip: TimelineId, text: &[u8]) -> Result<Self, FormatError> {
        let bad = |why: String| FormatError::Invalid { what: "timeline history file", why };
        let mut spans: Vec<TimelineSpan> = Vec::new();
        let mut begin = Lsn::INVALID;
        for line in String::from_utf8_lossy(text).lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_whitespace();
            let number = words.next().and_then(|word| word.parse().ok());
            let timeline = number
                .and_then(|number| TimelineId::new(number).ok())
                .ok_or_else(|| bad(format!("\"{line}\" does not begin with a timeline number")))?;
            let end: Lsn = words
                .next()
                .and_then(|word| word.parse().ok())
                .ok_or_else(|| bad(format!("\"{line}\" has no switch point")))?;
            if spans.last().is_some_and(|last| last.timeline >= timeline) || timeline >= tip {
                return Err(bad(format!("timeline {timeline} is out of order")));
            }
            if end < begin {
                return Err(bad(format!("switch point {end} lies before {begin}")));
            }
            spans.push(TimelineSpan { timeline, begin, end });
            begin = end;
        }
        spans.push(TimelineSpan { timeline: tip, begin, end: Lsn::MAX });
        Ok(Self { spans })
    }

    /// The spans, oldest first.
    pub fn spans(&self) -> &[TimelineSpan] {
        &self.spans
    }

    /// The newest timeline.
    pub fn tip(&self) -> TimelineId {
        self.spans.last().map_or(TimelineId(1), |span| span.timeline)
    }

    /// The timeline that holds the WAL byte at `lsn`.
    pub fn timeline_of(&self, lsn: Lsn) -> TimelineId {
        let holder = self.spans.iter().rev().find(|span| span.begin <= lsn);
        holder.map_or_else(|| self.tip(), |span| span.timeline)
    }

    /// The timeline under whose name PostgreSQL looks first for segment `number`: the newest that
    /// begins in it or before it (`XLogFileReadAnyTLI`).
    pub fn timeline_of_segment(&self, number: u64, size: crate::WalSegmentSize) -> TimelineId {
        let holder = self.spans.iter().rev().find(|span| size.segment_of(span.begin) <= number);
        holder.map_or_else(|| self.tip(), |span| span.timeline)
    }

    /// Whether `timeline` is part of this history.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        self.spans.iter().any(|span| span.timeline == timeline)
    }

    /// Where this history and `other` part, according to their history files; `None` if they have no timeline
    /// in common.
    pub fn common_ancestor(&self, other: &Self) -> Option<CommonAncestor> {
        let pairs = self.spans.iter().zip(&other.spans);
        let (ours, theirs) =
            pairs.take_while(|(a, b)| a.timeline == b.timeline && a.begin == b.begin).last()?;
        Some(CommonAncestor { timeline: ours.timeline, end: ours.end.min(theirs.end) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    #[test]
    fn a_history_file_becomes_spans_that_meet() {
        let text = b"# note\n\n1\t0/3000000\tno recovery target specified\n2\t0/5000060\tx y\n";
        let history = TimelineHistory::parse(tli(3), text).unwrap();
        assert_eq!(history.tip(), tli(3));
        assert_eq!(history.timeline_of(lsn("0/2FFFFFF")), tli(1));
        assert_eq!(history.timeline_of(lsn("0/3000000")), tli(2));
        assert_eq!(history.timeline_of(lsn("0/5000060")), tli(3));
        let size = crate::WalSegmentSize::new(16 << 20).unwrap();
        assert_eq!(history.timeline_of_segment(2, size), tli(1));
        assert_eq!(history.timeline_of_segment(3, size), tli(2));
        assert_eq!(history.timeline_of_segment(5, size), tli(3));
    }

    #[test]
    fn histories_that_go_back_are_refused() {
        for text in ["1", "x\t0/1", "0\t0/1", "2\t0/1\n1\t0/2", "3\t0/1", "1\t0/9\n2\t0/1"] {
            assert!(TimelineHistory::parse(tli(3), text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn the_fork_is_where_the_first_one_left() {
        let old = TimelineHistory::first(tli(1));
        let new = TimelineHistory::parse(tli(2), b"1\t0/3000000\tr\n").unwrap();
        let fork = old.common_ancestor(&new).unwrap();
        assert_eq!((fork.timeline, fork.end), (tli(1), lsn("0/3000000")));
        let other = TimelineHistory::parse(tli(3), b"1\t0/2000000\tr\n").unwrap();
        assert_eq!(new.common_ancestor(&other).unwrap().end, lsn("0/2000000"));
        let later = TimelineHistory::parse(tli(3), b"1\t0/3000000\tr\n2\t0/4000000\tr\n").unwrap();
        assert_eq!(new.common_ancestor(&later).unwrap().end, lsn("0/4000000"));
        assert_eq!(new.common_ancestor(&new).unwrap().end, Lsn::MAX);
    }

    #[test]
    fn history_file_names_are_exact() {
        assert_eq!(TimelineId::from_history_file_name("0000001F.history"), Some(tli(31)));
        for bad in ["00000000.history", "1.history", "0000001f.history", "0000001F.history.tmp"] {
            assert_eq!(TimelineId::from_history_file_name(bad), None, "{bad}");
        }
        assert_eq!(tli(31).history_file_name(), "0000001F.history");
    }
}

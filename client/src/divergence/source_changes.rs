//! What the source changed since the fork point, as its own WAL says: what strategy *latest* adds to the
//! target's changes.

use std::ops::Range;

use data_dir::wal::summary::WalSummary;
use pg_format::{Lsn, PageMap};
use proto::fetch::{Change, Item, ItemBody, Reached, Unit, UnitKind};

use super::Divergence;
use super::undecided::Undecided;
use crate::error::{NotPossible, Remedy, RewindError};
use crate::source::in_flight::Unexpected;
use crate::source::{Session, Snapshot, Source};
use crate::task::{Pending, begin, joined};

/// What the source changed since a position that is likely to be the fork point, asked for before that was proven.
#[derive(Debug)]
pub struct EarlyChanges {
    fork: Lsn,
    answer: Pending<Gathered>,
}

impl EarlyChanges {
    /// Asks for what the source changed between `fork` and its newest checkpoint; `None` if it has no WAL that
    /// tells.
    pub fn ask(source: &Source, fork: Lsn) -> Option<Self> {
        let redo = source.snapshot.checkpoint().redo;
        if fork >= redo || source.snapshot.first_missing_wal(fork, redo).is_some() {
            return None;
        }
        let mut session = source.session.clone();
        let answer = begin(async move { gather(&mut session, fork..redo, false).await });
        Some(Self { fork, answer })
    }
}

/// What either side changed since the fork point.
#[derive(Debug)]
pub struct ChangesOfBoth {
    /// All blocks that may differ, or why that is not known.
    pub wal_summary: Result<WalSummary, NotPossible>,
}

impl ChangesOfBoth {
    /// No changes are known, because they were not asked for.
    pub fn not_asked_for() -> Self {
        Self {
            wal_summary: Err(NotPossible::new(
                "not examined, because another strategy was requested",
            )),
        }
    }

    /// Asks the source what it changed between the fork point and its newest checkpoint, and adds the
    /// target's own changes.
    ///
    /// # Errors
    /// The source cannot be asked. If it has no answer, that is no error: only strategy *latest* needs it.
    pub async fn find(
        source: &Source,
        divergence: &Divergence,
        early: Option<EarlyChanges>,
    ) -> Result<Self, RewindError> {
        match wal_summary(source, divergence, early).await {
            Ok(wal_summary) => Ok(Self { wal_summary: Ok(wal_summary) }),
            Err(Undecided::NotPossible(why) | Undecided::Unreadable(why)) => {
                Ok(Self { wal_summary: Err(why) })
            }
            Err(Undecided::Failed(error)) => Err(error),
        }
    }
}

async fn wal_summary(
    source: &Source,
    divergence: &Divergence,
    early: Option<EarlyChanges>,
) -> Result<WalSummary, Undecided> {
    let target = divergence.target_changes.as_ref().map_err(Clone::clone)?;
    let fork = divergence.fork.ok_or_else(|| Undecided::new("the fork point is not proven"))?.lsn;
    let mut wal_summary = target.wal_summary.clone();
    let redo = source.snapshot.checkpoint().redo;
    // Up to its newest checkpoint the source has only changes that are common to both nodes.
    if redo <= fork {
        return Ok(wal_summary);
    }
    has_wal(&source.snapshot, fork..redo)?;
    let answer = match early {
        Some(EarlyChanges { fork: assumed, answer }) if assumed == fork => joined(answer).await,
        // The histories part earlier than the history files say.
        _ => gather(&mut source.session.clone(), fork..redo, false).await,
    };
    let gathered = match answer {
        // The other strategies stay possible without this answer.
        Err(error) if matches!(error.remedy(), Remedy::DoWithout(_)) => {
            let why = format!("the source could not report what it changed: {}", error.chain());
            return Err(Undecided::new(why));
        }
        answer => answer?,
    };
    wal_summary.absorb(gathered.whole(fork..redo)?);
    Ok(wal_summary)
}

/// Whether the source has its WAL of a range.
fn has_wal(source: &Snapshot, range: Range<Lsn>) -> Result<(), NotPossible> {
    source.first_missing_wal(range.start, range.end).map_or(Ok(()), |at| {
        Err(NotPossible::new(format!(
            "the source no longer has its WAL at {at}, from before its newest checkpoint"
        )))
    })
}

/// Asks the source for its changes in a range, or, with `rebuilt`, for what their replay rebuilds.
pub async fn gather(
    session: &mut Session,
    range: Range<Lsn>,
    rebuilt: bool,
) -> Result<Gathered, RewindError> {
    let Range { start: from, end: to } = range;
    let units = vec![Unit::single(UnitKind::Changes { from, to, rebuilt })];
    let take = |gathered: &mut Gathered, item: Item| match item.body {
        ItemBody::Change(change) => {
            gathered.take(change).map_err(|why| Unexpected::of(item.unit, why))
        }
        _ => Ok(()),
    };
    session.fold(units, take).await.map(|(gathered, _)| gathered)
}

/// Changes in one step of an answer, at most: 64 MiB of the smallest records name fewer.
const CHANGES_MAX: u32 = 4 << 20;

/// The pieces of an answer, put together as they come.
#[derive(Debug, Default)]
pub struct Gathered {
    wal_summary: WalSummary,
    last: Option<Reached>,
    /// Changes since the last [`Reached`].
    since: u32,
}

impl Gathered {
    /// Takes the next piece.
    fn take(&mut self, change: Change) -> Result<(), &'static str> {
        self.since += 1;
        if self.since > CHANGES_MAX {
            return Err("it has too many changes in one step");
        }
        match change {
            Change::Blocks { segment, blocks } => {
                self.wal_summary.pages.absorb_segment(segment, &blocks);
            }
            Change::Relation { relation, created, cut_to } => {
                if created {
                    self.wal_summary.created.insert(relation);
                }
                if let Some(blocks) = cut_to {
                    let smallest = self.wal_summary.truncated.entry(relation).or_insert(blocks);
                    *smallest = blocks.min(*smallest);
                }
            }
            Change::Directory { tablespace, database } => {
                self.wal_summary.directories.insert((tablespace, database));
            }
            Change::Reached(reached) => {
                if self.last.is_some_and(|last| reached.to <= last.to) {
                    return Err("it does not reach further than the one before");
                }
                (self.last, self.since) = (Some(reached), 0);
            }
        }
        Ok(())
    }

    /// How far the answer reaches.
    pub fn end(&self) -> Lsn {
        self.last.map_or(Lsn::INVALID, |reached| reached.to)
    }

    /// The blocks that were named.
    pub fn into_blocks(self) -> PageMap {
        self.wal_summary.pages
    }

    /// What was changed. Nothing of it counts unless the answer says that it covers the whole range: one
    /// that is too short must not look like a source that changed nothing.
    fn whole(self, range: Range<Lsn>) -> Result<WalSummary, NotPossible> {
        let Range { start: from, end: to } = range;
        let unknown = |why: String| Err(NotPossible::new(why));
        let reached = self.last.filter(|reached| reached.from <= from && reached.to >= to);
        let Some(reached) = reached else {
            let end = self.last.map_or(from, |reached| reached.to);
            return unknown(format!(
                "the source's WAL could only be read from {from} to {end}, not up to its \
                 checkpoint at {to}"
            ));
        };
        if reached.to != to {
            let end = reached.to;
            return unknown(format!(
                "no WAL record on the source begins at the redo position {to} of its checkpoint; \
                 the next one begins at {end}"
            ));
        }
        if let Some(at) = reached.minimal_at {
            return unknown(format!("wal_level was minimal on the source at {at}"));
        }
        if let Some(at) = reached.extension_at {
            return unknown(format!(
                "the source's WAL has a record of a custom resource manager at {at}"
            ));
        }
        if let Some(at) = reached.unknown_at {
            return unknown(format!(
                "the source's WAL has a record at {at} whose effect is not known"
            ));
        }
        Ok(WalSummary { start: from, end: to, ..self.wal_summary })
    }
}

#[cfg(test)]
mod tests {
    use pg_format::{BlockSet, Fork, RelationPath, RelationSegment};
    use proto::Refusal;
    use proto::refusal::{CallError, Reason};

    use super::*;

    const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

    /// What an answer with these pieces says of a range.
    fn collect(
        changes: impl IntoIterator<Item = Change>,
        range: Range<Lsn>,
    ) -> Result<WalSummary, NotPossible> {
        let mut gathered = Gathered::default();
        for change in changes {
            gathered.take(change).map_err(NotPossible::new)?;
        }
        gathered.whole(range)
    }

    fn covered(from: u64, to: u64) -> Reached {
        let (from, to) = (Lsn::new(from), Lsn::new(to));
        Reached { from, to, minimal_at: None, unknown_at: None, extension_at: None }
    }

    #[test]
    fn an_answer_that_is_not_whole_is_no_answer() {
        let range = || Lsn::new(100)..Lsn::new(200);
        let directory = || Change::Directory { tablespace: 1663, database: 5 };
        let whole = collect([directory(), Change::Reached(covered(100, 200))], range());
        assert_eq!(whole.expect("whole").directories.len(), 1);
        assert!(collect([], range()).is_err(), "nothing came");
        assert!(collect([directory()], range()).is_err(), "cut off");
        for (from, to) in [(100, 150), (101, 200), (100, 201)] {
            let short = collect([Change::Reached(covered(from, to))], range());
            assert!(short.is_err(), "{from} to {to}");
        }
        let minimal = Reached { minimal_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(minimal)], range()).is_err());
        let unknown = Reached { unknown_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(unknown)], range()).is_err());
        let extension = Reached { extension_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(extension)], range()).is_err());
    }

    #[test]
    fn a_source_that_cannot_read_its_old_wal_can_be_rewound_to_another_way() {
        let can_be_done_without =
            |error: &RewindError| matches!(error.remedy(), Remedy::DoWithout(_));
        let error = |reason| RewindError::from(CallError::Refused(Refusal::new(reason, "x")));
        for reason in [Reason::Internal, Reason::InvalidRequest, Reason::WalMissing] {
            assert!(can_be_done_without(&error(reason)), "{reason:?}");
        }
        for reason in [Reason::NotAllowed, Reason::Overloaded, Reason::ShuttingDown] {
            assert!(!can_be_done_without(&error(reason)), "{reason:?}");
        }
    }

    #[test]
    fn an_answer_has_an_end_and_a_bound() {
        let blocks = || {
            let (segment, block) = RelationSegment::of_block(RELATION, Fork::Main, 131_071);
            let mut blocks = BlockSet::default();
            blocks.insert(block);
            Change::Blocks { segment, blocks }
        };
        let reached = |to: u64| Change::Reached(covered(100, to));
        let mut gathered = Gathered::default();
        // Kept one by one, these would be 1.6 GB.
        for step in 0..100_000 {
            gathered.take(blocks()).expect("a change");
            gathered.take(reached(101 + step)).expect("a step");
        }
        assert_eq!(gathered.wal_summary.pages.len(), 1);
        assert!(gathered.take(reached(50)).is_err(), "it goes back");
        let endless = std::iter::repeat_with(|| Change::Directory { tablespace: 1, database: 2 });
        let mut gathered = Gathered::default();
        let refused = endless.take(CHANGES_MAX as usize + 1).find_map(|c| gathered.take(c).err());
        assert!(refused.is_some());
    }
}

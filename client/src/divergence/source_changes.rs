//! What the source changed since the fork, as its own WAL says: what strategy *latest* adds to the
//! target's window.

use data_dir::window::Window;
use pg_format::{Lsn, PageMap, TimelineHistory};
use proto::fetch::{Change, Item, ItemBody, Reached, Unit, UnitKind};
use proto::model::Description;

use crate::divergence::common_wal::{Analysis, source_segment, source_start};
use crate::error::{Class, RewindError};
use crate::prepare::prefetch::Assumed;
use crate::source::Session;
use crate::source::in_flight::Unexpected;
use crate::task::joined;

/// Asks the source what it changed between the fork and its newest checkpoint, and adds the target's own
/// changes: all blocks that may differ. The inner error says why that cannot be known.
pub(crate) async fn since_fork(
    session: &Session,
    source: &Description,
    history: &TimelineHistory,
    (analysis, ahead): (&Analysis, Option<Assumed>),
) -> Result<Result<Window, String>, RewindError> {
    let (found, fork) = match (&analysis.rewindable, analysis.fork) {
        (Err(why), _) => return Ok(Err(why.to_string())),
        (Ok(_), None) => return Ok(Err("the fork point is not proven".to_owned())),
        (Ok(found), Some(fork)) => (found, fork.lsn),
    };
    let mut window = found.window.clone();
    let redo = source_start(source).redo;
    // The target's window reaches back to it, and the source had not yet gone its own way.
    if redo <= fork {
        return Ok(Ok(window));
    }
    if let Err(gone) = is_there(source, history, (fork, redo)) {
        return Ok(Err(gone));
    }
    let answer = match ahead {
        Some((assumed, asked)) if assumed == fork => joined(asked).await,
        // The histories part earlier than they say.
        _ => gather(&mut session.clone(), (fork, redo), false).await,
    };
    let gathered = match answer {
        Ok(gathered) => gathered,
        // What no other way needs must not keep them from being gone.
        Err(error) if is_about_changes_alone(&error) => {
            return Ok(Err(format!("the source cannot tell what it changed: {}", error.chain())));
        }
        Err(error) => return Err(error),
    };
    Ok(gathered.whole((fork, redo)).map(|changes| {
        window.absorb(changes);
        window
    }))
}

/// Whether the source has another reason not to answer than that it cannot be asked at all.
pub(crate) fn is_about_changes_alone(error: &RewindError) -> bool {
    matches!(error.class(), Class::Other | Class::Rebuild | Class::Usage)
}

/// Asks the source for its changes in a range, or for what their replay rebuilds.
pub(crate) async fn gather(
    session: &mut Session,
    (from, to): (Lsn, Lsn),
    rebuilt: bool,
) -> Result<Gathered, RewindError> {
    let units = vec![Unit { id: 0, kind: UnitKind::Changes { from, to, rebuilt } }];
    let take = |gathered: &mut Gathered, item: Item| match item.body {
        ItemBody::Change(change) => {
            gathered.take(change).map_err(|why| Unexpected::of(item.unit, why))
        }
        _ => Ok(()),
    };
    session.fold(units, take).await.map(|(gathered, _)| gathered)
}

/// Whether the source has its WAL of a range, or where it has none.
pub(crate) fn is_there(
    source: &Description,
    history: &TimelineHistory,
    (from, to): (Lsn, Lsn),
) -> Result<(), String> {
    let size = source.node.control.wal_segment_size;
    let mut segments = size.segment_of(from)..=size.segment_of(to);
    let gone = segments.find(|number| source_segment(source, history, *number).is_none());
    gone.map_or(Ok(()), |gone| {
        let at = size.start_of(gone);
        Err(format!("the source no longer has its WAL at {at} from before its checkpoint"))
    })
}

/// Changes between two words on how far the answer reaches: more than 64 MiB of the smallest records name.
const CHANGES_MAX: u32 = 4 << 20;

/// The pieces of an answer, put together as they come.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    window: Window,
    last: Option<Reached>,
    /// Changes since then.
    since: u32,
}

impl Gathered {
    /// Takes the next piece.
    fn take(&mut self, change: Change) -> Result<(), &'static str> {
        self.since += 1;
        if self.since > CHANGES_MAX {
            return Err("changes without end");
        }
        match change {
            Change::Blocks { segment, blocks } => {
                self.window.pages.absorb_segment(segment, &blocks);
            }
            Change::Relation { relation, created, cut_to } => {
                if created {
                    self.window.created.insert(relation);
                }
                if let Some(blocks) = cut_to {
                    let smallest = self.window.truncated.entry(relation).or_insert(blocks);
                    *smallest = blocks.min(*smallest);
                }
            }
            Change::Directory { tablespace, database } => {
                self.window.directories.insert((tablespace, database));
            }
            Change::Reached(reached) => {
                if self.last.is_some_and(|last| reached.to <= last.to) {
                    return Err("changes that come no further");
                }
                (self.last, self.since) = (Some(reached), 0);
            }
        }
        Ok(())
    }

    /// How far the answer reaches.
    pub(crate) fn end(&self) -> Lsn {
        self.last.map_or(Lsn::INVALID, |reached| reached.to)
    }

    /// The blocks that were named.
    pub(crate) fn into_blocks(self) -> PageMap {
        self.window.pages
    }

    /// What was changed. Nothing of it counts unless the answer says that it covers the whole range: one
    /// that is too short must not look like a source that changed nothing.
    fn whole(self, (from, to): (Lsn, Lsn)) -> Result<Window, String> {
        let reached = self.last.filter(|reached| reached.from <= from && reached.to >= to);
        let Some(reached) = reached else {
            let end = self.last.map_or(from, |reached| reached.to);
            return Err(format!(
                "the source's WAL could be read from {from} to {end} only, not to its checkpoint at {to}"
            ));
        };
        if reached.to != to {
            let end = reached.to;
            return Err(format!(
                "no record of the source begins at its checkpoint's redo {to} but at {end}"
            ));
        }
        if let Some(at) = reached.minimal_at {
            return Err(format!("wal_level was minimal on the source at {at}"));
        }
        if let Some(at) = reached.extension_at {
            return Err(format!(
                "the source's WAL has a record of an extension's own resource manager at {at}"
            ));
        }
        if let Some(at) = reached.unknown_at {
            return Err(format!("the source's WAL has a record of unknown effect at {at}"));
        }
        Ok(Window { start: from, end: to, ..self.window })
    }
}

#[cfg(test)]
mod tests {
    use pg_format::{BlockSet, Fork, RelationPath, RelationSegment};
    use proto::Refusal;
    use proto::status::{CallError, Reason};

    use super::*;

    const RELATION: RelationPath = RelationPath { tablespace: 1663, database: 5, number: 16384 };

    /// What an answer with these pieces says of a range.
    fn collect(
        changes: impl IntoIterator<Item = Change>,
        range: (Lsn, Lsn),
    ) -> Result<Window, String> {
        let mut gathered = Gathered::default();
        for change in changes {
            gathered.take(change).map_err(str::to_owned)?;
        }
        gathered.whole(range)
    }

    fn covered(from: u64, to: u64) -> Reached {
        let (from, to) = (Lsn::new(from), Lsn::new(to));
        Reached { from, to, minimal_at: None, unknown_at: None, extension_at: None }
    }

    #[test]
    fn an_answer_that_is_not_whole_is_no_answer() {
        let range = (Lsn::new(100), Lsn::new(200));
        let directory = || Change::Directory { tablespace: 1663, database: 5 };
        let whole = collect([directory(), Change::Reached(covered(100, 200))], range);
        assert_eq!(whole.expect("whole").directories.len(), 1);
        assert!(collect([], range).is_err(), "nothing came");
        assert!(collect([directory()], range).is_err(), "cut off");
        for (from, to) in [(100, 150), (101, 200), (100, 201)] {
            let short = collect([Change::Reached(covered(from, to))], range);
            assert!(short.is_err(), "{from} to {to}");
        }
        let minimal = Reached { minimal_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(minimal)], range).is_err());
        let unknown = Reached { unknown_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(unknown)], range).is_err());
        let extension = Reached { extension_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect([Change::Reached(extension)], range).is_err());
    }

    #[test]
    fn a_source_that_cannot_read_its_old_wal_can_be_rewound_to_another_way() {
        let error = |reason| RewindError::from(CallError::Refused(Refusal::new(reason, "x")));
        for reason in [Reason::Internal, Reason::InvalidRequest, Reason::WalMissing] {
            assert!(is_about_changes_alone(&error(reason)), "{reason:?}");
        }
        for reason in [Reason::NotAllowed, Reason::Overloaded, Reason::ShuttingDown] {
            assert!(!is_about_changes_alone(&error(reason)), "{reason:?}");
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
        assert_eq!(gathered.window.pages.len(), 1);
        assert!(gathered.take(reached(50)).is_err(), "it goes back");
        let endless = std::iter::repeat_with(|| Change::Directory { tablespace: 1, database: 2 });
        let mut gathered = Gathered::default();
        let refused = endless.take(CHANGES_MAX as usize + 1).find_map(|c| gathered.take(c).err());
        assert!(refused.is_some());
    }
}

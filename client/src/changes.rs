//! What the source changed since the fork, as its own WAL says: what strategy *latest* adds to the
//! target's window.

use data_dir::window::Window;
use pg_format::{Lsn, TimelineHistory};
use proto::fetch::{Change, Item, ItemBody, Reached, Unit, UnitKind};
use proto::model::Description;

use crate::ahead::Assumed;
use crate::analysis::{Analysis, source_segment, source_start};
use crate::error::RewindError;
use crate::fetch::Session;
use crate::rewind::joined;

/// Asks the source what it changed between the fork and its newest checkpoint, and adds the target's own
/// changes: all blocks that may differ. The inner error says why that cannot be known.
pub(crate) async fn since_fork(
    session: &Session,
    source: &Description,
    history: &TimelineHistory,
    (analysis, ahead): (&Analysis, Option<Assumed>),
) -> Result<Result<Window, String>, RewindError> {
    let (found, fork) = match (&analysis.rewindable, analysis.fork) {
        (Err(why), _) => return Ok(Err(why.clone())),
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
        Some((assumed, asked)) if assumed == fork => joined(asked).await?.items,
        // The histories part earlier than they say.
        _ => {
            let kind = UnitKind::Changes { from: fork, to: redo, rebuilt: false };
            session.clone().collect(vec![Unit { id: 0, kind }]).await?
        }
    };
    Ok(collect(answer, (fork, redo)).map(|changes| {
        window.absorb(changes);
        window
    }))
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

/// Puts the pieces of an answer together. Nothing of it counts unless it says that it covers the whole
/// range: an answer that is too short must not look like a source that changed nothing.
fn collect(answer: Vec<Item>, (from, to): (Lsn, Lsn)) -> Result<Window, String> {
    let mut window = Window { start: from, end: to, ..Window::default() };
    let mut last: Option<Reached> = None;
    for item in answer {
        match item.body {
            ItemBody::Change(Change::Reached(covered)) => last = Some(covered),
            ItemBody::Change(change) => window.note(change),
            _ => {}
        }
    }
    let covered = last.filter(|covered| covered.from <= from && covered.to >= to);
    let Some(covered) = covered else {
        let end = last.map_or(from, |covered| covered.to);
        return Err(format!(
            "the source's WAL could be read from {from} to {end} only, not to its checkpoint at {to}"
        ));
    };
    if covered.to != to {
        let end = covered.to;
        return Err(format!(
            "no record of the source begins at its checkpoint's redo {to} but at {end}"
        ));
    }
    if let Some(at) = covered.minimal_at {
        return Err(format!("wal_level was minimal on the source at {at}"));
    }
    match covered.unknown_at {
        Some(at) => Err(format!("the source's WAL has a record of unknown effect at {at}")),
        None => Ok(window),
    }
}

/// Takes pieces of an answer.
trait Note {
    fn note(&mut self, change: Change);
}

impl Note for Window {
    fn note(&mut self, change: Change) {
        match change {
            Change::Blocks { segment, blocks } => self.pages.absorb_segment(segment, &blocks),
            Change::Relation { relation, created, cut_to } => {
                if created {
                    self.created.insert(relation);
                }
                if let Some(blocks) = cut_to {
                    let smallest = self.truncated.entry(relation).or_insert(blocks);
                    *smallest = blocks.min(*smallest);
                }
            }
            Change::Directory { tablespace, database } => {
                self.directories.insert((tablespace, database));
            }
            Change::Reached(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(changes: impl IntoIterator<Item = Change>) -> Vec<Item> {
        let item = |change| Item { unit: 0, body: ItemBody::Change(change) };
        changes.into_iter().map(item).collect()
    }

    fn covered(from: u64, to: u64) -> Reached {
        let (from, to) = (Lsn::new(from), Lsn::new(to));
        Reached { from, to, minimal_at: None, unknown_at: None }
    }

    #[test]
    fn an_answer_that_is_not_whole_is_no_answer() {
        let range = (Lsn::new(100), Lsn::new(200));
        let directory = || Change::Directory { tablespace: 1663, database: 5 };
        let whole = collect(answer([directory(), Change::Reached(covered(100, 200))]), range);
        assert_eq!(whole.expect("whole").directories.len(), 1);
        assert!(collect(answer([]), range).is_err(), "nothing came");
        assert!(collect(answer([directory()]), range).is_err(), "cut off");
        for (from, to) in [(100, 150), (101, 200), (100, 201)] {
            let short = collect(answer([Change::Reached(covered(from, to))]), range);
            assert!(short.is_err(), "{from} to {to}");
        }
        let minimal = Reached { minimal_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect(answer([Change::Reached(minimal)]), range).is_err());
        let unknown = Reached { unknown_at: Some(Lsn::new(120)), ..covered(100, 200) };
        assert!(collect(answer([Change::Reached(unknown)]), range).is_err());
    }
}

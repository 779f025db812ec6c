//! Questions whose answers are most likely needed, asked while the fork is being proven: on a long link
//! each would cost a round trip. They assume that it lies where the histories say; an answer that turns
//! out to be of no use is thrown away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use data_dir::window::Window;
use pg_format::wal::SegmentName;
use pg_format::{BLOCK_BYTES, Lsn, TimelineHistory};
use proto::fetch::{Unit, UnitKind};
use proto::model::{Description, Sealed};
use tokio_util::task::AbortOnDropHandle;

use crate::commands::rewind::Run;
use crate::divergence::common_wal::source_start;
use crate::divergence::source_changes::{Gathered, gather, is_there};
use crate::error::RewindError;
use crate::plan::SourceFiles;
use crate::plan::file_actions::{Comparison, comparisons};
use crate::plan::input::{Choices, Differences, Facts};
use crate::source::session::Answer;
use crate::source::{Session, compare};
use crate::strategy::wal_start::fetched_from;
use crate::target::Target;
use crate::task::Asked;

/// WAL that is asked for before it is known whether all of the plan can be: less than a round trip holds.
const WAL_BYTES_MAX: u64 = 256 << 10;

/// A position that is likely to be the fork, and what the source changed since.
pub(crate) type Assumed = (Lsn, Asked<Gathered>);

/// The pages that differ of files that are compared by every way.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) differences: Differences,
    /// Payload bytes it took.
    pub(crate) payload_bytes: u64,
}

/// WAL of one segment.
#[derive(Debug, Default)]
pub(crate) struct WalAhead {
    /// The segment; `None` if nothing was asked for.
    pub(crate) name: Option<SegmentName>,
    pub(crate) answer: Answer,
}

/// See the module.
pub(crate) struct Ahead {
    /// Where the source's WAL ends, and the WAL that every way replays, if it is little.
    pub(crate) announced: Asked<(Sealed, Asked<WalAhead>)>,
    /// What the source changed since the assumed fork.
    pub(crate) changes: Option<Assumed>,
    /// What the source has.
    pub(crate) files: Asked<(SourceFiles, Compared)>,
}

impl Run {
    /// Asks. Whoever goes on with the plan of an earlier run needs to know little anew.
    pub(crate) fn ask_ahead(
        &self,
        session: &Session,
        (source, history): (&Arc<Description>, &Arc<TimelineHistory>),
    ) -> Ahead {
        let fork = self.target.history.common_ancestor(history).map(|ancestor| ancestor.end);
        let fork = fork.filter(|_| self.stored.is_none());
        let redo = source_start(source).redo;
        let assumed = fork.filter(|fork| {
            let is_there = || is_there(source, history, (*fork, redo)).is_ok();
            self.wants_changes() && *fork < redo && is_there()
        });
        let changes = assumed.map(|fork| {
            let mut asking = session.clone();
            let asked = async move { gather(&mut asking, (fork, redo), false).await };
            (fork, AbortOnDropHandle::new(tokio::spawn(asked)))
        });
        let announced = self.announced(session, (source, history), fork);
        // What has lost nothing is not compared with anything.
        let diverged = fork.is_some_and(|fork| self.target.control.file.checkpoint >= fork);
        Ahead { announced, changes, files: self.listed(session, source, diverged) }
    }

    fn announced(
        &self,
        session: &Session,
        (source, history): (&Arc<Description>, &Arc<TimelineHistory>),
        fork: Option<Lsn>,
    ) -> Asked<(Sealed, Asked<WalAhead>)> {
        let (source, history) = (Arc::clone(source), Arc::clone(history));
        let fork = fork.filter(|_| !self.config.dry_run);
        let mut asking = session.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let sealed = asking.seal().await?;
            let span = (source_start(&source).redo, sealed.end);
            let wanted = fork.and_then(|fork| wal((&source, &history), span, fork));
            let wal = tokio::spawn(async move {
                Ok(match wanted {
                    Some((name, units)) => {
                        WalAhead { name: Some(name), answer: asking.ask(units).await? }
                    }
                    None => WalAhead::default(),
                })
            });
            Ok((sealed, AbortOnDropHandle::new(wal)))
        }))
    }

    fn listed(
        &self,
        session: &Session,
        source: &Arc<Description>,
        diverged: bool,
    ) -> Asked<(SourceFiles, Compared)> {
        let (target, choices) = (Arc::clone(&self.target), self.choices());
        let (directory, monitor) = (Arc::clone(&self.directory), Arc::clone(&self.monitor));
        let (source, session) = (Arc::clone(source), session.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let files = session.clone().list().await?;
            if !diverged {
                return Ok((files, Compared::default()));
            }
            let list = always_compared(&target, &source, &files, choices)?;
            let compared = compare::compare(&session, directory, &list, monitor).await?;
            let (differences, payload_bytes) = (compared.0, compared.1.total());
            Ok((files, Compared { differences, payload_bytes }))
        }))
    }
}

/// Files of which the pages are compared even if WAL names what was changed.
fn always_compared(
    target: &Target,
    source: &Description,
    files: &SourceFiles,
    choices: Choices,
) -> Result<Vec<Comparison>, RewindError> {
    let control = &source.node.control;
    let version_directory =
        pg_format::relation::tablespace_version_directory(control.major, control.catalog_version);
    comparisons(&Facts {
        target: &target.files,
        source: files,
        window: Some(&Window::default()),
        version_directory: &version_directory,
        choices,
        new_tablespaces: &BTreeMap::new(),
        keys: &BTreeSet::new(),
    })
}

/// The WAL that replay from the source's newest checkpoint needs, if it is little and lies in one segment.
fn wal(
    (source, history): (&Description, &TimelineHistory),
    (start, end): (Lsn, Lsn),
    fork: Lsn,
) -> Option<(SegmentName, Vec<Unit>)> {
    let size = source.node.control.wal_segment_size;
    let from = fetched_from(start, fork, size);
    let end = page_end(end);
    let last = Lsn::new(end.as_u64().saturating_sub(1));
    let is_little = end > from && end.distance_from(from) <= WAL_BYTES_MAX;
    if !is_little || size.segment_of(from) != size.segment_of(last) {
        return None;
    }
    let number = size.segment_of(from);
    let timeline = history.timeline_of_segment(number, size);
    let piece =
        |id, offset, length| Unit { id, kind: UnitKind::Wal { timeline, number, offset, length } };
    let mut units = vec![piece(0, size.offset_of(from), end.distance_from(from))];
    if size.offset_of(from) > 0 && size.segment_of(fork) < number {
        units.push(piece(1, 0, BLOCK_BYTES));
    }
    Some((SegmentName { timeline, number }, units))
}

/// The end of the page that holds what lies before a position.
fn page_end(lsn: Lsn) -> Lsn {
    let start = lsn.page_start();
    if start == lsn { lsn } else { start.plus(BLOCK_BYTES) }
}

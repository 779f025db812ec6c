//! Requests whose answers are most likely needed, sent while the fork point is being proven: on a long link
//! each would cost a round trip. They assume that the histories part where the history files say; an answer
//! that turns out to be of no use is discarded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use data_dir::wal::summary::WalSummary;
use pg_format::wal::SegmentName;
use pg_format::{BLOCK_BYTES, Lsn};
use proto::fetch::{Unit, UnitKind};
use proto::model::Sealed;

use crate::config::Config;
use crate::divergence::source_changes::EarlyChanges;
use crate::error::RewindError;
use crate::monitor::Monitor;
use crate::plan::file_actions::{Comparison, comparisons};
use crate::plan::input::{Differences, Facts};
use crate::plan::{SourceFiles, Strategy, StrategyChoice};
use crate::source::session::Answer;
use crate::source::{Snapshot, Source, compare};
use crate::strategy::wal_start::fetched_from;
use crate::target::Target;
use crate::task::{Pending, begin};

/// Bytes of WAL that are asked for before the whole plan is known, at most: less than a link carries in one
/// round trip.
const WAL_BYTES_MAX: u64 = 256 << 10;

/// The pages that differ of files that are compared by every strategy.
#[derive(Debug, Default)]
pub struct EarlyComparison {
    /// The pages.
    pub differences: Differences,
    /// Payload bytes that the comparison took.
    pub payload_bytes: u64,
}

/// The source's file list.
#[derive(Debug)]
pub struct Listed {
    /// Its files.
    pub files: SourceFiles,
    /// What was already compared of these files.
    pub compared: EarlyComparison,
}

/// WAL of one segment.
#[derive(Debug, Default)]
pub struct EarlyWal {
    /// The segment; `None` if nothing was asked for.
    pub name: Option<SegmentName>,
    /// The answer.
    pub answer: Answer,
}

/// Where the source's WAL ended before anything was copied.
#[derive(Debug)]
pub struct Announced {
    /// The source's answer.
    pub sealed: Sealed,
    /// The WAL that every strategy replays, if it is little.
    pub wal: Pending<EarlyWal>,
}

/// See the module.
#[derive(Debug)]
pub struct Prefetch {
    /// Where the source's WAL ends.
    pub announced: Pending<Announced>,
    /// What the source changed since the assumed fork point.
    pub changes: Option<EarlyChanges>,
    /// The source's file list.
    pub listed: Pending<Listed>,
}

/// Whether a strategy may be chosen that needs to know what the source changed.
pub fn wants_changes(config: &Config) -> bool {
    match config.strategy {
        StrategyChoice::Auto | StrategyChoice::Only(Strategy::Latest) => true,
        // A dry run tells what every strategy would transfer.
        StrategyChoice::Only(Strategy::Compare | Strategy::Fork) => config.dry_run,
    }
}

impl Prefetch {
    /// Sends the requests. A run that has the plan of an earlier run needs few of them.
    pub fn start(
        config: &Config,
        target: &Arc<Target>,
        source: &Source,
        monitor: &Arc<dyn Monitor>,
        has_plan: bool,
    ) -> Self {
        let ancestor = target.history.common_ancestor(&source.snapshot.history);
        let fork = ancestor.map(|ancestor| ancestor.end).filter(|_| !has_plan);
        let changes = fork.filter(|_| wants_changes(config));
        let changes = changes.and_then(|fork| EarlyChanges::ask(source, fork));
        // A dry run moves no data.
        let announced = announced(source.clone(), fork.filter(|_| !config.dry_run));
        // A target that has not diverged is not compared.
        let diverged = fork.is_some_and(|fork| target.control.file.checkpoint >= fork);
        let list = match diverged {
            true => begin(listed_and_compared(
                config.clone(),
                Arc::clone(target),
                source.clone(),
                Arc::clone(monitor),
            )),
            false => begin(listed(source.clone())),
        };
        Self { announced: begin(announced), changes, listed: list }
    }
}

async fn announced(source: Source, fork: Option<Lsn>) -> Result<Announced, RewindError> {
    let mut session = source.session.clone();
    let sealed = session.seal().await?;
    let wanted = fork.and_then(|fork| little_wal(&source.snapshot, fork, sealed.end));
    let wal = begin(async move {
        Ok(match wanted {
            Some(LittleWal { name, units }) => {
                EarlyWal { name: Some(name), answer: session.ask(units).await? }
            }
            None => EarlyWal::default(),
        })
    });
    Ok(Announced { sealed, wal })
}

async fn listed(source: Source) -> Result<Listed, RewindError> {
    let files = source.session.clone().list().await?;
    Ok(Listed { files, compared: EarlyComparison::default() })
}

async fn listed_and_compared(
    config: Config,
    target: Arc<Target>,
    source: Source,
    monitor: Arc<dyn Monitor>,
) -> Result<Listed, RewindError> {
    let Listed { files, .. } = listed(source.clone()).await?;
    let list = always_compared(&config, &target, &source.snapshot, &files)?;
    let directory = Arc::clone(&target.directory);
    let compared = compare::compare(&source.session, directory, &list, monitor).await?;
    let compare::Compared { differences, carried } = compared;
    Ok(Listed { files, compared: EarlyComparison { differences, payload_bytes: carried.total() } })
}

/// Files of which the pages are compared even if WAL names what was changed.
fn always_compared(
    config: &Config,
    target: &Target,
    source: &Snapshot,
    files: &SourceFiles,
) -> Result<Vec<Comparison>, RewindError> {
    comparisons(&Facts {
        target: &target.files,
        source: files,
        wal_summary: Some(&WalSummary::default()),
        version_directory: &source.version_directory(),
        choices: config.file_choices(),
        new_tablespaces: &BTreeMap::new(),
        keys: &BTreeSet::new(),
    })
}

/// WAL that is little and lies in one segment.
#[derive(Debug, PartialEq)]
struct LittleWal {
    name: SegmentName,
    units: Vec<Unit>,
}

/// The WAL that replay from the source's newest checkpoint to `end` needs, if it is little.
fn little_wal(source: &Snapshot, fork: Lsn, end: Lsn) -> Option<LittleWal> {
    let size = source.segment_size();
    let from = fetched_from(source.checkpoint().redo, fork, size);
    let end = page_end(end);
    let last = Lsn::new(end.as_u64().saturating_sub(1));
    let is_little = end > from && end.distance_from(from) <= WAL_BYTES_MAX;
    if !is_little || size.segment_of(from) != size.segment_of(last) {
        return None;
    }
    let number = size.segment_of(from);
    let timeline = source.history.timeline_of_segment(number, size);
    let piece =
        |id, offset, length| Unit { id, kind: UnitKind::Wal { timeline, number, offset, length } };
    let mut units = vec![piece(0, size.offset_of(from), end.distance_from(from))];
    if size.offset_of(from) > 0 && size.segment_of(fork) < number {
        units.push(piece(1, 0, BLOCK_BYTES));
    }
    Some(LittleWal { name: SegmentName { timeline, number }, units })
}

/// The end of the WAL page with the byte before a position.
fn page_end(lsn: Lsn) -> Lsn {
    let start = lsn.page_start();
    if start == lsn { lsn } else { start.plus(BLOCK_BYTES) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::snapshot;

    const MB_16: u64 = 16 << 20;

    /// What is asked for of a source whose checkpoint begins at `redo`: first byte and length in the segment.
    fn asked(redo: u64, fork: u64, end: u64) -> Option<Vec<(u64, u64)>> {
        let source = snapshot(0..9, Lsn::new(redo));
        let little = little_wal(&source, Lsn::new(fork), Lsn::new(end))?;
        let pieces = little.units.into_iter().map(|unit| match unit.kind {
            UnitKind::Wal { offset, length, .. } => (offset, length),
            other => panic!("{other:?}"),
        });
        Some(pieces.collect())
    }

    #[test]
    fn little_wal_is_asked_for_up_to_the_end_of_its_page() {
        // The fork lies in an older segment: this one comes whole from its start.
        let whole = asked(3 * MB_16 + 40, MB_16, 3 * MB_16 + 10_000);
        assert_eq!(whole, Some(vec![(0, 16_384)]));
        // The fork lies in the same segment: the target has what is before it.
        let rest = asked(3 * MB_16 + 9000, 3 * MB_16 + 8500, 3 * MB_16 + 16_384);
        assert_eq!(rest, Some(vec![(8192, 8192)]));
    }

    #[test]
    fn much_wal_waits_for_the_plan() {
        assert_eq!(asked(3 * MB_16 + 40, MB_16, 3 * MB_16 + WAL_BYTES_MAX + 1), None);
        let fork = 4 * MB_16 - 9000;
        assert_eq!(asked(fork + 1000, fork, 4 * MB_16 + 100), None, "in two segments");
        assert_eq!(asked(3 * MB_16, MB_16, 3 * MB_16), None, "nothing at all");
    }
}

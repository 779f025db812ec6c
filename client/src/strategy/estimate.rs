//! What each way would cost: by typical rates, to choose one, and for a dry run by what a sample of its
//! pages and WAL would take.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use data_dir::window::Window;
use data_dir::window_scan::scan_covered;
use pg_format::wal::SegmentName;
use pg_format::{Covered, Lsn, TimelineHistory};
use proto::delta::SIGNATURE_BYTES;
use proto::fetch::{ItemBody, Unit, UnitKind};
use proto::model::Description;

use crate::commands::rewind::Run;
use crate::divergence::source_changes::{gather, is_about_changes_alone};
use crate::error::RewindError;
use crate::plan::cost::{FILE_BYTES, Price, Prices, Rate, Rates};
use crate::plan::file_actions::{blocks_in, build};
use crate::plan::input::{Differences, Facts};
use crate::plan::replayed_blocks::leave_out;
use crate::plan::units::units;
use crate::plan::{Plan, SourceFiles, Strategy};
use crate::source::Session;
use crate::source::page_delta::OwnPages;
use crate::source::requests::Prepare as _;
use crate::strategy::candidates::{Candidates, Choice, Obstacle, Ways};
use crate::strategy::wal_start::fetched_from;
use crate::target::local_wal;
use crate::task::blocking;

/// Units of pages or files in a sample.
const SAMPLE_UNITS: usize = 8;
/// Pieces of WAL in a sample, and their bytes.
const SAMPLE_PIECES: u64 = 8;
const PIECE_BYTES: u64 = 128 << 10;

/// What is known of what travels.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// How much of the plan travels; `None` if nothing was measured.
    rates: Option<Rates>,
    /// Pages that were found to differ.
    differences: Differences,
    /// Payload bytes it took to find them.
    hash_bytes: u64,
    /// What replay rebuilds, by its start.
    covered: BTreeMap<Lsn, Covered>,
    /// The way of which all that differs was found.
    complete: Option<Strategy>,
}

impl Known {
    fn rates(&self, strategy: Strategy) -> Rates {
        self.rates.unwrap_or_else(|| match strategy {
            Strategy::Fork => Rates::from_the_fork(),
            Strategy::Latest | Strategy::Compare => Rates::default(),
        })
    }

    /// What a comparison found.
    pub(crate) fn of(differences: Differences, hash_bytes: u64) -> Self {
        Self { differences, hash_bytes, ..Self::default() }
    }
}

impl Run {
    /// What each way is likely to carry.
    pub(crate) fn prices(
        &self,
        source: &Description,
        files: &SourceFiles,
        (ways, candidates): (Ways<'_>, &Candidates<'_>),
        known: &Known,
    ) -> Result<Prices, RewindError> {
        let control = &source.node.control;
        let version_directory = pg_format::relation::tablespace_version_directory(
            control.major,
            control.catalog_version,
        );
        // Nothing of the plans is kept, so it does not matter where new tablespaces will be.
        let (places, keys) = (BTreeMap::new(), BTreeSet::new());
        let plan = |window: Option<&Window>| {
            let facts = Facts {
                target: &self.target.files,
                source: files,
                window,
                version_directory: &version_directory,
                choices: self.choices(),
                new_tablespaces: &places,
                keys: &keys,
            };
            build(&facts, &known.differences)
        };
        let price = |strategy: Strategy, window: Option<&Window>, start: Lsn| {
            let (plan, wal) = (plan(window)?, self.wal_bytes(source, ways, start));
            let rates = known.rates(strategy);
            let price = Price::of(&plan, wal, (rates, known.covered.get(&start)));
            Ok::<_, RewindError>((Price { hashes: known.hash_bytes, ..price }, plan))
        };
        let way = |way: &Result<Choice<'_>, Obstacle>| match way {
            Ok(way) => Ok(Ok(price(way.strategy, way.window, way.start.redo)?.0)),
            Err((why, _)) => Ok::<_, RewindError>(Err(why.clone())),
        };
        let compare = if known.complete == Some(Strategy::Compare) {
            price(Strategy::Compare, None, candidates.compare.start.redo)?.0
        } else {
            // Of what differs no more is known than what the WAL of one node or both tells.
            let told = [&candidates.latest, &candidates.fork];
            let told = told.into_iter().find_map(|way| way.as_ref().ok());
            let window = told.and_then(|way| way.window);
            let (price, plan) = price(Strategy::Compare, window, candidates.compare.start.redo)?;
            let pages = files.values().flatten().map(|bytes| u64::from(blocks_in(*bytes))).sum();
            price.of_comparing(&plan, pages)
        };
        Ok(Prices { fork: way(&candidates.fork)?, latest: way(&candidates.latest)?, compare })
    }

    fn wal_bytes(&self, source: &Description, ways: Ways<'_>, start: Lsn) -> u64 {
        ways.end.distance_from(self.wal_from(source, ways, start).min(ways.end))
    }

    fn wal_from(&self, source: &Description, ways: Ways<'_>, start: Lsn) -> Lsn {
        let fork = ways.analysis.fork.map_or(Lsn::INVALID, |fork| fork.lsn);
        let size = source.node.control.wal_segment_size;
        fetched_from(start, fork, size)
    }

    /// Learns what replay of each way would rebuild, and what a sample of the plan that was made would take:
    /// a dry run moves no data.
    pub(crate) async fn sampled(
        &self,
        session: &Session,
        (source, history): (&Description, &TimelineHistory),
        (ways, candidates): (Ways<'_>, &Candidates<'_>),
        (choice, plan, mut known): (&Choice<'_>, &Plan, Known),
    ) -> Result<Known, RewindError> {
        let starts = [candidates.fork.as_ref().ok(), Some(&candidates.compare)];
        for start in starts.into_iter().flatten().map(|way| way.start.redo) {
            let covered = self.covered(session, ways, start).await?;
            known.covered.insert(start, covered);
        }
        let start = choice.start.redo;
        let none = Covered::new(start);
        let (units, _) = leave_out(units(plan), known.covered.get(&start).unwrap_or(&none));
        let typical = Rates::default();
        let is_signed =
            |unit: &Unit| matches!(&unit.kind, UnitKind::Blocks { signatures: Some(_), .. });
        let is_whole =
            |unit: &Unit| matches!(&unit.kind, UnitKind::Blocks { signatures: None, .. });
        let is_file = |unit: &Unit| matches!(&unit.kind, UnitKind::File { offset: 0, .. });
        let sizes: BTreeMap<u64, u64> =
            plan.whole.iter().map(|file| ((file.file as u64) << 32, file.bytes)).collect();
        let file_bytes = |unit: &Unit| sizes.get(&unit.id).map_or(0, |bytes| bytes + FILE_BYTES);
        let signed = self.sign(sample(&units, is_signed)).await?;
        let difference =
            rate(session, signed, pages).await?.map(|rate| rate.plus(SIGNATURE_BYTES as u64));
        let whole = rate(session, sample(&units, is_whole), pages).await?;
        let file = rate(session, sample(&units, is_file), file_bytes).await?;
        let pieces = self.pieces((source, history), ways, start);
        let wal = rate(session, pieces, wal_length).await?;
        known.rates = Some(Rates {
            difference: difference.unwrap_or(typical.difference),
            whole: whole.unwrap_or(typical.whole),
            file: file.unwrap_or(typical.file),
            wal: wal.unwrap_or(typical.wal),
        });
        known.complete = Some(choice.strategy);
        Ok(known)
    }

    /// What replay from `start` to the end of the source's WAL rebuilds.
    async fn covered(
        &self,
        session: &Session,
        ways: Ways<'_>,
        start: Lsn,
    ) -> Result<Covered, RewindError> {
        let fork = ways.analysis.fork.map_or(Lsn::INVALID, |fork| fork.lsn);
        let (target, common) = (Arc::clone(&self.target), start < fork);
        let mut covered = blocking(move || {
            let local = local_wal(&target);
            let last = local.context.segment_size.segment_of(fork);
            // An estimate: what cannot be read rebuilds nothing.
            let read = common.then(|| scan_covered(&local, local.context, (start, fork), last));
            Ok(read
                .and_then(Result::ok)
                .map_or_else(|| Covered::new(start), |(covered, _)| covered))
        })
        .await?;
        let (from, to) = (start.max(fork), ways.end);
        if from < to {
            session.waited();
            let gathered = match gather(&mut session.clone(), (from, to), true).await {
                Err(error) if is_about_changes_alone(&error) => return Ok(covered),
                gathered => gathered?,
            };
            if gathered.end() >= to {
                covered.absorb_blocks(gathered.into_blocks());
            }
        }
        Ok(covered)
    }

    /// Completes units with the signatures of this node's pages.
    async fn sign(&self, mut units: Vec<Unit>) -> Result<Vec<Unit>, RewindError> {
        let own = OwnPages::new(Arc::clone(&self.target.directory));
        blocking(move || {
            units.iter_mut().try_for_each(|unit| own.prepare(unit).map(drop))?;
            Ok(units)
        })
        .await
    }

    /// Pieces of the WAL that replay from `start` needs, over all of its length.
    fn pieces(
        &self,
        (source, history): (&Description, &TimelineHistory),
        ways: Ways<'_>,
        start: Lsn,
    ) -> Vec<Unit> {
        let size = source.node.control.wal_segment_size;
        let from = self.wal_from(source, ways, start);
        let bytes = self.wal_bytes(source, ways, start);
        let count = bytes.div_ceil(PIECE_BYTES).clamp(1, SAMPLE_PIECES);
        let pieces = (0..count).map(|index| {
            let at = from.plus(bytes / count * index).page_start();
            let number = size.segment_of(at);
            let left =
                ways.end.distance_from(at.min(ways.end)).min(size.bytes() - size.offset_of(at));
            let timeline = history.timeline_of_segment(number, size);
            let SegmentName { timeline, number } = SegmentName { timeline, number };
            let (offset, length) = (size.offset_of(at), left.min(PIECE_BYTES));
            Unit { id: index, kind: UnitKind::Wal { timeline, number, offset, length } }
        });
        pieces.filter(|unit| wal_length(unit) > 0).collect()
    }
}

/// Some units of a kind, evenly over all of them.
fn sample(units: &[Unit], wanted: impl Fn(&Unit) -> bool) -> Vec<Unit> {
    let all: Vec<&Unit> = units.iter().filter(|unit| wanted(unit)).collect();
    let count = all.len().min(SAMPLE_UNITS);
    (0..count).filter_map(|index| all.get(index * all.len() / count).copied().cloned()).collect()
}

fn pages(unit: &Unit) -> u64 {
    match &unit.kind {
        UnitKind::Blocks { ranges, .. } => ranges.iter().map(|range| u64::from(range.count)).sum(),
        _ => 0,
    }
}

fn wal_length(unit: &Unit) -> u64 {
    match &unit.kind {
        UnitKind::Wal { length, .. } => *length,
        _ => 0,
    }
}

/// Asks how many bytes units would travel in, for each of what `size` counts. They do not travel.
async fn rate(
    session: &Session,
    units: Vec<Unit>,
    size: impl Fn(&Unit) -> u64,
) -> Result<Option<Rate>, RewindError> {
    let sizes: u64 = units.iter().map(size).sum();
    if sizes == 0 {
        return Ok(None);
    }
    session.waited();
    let kind = UnitKind::Measure(units);
    let answer = session.clone().ask(vec![Unit { id: 0, kind }]).await?;
    let bytes = answer.items.iter().find_map(|item| match item.body {
        ItemBody::End { bytes, .. } => Some(bytes),
        _ => None,
    });
    Ok(bytes.map(|bytes| Rate::new(bytes, sizes)))
}

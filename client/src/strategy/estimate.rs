//! Estimates what each strategy would transfer: by typical rates, to choose one, and for a dry run by
//! measuring a sample of pages and WAL.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use data_dir::wal::summarize::scan_covered;
use data_dir::wal::summary::WalSummary;
use pg_format::{Covered, Lsn};
use proto::delta::SIGNATURE_BYTES;
use proto::fetch::{ItemBody, Unit, UnitKind};

use super::candidates::{Candidate, Candidates};
use super::wal_start::fetched_from;
use crate::divergence::source_changes::gather;
use crate::error::{Remedy, RewindError};
use crate::plan::cost::{Estimate, Estimates, FILE_BYTES, Rate, Rates};
use crate::plan::file_actions::{blocks_in, build};
use crate::plan::input::{Choices, Differences, Facts};
use crate::plan::replayed_blocks::leave_out;
use crate::plan::units::units;
use crate::plan::{Plan, SourceFiles, Strategy};
use crate::source::page_delta::OwnPages;
use crate::source::prepare::Prepare as _;
use crate::source::{Session, Snapshot};
use crate::target::{Target, local_wal};
use crate::task::blocking;

/// Units of pages or files in a sample.
const SAMPLE_UNITS: usize = 8;
/// Pieces of WAL in a sample, and their bytes.
const SAMPLE_PIECES: u64 = 8;
const PIECE_BYTES: u64 = 128 << 10;

/// What estimates are made from.
#[derive(Debug, Clone, Copy)]
pub struct Basis<'a> {
    /// This node.
    pub target: &'a Arc<Target>,
    /// The source.
    pub source: &'a Snapshot,
    /// What the source has listed.
    pub listed: &'a SourceFiles,
    /// What the operator chose for files that are not PostgreSQL's data.
    pub choices: Choices,
    /// The fork point; [`Lsn::INVALID`] if it is not proven.
    pub fork: Lsn,
    /// Where the source's WAL ends by now.
    pub end: Lsn,
}

impl Basis<'_> {
    /// Where the WAL begins that is fetched for replay from `start`.
    fn wal_from(&self, start: Lsn) -> Lsn {
        fetched_from(start, self.fork, self.source.segment_size())
    }

    fn wal_bytes(&self, start: Lsn) -> u64 {
        self.end.distance_from(self.wal_from(start).min(self.end))
    }
}

/// What is known about the transfer.
#[derive(Debug, Default)]
pub struct Measured {
    /// Rates that were measured; `None` if nothing was.
    rates: Option<Rates>,
    /// Pages that were found to differ.
    differences: Differences,
    /// Payload bytes it took to find them.
    hash_bytes: u64,
    /// What replay rebuilds, by its start.
    covered: BTreeMap<Lsn, Covered>,
    /// The strategy for which all pages that differ were found.
    complete: Option<Strategy>,
}

impl Measured {
    /// What a comparison found, and the payload bytes that it took.
    pub fn by_comparing(differences: Differences, hash_bytes: u64) -> Self {
        Self { differences, hash_bytes, ..Self::default() }
    }

    fn rates(&self, strategy: Strategy) -> Rates {
        self.rates.unwrap_or_else(|| match strategy {
            Strategy::Fork => Rates::from_the_fork(),
            Strategy::Latest | Strategy::Compare => Rates::default(),
        })
    }
}

/// A plan that is made only for its estimate, and the estimate.
struct Estimated {
    plan: Plan,
    estimate: Estimate,
}

/// What each strategy is likely to transfer.
pub fn estimates(
    basis: Basis<'_>,
    candidates: &Candidates<'_>,
    known: &Measured,
) -> Result<Estimates, RewindError> {
    let of = |candidate: &Candidate<'_>| {
        estimated(basis, candidate, candidate.wal_summary, known).map(|made| made.estimate)
    };
    let fork = match &candidates.fork {
        Ok(candidate) => Ok(of(candidate)?),
        Err(why) => Err(why.clone()),
    };
    let latest = match &candidates.latest {
        Ok(candidate) => Ok(of(candidate)?),
        Err(why) => Err(why.clone()),
    };
    Ok(Estimates { fork, latest, compare: of_comparing(basis, candidates, known)? })
}

fn of_comparing(
    basis: Basis<'_>,
    candidates: &Candidates<'_>,
    known: &Measured,
) -> Result<Estimate, RewindError> {
    let compare = &candidates.compare;
    if known.complete == Some(Strategy::Compare) {
        return Ok(estimated(basis, compare, None, known)?.estimate);
    }
    // No more is known of what differs than what the WAL of one node or of both names.
    let named = [&candidates.latest, &candidates.fork];
    let named = named.into_iter().find_map(|candidate| candidate.as_ref().ok());
    let wal_summary = named.and_then(|candidate| candidate.wal_summary);
    let Estimated { plan, estimate } = estimated(basis, compare, wal_summary, known)?;
    let pages = basis.listed.values().flatten().map(|bytes| u64::from(blocks_in(*bytes))).sum();
    Ok(estimate.of_comparing(&plan, pages))
}

fn estimated(
    basis: Basis<'_>,
    candidate: &Candidate<'_>,
    wal_summary: Option<&WalSummary>,
    known: &Measured,
) -> Result<Estimated, RewindError> {
    let plan = build(
        &Facts {
            target: &basis.target.files,
            source: basis.listed,
            wal_summary,
            version_directory: &basis.source.version_directory(),
            choices: basis.choices,
            // Nothing of the plan is kept, so it does not matter where new tablespaces will be.
            new_tablespaces: &BTreeMap::new(),
            keys: &BTreeSet::new(),
        },
        &known.differences,
    )?;
    let start = candidate.start.redo;
    let rates = known.rates(candidate.strategy);
    let estimate = Estimate::of(&plan, basis.wal_bytes(start), rates, known.covered.get(&start));
    Ok(Estimated { plan, estimate: Estimate { hashes: known.hash_bytes, ..estimate } })
}

/// Finds out what replay of each strategy would rebuild, and measures a sample of what the plan would
/// transfer: a dry run transfers no data.
pub async fn measure(
    session: &Session,
    basis: Basis<'_>,
    candidates: &Candidates<'_>,
    chosen: &Candidate<'_>,
    plan: &Plan,
    mut known: Measured,
) -> Result<Measured, RewindError> {
    let starts = [candidates.fork.as_ref().ok(), Some(&candidates.compare)];
    for start in starts.into_iter().flatten().map(|candidate| candidate.start.redo) {
        let covered = covered(session, basis, start).await?;
        known.covered.insert(start, covered);
    }
    let start = chosen.start.redo;
    let none = Covered::new(start);
    let (units, _) = leave_out(units(plan), known.covered.get(&start).unwrap_or(&none));
    let typical = Rates::default();
    let is_signed =
        |unit: &Unit| matches!(&unit.kind, UnitKind::Blocks { signatures: Some(_), .. });
    let is_whole = |unit: &Unit| matches!(&unit.kind, UnitKind::Blocks { signatures: None, .. });
    let is_file = |unit: &Unit| matches!(&unit.kind, UnitKind::File { offset: 0, .. });
    let sizes: BTreeMap<u64, u64> =
        plan.whole.iter().map(|file| ((file.file as u64) << 32, file.bytes)).collect();
    let file_bytes = |unit: &Unit| sizes.get(&unit.id).map_or(0, |bytes| bytes + FILE_BYTES);
    let signed = sign(basis.target, sample(&units, is_signed)).await?;
    let difference =
        rate(session, signed, pages).await?.map(|rate| rate.plus(SIGNATURE_BYTES as u64));
    let whole = rate(session, sample(&units, is_whole), pages).await?;
    let file = rate(session, sample(&units, is_file), file_bytes).await?;
    let wal = rate(session, pieces(basis, start), wal_length).await?;
    known.rates = Some(Rates {
        difference: difference.unwrap_or(typical.difference),
        whole: whole.unwrap_or(typical.whole),
        file: file.unwrap_or(typical.file),
        wal: wal.unwrap_or(typical.wal),
    });
    known.complete = Some(chosen.strategy);
    Ok(known)
}

/// What replay from `start` to the end of the source's WAL rebuilds.
async fn covered(session: &Session, basis: Basis<'_>, start: Lsn) -> Result<Covered, RewindError> {
    let (target, fork) = (Arc::clone(basis.target), basis.fork);
    let mut covered = blocking(move || {
        let local = local_wal(&target);
        let last = local.context.segment_size.segment_of(fork);
        // An estimate: what cannot be read rebuilds nothing.
        let common = start < fork;
        let read = common.then(|| scan_covered(&local, local.context, start..fork, last));
        let read = read.and_then(Result::ok);
        Ok::<_, RewindError>(read.map_or_else(|| Covered::new(start), |(covered, _)| covered))
    })
    .await?;
    let (from, to) = (start.max(fork), basis.end);
    if from < to {
        session.waited();
        let gathered = match gather(&mut session.clone(), from..to, true).await {
            Err(error) if matches!(error.remedy(), Remedy::DoWithout(_)) => return Ok(covered),
            gathered => gathered?,
        };
        if gathered.end() >= to {
            covered.absorb_blocks(gathered.into_blocks());
        }
    }
    Ok(covered)
}

/// Completes units with the signatures of this node's pages.
async fn sign(target: &Target, mut units: Vec<Unit>) -> Result<Vec<Unit>, RewindError> {
    let own = OwnPages::new(Arc::clone(&target.directory));
    blocking(move || {
        units.iter_mut().try_for_each(|unit| own.prepare(unit).map(drop))?;
        Ok(units)
    })
    .await
}

/// Pieces of the WAL that replay from `start` needs, spread evenly over it.
fn pieces(basis: Basis<'_>, start: Lsn) -> Vec<Unit> {
    let size = basis.source.segment_size();
    let (from, bytes) = (basis.wal_from(start), basis.wal_bytes(start));
    let count = bytes.div_ceil(PIECE_BYTES).clamp(1, SAMPLE_PIECES);
    let pieces = (0..count).map(|index| {
        let at = from.plus(bytes / count * index).page_start();
        let number = size.segment_of(at);
        let left =
            basis.end.distance_from(at.min(basis.end)).min(size.bytes() - size.offset_of(at));
        let timeline = basis.source.history.timeline_of_segment(number, size);
        let (offset, length) = (size.offset_of(at), left.min(PIECE_BYTES));
        Unit { id: index, kind: UnitKind::Wal { timeline, number, offset, length } }
    });
    pieces.filter(|unit| wal_length(unit) > 0).collect()
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

/// Asks the source how many bytes the answers to units would take, for each of what `size` counts. The
/// answers are not sent.
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
    let answer = session.clone().ask(vec![Unit::single(kind)]).await?;
    let bytes = answer.items.iter().find_map(|item| match item.body {
        ItemBody::End { bytes, .. } => Some(bytes),
        _ => None,
    });
    Ok(bytes.map(|bytes| Rate::new(bytes, sizes)))
}

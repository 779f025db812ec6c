//! Proves by content how far two histories are the same. Equal timeline numbers prove nothing: two nodes can be
//! promoted to the same one. docs/RULES.md, R10.

use std::ops::ControlFlow;

use data_dir::wal::digest::{self, SegmentDigest};
use data_dir::wal::summary::WalSummary;
use data_dir::wal::{LocalWal, Segments as _};
use pg_format::Lsn;
use pg_format::wal::Start;
use proto::fetch::{Item, ItemBody, ProofStart, Unit, UnitKind};
use tokio_util::task::AbortOnDropHandle;

use super::search::Search;
use super::undecided::Undecided;
use crate::error::RewindError;
use crate::target::wal_archive::TargetWal;
use crate::task::{Pending, joined};

/// Bytes of WAL that must be proven equal before the fork if the last checkpoint cannot be reached.
const PROOF_BYTES_MIN: u64 = 1 << 20;

/// Positions between which records are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SearchRange {
    start: Lsn,
    end: Lsn,
}

/// The source's digests of a range, asked for while the target's own WAL is being read.
#[derive(Debug)]
pub struct Early {
    range: SearchRange,
    items: Pending<Vec<Item>>,
}

/// The source's digests of a range.
struct Theirs {
    digests: Vec<SegmentDigest>,
    /// Where its records of the range end.
    end: Lsn,
}

/// Whether both nodes have a segment.
fn both(search: &Search<'_>, local: &LocalWal<'_>, number: u64) -> Result<bool, Undecided> {
    let theirs = search.source.snapshot.segment(number).is_some();
    let ours = local.open(number).map_err(Undecided::unreadable("the target's WAL"))?;
    Ok(theirs && ours.is_some())
}

/// Number of the first segment from which on both nodes have every segment up to `to`. It reaches back no
/// further than a WAL summary from `start` on needs. `None` if one of them lacks the last segment.
fn first_common(
    search: &Search<'_>,
    local: &LocalWal<'_>,
    start: Lsn,
    to: Lsn,
) -> Result<Option<u64>, Undecided> {
    let size = local.context.segment_size;
    let last = size.segment_of(Lsn::new(to.as_u64().saturating_sub(1)));
    // One segment more than the WAL summary needs: a fork point close behind a segment's start proves little.
    let wanted = size.segment_of(start).min(last).saturating_sub(1);
    let mut first = last + 1;
    while first > wanted && both(search, local, first - 1)? {
        first -= 1;
    }
    Ok((first <= last).then_some(first))
}

/// Asks for the source's digests before the target's WAL is read, so that they arrive meanwhile. The range
/// begins with the WAL at `redo` and ends at `forked_at`, where the history files part; `None` if they do not
/// part. An error is not reported here: the next reader of the same files reports it.
pub fn ask_early(
    search: &Search<'_>,
    wal: &TargetWal<'_>,
    redo: Lsn,
    forked_at: Lsn,
) -> Option<Early> {
    let local = wal.local();
    let first = match forked_at {
        Lsn::MAX => None,
        to => first_common(search, local, redo, to).ok().flatten(),
    };
    first.map(|first| {
        let range =
            SearchRange { start: local.context.segment_size.start_of(first), end: forked_at };
        let mut session = search.source.session.clone();
        let units = vec![Unit::single(digests_unit(range))];
        let asked = async move { session.ask(units).await.map(|answer| answer.items) };
        Early { range, items: AbortOnDropHandle::new(search.runtime.spawn(asked)) }
    })
}

/// Compares the records of both nodes below `to`. `own` is the summary of the target's WAL since its last
/// checkpoint. Returns the position from which on the records differ.
pub fn prove(
    search: &Search<'_>,
    wal: &TargetWal<'_>,
    own: &WalSummary,
    to: Lsn,
    mut early: Option<Early>,
) -> Result<Lsn, Undecided> {
    let local = wal.local();
    let size = local.context.segment_size;
    let Some(mut first) = first_common(search, local, own.start, to)? else {
        return Err(Undecided::new(format!("the nodes have no WAL in common before {to}")));
    };
    let mut step = 1;
    loop {
        let range = SearchRange { start: size.start_of(first), end: to };
        let fork = first_difference(search, local, range, early.take())?;
        // A range that begins with a difference proves nothing: the histories parted earlier.
        let checkpoint = own.last_checkpoint_before(fork).is_some_and(|c| c.lsn >= range.start);
        if checkpoint || fork.distance_from(range.start) >= PROOF_BYTES_MIN {
            return Ok(fork);
        }
        let goal = first.saturating_sub(step);
        let known = first;
        while first > goal && both(search, local, first - 1)? {
            first -= 1;
        }
        if first == known {
            let bytes = fork.distance_from(range.start);
            return Err(Undecided::new(format!(
                "the nodes have only {bytes} bytes of WAL in common before {fork}"
            )));
        }
        step *= 2;
    }
}

/// Where the records of both nodes in a range begin to differ.
fn first_difference(
    search: &Search<'_>,
    local: &LocalWal<'_>,
    range: SearchRange,
    early: Option<Early>,
) -> Result<Lsn, Undecided> {
    let mut ours = Vec::new();
    let from = Start::FirstAfter(range.start);
    let our_end = digest::digests(local, local.context, from, range.end, &mut |digest| {
        ours.push(digest);
        ControlFlow::Continue(())
    })?;
    let theirs = source_digests(search, range, early)?;
    let differs = ours.iter().zip(&theirs.digests).find(|(a, b)| a != b).map(|(a, _)| a.number);
    if let Some(number) = differs {
        let size = local.context.segment_size;
        let end = size.start_of(number + 1).min(range.end);
        return first_different_record(
            search,
            local,
            SearchRange { start: size.start_of(number), end },
        );
    }
    if theirs.end < our_end.min(range.end) {
        check_their_end(search, range, theirs.end)?;
    }
    Ok(our_end.min(theirs.end).min(range.end))
}

/// Where the records of both nodes begin to differ within one segment, compared record by record.
fn first_different_record(
    search: &Search<'_>,
    local: &LocalWal<'_>,
    range: SearchRange,
) -> Result<Lsn, Undecided> {
    let SearchRange { start, end: to } = range;
    let mut ours = Vec::new();
    let from = Start::FirstAfter(start);
    let our_end = digest::records(local, local.context, from, to, &mut |lsn, crc| {
        ours.push((lsn, crc));
        ControlFlow::Continue(())
    })?;
    let unit = UnitKind::Proof { from: ProofStart::Segment(start), to, each_record: true };
    let mut theirs = Vec::new();
    let mut their_end = to;
    for item in search.ask(unit)? {
        match item.body {
            ItemBody::RecordCrc { lsn, crc } => theirs.push((lsn, crc)),
            ItemBody::End { bytes, .. } => their_end = Lsn::new(bytes),
            _ => {}
        }
    }
    let unequal = first_unequal(&ours, &theirs);
    // A record that the source does not have at all may only be one that it cannot read.
    if unequal.is_none_or(|lsn| lsn >= their_end) && their_end < our_end.min(to) {
        check_their_end(search, range, their_end)?;
    }
    Ok(unequal.unwrap_or_else(|| our_end.min(their_end)))
}

/// Checks that the source's WAL really ends where its records of a range end. A source that has more WAL and
/// cannot read it proves nothing about what lies there.
fn check_their_end(search: &Search<'_>, range: SearchRange, seen: Lsn) -> Result<(), Undecided> {
    let mut session = search.source.session.clone();
    let announced = search.runtime.block_on(async move { session.seal().await })?.end;
    // The source may have written more in between. What it announced must be readable now.
    let again = source_digests(search, range, None)?.end;
    if again >= announced.min(range.end) {
        return Ok(());
    }
    Err(Undecided::new(format!(
        "the source's WAL reaches {announced}, but it cannot be read from {} on: the WAL there is \
         not known to be common",
        seen.max(again)
    )))
}

fn source_digests(
    search: &Search<'_>,
    range: SearchRange,
    early: Option<Early>,
) -> Result<Theirs, RewindError> {
    let items = match early.filter(|early| early.range == range) {
        Some(early) => search.runtime.block_on(joined(early.items))?,
        None => search.ask(digests_unit(range))?,
    };
    let mut theirs = Theirs { digests: Vec::new(), end: range.start };
    for item in items {
        match item.body {
            ItemBody::SegmentDigest { number, records, digest } => {
                let digest = *digest.as_bytes();
                theirs.digests.push(SegmentDigest { number, records, digest });
            }
            ItemBody::End { bytes, .. } => theirs.end = Lsn::new(bytes),
            _ => {}
        }
    }
    Ok(theirs)
}

fn digests_unit(SearchRange { start, end: to }: SearchRange) -> UnitKind {
    UnitKind::Proof { from: ProofStart::Segment(start), to, each_record: false }
}

/// Where two lists of records and their CRCs part: the first record that is not the same, or that
/// only one of them has.
fn first_unequal(ours: &[(Lsn, u32)], theirs: &[(Lsn, u32)]) -> Option<Lsn> {
    let pair = ours.iter().zip(theirs).find(|(a, b)| a != b);
    let extra = |list: &[(Lsn, u32)], other: usize| list.get(other).map(|(lsn, _)| *lsn);
    match pair {
        Some((a, b)) => Some(a.0.min(b.0)),
        None => extra(ours, theirs.len()).or_else(|| extra(theirs, ours.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_was_cut_does_not_prove_the_rest() {
        let record = |lsn: u64, crc: u32| (Lsn::new(lsn), crc);
        let ours = [record(10, 1), record(20, 2), record(30, 3)];
        assert_eq!(first_unequal(&ours, &ours), None);
        assert_eq!(first_unequal(&ours, &ours[..2]), Some(Lsn::new(30)));
        assert_eq!(first_unequal(&ours[..1], &ours), Some(Lsn::new(20)));
        assert_eq!(first_unequal(&ours, &[record(10, 1), record(20, 9)]), Some(Lsn::new(20)));
    }
}

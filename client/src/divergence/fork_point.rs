//! Proves by content how far two histories are the same: equal timeline numbers do not (facts 7).

use std::ops::ControlFlow;

use data_dir::proof;
use data_dir::wal::{LocalWal, Segments as _};
use data_dir::window::Window;
use pg_format::Lsn;
use pg_format::wal::Start;
use proto::fetch::{Item, ItemBody, ProofStart, Unit, UnitKind};
use tokio_util::task::AbortOnDropHandle;

use crate::divergence::common_wal::{Subject, source_segment, wal_error};
use crate::divergence::hint_logging::NotRewindable;
use crate::error::RewindError;
use crate::target::wal_archive::TargetWal;
use crate::task::{Asked, joined};

/// Bytes of WAL that must be proven equal before the fork if the last checkpoint cannot be reached.
const PROOF_BYTES_MIN: u64 = 1 << 20;

/// The source's digests of a range, asked for while the target's own WAL is being read.
pub(crate) struct Early {
    range: (Lsn, Lsn),
    items: Asked<Vec<Item>>,
}

impl Subject<'_> {
    /// Whether both nodes have a segment.
    fn both(&self, local: &LocalWal<'_>, number: u64) -> Result<bool, RewindError> {
        let theirs = source_segment(self.source, self.source_history, number).is_some();
        Ok(theirs && local.open(number).map_err(wal_error)?.is_some())
    }

    /// First of the segments that both nodes have without a gap up to `to`, no more of them than a window
    /// from `start` on needs; `None` if there are none.
    fn first_common(
        &self,
        local: &LocalWal<'_>,
        (start, to): (Lsn, Lsn),
    ) -> Result<Option<u64>, RewindError> {
        let size = local.context.segment_size;
        let last = size.segment_of(Lsn::new(to.as_u64().saturating_sub(1)));
        // One segment more than the window: a fork close behind a segment's start proves little.
        let wanted = size.segment_of(start).min(last).saturating_sub(1);
        let mut first = last + 1;
        while first > wanted && self.both(local, first - 1)? {
            first -= 1;
        }
        Ok((first <= last).then_some(first))
    }

    /// Asks for the source's digests before the target's WAL is read: for as far as the histories say
    /// that it is common, unless they do not say. What cannot be read is told by whoever reads it next.
    pub(crate) fn ask_early(
        &self,
        wal: &TargetWal<'_>,
        (redo, forked_at): (Lsn, Lsn),
    ) -> Option<Early> {
        let local = wal.local();
        let first = match forked_at {
            Lsn::MAX => None,
            to => self.first_common(local, (redo, to)).ok().flatten(),
        };
        first.map(|first| {
            let range = (local.context.segment_size.start_of(first), forked_at);
            let mut session = self.session.clone();
            let units = vec![Unit { id: 0, kind: digests_unit(range) }];
            let asked = async move { session.ask(units).await.map(|answer| answer.items) };
            Early { range, items: AbortOnDropHandle::new(self.runtime.spawn(asked)) }
        })
    }

    /// Compares the records of both nodes below `to`: the position from which on they differ, or
    /// why nothing is proven.
    pub(crate) fn prove(
        &self,
        wal: &TargetWal<'_>,
        own: &Window,
        to: Lsn,
        mut early: Option<Early>,
    ) -> Result<Result<Lsn, NotRewindable>, RewindError> {
        let local = wal.local();
        let size = local.context.segment_size;
        let Some(mut first) = self.first_common(local, (own.start, to))? else {
            let why = format!("the nodes have no WAL in common before {to}");
            return Ok(Err(NotRewindable::new(why)));
        };
        let mut step = 1;
        loop {
            let start = size.start_of(first);
            let fork = match self.first_difference(local, (start, to), early.take())? {
                Ok(fork) => fork,
                Err(why) => return Ok(Err(why)),
            };
            // A range that begins with a difference proves nothing: the histories parted earlier.
            let checkpoint = own.last_checkpoint_before(fork).is_some_and(|c| c.lsn >= start);
            if checkpoint || fork.distance_from(start) >= PROOF_BYTES_MIN {
                return Ok(Ok(fork));
            }
            let goal = first.saturating_sub(step);
            let known = first;
            while first > goal && self.both(local, first - 1)? {
                first -= 1;
            }
            if first == known {
                let bytes = fork.distance_from(start);
                let why =
                    format!("the nodes have only {bytes} bytes of WAL in common before {fork}");
                return Ok(Err(NotRewindable::new(why)));
            }
            step *= 2;
        }
    }

    /// Where the records of both nodes in a range begin to differ, or why that is not known.
    fn first_difference(
        &self,
        local: &LocalWal<'_>,
        (start, to): (Lsn, Lsn),
        early: Option<Early>,
    ) -> Result<Result<Lsn, NotRewindable>, RewindError> {
        let mut ours = Vec::new();
        let from = Start::FirstAfter(start);
        let our_end = proof::digests(local, local.context, from, to, &mut |digest| {
            ours.push(digest);
            ControlFlow::Continue(())
        })?;
        let (theirs, their_end) = self.source_digests((start, to), early)?;
        let differs = ours.iter().zip(&theirs).find(|(a, b)| a != b).map(|(a, _)| a.number);
        let Some(number) = differs else {
            if their_end < our_end.min(to)
                && let Err(why) = self.check_their_end((start, to), their_end)?
            {
                return Ok(Err(why));
            }
            return Ok(Ok(our_end.min(their_end).min(to)));
        };
        let size = local.context.segment_size;
        let (start, to) = (size.start_of(number), size.start_of(number + 1).min(to));
        let mut ours = Vec::new();
        let from = Start::FirstAfter(start);
        let our_end = proof::records(local, local.context, from, to, &mut |lsn, crc| {
            ours.push((lsn, crc));
            ControlFlow::Continue(())
        })?;
        let unit = UnitKind::Proof { from: ProofStart::Segment(start), to, each_record: true };
        let mut theirs = Vec::new();
        let mut their_end = to;
        for item in self.ask(unit)? {
            match item.body {
                ItemBody::RecordCrc { lsn, crc } => theirs.push((lsn, crc)),
                ItemBody::End { bytes, .. } => their_end = Lsn::new(bytes),
                _ => {}
            }
        }
        let unequal = first_unequal(&ours, &theirs);
        // A record that the source does not have at all may only be one that it cannot read.
        if unequal.is_none_or(|lsn| lsn >= their_end)
            && their_end < our_end.min(to)
            && let Err(why) = self.check_their_end((start, to), their_end)?
        {
            return Ok(Err(why));
        }
        Ok(Ok(unequal.unwrap_or_else(|| our_end.min(their_end))))
    }

    /// Whether the source's WAL ends where its records of a range do: one that has more and cannot read it
    /// proves nothing about what lies there.
    fn check_their_end(
        &self,
        range: (Lsn, Lsn),
        seen: Lsn,
    ) -> Result<Result<(), NotRewindable>, RewindError> {
        let mut session = self.session.clone();
        let announced = self.runtime.block_on(async move { session.seal().await })?.end;
        // It may have written more in between: what it had then must be readable now.
        let (_, again) = self.source_digests(range, None)?;
        if again >= announced.min(range.1) {
            return Ok(Ok(()));
        }
        Ok(Err(NotRewindable::new(format!(
            "the source's WAL reaches {announced}, but it cannot be read from {} on: what lies there is not \
             known to be common",
            seen.max(again)
        ))))
    }

    fn source_digests(
        &self,
        range: (Lsn, Lsn),
        early: Option<Early>,
    ) -> Result<(Vec<proof::SegmentDigest>, Lsn), RewindError> {
        let items = match early.filter(|early| early.range == range) {
            Some(early) => self.runtime.block_on(joined(early.items))?,
            None => self.ask(digests_unit(range))?,
        };
        let mut digests = Vec::new();
        let mut end = range.0;
        for item in items {
            match item.body {
                ItemBody::SegmentDigest { number, records, digest } => {
                    let digest = *digest.as_bytes();
                    digests.push(proof::SegmentDigest { number, records, digest });
                }
                ItemBody::End { bytes, .. } => end = Lsn::new(bytes),
                _ => {}
            }
        }
        Ok((digests, end))
    }
}

fn digests_unit((start, to): (Lsn, Lsn)) -> UnitKind {
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

//! Digests or CRCs of the records of this node's WAL.

use std::ops::ControlFlow;

use data_dir::wal::LocalWal;
use data_dir::wal::digest;
use pg_format::Lsn;
use pg_format::wal::Start;
use proto::fetch::{Item, ItemBody, ProofStart};
use proto::{PageHash, Reason, Refusal};

use super::Answered;
use crate::node;
use crate::reply_stream::ReplyStream;

/// Segments that one proof may cover; a proof with each record covers at most one.
pub(super) const PROOF_SEGMENTS_MAX: u64 = 1 << 16;

/// The records of which a proof is requested.
#[derive(Clone, Copy)]
pub(crate) struct ProofRange {
    pub(crate) from: ProofStart,
    pub(crate) to: Lsn,
    /// Whether each record is sent, or a digest of each segment.
    pub(crate) each_record: bool,
}

/// Sends the digests or CRCs of the records that begin in a range.
pub(crate) fn answer(
    wal: &LocalWal<'_>,
    output: &mut ReplyStream,
    unit: u64,
    range: ProofRange,
) -> Result<Answered, Refusal> {
    let ProofRange { from, to, each_record } = range;
    let (first, from) = match from {
        ProofStart::Record(lsn) => (lsn, Start::Record(lsn)),
        ProofStart::Segment(lsn) => (lsn, Start::FirstAfter(lsn)),
    };
    let context = wal.context;
    let segments = if each_record { 1 } else { PROOF_SEGMENTS_MAX };
    if to.distance_from(first) > segments.saturating_mul(context.segment_size.bytes()) {
        return Err(Refusal::new(
            Reason::InvalidRequest,
            "a proof of too many WAL segments was requested",
        ));
    }
    // Nothing is collected: replies leave as they are made, so memory has a bound and the
    // client sees that the work goes on.
    let mut failed = None;
    let mut counted = first;
    let mut give = |at: Lsn, body| {
        // What was read up to here counts before its answer leaves.
        output.read("proofs", at.distance_from(counted.min(at)));
        counted = counted.max(at);
        match output.send(Item { unit, body }) {
            Ok(()) => ControlFlow::Continue(()),
            Err(refusal) => {
                failed = Some(refusal);
                ControlFlow::Break(())
            }
        }
    };
    let size = context.segment_size;
    let end = if each_record {
        digest::records(wal, context, from, to, &mut |lsn, crc| {
            give(lsn, ItemBody::RecordCrc { lsn, crc })
        })
    } else {
        digest::digests(wal, context, from, to, &mut |segment| {
            let digest = PageHash::from_bytes(segment.digest);
            let (number, records) = (segment.number, segment.records);
            let end = size.start_of(number).plus(size.bytes());
            give(end.min(to), ItemBody::SegmentDigest { number, records, digest })
        })
    };
    let end = end.map_err(|error| node::internal("its WAL", &error))?;
    failed.map_or(Ok(Answered::of(end.as_u64())), Err)
}

//! Proof by content that two nodes have the same WAL: digests of records, segment by segment.

use std::ops::ControlFlow;

use pg_format::Lsn;
use pg_format::wal::{Start, WalContext};

use crate::wal::{Segments, WalError, scan};

/// The records that begin in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentDigest {
    /// The segment.
    pub number: u64,
    /// How many records begin in it, inside the range asked for.
    pub records: u64,
    /// First 16 bytes of BLAKE3 over the position and CRC of each.
    pub digest: [u8; 16],
}

/// Hands out the digest of each segment that has records in `[start, to)`, in order, until `found`
/// breaks. Returns where the records end: at or after `to`, or where this node's WAL stops.
pub fn digests(
    segments: &dyn Segments,
    context: WalContext,
    start: Start,
    to: Lsn,
    found: &mut dyn FnMut(SegmentDigest) -> ControlFlow<()>,
) -> Result<Lsn, WalError> {
    let size = context.segment_size;
    let mut current: Option<(u64, u64, blake3::Hasher)> = None;
    let mut close = |open: Option<(u64, u64, blake3::Hasher)>| match open {
        Some((number, records, hasher)) => {
            let full = hasher.finalize();
            let digest = full.as_bytes().first_chunk().copied().unwrap_or_default();
            found(SegmentDigest { number, records, digest })
        }
        None => ControlFlow::Continue(()),
    };
    let end = records(segments, context, start, to, &mut |lsn, crc| {
        let number = size.segment_of(lsn);
        if current.as_ref().is_none_or(|(open, ..)| *open != number) {
            close(current.replace((number, 0, blake3::Hasher::new())))?;
        }
        if let Some((_, records, hasher)) = &mut current {
            *records += 1;
            hasher.update(&lsn.as_u64().to_le_bytes());
            hasher.update(&crc.to_le_bytes());
        }
        ControlFlow::Continue(())
    })?;
    match close(current) {
        // It was the last: whether more is wanted makes no difference.
        ControlFlow::Continue(()) | ControlFlow::Break(()) => Ok(end),
    }
}

/// Hands out position and CRC of each record that begins in `[start, to)`, until `found` breaks;
/// returns where they end.
pub fn records(
    segments: &dyn Segments,
    context: WalContext,
    start: Start,
    to: Lsn,
    found: &mut dyn FnMut(Lsn, u32) -> ControlFlow<()>,
) -> Result<Lsn, WalError> {
    let scanned = scan(segments, context, start, &mut |record, _| {
        if record.lsn >= to {
            return ControlFlow::Break(());
        }
        found(record.lsn, record.crc())?;
        if record.end >= to { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(scanned.end)
}

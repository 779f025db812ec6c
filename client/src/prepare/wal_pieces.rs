//! WAL that the source has announced, fetched over all connections like everything else and written
//! to its place in staging in any order.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pg_format::WalSegmentSize;
use pg_format::wal::SegmentName;
use proto::fetch::{Item, ItemBody, Unit, UnitKind};
use proto::frame::Frame;
use tokio_util::sync::CancellationToken;

use crate::error::{Class, Replan, RewindError};
use crate::staging::disk::Disk;
use crate::staging::layout;
use crate::task::{Closing, Gate};

/// Bit that marks the units of WAL: the numbers of other units begin with the index of a planned file.
const WAL: u64 = 1 << 63;

/// Whether a reply belongs to a unit of WAL.
pub fn is_wal(item: &Item) -> bool {
    item.unit & WAL != 0
}

/// A range of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The segment.
    pub name: SegmentName,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The units of WAL, and what takes the replies.
#[derive(Debug)]
pub struct WalPieces {
    /// The units.
    pub units: Vec<Unit>,
    /// What takes the replies.
    pub receiver: Arc<WalReceiver>,
}

/// Writes the WAL that comes to its place.
#[derive(Debug)]
pub struct WalReceiver {
    disk: Arc<dyn Disk>,
    size: WalSegmentSize,
    /// Segment and bytes that are still to come, by unit.
    left: Mutex<HashMap<u64, (SegmentName, u64)>>,
    /// Closed when nothing more may be written, because the files may then be those of another attempt.
    gate: Arc<Gate>,
    complete: CancellationToken,
    payload_bytes: AtomicU64,
}

impl WalPieces {
    /// The units for these pieces, whose files must exist.
    pub fn new(disk: Arc<dyn Disk>, size: WalSegmentSize, pieces: &[Piece]) -> Self {
        let mut left = HashMap::new();
        let mut units = Vec::new();
        for (piece, index) in pieces.iter().zip(0..) {
            let Piece { name, offset, length } = *piece;
            let SegmentName { timeline, number } = name;
            let id = WAL | index;
            left.insert(id, (name, length));
            units.push(Unit { id, kind: UnitKind::Wal { timeline, number, offset, length } });
        }
        let complete = CancellationToken::new();
        if left.is_empty() {
            complete.cancel();
        }
        let (left, payload_bytes) = (Mutex::new(left), AtomicU64::new(0));
        let receiver =
            WalReceiver { disk, size, left, gate: Arc::default(), complete, payload_bytes };
        Self { units, receiver: Arc::new(receiver) }
    }
}

impl WalReceiver {
    /// Waits until all of it has arrived.
    pub async fn complete(&self) {
        self.complete.cancelled().await;
    }

    /// Ends the writing when it is dropped, whatever the threads still have to write.
    pub fn closing(&self) -> Closing {
        Closing(Arc::clone(&self.gate))
    }

    /// Bytes that arrived, before they were decompressed.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes.load(Ordering::Relaxed)
    }

    /// Takes a frame that holds nothing but WAL.
    pub fn receive(&self, frame: &Frame, items: &[Item]) -> Result<(), RewindError> {
        self.payload_bytes.fetch_add(frame.payload.len() as u64, Ordering::Relaxed);
        let _inside = self.gate.enter().map_err(|error| {
            RewindError::because(Class::Interrupted, "the attempt is over", error)
        })?;
        for item in items {
            let known = self.left().get(&item.unit).copied();
            let (Some((name, missing)), true) = (known, is_wal(item)) else {
                let message = "the source sent WAL and other data in one frame";
                return Err(RewindError::new(Class::Other, message));
            };
            let left = match &item.body {
                ItemBody::Chunk(chunk) => {
                    let path = layout::staged_wal(&name.file_name(self.size));
                    let written = self.disk.write_at(&path, chunk.offset(), chunk.data());
                    written.map_err(|error| {
                        let message = format!("could not write {path}");
                        RewindError::because(Class::Preflight, message, error)
                    })?;
                    missing.saturating_sub(chunk.data().len() as u64)
                }
                ItemBody::End { vanished: true, .. } if missing > 0 => {
                    let name = name.file_name(self.size);
                    let message =
                        format!("the source no longer has WAL segment {name}, which replay needs");
                    return Err(RewindError::replan(Replan::WalUnavailable, message));
                }
                // WAL that did not come is noticed when it is decoded.
                _ => 0,
            };
            self.note(item.unit, name, left);
        }
        Ok(())
    }

    fn left(&self) -> parking_lot::MutexGuard<'_, HashMap<u64, (SegmentName, u64)>> {
        self.left.lock()
    }

    fn note(&self, unit: u64, name: SegmentName, left: u64) {
        let mut all = self.left();
        all.insert(unit, (name, left));
        if all.values().all(|(_, left)| *left == 0) {
            self.complete.cancel();
        }
    }
}

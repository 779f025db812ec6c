//! Frames: batches of replies, compressed each for itself.
//!
//! A frame needs no earlier one to be understood, so the client stores it as it came and a cut
//! connection loses nothing that had arrived.

use std::cell::RefCell;
use std::io;

use bytes::Bytes;
use prost::Message as _;

use crate::fetch::Item;
use crate::limits::{BATCH_BYTES, BATCH_BYTES_MAX, BATCH_ITEMS_MAX, ZSTD_LEVEL};
use crate::wire;

/// How a frame's payload is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is: it did not shrink.
    Plain,
    /// One zstd frame.
    Zstd,
}

/// A frame as it travels and as it is stored.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Counts the frames of a stream from 0.
    pub sequence: u64,
    /// How the payload is encoded.
    pub codec: Codec,
    /// Bytes of the batch when decoded.
    pub batch_bytes: u32,
    /// The payload.
    pub payload: Bytes,
    /// CRC-32C of the payload.
    pub payload_crc: u32,
}

/// Why a frame or an item in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The payload is not what its CRC says.
    #[error("frame payload has a wrong CRC")]
    Crc,
    /// It does not decompress to what it promised.
    #[error("frame does not decompress to the {0} bytes it promised")]
    Size(u32),
    /// It is longer than any frame may be.
    #[error("frame of {0} bytes is longer than the protocol allows")]
    TooLong(u32),
    /// It has so many items that they would take far more memory than its bytes.
    #[error("frame has more items than the protocol allows, or is no valid batch")]
    Items,
    /// zstd refused it.
    #[error("frame could not be decompressed")]
    Zstd(#[source] std::io::Error),
    /// The content is not a valid batch.
    #[error("frame holds no valid batch")]
    Batch(#[from] prost::DecodeError),
    /// Content does not have the hash that came with it.
    #[error("content of unit {unit} does not have the hash that came with it")]
    Hash {
        /// The unit.
        unit: u64,
    },
    /// A field holds what it must not.
    #[error("field {field} of a reply is invalid")]
    Field {
        /// Its name.
        field: &'static str,
    },
}

/// Collects items into frames.
pub struct FrameEncoder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    level: Option<i32>,
    also: Option<i32>,
    sizes: (usize, Option<usize>),
    batch: wire::Batch,
    batch_bytes: usize,
    sequence: u64,
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameEncoder").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl FrameEncoder {
    /// An encoder at the default level.
    pub fn new() -> Self {
        // Without its memory zstd cannot work; frames then travel plain.
        let compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
        Self {
            compressor,
            level: Some(ZSTD_LEVEL),
            also: None,
            sizes: (0, None),
            batch: wire::Batch::default(),
            batch_bytes: 0,
            sequence: 0,
        }
    }

    /// Sets the zstd level of the next frames, `None` for no compression, and a second level that is tried as
    /// well: the smaller of the two results is sent.
    pub fn pack(&mut self, level: Option<i32>, also: Option<i32>) {
        (self.level, self.also) = (level, also);
    }

    /// Bytes of the last frame at the level in use, and at the other one if that was tried.
    pub fn sizes(&self) -> (usize, Option<usize>) {
        self.sizes
    }

    fn compress(&mut self, plain: &[u8], level: Option<i32>) -> Option<Vec<u8>> {
        let (compressor, level) = (self.compressor.as_mut()?, level?);
        compressor.set_compression_level(level).ok()?;
        compressor.compress(plain).ok().filter(|packed| packed.len() < plain.len())
    }

    /// Adds an item; a full batch comes back as a frame.
    pub fn push(&mut self, item: Item) -> Option<Frame> {
        let item = wire::Item::from(item);
        self.batch_bytes += item.encoded_len();
        self.batch.items.push(item);
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { None }
    }

    /// The items collected so far as a frame; `None` if there are none.
    pub fn flush(&mut self) -> Option<Frame> {
        if self.batch.items.is_empty() {
            return None;
        }
        let plain = std::mem::take(&mut self.batch).encode_to_vec();
        self.batch_bytes = 0;
        let packed = self.compress(&plain, self.level);
        let other = self.compress(&plain, self.also);
        let bytes = |packed: &Option<Vec<u8>>| packed.as_ref().map_or(plain.len(), Vec::len);
        self.sizes = (bytes(&packed), self.also.map(|_| bytes(&other)));
        let batch_bytes = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        let smaller = [packed, other].into_iter().flatten().min_by_key(Vec::len);
        let (codec, payload) = match smaller {
            Some(packed) => (Codec::Zstd, packed),
            None => (Codec::Plain, plain),
        };
        let payload = Bytes::from(payload);
        let sequence = self.sequence;
        self.sequence += 1;
        let payload_crc = crc32c::crc32c(&payload);
        Some(Frame { sequence, codec, batch_bytes, payload, payload_crc })
    }
}

impl Default for FrameEncoder {
    fn default() -> Self {
        Self::new()
    }
}

thread_local! {
    /// Making one costs as much as decompressing a small frame.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// One zstd frame of at most `bytes` when decompressed.
fn decompress(packed: &[u8], bytes: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        let mut ready = match decompressor.take() {
            Some(ready) => ready,
            None => zstd::bulk::Decompressor::new()?,
        };
        let plain = ready.decompress(packed, bytes);
        *decompressor = Some(ready);
        plain
    })
}

impl Frame {
    /// Checks and decodes the items. Every page and chunk that comes back has the hash it came
    /// with. Never allocates more than [`BATCH_BYTES_MAX`] for the batch.
    pub fn items(&self) -> Result<Vec<Item>, FrameError> {
        if crc32c::crc32c(&self.payload) != self.payload_crc {
            return Err(FrameError::Crc);
        }
        let promised = self.batch_bytes as usize;
        if promised > BATCH_BYTES_MAX {
            return Err(FrameError::TooLong(self.batch_bytes));
        }
        let batch = match self.codec {
            Codec::Plain => self.payload.clone(),
            Codec::Zstd => {
                Bytes::from(decompress(&self.payload, promised).map_err(FrameError::Zstd)?)
            }
        };
        if batch.len() != promised {
            return Err(FrameError::Size(self.batch_bytes));
        }
        if !wire::has_at_most(&batch, BATCH_ITEMS_MAX) {
            return Err(FrameError::Items);
        }
        let batch = wire::Batch::decode(batch)?;
        batch.items.into_iter().map(Item::try_from).collect()
    }
}

//! Packs: the frames of one connection as they came, one file a connection.
//!
//! A record is the frame's payload with a header that is enough to check and decode it. Frames are
//! independent of each other, so a pack is read from start to end without any index.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::sync::Arc;

use bytes::Bytes;
use pg_format::DataPath;
use proto::fetch::Item;
use proto::frame::{Codec, Frame};
use proto::limits::FRAME_MESSAGE_BYTES_MAX;

use super::disk::Disk;
use super::manifest::PackDigest;

const MAGIC: u32 = 0x4A52_4750;
const HEADER_BYTES: usize = 20;
/// A pack is made durable every so many bytes, so that the seal does not wait for all of it.
const SYNC_BYTES: u64 = 64 << 20;

/// Why a pack cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The system refused.
    #[error("could not read the pack")]
    Io(#[from] io::Error),
    /// It is not what was sealed.
    #[error("the pack is damaged: {0}")]
    Damaged(String),
}

/// Writes a pack.
#[derive(Debug)]
pub struct PackWriter {
    disk: Arc<dyn Disk>,
    name: String,
    path: DataPath,
    bytes: u64,
    synced: u64,
    crc: u32,
}

impl PackWriter {
    /// An empty pack.
    pub fn create(disk: Arc<dyn Disk>, name: String) -> io::Result<Self> {
        let path = super::state::pack(&name);
        disk.create_file(&path)?;
        Ok(Self { disk, name, path, bytes: 0, synced: 0, crc: 0 })
    }

    /// Appends a frame that was checked.
    pub fn append(&mut self, frame: &Frame) -> io::Result<()> {
        let length = u32::try_from(frame.payload.len()).map_err(io::Error::other)?;
        let codec: u32 = match frame.codec {
            Codec::Plain => 1,
            Codec::Zstd => 2,
        };
        let mut record = Vec::with_capacity(HEADER_BYTES + frame.payload.len());
        for word in [MAGIC, codec, frame.batch_bytes, length, frame.payload_crc] {
            record.extend_from_slice(&word.to_le_bytes());
        }
        record.extend_from_slice(&frame.payload);
        self.disk.write_at(&self.path, self.bytes, &record)?;
        self.bytes += record.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, &record);
        if self.bytes - self.synced >= SYNC_BYTES {
            self.disk.sync_file(&self.path)?;
            self.synced = self.bytes;
        }
        Ok(())
    }

    /// Makes it durable; what it is from now on.
    pub fn finish(&self) -> io::Result<PackDigest> {
        self.disk.sync_file(&self.path)?;
        Ok(PackDigest { name: self.name.clone(), bytes: self.bytes, crc: self.crc })
    }
}

/// Hands out all replies of a sealed pack.
pub fn read(
    file: File,
    digest: &PackDigest,
    give: &mut dyn FnMut(Item) -> io::Result<()>,
) -> Result<(), PackError> {
    let damaged = |why: &str| PackError::Damaged(why.to_owned());
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let (mut crc, mut left) = (0, digest.bytes);
    while left > 0 {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header)?;
        crc = crc32c::crc32c_append(crc, &header);
        let (words, _) = header.as_chunks::<4>();
        let [magic, codec, batch_bytes, length, payload_crc] = words else {
            return Err(damaged("short header"));
        };
        let number = |word: &[u8; 4]| u32::from_le_bytes(*word);
        let codec = match (number(magic), number(codec)) {
            (MAGIC, 1) => Codec::Plain,
            (MAGIC, 2) => Codec::Zstd,
            _ => return Err(damaged("no record where one must be")),
        };
        let length = number(length) as usize;
        if length > FRAME_MESSAGE_BYTES_MAX {
            return Err(damaged("record is too long"));
        }
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload)?;
        crc = crc32c::crc32c_append(crc, &payload);
        left = left
            .checked_sub((HEADER_BYTES + length) as u64)
            .ok_or_else(|| damaged("record runs past the end"))?;
        let frame = Frame {
            sequence: 0,
            codec,
            batch_bytes: number(batch_bytes),
            payload: Bytes::from(payload),
            payload_crc: number(payload_crc),
        };
        let items = frame.items().map_err(|error| PackError::Damaged(error.to_string()))?;
        for item in items {
            give(item)?;
        }
    }
    if crc == digest.crc { Ok(()) } else { Err(damaged("its content changed since the seal")) }
}

//! Packs: the frames of one connection as they came, one file for each connection.
//!
//! A record is the frame's payload with a header that is enough to check and decode it. Frames are
//! independent of each other, so a pack is read from start to end without an index. Of a pack that was not
//! finished, everything up to the first invalid record can be used.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pg_format::DataPath;
use proto::fetch::Item;
use proto::frame::{Codec, Frame};
use proto::limits::FRAME_MESSAGE_BYTES_MAX;

use crate::staging::disk::Disk;
use crate::staging::header::{self, HEADER_BYTES, HeaderError};
use crate::staging::manifest::PackDigest;

/// zstd level of what is compressed on this node. It is not sent over the link and is read at most once, so
/// speed matters more than size.
pub const STAGING_LEVEL: i32 = -5;

const MAGIC: u32 = 0x4A52_4750;
const RECORD_HEADER_BYTES: usize = 20;
/// A pack is made durable every time it has grown by this much, so that the seal does not wait for all of it.
const SYNC_BYTES: u64 = 64 << 20;
/// A pack is made durable at least this often while it grows, so that a power cut on a slow link loses no
/// more than that.
const SYNC_INTERVAL: Duration = Duration::from_secs(2);

/// Why a pack cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The system refused.
    #[error("it could not be read")]
    Io(#[from] io::Error),
    /// It is not a pack, or it was written by another release.
    #[error("it cannot be used")]
    Header(#[from] HeaderError),
    /// It is not what was sealed.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

impl PackError {
    /// The same as an error of the system.
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error,
            other => io::Error::other(other),
        }
    }
}

/// Bytes of a signature.
const SIGNATURE_BYTES: usize = 16;

/// Signs each record, with its place, in a file that lies where others could put records of their own.
#[derive(Debug, Clone)]
pub struct Signer {
    key: Option<[u8; 32]>,
    name: String,
}

impl Signer {
    /// The signer for the file of this name.
    pub fn new(disk: &dyn Disk, name: &str) -> Self {
        Self { key: disk.staging_key(), name: name.to_owned() }
    }

    /// For files that lie where nobody else can write: their records are not signed.
    pub fn none() -> Self {
        Self { key: None, name: String::new() }
    }

    /// The signature of a record that begins at `offset`, given in parts; `None` if records are not signed.
    fn sign(&self, offset: u64, record: [&[u8]; 2]) -> Option<[u8; SIGNATURE_BYTES]> {
        let mut hasher = blake3::Hasher::new_keyed(&self.key?);
        hasher.update(&(self.name.len() as u64).to_le_bytes()).update(self.name.as_bytes());
        hasher.update(&offset.to_le_bytes());
        record.iter().for_each(|part| _ = hasher.update(part));
        hasher.finalize().as_bytes().first_chunk().copied()
    }
}

/// A file of records that is written from start to end.
#[derive(Debug)]
pub struct Appender {
    signer: Signer,
    disk: Arc<dyn Disk>,
    name: String,
    path: DataPath,
    bytes: u64,
    synced: u64,
    synced_at: Instant,
    crc: u32,
}

impl Appender {
    /// A file with nothing in it but the header.
    pub fn create(disk: Arc<dyn Disk>, name: String, path: DataPath) -> io::Result<Self> {
        disk.create_file(&path)?;
        let signer = Signer::new(&*disk, &name);
        let synced_at = Instant::now();
        let mut new = Self { signer, disk, name, path, bytes: 0, synced: 0, synced_at, crc: 0 };
        new.write(&header::header())?;
        Ok(new)
    }

    /// Appends a record; now and then all of them are made durable.
    pub fn append(&mut self, mut record: Vec<u8>) -> io::Result<()> {
        let signature = self.signer.sign(self.bytes, [&record, &[]]);
        record.extend(signature.into_iter().flatten());
        self.write(&record)
    }

    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        self.disk.write_at(&self.path, self.bytes, record)?;
        self.bytes += record.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, record);
        if self.bytes - self.synced >= SYNC_BYTES || self.synced_at.elapsed() >= SYNC_INTERVAL {
            self.disk.sync_file(&self.path)?;
            self.synced = self.bytes;
            self.synced_at = Instant::now();
        }
        Ok(())
    }

    /// Makes the file durable. Returns its name, length and CRC.
    pub fn finish(&self) -> io::Result<PackDigest> {
        self.disk.sync_file(&self.path)?;
        Ok(PackDigest { name: self.name.clone(), bytes: self.bytes, crc: self.crc })
    }
}

/// Writes a pack.
#[derive(Debug)]
pub struct PackWriter {
    file: Appender,
}

impl PackWriter {
    /// An empty pack.
    pub fn create(disk: Arc<dyn Disk>, name: String) -> io::Result<Self> {
        let path = crate::staging::layout::pack(&name);
        Ok(Self { file: Appender::create(disk, name, path)? })
    }

    /// Appends a frame that was checked.
    pub fn append(&mut self, frame: &Frame) -> io::Result<()> {
        let length = u32::try_from(frame.payload.len()).map_err(io::Error::other)?;
        let codec: u32 = match frame.codec {
            Codec::Plain => 1,
            Codec::Zstd => 2,
        };
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + frame.payload.len());
        for word in [MAGIC, codec, frame.batch_bytes, length, frame.payload_crc] {
            record.extend_from_slice(&word.to_le_bytes());
        }
        record.extend_from_slice(&frame.payload);
        self.file.append(record)
    }

    /// Makes the pack durable. Returns its name, length and CRC.
    pub fn finish(&self) -> io::Result<PackDigest> {
        self.file.finish()
    }
}

/// Receives the replies in a pack, frame by frame.
pub type TakeItems<'g> = dyn FnMut(Vec<Item>) -> io::Result<()> + 'g;

/// Hands out all replies of a sealed pack.
pub fn read(
    file: File,
    digest: &PackDigest,
    signer: Signer,
    give: &mut TakeItems<'_>,
) -> Result<(), PackError> {
    let mut records = Records::open(file, signer)?;
    while records.bytes < digest.bytes {
        give(next_items(&mut records)?)?;
    }
    records.check(digest)
}

/// Whether a sealed file, a pack or one with undo images, is what it was: its length and CRC alone. What
/// is in it was decoded when it was written.
pub fn check(
    mut file: File,
    digest: &PackDigest,
    keep_reading: &dyn Fn() -> io::Result<()>,
) -> Result<(), PackError> {
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, mut crc) = (0, 0);
    loop {
        keep_reading()?;
        let read = file.read(&mut buffer)?;
        let part = buffer.get(..read).filter(|part| !part.is_empty());
        let Some(part) = part else { break };
        if bytes == 0 {
            header::check(part.get(..HEADER_BYTES).unwrap_or_default())?;
        }
        bytes += part.len() as u64;
        crc = crc32c::crc32c_append(crc, part);
        if bytes > digest.bytes {
            break;
        }
    }
    same_content(digest, bytes, crc)
}

/// Whether so many bytes with this CRC are what was sealed.
fn same_content(digest: &PackDigest, bytes: u64, crc: u32) -> Result<(), PackError> {
    if bytes == digest.bytes && crc == digest.crc {
        Ok(())
    } else {
        Err(PackError::Damaged("its content changed after it was staged".to_owned()))
    }
}

/// Gives the usable part of an unfinished pack to `give`. Returns the length and CRC of that part; `None` if
/// the pack does not even have a header.
pub fn recover(
    file: File,
    signer: Signer,
    give: &mut TakeItems<'_>,
) -> Result<Option<(u64, u32)>, PackError> {
    let mut records = match Records::open(file, signer) {
        Ok(records) => records,
        Err(PackError::Header(error @ HeaderError::Version { .. })) => return Err(error.into()),
        Err(PackError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
            return Err(error.into());
        }
        Err(_) => return Ok(None),
    };
    loop {
        let sound = (records.bytes, records.crc);
        match next_items(&mut records) {
            Ok(items) => give(items)?,
            Err(PackError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(error.into());
            }
            Err(_) => return Ok(Some(sound)),
        }
    }
}

/// Reads a file of records in order, counts its bytes and their CRC, and checks signatures.
#[derive(Debug)]
pub(crate) struct Records {
    file: BufReader<File>,
    signer: Signer,
    /// Bytes read so far.
    pub(crate) bytes: u64,
    /// CRC of all of them.
    pub(crate) crc: u32,
}

impl Records {
    /// Reads the header that every file of ours has.
    pub(crate) fn open(file: File, signer: Signer) -> Result<Self, PackError> {
        let file = BufReader::with_capacity(1 << 20, file);
        let mut records = Self { file, signer, bytes: 0, crc: 0 };
        let mut head = [0; HEADER_BYTES];
        records.fill(&mut head)?;
        header::check(&head)?;
        Ok(records)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact(buffer)?;
        self.bytes += buffer.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, buffer);
        Ok(())
    }

    /// Checks that what was read is all that was sealed.
    pub(crate) fn check(&self, digest: &PackDigest) -> Result<(), PackError> {
        same_content(digest, self.bytes, self.crc)
    }

    /// The words that a record begins with.
    pub(crate) fn head<const WORDS: usize>(&mut self) -> Result<RecordHead<WORDS>, PackError> {
        let begun = self.bytes;
        let mut bytes = vec![0; WORDS * 4];
        self.fill(&mut bytes)?;
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Ok(RecordHead { begun, bytes, words })
    }

    /// Reads the payload that follows `head`, and checks the signature of both.
    pub(crate) fn payload<const WORDS: usize>(
        &mut self,
        head: &RecordHead<WORDS>,
        bytes: usize,
    ) -> Result<Vec<u8>, PackError> {
        let mut payload = vec![0; bytes];
        self.fill(&mut payload)?;
        if let Some(expected) = self.signer.sign(head.begun, [&head.bytes, &payload]) {
            let mut found = [0; SIGNATURE_BYTES];
            self.fill(&mut found)?;
            if found != expected {
                return Err(PackError::Damaged(
                    "a record does not have the signature of this rewind".to_owned(),
                ));
            }
        }
        Ok(payload)
    }
}

/// How a record begins.
#[derive(Debug)]
pub(crate) struct RecordHead<const WORDS: usize> {
    begun: u64,
    bytes: Vec<u8>,
    /// Its words.
    pub(crate) words: [u32; WORDS],
}

/// The replies of a pack's next frame.
fn next_items(records: &mut Records) -> Result<Vec<Item>, PackError> {
    let damaged = |why: &str| PackError::Damaged(why.to_owned());
    let head = records.head()?;
    let [magic, codec, batch_bytes, length, payload_crc] = head.words;
    let codec = match (magic, codec) {
        (MAGIC, 1) => Codec::Plain,
        (MAGIC, 2) => Codec::Zstd,
        _ => return Err(damaged("a record has no valid header")),
    };
    let length = length as usize;
    if length > FRAME_MESSAGE_BYTES_MAX {
        return Err(damaged("record is too long"));
    }
    let payload = Bytes::from(records.payload(&head, length)?);
    let frame = Frame { sequence: 0, codec, batch_bytes, payload, payload_crc };
    frame.items().map_err(|error| PackError::Damaged(error.to_string()))
}

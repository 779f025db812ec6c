//! Undo images: the old content of the parts of the target's files that will be overwritten or cut.
//!
//! They are saved before the seal, while the target is unchanged. A full disk is then noticed in time, and
//! once the target is being changed, everything that a rollback needs is there.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use parking_lot::Mutex;
use pg_format::DataPath;

use crate::plan::before_images::Image;
use crate::staging::disk::Disk;
use crate::staging::layout;
use crate::staging::manifest::PackDigest;
use crate::staging::pack::{Appender, PackError, Records, STAGING_LEVEL, Signer};
use crate::task::{Gate, Inside};

const MAGIC: u32 = 0x4F44_4E55;
const RECORD_HEADER_BYTES: usize = 28;
/// Bytes in one record at most: large enough to compress well.
const RECORD_BYTES_MAX: u64 = 256 << 10;
/// Threads that read and compress: one file after the other would leave the disk idle.
const THREADS: usize = 4;

/// Saves all `images` in files whose names begin with `name`, and makes them durable, unless the
/// gate is closed.
pub fn save(
    disk: &Arc<dyn Disk>,
    name: &str,
    images: &[Image],
    gate: &Gate,
) -> io::Result<Vec<PackDigest>> {
    let inside = gate.enter()?;
    let waiting = Mutex::new(images.iter());
    let saver = |number: usize| -> io::Result<PackDigest> {
        let name = format!("{name}-{number}");
        let path = layout::undo(&name);
        let mut saver = Saver {
            file: Appender::create(Arc::clone(disk), name, path)?,
            compressor: zstd::bulk::Compressor::new(STAGING_LEVEL)?,
        };
        loop {
            let next = waiting.lock().next();
            match next {
                Some(image) => saver.save(&**disk, image, &inside)?,
                None => return saver.file.finish(),
            }
        }
    };
    let threads = THREADS.min(images.len());
    std::thread::scope(|scope| {
        let saver = &saver;
        let running: Vec<_> =
            (0..threads).map(|number| scope.spawn(move || saver(number))).collect();
        let saved = running.into_iter().map(ScopedJoinHandle::join);
        saved.map(|saved| saved.unwrap_or_else(|_| Err(io::Error::other("panicked")))).collect()
    })
}

struct Saver {
    file: Appender,
    compressor: zstd::bulk::Compressor<'static>,
}

impl Saver {
    fn save(&mut self, disk: &dyn Disk, image: &Image, inside: &Inside<'_>) -> io::Result<()> {
        let file = disk.open(&image.path)?;
        let number = u32::try_from(image.file).map_err(io::Error::other)?;
        for range in &image.ranges {
            for offset in pieces(range) {
                inside.check()?;
                let length = RECORD_BYTES_MAX.min(range.end - offset);
                let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
                file.read_exact_at(&mut bytes, offset)?;
                self.append(number, offset, &bytes)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, file: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let compressed = self.compressor.compress(bytes)?;
        let stored = if compressed.len() < bytes.len() { &compressed } else { bytes };
        let word = |length: usize| u32::try_from(length).map_err(io::Error::other);
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + stored.len());
        for word in [MAGIC, file, word(bytes.len())?, word(stored.len())?, crc32c::crc32c(stored)] {
            record.extend_from_slice(&word.to_le_bytes());
        }
        record.extend_from_slice(&offset.to_le_bytes());
        record.extend_from_slice(stored);
        self.file.append(record)
    }
}

/// Receives images: index of the planned file, offset, bytes.
pub type TakeImage<'g> = dyn FnMut(usize, u64, &[u8]) -> io::Result<()> + 'g;

/// Hands out all images of a saved file.
pub fn read(
    file: File,
    digest: &PackDigest,
    signer: Signer,
    give: &mut TakeImage<'_>,
) -> Result<(), PackError> {
    let mut records = Records::open(file, signer)?;
    while records.bytes < digest.bytes {
        let ImageRecord { file, offset, bytes } = next_image(&mut records)?;
        give(file, offset, &bytes)?;
    }
    records.check(digest)
}

/// The files in which an earlier run has saved all of these images for the same plan; `None` if any is
/// missing. Files with anything else are removed.
pub fn adopt(
    disk: &dyn Disk,
    images: &[Image],
    gate: &Gate,
) -> io::Result<Option<Vec<PackDigest>>> {
    let _inside = gate.enter()?;
    let directory = DataPath::new(layout::STAGED_DIRECTORIES[2]).map_err(io::Error::other)?;
    let names = match disk.is_directory(&directory)? {
        Some(true) => disk.names(&directory)?,
        _ => Vec::new(),
    };
    let mut missing = Ranges::of(images);
    let mut adopted = Vec::new();
    for name in names {
        let path = layout::undo(&name);
        let held = held(disk, &name)?.filter(|(held, _)| missing.contains(held));
        match held {
            Some((held, digest)) => {
                missing.remove(&held);
                disk.sync_file(&path)?;
                adopted.push(digest);
            }
            None => disk.remove_file(&path)?,
        }
    }
    if missing.is_empty() {
        return Ok(Some(adopted));
    }
    adopted.iter().try_for_each(|digest| disk.remove_file(&layout::undo(&digest.name)))?;
    Ok(None)
}

/// The ranges of which a file has images, and the file's digest; `None` if the file is not complete.
fn held(disk: &dyn Disk, name: &str) -> io::Result<Option<(Ranges, PackDigest)>> {
    let file = disk.open(&layout::undo(name))?;
    let bytes = file.metadata()?.len();
    let read = || {
        let mut records = Records::open(file, Signer::new(disk, name))?;
        let mut held = Ranges::default();
        while records.bytes < bytes {
            let ImageRecord { file, offset, bytes } = next_image(&mut records)?;
            held.insert(file, offset..offset + bytes.len() as u64);
        }
        Ok((held, PackDigest { name: name.to_owned(), bytes, crc: records.crc }))
    };
    match read() {
        Ok(held) => Ok(Some(held)),
        Err(PackError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        Err(_) => Ok(None),
    }
}

/// Ranges of the planned files, divided into the pieces in which they are saved.
#[derive(Debug, Default)]
struct Ranges(BTreeSet<(usize, u64, u64)>);

impl Ranges {
    fn of(images: &[Image]) -> Self {
        let mut ranges = Self::default();
        for image in images {
            for range in &image.ranges {
                for start in pieces(range) {
                    let end = range.end.min(start + RECORD_BYTES_MAX);
                    ranges.insert(image.file, start..end);
                }
            }
        }
        ranges
    }

    fn insert(&mut self, file: usize, range: Range<u64>) {
        self.0.insert((file, range.start, range.end));
    }

    fn contains(&self, other: &Self) -> bool {
        other.0.is_subset(&self.0)
    }

    fn remove(&mut self, other: &Self) {
        other.0.iter().for_each(|piece| _ = self.0.remove(piece));
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Where the records of a range begin.
fn pieces(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let step = usize::try_from(RECORD_BYTES_MAX).unwrap_or(usize::MAX);
    (range.start..range.end).step_by(step)
}

/// One image.
struct ImageRecord {
    /// Index of the file in the plan.
    file: usize,
    offset: u64,
    bytes: Vec<u8>,
}

/// Reads the next image from a file of images.
fn next_image(records: &mut Records) -> Result<ImageRecord, PackError> {
    let damaged = |why: &str| PackError::Damaged(why.to_owned());
    let head = records.head()?;
    let [MAGIC, file, length, stored, stored_crc, low, high] = head.words else {
        return Err(damaged("a record has no valid header"));
    };
    if u64::from(length.max(stored)) > RECORD_BYTES_MAX {
        return Err(damaged("record is too long"));
    }
    let mut payload = records.payload(&head, stored as usize)?;
    if crc32c::crc32c(&payload) != stored_crc {
        return Err(damaged("an image has a wrong CRC"));
    }
    if stored < length {
        payload = zstd::bulk::decompress(&payload, length as usize)?;
    }
    if payload.len() != length as usize {
        return Err(damaged("an image has a wrong length"));
    }
    let offset = u64::from(high) << 32 | u64::from(low);
    Ok(ImageRecord { file: file as usize, offset, bytes: payload })
}

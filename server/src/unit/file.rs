//! Bytes of a file.

use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use bytes::BytesMut;
use data_dir::dir::read_at;
use pg_format::{DataPath, Major, relation_map, two_phase};
use proto::fetch::{Item, ItemBody, VerifiedChunk};
use proto::limits::CHUNK_BYTES;
use proto::{Reason, Refusal};

use super::{Answered, Requested};
use crate::reply_stream::ReplyStream;

/// Relation maps have 512 or 524 bytes, two-phase files seldom more than a few thousand.
const SEALED_FILE_BYTES_MAX: usize = 1 << 20;
/// Times one with a wrong CRC is read; it is written in microseconds.
const SEALED_FILE_READS: u32 = 10;
const SEALED_FILE_PAUSE: Duration = Duration::from_millis(10);

/// Sends a range of a file.
pub(crate) fn answer(
    major: Major,
    output: &mut ReplyStream,
    requested: Requested<'_>,
    range: Range<u64>,
) -> Result<Answered, Refusal> {
    let path = requested.path;
    let small = requested.length()? < SEALED_FILE_BYTES_MAX as u64;
    if path.file_name() == "pg_filenode.map" || path.is_within("pg_twophase") && small {
        return sealed_file(major, output, requested, range.start);
    }
    chunks(output, "files", requested, range)?;
    requested.length().map(Answered::of)
}

/// Sends a small file that ends in its own CRC in one piece. Relation maps (before 16) and
/// two-phase files are written in place, so one that was read while it was written shows by its
/// CRC and is read again.
fn sealed_file(
    major: Major,
    output: &mut ReplyStream,
    requested: Requested<'_>,
    offset: u64,
) -> Result<Answered, Refusal> {
    let Requested { id: unit, path, file } = requested;
    // The file is sent in one piece, so the client has all of it.
    if offset > 0 {
        return requested.length().map(Answered::of);
    }
    for _ in 0..SEALED_FILE_READS {
        let mut bytes = BytesMut::zeroed(SEALED_FILE_BYTES_MAX);
        let length = read_at(file, &mut bytes, 0).map_err(|error| requested.unreadable(&error))?;
        bytes.truncate(length);
        if crc_fits(path, &bytes, major) {
            output.read("files", length as u64);
            let chunk = VerifiedChunk::read(0, bytes.freeze());
            output.send(Item { unit, body: ItemBody::Chunk(chunk) })?;
            return Ok(Answered::of(length as u64));
        }
        // The file was removed while it was read.
        if !matches!(file.metadata().map(|found| found.nlink()), Ok(1..)) {
            return Ok(Answered::GONE);
        }
        std::thread::sleep(SEALED_FILE_PAUSE);
    }
    let message = format!("{path} on the source has a wrong CRC: the source is damaged");
    Err(Refusal::new(Reason::Damaged, message))
}

/// Whether the CRC that a small file ends in fits.
fn crc_fits(path: &DataPath, bytes: &[u8], major: Major) -> bool {
    match path.file_name() {
        "pg_filenode.map" => relation_map::parse(bytes, major).is_ok(),
        _ => two_phase::crc_fits(bytes),
    }
}

/// Sends a range of a file, or less if the file ends before; returns the number of bytes sent. What is read
/// is counted as `kind`.
pub(super) fn chunks(
    output: &mut ReplyStream,
    kind: &'static str,
    requested: Requested<'_>,
    range: Range<u64>,
) -> Result<u64, Refusal> {
    let (offset, wanted) = (range.start, range.end - range.start);
    let mut sent = 0;
    while sent < wanted {
        let size = usize::try_from(wanted - sent).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
        let mut buffer = BytesMut::zeroed(size);
        let bytes = read_at(requested.file, &mut buffer, offset + sent)
            .map_err(|error| requested.unreadable(&error))?;
        if bytes == 0 {
            break;
        }
        buffer.truncate(bytes);
        output.read(kind, bytes as u64);
        let chunk = VerifiedChunk::read(offset + sent, buffer.freeze());
        output.send(Item { unit: requested.id, body: ItemBody::Chunk(chunk) })?;
        sent += bytes as u64;
    }
    Ok(sent)
}

//! Bytes of a WAL segment.

use std::ops::Range;

use data_dir::dir::read_at;
use pg_format::wal::page::{ADDRESS_END, page_address};
use pg_format::{BLOCK_BYTES, Lsn};
use proto::Refusal;

use super::{Answered, Requested, file};
use crate::reply_stream::ReplyStream;

/// Sends a range of the WAL segment that begins at `start`. It ends before the first page whose header has
/// another position: a recycled segment is full of old WAL that nobody needs.
pub(crate) fn answer(
    output: &mut ReplyStream,
    requested: Requested<'_>,
    start: Lsn,
    range: Range<u64>,
) -> Result<Answered, Refusal> {
    let (offset, wanted) = (range.start, range.end - range.start);
    let mut usable = 0;
    let mut header = [0; ADDRESS_END];
    while usable < wanted {
        // A range may begin inside a page; its header says whether the page is in place.
        let page = offset + usable - (offset + usable) % BLOCK_BYTES;
        let bytes = read_at(requested.file, &mut header, page)
            .map_err(|error| requested.unreadable(&error))?;
        if page_address(header.get(..bytes).unwrap_or_default()) != Some(start.plus(page)) {
            break;
        }
        usable = (page + BLOCK_BYTES - offset).min(wanted);
    }
    file::chunks(output, "wal", requested, offset..offset + usable).map(Answered::of)
}

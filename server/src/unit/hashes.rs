//! Answers units that ask for page hashes, and compares runs of pages with the client's hashes.

use data_dir::dir::is_hole;
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, ControlFile};
use proto::fetch::{BlockRange, Item, ItemBody, PageContent};
use proto::hash::run_hash;
use proto::limits::RUN_PAGES;
use proto::{PageHash, Refusal};

use super::{Answered, Requested, pages};
use crate::reply_stream::ReplyStream;

/// Sends hashes of a range of pages. For a run whose hash is equal to the client's, only that is sent.
pub(crate) fn answer(
    control: &ControlFile,
    output: &mut ReplyStream,
    requested: Requested<'_>,
    range: BlockRange,
    own: &[PageHash],
) -> Result<Answered, Refusal> {
    let unit = requested.id;
    let mut first = range.first;
    let end = range.first.saturating_add(range.count);
    let mut own = own.iter();
    // Pages are hashed in runs, so that the client sees progress even on a slow disk or with `--max-rate`.
    while first < end {
        let run = BlockRange { first, count: RUN_PAGES.min(end - first) };
        let hashes = run_hashes(control, output, requested, run)?;
        let whole = hashes.len() == run.count as usize;
        let same = own.next().is_some_and(|own| whole && run_hash(&hashes) == *own);
        let body = match same {
            true => ItemBody::Same { first, count: run.count },
            false => ItemBody::PageHashes { first, hashes },
        };
        if !matches!(&body, ItemBody::PageHashes { hashes, .. } if hashes.is_empty()) {
            output.send(Item { unit, body })?;
        }
        if !whole {
            break;
        }
        first += run.count;
    }
    requested.length().map(Answered::of)
}

/// Hashes of a run of pages; fewer than it has if the file ends.
fn run_hashes(
    control: &ControlFile,
    output: &mut ReplyStream,
    requested: Requested<'_>,
    run: BlockRange,
) -> Result<Vec<PageHash>, Refusal> {
    let bytes = u64::from(run.count) * BLOCK_BYTES;
    if is_hole(requested.file, u64::from(run.first) * BLOCK_BYTES, bytes) {
        return Ok(vec![PageHash::of(&[0; BLOCK_SIZE]); run.count as usize]);
    }
    let mut hashes = Vec::with_capacity(run.count as usize);
    pages::each(control, output, "hashes", requested, run, &mut |_, _, content| {
        match content {
            PageContent::Present(page) | PageContent::Torn(page) => hashes.push(page.hash()),
            PageContent::Difference(_) | PageContent::BeyondEnd => {}
        }
        Ok(())
    })?;
    Ok(hashes)
}

//! Pages of a file, whole or as differences to the client's own.

use pg_format::{BLOCK_BYTES, ControlFile, FileClass, Fork};
use proto::Refusal;
use proto::fetch::{BlockRange, Item, ItemBody, PageContent, Signatures};

use super::{Answered, Requested};
use crate::page_delta::PageDifferences;
use crate::page_reader::{Check, Pages};
use crate::reply_stream::ReplyStream;

/// Pages read at once.
const RUN_BLOCKS: u32 = 32;

/// Sends pages.
pub(crate) fn answer(
    control: &ControlFile,
    output: &mut ReplyStream,
    requested: Requested<'_>,
    ranges: &[BlockRange],
    signatures: Option<&Signatures>,
) -> Result<Answered, Refusal> {
    let mut differences = PageDifferences::new(signatures);
    let unit = requested.id;
    for range in ranges {
        let give: &mut SendPage<'_> = &mut |output, block, content| {
            let content = differences.next(content);
            output.send(Item { unit, body: ItemBody::Page { block, content } })
        };
        each(control, output, "pages", requested, *range, give)?;
    }
    requested.length().map(Answered::of)
}

/// Receives each page.
pub(super) type SendPage<'g> =
    dyn FnMut(&mut ReplyStream, u32, PageContent) -> Result<(), Refusal> + 'g;

/// Reads pages in runs and gives each to `give`; what is read is counted as `kind`.
pub(super) fn each(
    control: &ControlFile,
    output: &mut ReplyStream,
    kind: &'static str,
    requested: Requested<'_>,
    range: BlockRange,
    give: &mut SendPage<'_>,
) -> Result<(), Refusal> {
    let Requested { path, file, .. } = requested;
    let check = Check::of(path, control.has_checksums());
    let redo = control.checkpoint_copy.redo;
    let is_map = matches!(
        FileClass::of(path),
        FileClass::Relation(segment)
            if matches!(segment.fork, Fork::FreeSpaceMap | Fork::VisibilityMap)
    );
    let pages = Pages { path, file, check, is_map, redo };
    let mut first = range.first;
    let end = range.first.saturating_add(range.count);
    while first < end {
        let run = BlockRange { first, count: RUN_BLOCKS.min(end - first) };
        output.read(kind, u64::from(run.count) * BLOCK_BYTES);
        pages.read(run, &mut |block, content| give(output, block, content))?;
        first += run.count;
    }
    Ok(())
}

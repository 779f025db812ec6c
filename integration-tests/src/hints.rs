//! Differences between two nodes that replayed the same WAL and are right all the same: hints, and
//! pages that no WAL tells of.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use client::target::wal_context;
use data_dir::DataDir;
use data_dir::wal::{LocalWal, scan};
use pg_format::page::Page;
use pg_format::wal::Start;
use pg_format::{BLOCK_SIZE, DataPath, Lsn, RelationSegment};

use crate::cluster::Node;

/// `RM_XLOG_ID`.
const XLOG: u8 = 0;

/// `XLOG_FPI_FOR_HINT`.
const IMAGE_FOR_HINT: u8 = 0xA0;

/// How far before its end a record with the image of one page can begin, page headers of the WAL
/// counted.
const IMAGE_RECORD_BYTES: u64 = 2 * BLOCK_SIZE as u64;

/// Whether the standby's page has a newer LSN than the primary's only because two sessions set
/// hints on it at one time: each logs an image, but the LSN is set only by the one that finds the
/// page not yet dirty (`MarkBufferDirtyHint`), while replay sets it from both. `ours` belongs to
/// `standby`, whose `pg_wal` must hold the image.
pub fn logged_twice(
    standby: &Node,
    (segment, block): (RelationSegment, u32),
    (ours, theirs): (&[u8], &[u8]),
) -> bool {
    let lsn = |page: &[u8]| Page::new(page).map(Page::lsn);
    let Some((newer, older)) = lsn(ours).zip(lsn(theirs)) else {
        return false;
    };
    newer > older
        && without_hints(ours.to_vec()) == without_hints(theirs.to_vec())
        && is_image_for_hint(standby, (segment, block), newer)
}

/// Whether pages that only the primary has, behind a relation's last, were never written to: a relation
/// grows by several pages at a time without WAL (`RelationAddBlocks`), and a session that ends before it
/// has used them leaves them behind.
pub fn is_unlogged_tail(tail: Option<&[u8]>) -> bool {
    let never_logged = |page: &[u8]| Page::new(page).is_some_and(|page| page.lsn() == Lsn::INVALID);
    tail.is_some_and(|tail| !tail.is_empty() && tail.chunks(BLOCK_SIZE).all(never_logged))
}

/// Whether the record that ends at `end` is an image of this block, logged for a hint.
fn is_image_for_hint(node: &Node, (segment, block): (RelationSegment, u32), end: Lsn) -> bool {
    let directory = DataDir::open(&node.data).expect("data directory");
    let control = node.control();
    let history = directory.history(control.timeline()).expect("history");
    let context = wal_context(&control);
    let wal = LocalWal { directory: &directory, history: &history, context };
    let page =
        end.as_u64().saturating_sub(IMAGE_RECORD_BYTES) / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
    let mut found = false;
    let start = Start::FirstAfter(Lsn::new(page));
    let scanned = scan(&wal, context, start, &mut |record, body| {
        if record.end < end {
            return ControlFlow::Continue(());
        }
        let names = |relation, fork, number| {
            RelationSegment::of_block(relation, fork, number) == (segment, block)
        };
        found = record.end == end
            && (record.resource_manager(), record.info() & 0xF0) == (XLOG, IMAGE_FOR_HINT)
            && body.blocks.iter().any(|b| b.restores_image && names(b.relation, b.fork, b.block));
        ControlFlow::Break(())
    });
    scanned.is_ok() && found
}

/// Block `block` of `path` must be the same on both nodes but for its hints. So must its LSN, unless
/// both are older than `start`, where replay begins: then one hint may have been logged twice.
pub fn assert_differ_in_hints(
    (ours, theirs): (&Path, &Path),
    (path, block): (&DataPath, u32),
    start: Lsn,
) {
    let page = |data: &Path| {
        let file = fs::read(data.join(path.as_str())).expect("file");
        let at = block as usize * BLOCK_SIZE;
        file[at..at + BLOCK_SIZE].to_vec()
    };
    let (ours, theirs) = (page(ours), page(theirs));
    let lsn = |page: &[u8]| Page::new(page).map_or(Lsn::INVALID, Page::lsn);
    let (our_lsn, their_lsn) = (lsn(&ours), lsn(&theirs));
    let fits = our_lsn == their_lsn || our_lsn.max(their_lsn) < start;
    assert!(fits, "block {block} of {path} stays at {our_lsn}, on the source it is at {their_lsn}");
    let (ours, theirs) = (without_hints(ours), without_hints(theirs));
    let at: Vec<_> = (0..BLOCK_SIZE).filter(|at| ours[*at] != theirs[*at]).collect();
    assert!(at.is_empty(), "block {block} of {path} stays wrong at bytes {at:?}");
}

/// A page with everything taken out that may differ between nodes that replayed the same WAL
/// (`heap_mask`): LSN, checksum, flags and prune hint of the page, what lies in its hole, flags of line
/// pointers, and of heap tuples the hint bits and the command id, which replay does not know.
fn without_hints(mut page: Vec<u8>) -> Vec<u8> {
    let word = |page: &[u8], at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    page[..12].fill(0);
    page[20..24].fill(0);
    // An SP-GiST metapage remembers pages with room, for speed alone (`SpGistUpdateMetaPage`).
    if page[24..28] == 0xBA0B_ABEE_u32.to_le_bytes() {
        page[28..92].fill(0);
    }
    let (lower, upper) = (word(&page, 12), word(&page, 14));
    let is_heap = word(&page, 16) == BLOCK_SIZE;
    if lower <= upper && upper <= BLOCK_SIZE {
        page[lower..upper].fill(0);
    }
    // Tuples are aligned, and what lies between them is nobody's.
    let mut gaps = page.clone();
    for pointer in (24..lower.min(BLOCK_SIZE)).step_by(4) {
        // 15 bits of offset, 2 of flags, 15 of length.
        let bits: [u8; 4] = page[pointer..pointer + 4].try_into().expect("four bytes");
        let bits = u32::from_le_bytes(bits);
        let (offset, length) = ((bits & 0x7FFF) as usize, bits >> 17);
        if is_heap && length >= 23 {
            // HEAP_XMIN_COMMITTED to HEAP_XMAX_INVALID.
            page[offset + 21] &= 0xF0;
            page[offset + 8..offset + 12].fill(0);
            gaps[offset..offset + length as usize].fill(0);
        }
        page[pointer..pointer + 4].copy_from_slice(&(bits & !0x1_8000).to_le_bytes());
    }
    if is_heap {
        page.iter_mut().zip(&gaps).skip(upper).for_each(|(byte, gap)| *byte ^= gap);
    }
    page
}

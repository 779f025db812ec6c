//! Reads pages and checks them, so that every page that is sent is as PostgreSQL wrote it or is marked as
//! torn (R15).

use std::fs::File;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use data_dir::dir::read_at;
use pg_format::page::Page;
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, DataPath, FileClass, Lsn};
use proto::fetch::{BlockRange, PageContent, VerifiedPage};
use proto::{Reason, Refusal};

use crate::node;

/// Times a page with a wrong checksum is read again. A server writes a page in microseconds; one
/// that stays wrong for so long is not being written.
const READS_AGAIN: u32 = 8;
const READ_PAUSE: Duration = Duration::from_millis(10);

/// How a file's pages are checked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Check {
    /// They have no checksums.
    Nothing,
    /// Their checksums count blocks from this one, the file's first.
    Checksums { first_block: u32 },
}

impl Check {
    /// How the pages of `path` are checked in a cluster with or without checksums.
    pub(crate) fn of(path: &DataPath, checksums: bool) -> Self {
        match FileClass::of(path) {
            FileClass::Relation(segment) if checksums => {
                Self::Checksums { first_block: segment.first_block() }
            }
            _ => Self::Nothing,
        }
    }

    fn fits(self, page: &[u8], block: u32) -> bool {
        match (self, Page::new(page)) {
            (Self::Nothing, _) => true,
            (Self::Checksums { first_block }, Some(page)) => {
                page.checksum_fits(first_block.saturating_add(block))
            }
            (Self::Checksums { .. }, None) => false,
        }
    }
}

/// Pages of one open file.
#[derive(Debug)]
pub(crate) struct Pages<'a> {
    pub(crate) path: &'a DataPath,
    pub(crate) file: &'a File,
    pub(crate) check: Check,
    /// Whether it is a free space or visibility map.
    pub(crate) is_map: bool,
    /// Redo position of the node's last completed checkpoint. A page with an older LSN is on disk in full, so
    /// one with a wrong checksum is damaged.
    pub(crate) redo: Lsn,
}

impl Pages<'_> {
    /// Reads a range at once and hands out each page. Pages beyond the end of the file come as
    /// [`PageContent::BeyondEnd`].
    pub(crate) fn read(
        &self,
        range: BlockRange,
        give: &mut dyn FnMut(u32, PageContent) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut buffer = BytesMut::zeroed(range.count as usize * BLOCK_SIZE);
        let offset = u64::from(range.first) * BLOCK_BYTES;
        let bytes = read_at(self.file, &mut buffer, offset).map_err(|e| self.unreadable(&e))?;
        buffer.truncate(bytes - bytes % BLOCK_SIZE);
        let mut rest = buffer.freeze();
        for block in range.first..range.first.saturating_add(range.count) {
            let content = if rest.is_empty() {
                PageContent::BeyondEnd
            } else {
                self.checked(block, rest.split_to(BLOCK_SIZE))?
            };
            give(block, content)?;
        }
        Ok(())
    }

    fn unreadable(&self, error: &io::Error) -> Refusal {
        node::internal(self.path.as_str(), error)
    }

    fn checked(&self, block: u32, page: Bytes) -> Result<PageContent, Refusal> {
        let mut page = page;
        for _ in 0..READS_AGAIN {
            if self.check.fits(&page, block) {
                return Ok(
                    VerifiedPage::read(page).map_or(PageContent::BeyondEnd, PageContent::Present)
                );
            }
            sleep(READ_PAUSE);
            let mut again = BytesMut::zeroed(BLOCK_SIZE);
            let offset = u64::from(block) * BLOCK_BYTES;
            let bytes = read_at(self.file, &mut again, offset).map_err(|e| self.unreadable(&e))?;
            if bytes < BLOCK_SIZE {
                return Ok(PageContent::BeyondEnd);
            }
            page = again.freeze();
        }
        if self.check.fits(&page, block) {
            return Ok(
                VerifiedPage::read(page).map_or(PageContent::BeyondEnd, PageContent::Present)
            );
        }
        if self.is_map {
            // PostgreSQL itself takes such a page of these forks for empty, and rebuilds it.
            let empty = BytesMut::zeroed(BLOCK_SIZE).freeze();
            return Ok(
                VerifiedPage::read(empty).map_or(PageContent::BeyondEnd, PageContent::Present)
            );
        }
        let lsn = Page::new(&page).map_or(Lsn::INVALID, Page::lsn);
        if lsn < self.redo {
            return Err(Refusal::new(
                Reason::Damaged,
                format!(
                    "block {block} of {} on the source has a wrong checksum and was last changed \
                     at {lsn}, before its last checkpoint: the source is damaged, restore or \
                     repair that relation there first",
                    self.path
                ),
            ));
        }
        Ok(VerifiedPage::read(page).map_or(PageContent::BeyondEnd, PageContent::Torn))
    }
}

//! Headers of WAL pages (`access/xlog_internal.h`).

use super::context::WalContext;
use crate::Lsn;
use crate::bytes::Fields;

/// Bytes of the header of every page but the first of a segment.
pub const SHORT_HEADER: usize = 24;
/// Bytes of the header of a segment's first page.
pub const LONG_HEADER: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const IS_LONG: u16 = 0x0002;

/// Where the position in a page's header ends (`xlp_pageaddr`).
pub const ADDRESS_END: usize = 16;

/// The position that a page was written for, from the first [`ADDRESS_END`] bytes of it; `None` if there are fewer.
pub fn page_address(header: &[u8]) -> Option<Lsn> {
    let address = header.get(8..ADDRESS_END)?.first_chunk().copied()?;
    Some(Lsn::new(u64::from_le_bytes(address)))
}

/// A WAL page header that passed every check the server makes
/// (`XLogReaderValidatePageHeader`), but for the order of timelines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The timeline the page was written on.
    pub timeline: u32,
    /// Bytes of a record that began on an earlier page and end here or later; 0 if none.
    pub continuation_bytes: u32,
    /// Whether the page begins with the rest of a record.
    pub continues: bool,
    /// Whether a record that should continue on this page was cut off by a crash and is given up
    /// (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub overwrites: bool,
    /// Bytes of this header.
    pub bytes: usize,
}

impl PageHeader {
    /// Checks the header of the page that should begin at `at`; the error says what is wrong.
    pub fn parse(page: &[u8], at: Lsn, context: &WalContext) -> Result<Self, &'static str> {
        const SHORT: &str = "page header is cut off";
        let fields = Fields::new("WAL page header", page);
        let info = fields.u16(2).map_err(|_| SHORT)?;
        if !context.format.is_page_magic(fields.u16(0).map_err(|_| SHORT)?) {
            return Err("page has no valid magic number");
        }
        if info & !context.format.page_info_bits() != 0 {
            return Err("page has unknown info bits");
        }
        if fields.u64(8).map_err(|_| SHORT)? != at.as_u64() {
            return Err("page belongs to another position (recycled segment)");
        }
        let first = context.segment_size.offset_of(at) == 0;
        if first && info & IS_LONG == 0 {
            return Err("first page of a segment has no long header");
        }
        if info & IS_LONG != 0 {
            let own = fields.u64(24).map_err(|_| SHORT)? == context.system_identifier
                && fields.u32(32).map_err(|_| SHORT)? == context.segment_size.as_u32()
                && fields.u32(36).map_err(|_| SHORT)? == 8192;
            if !own {
                return Err("segment belongs to another cluster or has another size");
            }
        }
        Ok(Self {
            timeline: fields.u32(4).map_err(|_| SHORT)?,
            continuation_bytes: fields.u32(16).map_err(|_| SHORT)?,
            continues: info & FIRST_IS_CONTRECORD != 0,
            overwrites: info & context.format.overwrite_contrecord_bit() != 0,
            bytes: if info & IS_LONG != 0 { LONG_HEADER } else { SHORT_HEADER },
        })
    }
}

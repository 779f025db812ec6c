//! WAL records: the fixed header, the block references and the main data
//! (`access/xlogrecord.h`, `DecodeXLogRecord`).

use crate::bytes::Fields;
use crate::{BLOCK_SIZE, Fork, FormatError, Lsn, RelationPath, WalFormat};

/// Resource managers of extensions have numbers from here on (`RM_MIN_CUSTOM_ID`, 15 and later).
pub(super) const EXTENSIONS: u8 = 128;

/// Bytes of the fixed header.
pub const RECORD_HEADER: usize = 24;
/// No record is longer (`XLogRecordMaxSize`).
pub const RECORD_BYTES_MAX: u32 = 1020 << 20;

const BLOCK_ID_MAX: u8 = 32;
const ID_TOP_LEVEL_XID: u8 = 252;
const ID_ORIGIN: u8 = 253;
const ID_DATA_LONG: u8 = 254;
const ID_DATA_SHORT: u8 = 255;

const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;

/// A complete record whose CRC matches.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next one may begin (`EndRecPtr`).
    pub end: Lsn,
    /// All its bytes, page headers taken out.
    pub bytes: &'a [u8],
}

/// One block a record changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockReference {
    /// The number the record gives it.
    pub id: u8,
    /// The relation.
    pub relation: RelationPath,
    /// The fork.
    pub fork: Fork,
    /// The block in the whole relation.
    pub block: u32,
    /// Whether redo restores the block from a full-page image in the record.
    pub restores_image: bool,
    /// Whether redo initialises the block without looking at its old content.
    pub initialises: bool,
}

impl BlockReference {
    /// Whether redo of this record makes the block right whatever it holds before.
    pub fn rebuilds(&self) -> bool {
        self.restores_image || self.initialises
    }
}

/// The decoded parts of a record.
#[derive(Debug, Default)]
pub struct RecordBody {
    /// The blocks it names, in order.
    pub blocks: Vec<BlockReference>,
    main_start: usize,
}

impl<'a> Record<'a> {
    fn fields(&self) -> Fields<'a> {
        Fields::new("WAL record", self.bytes)
    }

    /// The transaction that wrote it; 0 for none.
    pub fn xid(&self) -> u32 {
        self.fields().u32(4).unwrap_or(0)
    }

    /// Start of the record before it.
    pub fn previous(&self) -> Lsn {
        Lsn::new(self.fields().u64(8).unwrap_or(0))
    }

    /// The info byte: the high half belongs to the resource manager.
    pub fn info(&self) -> u8 {
        self.fields().u8(16).unwrap_or(0)
    }

    /// The resource manager.
    pub fn resource_manager(&self) -> u8 {
        self.fields().u8(17).unwrap_or(0)
    }

    /// The stored CRC, which fits.
    pub fn crc(&self) -> u32 {
        self.fields().u32(20).unwrap_or(0)
    }

    /// Whether the stored CRC of a record matches its content. It covers the body, then the header up to the
    /// CRC field.
    pub(super) fn crc_fits(bytes: &[u8]) -> bool {
        let (Some(body), Some(head)) = (bytes.get(RECORD_HEADER..), bytes.get(..20)) else {
            return false;
        };
        let stored = Fields::new("WAL record", bytes).u32(20);
        stored == Ok(crc32c::crc32c_append(crc32c::crc32c(body), head))
    }

    /// The main data, given the body decoded from this same record.
    pub fn main_data(&self, body: &RecordBody) -> &'a [u8] {
        self.bytes.get(body.main_start..).unwrap_or_default()
    }
}

/// What the header area says about the payloads that follow it.
struct Payloads {
    position: usize,
    bytes: usize,
    main: usize,
    last_relation: Option<RelationPath>,
}

impl RecordBody {
    /// Decodes `record` into this value, whose memory is used again.
    ///
    /// # Errors
    /// The CRC fits but the content makes no sense: this program and the server that wrote the
    /// record disagree about the format, so nothing may be concluded from the WAL.
    pub fn decode(&mut self, record: &Record<'_>, format: WalFormat) -> Result<(), FormatError> {
        self.blocks.clear();
        let fault = |why| FormatError::Record { at: record.lsn, why };
        let fields = record.fields();
        let total = record.bytes.len();
        let mut at = Payloads { position: RECORD_HEADER, bytes: 0, main: 0, last_relation: None };
        while total - at.position > at.bytes {
            let id = fields.u8(at.position)?;
            at.position += 1;
            match id {
                ID_DATA_SHORT => {
                    at.main = usize::from(fields.u8(at.position)?);
                    at.position += 1;
                }
                ID_DATA_LONG => {
                    let bytes = fields.u32(at.position)?;
                    at.main = usize::try_from(bytes).map_err(|_| fault("data too long"))?;
                    at.position += 4;
                }
                ID_ORIGIN => at.position += 2,
                ID_TOP_LEVEL_XID => at.position += 4,
                0..=BLOCK_ID_MAX => {
                    if self.blocks.last().is_some_and(|last| last.id >= id) {
                        return Err(fault("block references are out of order"));
                    }
                    self.block(record, format, &mut at, id)?;
                }
                _ => return Err(fault("unknown item in the record header")),
            }
            if at.position > total {
                return Err(fault("header runs past the end of the record"));
            }
            if id == ID_DATA_SHORT || id == ID_DATA_LONG {
                at.bytes = at.bytes.saturating_add(at.main);
                break;
            }
        }
        if total - at.position != at.bytes {
            return Err(fault("lengths inside the record do not add up"));
        }
        self.main_start = total - at.main;
        // Only the extension's redo function decides whether a page is restored from the image in its record.
        if record.resource_manager() >= EXTENSIONS {
            for reference in &mut self.blocks {
                (reference.restores_image, reference.initialises) = (false, false);
            }
        }
        Ok(())
    }

    fn block(
        &mut self,
        record: &Record<'_>,
        format: WalFormat,
        at: &mut Payloads,
        id: u8,
    ) -> Result<(), FormatError> {
        let fault = |why| FormatError::Record { at: record.lsn, why };
        let fields = record.fields();
        let flags = fields.u8(at.position)?;
        let data = fields.u16(at.position + 1)?;
        at.position += 3;
        let fork = Fork::from_number(flags & 0x0F).ok_or_else(|| fault("unknown fork"))?;
        if (flags & HAS_DATA != 0) != (data > 0) {
            return Err(fault("block data flag and length disagree"));
        }
        at.bytes += usize::from(data);
        let mut restores_image = false;
        if flags & HAS_IMAGE != 0 {
            restores_image = image(record, format, at)?;
        }
        if flags & SAME_RELATION == 0 {
            at.last_relation = Some(RelationPath {
                tablespace: fields.u32(at.position)?,
                database: fields.u32(at.position + 4)?,
                number: fields.u32(at.position + 8)?,
            });
            at.position += 12;
        }
        let relation =
            at.last_relation.ok_or_else(|| fault("same-relation flag without a relation"))?;
        let block = fields.u32(at.position)?;
        at.position += 4;
        let initialises = flags & WILL_INIT != 0;
        self.blocks.push(BlockReference { id, relation, fork, block, restores_image, initialises });
        Ok(())
    }
}

/// Reads the header of a block image; tells whether redo applies it.
fn image(record: &Record<'_>, format: WalFormat, at: &mut Payloads) -> Result<bool, FormatError> {
    let fault = |why| FormatError::Record { at: record.lsn, why };
    let fields = record.fields();
    let length = usize::from(fields.u16(at.position)?);
    let hole_offset = fields.u16(at.position + 2)?;
    let info = fields.u8(at.position + 4)?;
    at.position += 5;
    let compressed = format.image_is_compressed(info);
    let has_hole = info & IMAGE_HAS_HOLE != 0;
    let hole = match (has_hole, compressed) {
        (true, true) => {
            at.position += 2;
            usize::from(fields.u16(at.position - 2)?)
        }
        (true, false) => BLOCK_SIZE.saturating_sub(length),
        (false, _) => 0,
    };
    let sound = match (has_hole, compressed) {
        (true, _) => hole_offset > 0 && hole > 0 && length < BLOCK_SIZE,
        (false, true) => hole_offset == 0 && length < BLOCK_SIZE,
        (false, false) => hole_offset == 0 && length == BLOCK_SIZE,
    };
    if !sound {
        return Err(fault("block image has impossible sizes"));
    }
    at.bytes += length;
    Ok(format.image_is_applied(info))
}

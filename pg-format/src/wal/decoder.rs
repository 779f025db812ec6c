//! Reads WAL records out of pages, exactly as far as the server would (`xlogreader.c`).
//!
//! The decoder does no I/O: it says which page it wants, is fed pages of one segment, and hands
//! every valid record to a closure. It stops at the first record that is not valid, as crash
//! recovery does, and says where and why. It does not judge whether that is the true end of the
//! WAL or damage in its middle: that takes a look at what follows.

use std::ops::ControlFlow;

use super::context::WalContext;
use super::page::PageHeader;
use super::record::{RECORD_BYTES_MAX, RECORD_HEADER, Record, RecordBody};
use crate::bytes::Fields;
use crate::{BLOCK_SIZE, FormatError, Lsn};

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A record begins exactly here.
    Record(Lsn),
    /// The first record that begins at or after this page start; what is left of an earlier one is
    /// skipped.
    FirstAfter(Lsn),
}

/// Why and where valid WAL ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfWal {
    /// Where the first record begins that is not valid: the end of the last one that is.
    pub at: Lsn,
    /// The page on which reading failed: later than [`Self::at`] if a record spans pages.
    pub page: Lsn,
    /// What is wrong there.
    pub why: &'static str,
}

/// What the decoder wants after pages were fed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The page that begins here.
    Wants(Lsn),
    /// Nothing: valid WAL ends.
    End(EndOfWal),
    /// Nothing: the closure asked to stop.
    Stopped,
}

/// A record that continues on later pages.
#[derive(Debug)]
struct Partial {
    lsn: Lsn,
    total: usize,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Decoder {
    context: WalContext,
    /// Next byte to read: a record start, or the start of a page that holds one or continues one.
    position: Lsn,
    /// Whether the first record is still looked for. The rest of an earlier record at the start of the page
    /// is skipped.
    seeking: bool,
    partial: Option<Partial>,
    buffer: Vec<u8>,
    previous: Option<Lsn>,
    end: Lsn,
    latest_timeline: u32,
    /// Start of a record that is not continued (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`). The next record must be
    /// an `OVERWRITE_CONTRECORD` that names this position.
    overwritten: Option<Lsn>,
}

/// Receives the records.
struct Out<'s> {
    /// Memory for the decoded parts of one record, used again for the next.
    body: RecordBody,
    sink: &'s mut dyn FnMut(&Record<'_>, &RecordBody) -> ControlFlow<()>,
}

/// A page and its checked header.
#[derive(Clone, Copy)]
struct OpenPage<'p> {
    bytes: &'p [u8],
    at: Lsn,
    header: PageHeader,
}

/// How a step inside one page ended.
enum DecodeStep {
    /// Go on with the next record or page.
    Next,
    End(EndOfWal),
    Stopped,
}

impl Decoder {
    /// A decoder that has read no page yet.
    pub fn new(context: WalContext, start: Start) -> Self {
        let (position, seeking) = match start {
            Start::Record(lsn) => (lsn, false),
            Start::FirstAfter(lsn) => (lsn.page_start(), true),
        };
        Self {
            context,
            position,
            seeking,
            partial: None,
            buffer: Vec::new(),
            previous: None,
            end: position,
            latest_timeline: 0,
            overwritten: None,
        }
    }

    /// Start of the page that the decoder needs next.
    pub fn wants(&self) -> Lsn {
        self.position.page_start()
    }

    /// End of the last valid record, or the start if there was none.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Start of the last valid record.
    pub fn last_record(&self) -> Option<Lsn> {
        self.previous
    }

    /// The end of WAL where the next page does not exist, with the reason `why`.
    pub fn missing(&self, why: &'static str) -> EndOfWal {
        self.failed(self.wants(), why)
    }

    fn failed(&self, page: Lsn, why: &'static str) -> EndOfWal {
        EndOfWal { at: self.end, page, why }
    }

    /// Checks the header of a segment's first page, which the server does also when it starts to
    /// read in the middle of a segment.
    pub fn check_segment(&self, first_page: &[u8], start: Lsn) -> Result<(), EndOfWal> {
        let header = PageHeader::parse(first_page, start, &self.context);
        header.map(|_| ()).map_err(|why| self.failed(start, why))
    }

    /// Reads `pages`: whole pages of one segment, the first of them the one wanted.
    ///
    /// # Errors
    /// A record passed its CRC check but cannot be understood; see [`RecordBody::decode`].
    pub fn feed(
        &mut self,
        pages: &[u8],
        sink: &mut dyn FnMut(&Record<'_>, &RecordBody) -> ControlFlow<()>,
    ) -> Result<Progress, FormatError> {
        let mut out = Out { body: RecordBody::default(), sink };
        let mut first = self.wants();
        for page in pages.chunks_exact(BLOCK_SIZE) {
            if self.wants() != first {
                // A switch record voids the rest of its segment.
                break;
            }
            match self.page(page, first, &mut out)? {
                DecodeStep::Next => {}
                DecodeStep::End(end) => return Ok(Progress::End(end)),
                DecodeStep::Stopped => return Ok(Progress::Stopped),
            }
            first = first.plus(crate::BLOCK_BYTES);
        }
        Ok(Progress::Wants(self.wants()))
    }

    fn page(&mut self, page: &[u8], at: Lsn, out: &mut Out<'_>) -> Result<DecodeStep, FormatError> {
        let header = match PageHeader::parse(page, at, &self.context) {
            Ok(header) if header.timeline < self.latest_timeline => {
                return Ok(DecodeStep::End(self.failed(at, "timeline goes back")));
            }
            Ok(header) => header,
            Err(why) => return Ok(DecodeStep::End(self.failed(at, why))),
        };
        self.latest_timeline = header.timeline;
        match self.enter(OpenPage { bytes: page, at, header }, out)? {
            DecodeStep::Next => {}
            other => return Ok(other),
        }
        let page_end = at.plus(crate::BLOCK_BYTES);
        while self.partial.is_none() && self.position < page_end {
            if self.position.page_start() != at {
                break;
            }
            match self.record(page, at, out)? {
                DecodeStep::Next => {}
                other => return Ok(other),
            }
        }
        Ok(DecodeStep::Next)
    }

    /// Handles the start of a page, which may continue an earlier record. Afterwards `position` is where a
    /// record begins.
    fn enter(&mut self, page: OpenPage<'_>, out: &mut Out<'_>) -> Result<DecodeStep, FormatError> {
        let OpenPage { at, header, .. } = page;
        let content = at.plus(header.bytes as u64);
        if let Some(partial) = self.partial.take() {
            if !header.overwrites {
                return self.continued(partial, page, out);
            }
            self.overwritten = Some(partial.lsn);
            self.position = content;
            return Ok(DecodeStep::Next);
        }
        if self.seeking {
            let rest = if header.continues { header.continuation_bytes } else { 0 };
            let next = content.plus(u64::from(rest)).aligned();
            if next >= at.plus(crate::BLOCK_BYTES) {
                self.position = at.plus(crate::BLOCK_BYTES);
            } else {
                self.position = next;
                self.seeking = false;
            }
            self.end = self.position;
            return Ok(DecodeStep::Next);
        }
        if self.position == at || self.position == content {
            if header.continues {
                return Ok(DecodeStep::End(self.failed(at, "page begins inside another record")));
            }
            self.position = content;
        } else if self.position < content {
            return Ok(DecodeStep::End(self.failed(at, "position lies inside a page header")));
        }
        Ok(DecodeStep::Next)
    }

    /// Adds a page's share to a record that began earlier.
    fn continued(
        &mut self,
        mut partial: Partial,
        page: OpenPage<'_>,
        out: &mut Out<'_>,
    ) -> Result<DecodeStep, FormatError> {
        let OpenPage { bytes: page, at, header } = page;
        let missing = partial.total - partial.bytes.len();
        if !header.continues || u64::from(header.continuation_bytes) != missing as u64 {
            return Ok(DecodeStep::End(
                self.failed(at, "record is not continued on the next page"),
            ));
        }
        let share = missing.min(BLOCK_SIZE - header.bytes);
        partial
            .bytes
            .extend_from_slice(page.get(header.bytes..header.bytes + share).unwrap_or_default());
        if partial.bytes.len() < partial.total {
            self.position = at.plus(crate::BLOCK_BYTES);
            self.partial = Some(partial);
            return Ok(DecodeStep::Next);
        }
        self.position = at.plus((header.bytes + share) as u64).aligned();
        let step = self.complete(partial.lsn, &partial.bytes, at, out);
        self.buffer = partial.bytes;
        step
    }

    /// Reads the record at `position`, or the part of it that lies on this page.
    fn record(
        &mut self,
        page: &[u8],
        at: Lsn,
        out: &mut Out<'_>,
    ) -> Result<DecodeStep, FormatError> {
        let lsn = self.position;
        let rest = page.get(lsn.page_offset()..).unwrap_or_default();
        let total = Fields::new("WAL record", rest).u32(0)?;
        if (total as usize) < RECORD_HEADER {
            let why = if total == 0 { "no record" } else { "record is too short" };
            return Ok(DecodeStep::End(self.failed(at, why)));
        }
        if total > RECORD_BYTES_MAX {
            return Ok(DecodeStep::End(self.failed(at, "record is too long")));
        }
        if rest.len() >= RECORD_HEADER
            && let Err(why) = self.check_header(rest, lsn)
        {
            return Ok(DecodeStep::End(self.failed(at, why)));
        }
        let total = total as usize;
        if let Some(bytes) = rest.get(..total) {
            self.position = lsn.plus(total as u64).aligned();
            return self.complete(lsn, bytes, at, out);
        }
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.clear();
        bytes.extend_from_slice(rest);
        self.partial = Some(Partial { lsn, total, bytes });
        self.position = at.plus(crate::BLOCK_BYTES);
        Ok(DecodeStep::Next)
    }

    /// The checks of `ValidXLogRecordHeader`.
    fn check_header(&self, bytes: &[u8], lsn: Lsn) -> Result<(), &'static str> {
        let fields = Fields::new("WAL record", bytes);
        let rmid = fields.u8(17).map_err(|_| "record header is cut off")?;
        if !self.context.format.is_resource_manager(rmid) {
            return Err("record has an invalid resource manager");
        }
        let previous = Lsn::new(fields.u64(8).map_err(|_| "record header is cut off")?);
        let linked = self.previous.map_or(previous < lsn, |expected| previous == expected);
        if linked { Ok(()) } else { Err("record does not follow the one before it") }
    }

    fn complete(
        &mut self,
        lsn: Lsn,
        bytes: &[u8],
        page: Lsn,
        out: &mut Out<'_>,
    ) -> Result<DecodeStep, FormatError> {
        if let Err(why) = self.check_header(bytes, lsn) {
            return Ok(DecodeStep::End(self.failed(page, why)));
        }
        if !Record::crc_fits(bytes) {
            return Ok(DecodeStep::End(self.failed(page, "record has a wrong CRC")));
        }
        let switch =
            bytes.get(16).is_some_and(|info| info & 0xF0 == 0x40) && bytes.get(17) == Some(&0);
        if switch {
            let size = self.context.segment_size;
            let last = Lsn::new(self.position.as_u64().saturating_sub(1));
            self.position = size.start_of(size.segment_of(last) + 1);
        }
        let record = Record { lsn, end: self.position, bytes };
        out.body.decode(&record, self.context.format)?;
        if let Some(lost) = self.overwritten.take() {
            let named = super::effect::overwritten_record(&record, &out.body);
            if named != Some(lost) {
                return Ok(DecodeStep::End(
                    self.failed(page, "overwritten record is not announced"),
                ));
            }
        }
        self.previous = Some(lsn);
        self.end = self.position;
        match (out.sink)(&record, &out.body) {
            ControlFlow::Continue(()) => Ok(DecodeStep::Next),
            ControlFlow::Break(()) => Ok(DecodeStep::Stopped),
        }
    }
}

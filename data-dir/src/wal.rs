//! Reading WAL from segment files, wherever each of them comes from. What its records say is summed up in [`summary`].

pub mod digest;
pub mod parallel_scan;
pub mod summarize;
pub mod summary;

use std::fs::File;
use std::io;
use std::ops::ControlFlow;

use pg_format::wal::{
    Decoder, EndOfWal, Progress, Record, RecordBody, SegmentName, Start, WalContext,
};
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, DataPath, FormatError, Lsn, TimelineHistory};

use crate::DataDir;
use crate::dir::read_at;

/// Bytes read at once: large enough for the disk, small enough to stay in the CPU's cache.
const READ_BYTES: usize = 1 << 20;

/// Where WAL segments come from.
pub trait Segments {
    /// The file that holds segment `number`, `None` if there is none.
    fn open(&self, number: u64) -> io::Result<Option<File>>;
}

/// The segments in a node's `pg_wal`, found as the server finds them along its history: the newest
/// timeline first, but none that begins after the segment (`XLogFileReadAnyTLI`).
#[derive(Debug)]
pub struct LocalWal<'a> {
    /// The node.
    pub directory: &'a DataDir,
    /// Its history.
    pub history: &'a TimelineHistory,
    /// How its WAL is read.
    pub context: WalContext,
}

impl Segments for LocalWal<'_> {
    fn open(&self, number: u64) -> io::Result<Option<File>> {
        let size = self.context.segment_size;
        for span in self.history.spans().iter().rev() {
            if size.segment_of(span.begin) > number {
                continue;
            }
            let name = SegmentName { timeline: span.timeline, number }.file_name(size);
            let path = DataPath::new(format!("pg_wal/{name}")).map_err(io::Error::other)?;
            match self.directory.open_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result.map(Some),
            }
        }
        Ok(None)
    }
}

/// Why WAL could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The operating system reported an error.
    #[error("could not read the WAL at {at}")]
    Io {
        /// The page wanted.
        at: Lsn,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record is intact but makes no sense.
    #[error("the WAL could not be decoded")]
    Format(#[from] FormatError),
}

/// How far a scan got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// End of the last valid record.
    pub end: Lsn,
    /// Start of the last valid record, if there was any.
    pub last_record: Option<Lsn>,
    /// Why it ended; `None` if the closure stopped it.
    pub stopped_by: Option<EndOfWal>,
}

/// Receives the records of a scan.
pub type RecordSink<'s> = dyn FnMut(&Record<'_>, &RecordBody) -> ControlFlow<()> + 's;

/// Hands every record from `start` on to `sink`, until the WAL ends or `sink` breaks.
pub fn scan(
    segments: &dyn Segments,
    context: WalContext,
    start: Start,
    sink: &mut RecordSink<'_>,
) -> Result<Scanned, WalError> {
    scan_pages(segments, context, start, FirstPage::Checked, sink)
}

/// Whether the first page of every segment must be valid, as the server requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstPage {
    Checked,
    Ignored,
}

fn scan_pages(
    segments: &dyn Segments,
    context: WalContext,
    start: Start,
    first_page: FirstPage,
    sink: &mut RecordSink<'_>,
) -> Result<Scanned, WalError> {
    let mut decoder = Decoder::new(context, start);
    let size = context.segment_size;
    let mut buffer = vec![0; READ_BYTES];
    let mut open: Option<(u64, File)> = None;
    loop {
        let at = decoder.wants();
        let io = |source| WalError::Io { at, source };
        let number = size.segment_of(at);
        let file = match &open {
            Some((opened, file)) if *opened == number => file,
            _ => match segments.open(number).map_err(io)? {
                None => return Ok(ended(&decoder, decoder.missing("segment is missing"))),
                Some(file) => {
                    let got = read_at(&file, buffer.get_mut(..BLOCK_SIZE).unwrap_or_default(), 0);
                    let first = buffer.get(..got.map_err(io)?).unwrap_or_default();
                    let checked = decoder.check_segment(first, size.start_of(number));
                    if let (Err(end), FirstPage::Checked) = (checked, first_page) {
                        return Ok(ended(&decoder, end));
                    }
                    &open.insert((number, file)).1
                }
            },
        };
        let offset = size.offset_of(at);
        let wanted =
            usize::try_from(size.bytes() - offset).map_or(READ_BYTES, |n| n.min(READ_BYTES));
        let bytes =
            read_at(file, buffer.get_mut(..wanted).unwrap_or_default(), offset).map_err(io)?;
        let pages = buffer.get(..bytes - bytes % BLOCK_SIZE).unwrap_or_default();
        if pages.is_empty() {
            return Ok(ended(&decoder, decoder.missing("segment is cut short")));
        }
        match decoder.feed(pages, sink)? {
            Progress::Wants(_) => {}
            Progress::End(end) => return Ok(ended(&decoder, end)),
            Progress::Stopped => {
                let (end, last_record) = (decoder.end(), decoder.last_record());
                return Ok(Scanned { end, last_record, stopped_by: None });
            }
        }
    }
}

fn ended(decoder: &Decoder, end: EndOfWal) -> Scanned {
    Scanned { end: decoder.end(), last_record: decoder.last_record(), stopped_by: Some(end) }
}

/// Looks for intact records behind an end of WAL. They prove that the WAL is damaged there: a log that simply
/// ends has none behind its end. Returns the position of the first one found in the segment of the end or in
/// the next one that exists, up to `last_segment`.
///
/// Old records in a recycled segment are not found, because its pages carry older positions.
pub fn records_after(
    segments: &dyn Segments,
    context: WalContext,
    end: EndOfWal,
    last_segment: u64,
) -> Result<Option<Lsn>, WalError> {
    let size = context.segment_size;
    let mut page = end.page.plus(BLOCK_BYTES);
    let failed = size.segment_of(end.page);
    // The failed segment and the next one that exists: beyond a gap one segment proves enough.
    for number in size.segment_of(page)..=last_segment.max(failed) {
        let io = |source| WalError::Io { at: size.start_of(number), source };
        let Some(file) = segments.open(number).map_err(io)? else {
            page = size.start_of(number + 1);
            continue;
        };
        drop(file);
        let segment_end = size.start_of(number + 1);
        while page < segment_end {
            let mut found = None;
            let mut note = |record: &Record<'_>, _: &RecordBody| {
                found = Some(record.lsn);
                ControlFlow::Break(())
            };
            // The damage may be in the segment's first page, by which a segment is checked.
            let start = Start::FirstAfter(page);
            scan_pages(segments, context, start, FirstPage::Ignored, &mut note)?;
            if found.is_some() {
                return Ok(found);
            }
            page = page.plus(BLOCK_BYTES);
        }
        if number > failed {
            break;
        }
    }
    Ok(None)
}

//! Fetches the source's WAL into staging and follows it while the rest of the rewind runs: the
//! source may recycle a segment as soon as it has made another checkpoint.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_dir::dir::read_at;
use pg_format::wal::page::{ADDRESS_END, page_address};
use pg_format::wal::{Decoder, Progress, SegmentName, Start, WalContext};
use pg_format::{BLOCK_BYTES, BLOCK_SIZE, Lsn, TimelineHistory};
use proto::fetch::{ItemBody, Unit, UnitKind};
use proto::limits::UNIT_BYTES_MAX;

use crate::error::{Class, Replan, RewindError};
use crate::prepare::wal_pieces::Piece;
use crate::source::session::Answer;
use crate::source::{Session, Source};
use crate::staging::disk::Disk;
use crate::staging::layout;

/// Pause before the source is asked again for what it should have.
const PAUSE: Duration = Duration::from_millis(100);
/// How often new WAL is asked for while pages are fetched: a source recycles a segment no sooner
/// than at its next checkpoint.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// How long WAL that the source has announced is asked for again: it is on its disk, so what cannot be read of
/// it by then is damaged or gone.
const UNREADABLE: Duration = Duration::from_secs(10);
/// Units asked for at once: together more than a long fast link holds.
const UNITS_AT_ONCE: u64 = 4;

/// Whether the page at `offset` was written for the position `lsn` (`xlp_pageaddr`).
fn is_in_place(file: &File, offset: u64, lsn: Lsn) -> std::io::Result<bool> {
    let mut header = [0; ADDRESS_END];
    let bytes = read_at(file, &mut header, offset)?;
    Ok(page_address(header.get(..bytes).unwrap_or_default()) == Some(lsn))
}

/// Adds a page to the pieces.
fn add(pieces: &mut Vec<Piece>, page: Piece, piece_bytes: u64) {
    match pieces.last_mut() {
        Some(last)
            if last.name == page.name
                && last.offset + last.length == page.offset
                && last.length < piece_bytes =>
        {
            last.length += page.length;
        }
        _ => pieces.push(page),
    }
}

/// See the module.
#[derive(Debug)]
pub struct WalFollower {
    session: Session,
    disk: Arc<dyn Disk>,
    history: TimelineHistory,
    context: WalContext,
    decoder: Decoder,
    /// Where the decoder began, for beginning again before any record was found.
    start: Start,
    staged: BTreeSet<SegmentName>,
    fetched_bytes: u64,
    /// Whether the source did not have the segment asked for last.
    absent: bool,
    /// Where the source's WAL ended when it was asked: what lies behind need not be there yet.
    announced: Lsn,
}

impl WalFollower {
    /// A follower that begins at the page start `from`; what is before it in that segment must be
    /// staged already.
    pub fn new(source: &Source, disk: &Arc<dyn Disk>, context: WalContext, from: Lsn) -> Self {
        let start = Start::FirstAfter(from);
        let decoder = Decoder::new(context, start);
        let staged = BTreeSet::new();
        Self {
            session: source.session.clone(),
            disk: Arc::clone(disk),
            history: source.snapshot.history.clone(),
            context,
            decoder,
            start,
            staged,
            fetched_bytes: 0,
            absent: false,
            announced: Lsn::MAX,
        }
    }

    /// Stages WAL that was fetched before the plan was made.
    pub fn take_early(&mut self, name: SegmentName, answer: &Answer) -> std::io::Result<()> {
        for item in &answer.items {
            let ItemBody::Chunk(chunk) = &item.body else {
                continue;
            };
            self.staged_file(name)?;
            let path = layout::staged_wal(&name.file_name(self.context.segment_size));
            self.disk.write_at(&path, chunk.offset(), chunk.data())?;
            self.fetched_bytes += chunk.data().len() as u64;
        }
        Ok(())
    }

    /// Reads what is staged already, as far as its records are valid. The follower continues behind it.
    pub fn recover(&mut self) -> std::io::Result<()> {
        let size = self.context.segment_size;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let at = self.decoder.wants();
            let number = size.segment_of(at);
            let timeline = self.history.timeline_of_segment(number, size);
            let name = SegmentName { timeline, number };
            let file = match self.disk.open(&layout::staged_wal(&name.file_name(size))) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                file => file?,
            };
            let offset = size.offset_of(at);
            let left = usize::try_from(size.bytes() - offset).unwrap_or(usize::MAX);
            let wanted = buffer.len().min(left);
            let read = read_at(&file, buffer.get_mut(..wanted).unwrap_or_default(), offset)?;
            let whole = read - read % BLOCK_SIZE;
            let Some(pages) = buffer.get(..whole).filter(|pages| !pages.is_empty()) else {
                return Ok(());
            };
            self.staged.insert(name);
            let fed = self.decoder.feed(pages, &mut |_, _| ControlFlow::Continue(()));
            if !matches!(fed, Ok(Progress::Wants(_))) {
                self.begin_again();
                return Ok(());
            }
        }
    }

    /// The parts of the WAL up to `end` that are not staged yet, in pieces of at most `piece_bytes`. The
    /// files of all its segments exist afterwards. Pages that an earlier run has fetched, in any order, are
    /// left out: a page is there if its header has its own position. The last page before a gap is fetched
    /// again: it may have been fetched while the source was filling it, or may not have reached the disk in
    /// full.
    pub fn missing_to(&mut self, end: Lsn, piece_bytes: u64) -> std::io::Result<Vec<Piece>> {
        self.announced = end;
        let size = self.context.segment_size;
        let mut pieces: Vec<Piece> = Vec::new();
        // Valid records prove more than positions in page headers.
        if self.decoder.end() >= end {
            return Ok(pieces);
        }
        let first = self.decoder.wants().page_start();
        let mut at = first;
        let mut open: Option<(SegmentName, File)> = None;
        // The page before, if it is staged already.
        let mut before: Option<Piece> = None;
        while at < end {
            let number = size.segment_of(at);
            let name =
                SegmentName { timeline: self.history.timeline_of_segment(number, size), number };
            if open.as_ref().is_none_or(|(known, _)| *known != name) {
                open = Some((name, self.staged_file(name)?));
            }
            let page = Piece { name, offset: size.offset_of(at), length: BLOCK_BYTES };
            let there = match &open {
                Some((_, file)) if at > first => is_in_place(file, page.offset, at)?,
                _ => false,
            };
            if !there {
                before.into_iter().for_each(|page| add(&mut pieces, page, piece_bytes));
                add(&mut pieces, page, piece_bytes);
            }
            before = there.then_some(page);
            at = at.plus(BLOCK_BYTES);
        }
        before.into_iter().for_each(|page| add(&mut pieces, page, piece_bytes));
        Ok(pieces)
    }

    /// The file of a segment, made if it is not there.
    fn staged_file(&mut self, name: SegmentName) -> std::io::Result<File> {
        let path = layout::staged_wal(&name.file_name(self.context.segment_size));
        if self.staged.insert(name) && self.disk.stat(&path)?.is_none() {
            self.disk.create_file(&path)?;
        }
        self.disk.open(&path)
    }

    /// Counts WAL that was staged by the data connections.
    pub fn count(&mut self, bytes: u64) {
        self.fetched_bytes += bytes;
    }

    /// Decodes anew from the last record on: what follows it is fetched again.
    fn begin_again(&mut self) {
        if self.decoder.last_record().is_some() {
            self.start = Start::Record(self.decoder.end());
        }
        self.decoder = Decoder::new(self.context, self.start);
    }

    /// Notes a segment that was staged by somebody else.
    pub fn adopt(&mut self, name: SegmentName) {
        self.staged.insert(name);
    }

    /// Cuts the staged WAL at `end`: nothing behind it, zeros up to the end of its segment, and all
    /// of it durable.
    pub fn finish(&mut self, end: Lsn) -> std::io::Result<()> {
        let size = self.context.segment_size;
        let last = size.segment_of(Lsn::new(end.as_u64().saturating_sub(1)));
        for name in std::mem::take(&mut self.staged) {
            let path = layout::staged_wal(&name.file_name(size));
            if name.number > last {
                self.disk.remove_file(&path)?;
                continue;
            }
            if name.number == last {
                self.disk.set_length(&path, end.distance_from(size.start_of(last)))?;
            }
            self.disk.set_length(&path, size.bytes())?;
            self.disk.sync_file(&path)?;
            self.staged.insert(name);
        }
        Ok(())
    }

    /// Segments staged so far.
    pub fn staged(&self) -> &BTreeSet<SegmentName> {
        &self.staged
    }

    /// WAL bytes fetched so far, before compression.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes
    }

    /// Bytes of WAL up to `end` that have not come.
    pub fn missing_bytes(&self, end: Lsn) -> u64 {
        end.distance_from(self.decoder.end().min(end))
    }

    /// Fetches until valid WAL reaches `end`, which the source has announced. What it has written
    /// since is left alone: a busy source would never be caught up with.
    pub async fn advance_to(&mut self, end: Lsn) -> Result<(), RewindError> {
        let mut since = Instant::now();
        while self.decoder.end() < end {
            let before = self.decoder.end();
            let all_came = self.round().await?;
            if self.decoder.end() > before {
                since = Instant::now();
            } else if self.absent {
                // The source announced WAL behind a segment that it does not have: it was recycled meanwhile.
                return Err(self.gone(self.context.segment_size.segment_of(self.decoder.wants())));
            } else if since.elapsed() > UNREADABLE.min(self.session.patience()) {
                let message = format!(
                    "the source's WAL cannot be read from {before} on although it must reach {end}: run \
                     SELECT pg_switch_wal() and CHECKPOINT on the primary and try again"
                );
                return Err(RewindError::replan(Replan::WalUnavailable, message));
            }
            if !all_came {
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok(())
    }

    /// Fetches the source's WAL as it is written, and ends only with an error. The future can be dropped at
    /// any moment and leaves the follower consistent, because staging never waits.
    pub async fn follow(&mut self) -> Result<Infallible, RewindError> {
        loop {
            if !self.round().await? {
                tokio::time::sleep(FOLLOW_INTERVAL).await;
            }
        }
    }

    /// Asks once; tells whether all came that was asked for, so that there may be more at once.
    async fn round(&mut self) -> Result<bool, RewindError> {
        let size = self.context.segment_size;
        let before = self.decoder.wants();
        self.absent = false;
        let mut units = Vec::new();
        let mut at = before;
        for id in 0..UNITS_AT_ONCE {
            let number = size.segment_of(at);
            let offset = size.offset_of(at);
            let length = UNIT_BYTES_MAX.min(size.bytes() - offset);
            let timeline = self.history.timeline_of_segment(number, size);
            units.push(Unit { id, kind: UnitKind::Wal { timeline, number, offset, length } });
            at = at.plus(length);
        }
        let asked: Vec<Lsn> = units.iter().map(|unit| self.start_of(unit)).collect();
        let items = self.session.collect(units).await?;
        let mut expected = before;
        for item in items {
            let index = usize::try_from(item.unit).unwrap_or(usize::MAX);
            let Some(unit_start) = asked.get(index).copied() else {
                continue;
            };
            match item.body {
                ItemBody::Chunk(chunk) => {
                    let lsn = size.start_of(size.segment_of(unit_start)).plus(chunk.offset());
                    // After a gap nothing more can be used in this round.
                    if lsn == expected {
                        self.stage(lsn, chunk.data())?;
                        expected = lsn.plus(chunk.data().len() as u64);
                    }
                }
                ItemBody::End { vanished: true, .. } if index == 0 => {
                    self.absent = true;
                    return self.missing(size.segment_of(before)).map(|()| false);
                }
                _ => {}
            }
        }
        Ok(expected == at)
    }

    fn start_of(&self, unit: &Unit) -> Lsn {
        match unit.kind {
            UnitKind::Wal { number, offset, .. } => {
                self.context.segment_size.start_of(number).plus(offset)
            }
            _ => Lsn::INVALID,
        }
    }

    /// Handles a segment that the source does not have. If everything before it was read, the source has not
    /// written it yet; otherwise it is gone.
    fn missing(&self, number: u64) -> Result<(), RewindError> {
        let began = self.decoder.last_record().is_some() || matches!(self.start, Start::Record(_));
        let is_later = self.context.segment_size.start_of(number) >= self.announced;
        if began || is_later { Ok(()) } else { Err(self.gone(number)) }
    }

    fn gone(&self, number: u64) -> RewindError {
        let size = self.context.segment_size;
        let timeline = self.history.timeline_of_segment(number, size);
        let name = SegmentName { timeline, number }.file_name(size);
        let message = format!("the source no longer has WAL segment {name}, which replay needs");
        RewindError::replan(Replan::WalUnavailable, message)
    }

    /// Writes pages to staging and decodes them.
    fn stage(&mut self, lsn: Lsn, bytes: &[u8]) -> Result<(), RewindError> {
        let size = self.context.segment_size;
        let number = size.segment_of(lsn);
        let timeline = self.history.timeline_of_segment(number, size);
        let name = SegmentName { timeline, number };
        let path = layout::staged_wal(&name.file_name(size));
        let staging = |error| {
            RewindError::because(Class::Preflight, format!("could not write {path}"), error)
        };
        if self.staged.insert(name) && size.offset_of(lsn) == 0 {
            self.disk.create_file(&path).map_err(staging)?;
        }
        self.disk.write_at(&path, size.offset_of(lsn), bytes).map_err(staging)?;
        self.fetched_bytes += bytes.len() as u64;
        if self.decoder.wants() < lsn {
            return Ok(());
        }
        let skip = usize::try_from(self.decoder.wants().distance_from(lsn)).unwrap_or(usize::MAX);
        let whole = bytes.len() - bytes.len() % usize::try_from(BLOCK_BYTES).unwrap_or(1);
        let Some(pages) = bytes.get(skip..whole).filter(|pages| !pages.is_empty()) else {
            return Ok(());
        };
        let progress = self.decoder.feed(pages, &mut |_, _| ControlFlow::Continue(()));
        let progress = progress.map_err(|error| {
            RewindError::because(Class::Other, "could not decode the source's WAL", error)
        })?;
        if let Progress::End(_) = progress {
            // The last page was being written: it is fetched and read again from its last record.
            self.begin_again();
        }
        Ok(())
    }
}

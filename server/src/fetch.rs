//! Works on the units of one data stream.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use data_dir::DataDir;
use data_dir::dir::{is_hole, read_at};
use data_dir::proof;
use data_dir::wal::LocalWal;
use pg_format::relation::tablespace_version_directory;
use pg_format::wal::{SegmentName, Start};
use pg_format::{
    BLOCK_BYTES, BLOCK_SIZE, DataPath, FileClass, Fork, Lsn, Major, TimelineHistory, relation_map,
};
use proto::fetch::{
    BlockRange, Item, ItemBody, PageContent, ProofStart, Signatures, Unit, UnitKind, VerifiedChunk,
};
use proto::frame::Frame;
use proto::hash::run_hash;
use proto::limits::{CHUNK_BYTES, RUN_PAGES, STREAM_IDLE_TIMEOUT};
use proto::model::Node;
use proto::tls::Peer;
use proto::{PageHash, Reason, Refusal};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::allow::AllowList;
use crate::audit::Session;
use crate::changes::{self, Give, Steps};
use crate::differences::Differences;
use crate::node;
use crate::output::{Output, Rates};
use crate::pages::{Check, Pages};
use crate::served::Served;

/// Pages read at once.
const RUN_BLOCKS: u32 = 32;
/// Relation maps have 512 or 524 bytes, two-phase files seldom more than a few thousand.
const SEALED_FILE_BYTES_MAX: usize = 1 << 20;
/// Times one with a wrong CRC is read; it is written in microseconds.
const SEALED_FILE_READS: u32 = 10;
const SEALED_FILE_PAUSE: Duration = Duration::from_millis(10);
/// Segments one proof may cover, and at least one when each record is asked for.
const PROOF_SEGMENTS_MAX: u64 = 1 << 16;

/// One stream's worker; lives on a blocking thread.
pub(crate) struct Worker {
    directory: DataDir,
    served: Served,
    node: Node,
    history: TimelineHistory,
    output: Output,
    allow: Arc<AllowList>,
    peer: Arc<Peer>,
    /// Units of one file follow each other.
    open: Option<(DataPath, File)>,
    /// Whether the last unit was one of WAL.
    in_wal: bool,
}

/// What a worker is given.
pub(crate) struct Job {
    pub(crate) pgdata: PathBuf,
    pub(crate) units: Receiver<Vec<Unit>>,
    pub(crate) frames: Sender<Result<Frame, Refusal>>,
    pub(crate) rates: Option<Arc<Rates>>,
    pub(crate) session: Arc<Session>,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) peer: Arc<Peer>,
}

/// Works on all units of a stream. Blocks.
pub(crate) fn run(job: Job) {
    let frames = job.frames.clone();
    if let Err(refusal) = work(job) {
        // If the client is gone there is nobody to tell.
        drop(frames.blocking_send(Err(refusal)));
    }
}

fn work(job: Job) -> Result<(), Refusal> {
    let Job { pgdata, mut units, frames, rates, session, allow, peer } = job;
    let directory = node::open(&pgdata)?;
    let node = node::inspect(&directory)?;
    let history = node
        .history()
        .map_err(|error| Refusal::new(Reason::Damaged, format!("source: {error}")))?;
    let version = tablespace_version_directory(node.control.major, node.control.catalog_version);
    let served = Served::new(&directory, version);
    let mut worker = Worker {
        directory,
        served,
        node,
        history,
        output: Output::new(frames, rates, session),
        allow,
        peer,
        open: None,
        in_wal: false,
    };
    while let Some(batch) = next_batch(&mut units)? {
        for unit in batch {
            worker.unit(unit)?;
        }
        // The client waits for what it asked for: nothing stays behind when no unit is queued.
        if units.is_empty() {
            worker.output.flush()?;
        }
    }
    worker.output.flush()
}

/// The next units; a client that asks for nothing must not keep a thread for good.
fn next_batch(units: &mut Receiver<Vec<Unit>>) -> Result<Option<Vec<Unit>>, Refusal> {
    let waiting = tokio::time::timeout(STREAM_IDLE_TIMEOUT, units.recv());
    tokio::runtime::Handle::current()
        .block_on(waiting)
        .map_err(|_| Refusal::new(Reason::InvalidRequest, "client asks for nothing any more"))
}

impl Worker {
    fn unit(&mut self, unit: Unit) -> Result<(), Refusal> {
        // A name removed from the list is refused at its next unit, whatever is queued.
        self.allow.check(&self.peer)?;
        let id = unit.id;
        // The client puts WAL in its place and keeps frames of everything else as they come.
        let in_wal = matches!(unit.kind, UnitKind::Wal { .. });
        if std::mem::replace(&mut self.in_wal, in_wal) != in_wal {
            self.output.flush()?;
        }
        let (vanished, bytes) = match unit.kind {
            UnitKind::Blocks { path, ranges, signatures } => {
                self.blocks(id, &path, (&ranges, signatures))?
            }
            UnitKind::Hashes { path, range, own } => self.hashes(id, &path, range, &own)?,
            UnitKind::File { path, offset, length } => self.file(id, &path, offset, length)?,
            UnitKind::Wal { timeline, number, offset, length } => {
                let size = self.node.control.wal_segment_size;
                let name = SegmentName { timeline, number }.file_name(size);
                let path = DataPath::new(format!("pg_wal/{name}"))
                    .map_err(|e| Refusal::new(Reason::InvalidRequest, e.to_string()))?;
                match self.directory.open_file(&path) {
                    Ok(file) => {
                        let start = SegmentName { timeline, number }.start(size);
                        (false, self.wal(id, &path, &file, (start, offset, length))?)
                    }
                    Err(error) => missing(&path, &error)?,
                }
            }
            UnitKind::Proof { from, to, each_record } => {
                let from = match from {
                    ProofStart::Record(lsn) => Start::Record(lsn),
                    ProofStart::Segment(lsn) => Start::FirstAfter(lsn),
                };
                (false, self.proof(id, from, to, each_record)?)
            }
            UnitKind::Changes { from, to, rebuilt } => {
                (false, self.changes(id, (from, to), rebuilt)?)
            }
            UnitKind::Measure(units) => (false, self.measure(units)?),
        };
        self.output.send(Item { unit: id, body: ItemBody::End { vanished, bytes } })
    }

    /// Answers units without sending anything: how many bytes it would have been.
    fn measure(&mut self, units: Vec<Unit>) -> Result<u64, Refusal> {
        self.output.flush()?;
        self.output.measure();
        units.into_iter().try_for_each(|unit| self.unit(unit))?;
        self.output.measured()
    }

    /// Opens a file the client asked for, or the one that is open already.
    fn open(&mut self, path: &DataPath) -> Result<Option<File>, Refusal> {
        if let Some((open, file)) = &self.open
            && open == path
        {
            return file.try_clone().map(Some).map_err(|e| node::internal(path.as_str(), &e));
        }
        match self.served.serves(&self.directory, path) {
            Ok(true) => {}
            Ok(false) => {
                let message = format!("{path} is not a file this server gives to anybody");
                return Err(Refusal::new(Reason::NotServed, message));
            }
            Err(error) => return missing(path, &error).map(|_| None),
        }
        match self.directory.open_file(path) {
            Ok(file) => {
                let again = file.try_clone().map_err(|e| node::internal(path.as_str(), &e))?;
                self.open = Some((path.clone(), again));
                Ok(Some(file))
            }
            Err(error) => missing(path, &error).map(|_| None),
        }
    }

    fn blocks(
        &mut self,
        id: u64,
        path: &DataPath,
        (ranges, signatures): (&[BlockRange], Option<Signatures>),
    ) -> Result<(bool, u64), Refusal> {
        let Some(file) = self.open(path)? else {
            return Ok((true, 0));
        };
        let mut differences = Differences::new(signatures.as_ref());
        for range in ranges {
            self.each_page("pages", (path, &file), *range, &mut |worker, block, content| {
                let content = differences.next(content);
                worker.output.send(Item { unit: id, body: ItemBody::Page { block, content } })
            })?;
        }
        Ok((false, length(path, &file)?))
    }

    fn hashes(
        &mut self,
        id: u64,
        path: &DataPath,
        range: BlockRange,
        own: &[PageHash],
    ) -> Result<(bool, u64), Refusal> {
        let Some(file) = self.open(path)? else {
            return Ok((true, 0));
        };
        let mut first = range.first;
        let end = range.first.saturating_add(range.count);
        let mut own = own.iter();
        // In runs, so that a client sees that a slowed or slow disk goes on.
        while first < end {
            let run = BlockRange { first, count: RUN_PAGES.min(end - first) };
            let hashes = self.run_hashes(path, &file, run)?;
            let whole = hashes.len() == run.count as usize;
            let same = own.next().is_some_and(|own| whole && run_hash(&hashes) == *own);
            let body = match same {
                true => ItemBody::Same { first, count: run.count },
                false => ItemBody::PageHashes { first, hashes },
            };
            if !matches!(&body, ItemBody::PageHashes { hashes, .. } if hashes.is_empty()) {
                self.output.send(Item { unit: id, body })?;
            }
            if !whole {
                break;
            }
            first += run.count;
        }
        Ok((false, length(path, &file)?))
    }

    /// Hashes of a run of pages; fewer than it has if the file ends.
    fn run_hashes(
        &mut self,
        path: &DataPath,
        file: &File,
        run: BlockRange,
    ) -> Result<Vec<PageHash>, Refusal> {
        let bytes = u64::from(run.count) * BLOCK_BYTES;
        if is_hole(file, u64::from(run.first) * BLOCK_BYTES, bytes) {
            return Ok(vec![PageHash::of(&[0; BLOCK_SIZE]); run.count as usize]);
        }
        let mut hashes = Vec::with_capacity(run.count as usize);
        self.each_page("hashes", (path, file), run, &mut |_, _, content| {
            match content {
                PageContent::Present(page) | PageContent::Torn(page) => hashes.push(page.hash()),
                PageContent::Difference(_) | PageContent::BeyondEnd => {}
            }
            Ok(())
        })?;
        Ok(hashes)
    }

    fn each_page(
        &mut self,
        kind: &'static str,
        (path, file): (&DataPath, &File),
        range: BlockRange,
        give: &mut dyn FnMut(&mut Self, u32, PageContent) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let check = Check::of(path, self.node.control.has_checksums());
        let redo = self.node.control.checkpoint_copy.redo;
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
            self.output.read(kind, u64::from(run.count) * BLOCK_BYTES);
            pages.read(run, &mut |block, content| give(self, block, content))?;
            first += run.count;
        }
        Ok(())
    }

    fn file(
        &mut self,
        id: u64,
        path: &DataPath,
        offset: u64,
        wanted: u64,
    ) -> Result<(bool, u64), Refusal> {
        let Some(file) = self.open(path)? else {
            return Ok((true, 0));
        };
        let small = length(path, &file)? < SEALED_FILE_BYTES_MAX as u64;
        if path.file_name() == "pg_filenode.map" || path.is_within("pg_twophase") && small {
            return self.sealed_file(id, path, (&file, offset));
        }
        self.chunks(id, ("files", path), &file, offset..offset.saturating_add(wanted))?;
        Ok((false, length(path, &file)?))
    }

    /// Sends a small file that ends in its own CRC in one piece. Relation maps (before 16) and
    /// two-phase files are written in place, so one that was read while it was written shows by its
    /// CRC and is read again.
    fn sealed_file(
        &mut self,
        id: u64,
        path: &DataPath,
        (file, offset): (&File, u64),
    ) -> Result<(bool, u64), Refusal> {
        let unreadable = |error| node::internal(path.as_str(), &error);
        // All of it came before the link was cut.
        if offset > 0 {
            return Ok((false, length(path, file)?));
        }
        for _ in 0..SEALED_FILE_READS {
            let mut bytes = BytesMut::zeroed(SEALED_FILE_BYTES_MAX);
            let length = read_at(file, &mut bytes, 0).map_err(unreadable)?;
            bytes.truncate(length);
            if crc_at_the_end_fits(path, &bytes, self.node.control.major) {
                self.output.read("files", length as u64);
                let chunk = VerifiedChunk::read(0, bytes.freeze());
                self.output.send(Item { unit: id, body: ItemBody::Chunk(chunk) })?;
                return Ok((false, length as u64));
            }
            // Dropped while it was read.
            if !matches!(file.metadata().map(|m| m.nlink()), Ok(1..)) {
                return Ok((true, 0));
            }
            std::thread::sleep(SEALED_FILE_PAUSE);
        }
        let message = format!("{path} on the source has a wrong CRC: the source is damaged");
        Err(Refusal::new(Reason::Damaged, message))
    }

    /// Sends bytes of a file until the range is sent or it ends; returns how many were.
    fn chunks(
        &mut self,
        id: u64,
        (kind, path): (&'static str, &DataPath),
        file: &File,
        range: std::ops::Range<u64>,
    ) -> Result<u64, Refusal> {
        let (offset, wanted) = (range.start, range.end - range.start);
        let mut sent = 0;
        while sent < wanted {
            let size = usize::try_from(wanted - sent).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            let mut buffer = BytesMut::zeroed(size);
            let bytes = read_at(file, &mut buffer, offset + sent)
                .map_err(|e| node::internal(path.as_str(), &e))?;
            if bytes == 0 {
                break;
            }
            buffer.truncate(bytes);
            self.output.read(kind, bytes as u64);
            let chunk = VerifiedChunk::read(offset + sent, buffer.freeze());
            self.output.send(Item { unit: id, body: ItemBody::Chunk(chunk) })?;
            sent += bytes as u64;
        }
        Ok(sent)
    }

    /// Sends WAL from `offset` on, but nothing behind the first page that was not written at its
    /// place: a recycled segment is full of old WAL that nobody needs.
    fn wal(
        &mut self,
        id: u64,
        path: &DataPath,
        file: &File,
        (start, offset, wanted): (Lsn, u64, u64),
    ) -> Result<u64, Refusal> {
        let unreadable = |error| node::internal(path.as_str(), &error);
        let mut usable = 0;
        let mut header = [0; 16];
        while usable < wanted {
            // A range may begin inside a page; its header says whether the page is in place.
            let page = offset + usable - (offset + usable) % BLOCK_BYTES;
            let bytes = read_at(file, &mut header, page).map_err(unreadable)?;
            let address = header.last_chunk().copied().map(u64::from_le_bytes);
            if bytes < header.len() || address != Some(start.plus(page).as_u64()) {
                break;
            }
            usable = (page + BLOCK_BYTES - offset).min(wanted);
        }
        self.chunks(id, ("wal", path), file, offset..offset + usable)
    }

    fn changes(&mut self, id: u64, (from, to): (Lsn, Lsn), asked: bool) -> Result<u64, Refusal> {
        let size = self.node.control.wal_segment_size;
        if to.distance_from(from) > PROOF_SEGMENTS_MAX.saturating_mul(size.bytes()) {
            return Err(Refusal::new(Reason::InvalidRequest, "changes of too many segments"));
        }
        let Self { directory, node, history, output, .. } = self;
        let steps = Steps::new((from, to), output.is_limited());
        let give: &mut Give<'_> = &mut |read, change| {
            output.read("changes", read);
            output.send(Item { unit: id, body: ItemBody::Change(change) })
        };
        let node = (&*directory, &*node, &*history);
        let end = match asked {
            true => changes::rebuilt(node, steps, give)?,
            false => changes::changes(node, steps, give)?,
        };
        Ok(end.as_u64())
    }

    fn proof(&mut self, id: u64, from: Start, to: Lsn, each_record: bool) -> Result<u64, Refusal> {
        let context = node::wal_context(&self.node.control);
        let size = context.segment_size;
        let first = match from {
            Start::Record(lsn) | Start::FirstAfter(lsn) => lsn,
        };
        let segments = if each_record { 1 } else { PROOF_SEGMENTS_MAX };
        if to.distance_from(first) > segments.saturating_mul(size.bytes()) {
            return Err(Refusal::new(Reason::InvalidRequest, "a proof of too many segments"));
        }
        // Nothing is collected: replies leave as they are made, so memory has a bound and the
        // client sees that the work goes on.
        let Self { directory, history, output, .. } = self;
        let wal = LocalWal { directory, history, context };
        let mut failed = None;
        let mut give = |body| match output.send(Item { unit: id, body }) {
            Ok(()) => ControlFlow::Continue(()),
            Err(refusal) => {
                failed = Some(refusal);
                ControlFlow::Break(())
            }
        };
        let end = if each_record {
            proof::records(&wal, context, from, to, &mut |lsn, crc| {
                give(ItemBody::RecordCrc { lsn, crc })
            })
        } else {
            proof::digests(&wal, context, from, to, &mut |segment| {
                let digest = PageHash::from_bytes(segment.digest);
                let (number, records) = (segment.number, segment.records);
                give(ItemBody::SegmentDigest { number, records, digest })
            })
        };
        let end = end.map_err(|error| node::internal("its WAL", &error))?;
        failed.map_or(Ok(end.as_u64()), Err)
    }
}

/// Checks the CRC-32C a small file ends in: a relation map (`relmapper.c`, 62 entries up to 15, 64
/// from 16 on, padding behind the CRC before 16) or a two-phase file (`twophase.c`).
fn crc_at_the_end_fits(path: &DataPath, bytes: &[u8], major: Major) -> bool {
    if path.file_name() == "pg_filenode.map" {
        return relation_map::parse(bytes, major).is_ok();
    }
    let at = bytes.len().saturating_sub(4);
    let stored = bytes.get(at..at + 4).and_then(|crc| crc.try_into().ok()).map(u32::from_le_bytes);
    stored == bytes.get(..at).map(crc32c::crc32c)
}

fn length(path: &DataPath, file: &File) -> Result<u64, Refusal> {
    file.metadata().map(|m| m.len()).map_err(|e| node::internal(path.as_str(), &e))
}

/// A file that vanished is normal on a live node; any other error is not.
fn missing(path: &DataPath, error: &io::Error) -> Result<(bool, u64), Refusal> {
    if error.kind() == io::ErrorKind::NotFound {
        return Ok((true, 0));
    }
    Err(node::internal(path.as_str(), error))
}

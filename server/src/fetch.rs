//! Works on the units of one data stream.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use data_dir::DataDir;
use data_dir::dir::read_at;
use data_dir::proof;
use data_dir::wal::LocalWal;
use pg_format::relation::tablespace_version_directory;
use pg_format::wal::{SegmentName, Start};
use pg_format::{BLOCK_BYTES, DataPath, FileClass, Fork, Lsn, TimelineHistory};
use proto::fetch::{
    BlockRange, Item, ItemBody, PageContent, ProofStart, Unit, UnitKind, VerifiedChunk,
};
use proto::frame::{Frame, FrameEncoder};
use proto::limits::CHUNK_BYTES;
use proto::model::Node;
use proto::rate::RateLimit;
use proto::tls::Peer;
use proto::{PageHash, Reason, Refusal};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::allow::AllowList;
use crate::audit::Audit;
use crate::node;
use crate::pages::{Check, Pages};
use crate::served::Served;

/// Pages read at once.
const RUN_BLOCKS: u32 = 32;
/// A frame that is not full is sent after so long; far below the client's progress deadline.
const FRAME_AGE_MAX: Duration = Duration::from_secs(5);
/// Relation maps have 512 or 524 bytes.
const RELATION_MAP_BYTES_MAX: usize = 1024;
/// Times one with a wrong CRC is read; it is written in microseconds.
const MAP_READS: u32 = 10;
const MAP_PAUSE: Duration = Duration::from_millis(10);
/// Segments one proof may cover, and records when each of them is asked for: bounds on memory.
const PROOF_SEGMENTS_MAX: u64 = 1 << 16;
/// See [`PROOF_SEGMENTS_MAX`]; a 64 MiB segment of the smallest records has two million.
const PROOF_RECORDS_MAX: usize = 4 << 20;

/// One stream's worker; lives on a blocking thread.
pub(crate) struct Worker {
    directory: DataDir,
    served: Served,
    node: Node,
    history: TimelineHistory,
    encoder: FrameEncoder,
    frames: Sender<Result<Frame, Refusal>>,
    rate: Option<Arc<RateLimit>>,
    audit: Audit,
    allow: Arc<AllowList>,
    peer: Arc<Peer>,
    last_frame: Instant,
    /// Units of one file follow each other.
    open: Option<(DataPath, File)>,
}

/// What a worker is given.
pub(crate) struct Job {
    pub(crate) pgdata: PathBuf,
    pub(crate) units: Receiver<Vec<Unit>>,
    pub(crate) frames: Sender<Result<Frame, Refusal>>,
    pub(crate) rate: Option<Arc<RateLimit>>,
    pub(crate) audit: Audit,
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
    let Job { pgdata, mut units, frames, rate, audit, allow, peer } = job;
    let directory = node::open(&pgdata)?;
    let node = node::inspect(&directory)?;
    let history = node
        .history()
        .map_err(|error| Refusal::new(Reason::Damaged, format!("source: {error}")))?;
    let version = tablespace_version_directory(node.control.major, node.control.catalog_version);
    let served = Served::new(&directory, version);
    let encoder = FrameEncoder::new();
    let mut worker = Worker {
        directory,
        served,
        node,
        history,
        encoder,
        frames,
        rate,
        audit,
        allow,
        peer,
        last_frame: Instant::now(),
        open: None,
    };
    while let Some(batch) = units.blocking_recv() {
        for unit in batch {
            worker.unit(unit)?;
        }
        // The client waits for what it asked for: nothing stays behind when no unit is queued.
        if units.is_empty() {
            worker.flush()?;
        }
    }
    worker.flush()
}

impl Worker {
    fn unit(&mut self, unit: Unit) -> Result<(), Refusal> {
        // A name removed from the list is refused at its next unit, whatever is queued.
        self.allow.check(&self.peer)?;
        let id = unit.id;
        let (vanished, bytes) = match unit.kind {
            UnitKind::Blocks { path, ranges } => self.blocks(id, &path, &ranges)?,
            UnitKind::Hashes { path, range } => self.hashes(id, &path, range)?,
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
        };
        self.send(Item { unit: id, body: ItemBody::End { vanished, bytes } })
    }

    fn send(&mut self, item: Item) -> Result<(), Refusal> {
        match self.encoder.push(item) {
            Some(frame) => self.send_frame(frame),
            // Hashing reads much and sends little: the client must see that it goes on.
            None if self.last_frame.elapsed() > FRAME_AGE_MAX => self.flush(),
            None => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        match self.encoder.flush() {
            Some(frame) => self.send_frame(frame),
            None => Ok(()),
        }
    }

    fn send_frame(&mut self, frame: Frame) -> Result<(), Refusal> {
        let bytes = frame.payload.len();
        self.last_frame = Instant::now();
        if let Some(rate) = &self.rate {
            rate.wait(bytes);
        }
        self.audit.sent(bytes);
        let gone = |_| Refusal::new(Reason::InvalidRequest, "client is gone");
        self.frames.blocking_send(Ok(frame)).map_err(gone)
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
        ranges: &[BlockRange],
    ) -> Result<(bool, u64), Refusal> {
        let Some(file) = self.open(path)? else {
            return Ok((true, 0));
        };
        for range in ranges {
            self.audit.served("pages", u64::from(range.count) * BLOCK_BYTES);
            self.each_page(path, &file, *range, &mut |worker, block, content| {
                worker.send(Item { unit: id, body: ItemBody::Page { block, content } })
            })?;
        }
        Ok((false, length(path, &file)?))
    }

    fn hashes(
        &mut self,
        id: u64,
        path: &DataPath,
        range: BlockRange,
    ) -> Result<(bool, u64), Refusal> {
        let Some(file) = self.open(path)? else {
            return Ok((true, 0));
        };
        self.audit.served("hashes", u64::from(range.count) * BLOCK_BYTES);
        let mut hashes: Vec<PageHash> = Vec::new();
        self.each_page(path, &file, range, &mut |_, _, content| {
            match content {
                PageContent::Present(page) | PageContent::Torn(page) => hashes.push(page.hash()),
                PageContent::BeyondEnd => {}
            }
            Ok(())
        })?;
        self.send(Item { unit: id, body: ItemBody::PageHashes { first: range.first, hashes } })?;
        Ok((false, length(path, &file)?))
    }

    fn each_page(
        &mut self,
        path: &DataPath,
        file: &File,
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
        if path.file_name() == "pg_filenode.map" {
            return self.relation_map(id, path, &file);
        }
        self.audit.served("files", wanted);
        self.chunks(id, path, &file, offset..offset.saturating_add(wanted))?;
        Ok((false, length(path, &file)?))
    }

    /// Sends a relation map in one piece. Before 16 it is overwritten in place, so one that was read
    /// while it was written shows by its CRC and is read again.
    fn relation_map(
        &mut self,
        id: u64,
        path: &DataPath,
        file: &File,
    ) -> Result<(bool, u64), Refusal> {
        let unreadable = |error| node::internal(path.as_str(), &error);
        for _ in 0..MAP_READS {
            let mut bytes = BytesMut::zeroed(RELATION_MAP_BYTES_MAX);
            let length = read_at(file, &mut bytes, 0).map_err(unreadable)?;
            bytes.truncate(length);
            if relation_map_is_sound(&bytes) {
                let chunk = VerifiedChunk::read(0, bytes.freeze());
                self.send(Item { unit: id, body: ItemBody::Chunk(chunk) })?;
                return Ok((false, length as u64));
            }
            std::thread::sleep(MAP_PAUSE);
        }
        let message = format!("{path} on the source has a wrong CRC: the source is damaged");
        Err(Refusal::new(Reason::Damaged, message))
    }

    /// Sends bytes of a file until the range is sent or it ends; returns how many were.
    fn chunks(
        &mut self,
        id: u64,
        path: &DataPath,
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
            let chunk = VerifiedChunk::read(offset + sent, buffer.freeze());
            self.send(Item { unit: id, body: ItemBody::Chunk(chunk) })?;
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
        self.audit.served("wal", usable);
        self.chunks(id, path, file, offset..offset + usable)
    }

    fn proof(&mut self, id: u64, from: Start, to: Lsn, each_record: bool) -> Result<u64, Refusal> {
        let mut items = Vec::new();
        let context = node::wal_context(&self.node.control);
        let size = context.segment_size;
        let first = match from {
            Start::Record(lsn) | Start::FirstAfter(lsn) => lsn,
        };
        let segments = if each_record { 1 } else { PROOF_SEGMENTS_MAX };
        if to.distance_from(first) > segments.saturating_mul(size.bytes()) {
            return Err(Refusal::new(Reason::InvalidRequest, "a proof of too many segments"));
        }
        let wal = LocalWal { directory: &self.directory, history: &self.history, context };
        let end = if each_record {
            proof::records(&wal, context, from, to, &mut |lsn, crc| {
                if items.len() < PROOF_RECORDS_MAX {
                    items.push(ItemBody::RecordCrc { lsn, crc });
                }
            })
        } else {
            proof::digests(&wal, context, from, to, &mut |segment| {
                let digest = PageHash::from_bytes(segment.digest);
                let (number, records) = (segment.number, segment.records);
                items.push(ItemBody::SegmentDigest { number, records, digest });
            })
        };
        let end = end.map_err(|error| node::internal("its WAL", &error))?;
        for body in items {
            self.send(Item { unit: id, body })?;
        }
        Ok(end.as_u64())
    }
}

/// Checks the CRC of a relation map (`relmapper.c`): 62 entries up to 15, 64 from 16 on.
fn relation_map_is_sound(bytes: &[u8]) -> bool {
    let at = match bytes.len() {
        512 => 504,
        524 => 520,
        _ => return false,
    };
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

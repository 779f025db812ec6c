//! Works on the units of one data stream.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use data_dir::DataDir;
use data_dir::private_keys::KeyVerdicts;
use data_dir::wal::LocalWal;
use pg_format::relation::tablespace_version_directory;
use pg_format::wal::SegmentName;
use pg_format::{ControlFile, DataPath, TimelineHistory};
use proto::fetch::{Item, ItemBody, Unit, UnitKind};
use proto::frame::Frame;
use proto::limits::STREAM_IDLE_TIMEOUT;
use proto::model::Node;
use proto::tls::Peer;
use proto::{Reason, Refusal};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::allow::AllowList;
use crate::audit::AuditSession;
use crate::node;
use crate::refusal_log::RefusalLog;
use crate::reply_stream::{RateLimits, ReplyStream};
use crate::request_budget::HeldBytes;
use crate::served_files::Served;
use crate::unit::{Answered, Requested, changes, file, hashes, missing, pages, proof, wal};

/// One stream's worker; lives on a blocking thread.
pub(crate) struct StreamWorker {
    directory: DataDir,
    served: Served,
    node: Node,
    history: TimelineHistory,
    output: ReplyStream,
    allow: Arc<AllowList>,
    peer: Arc<Peer>,
    /// The file of the last unit: units of one file follow each other.
    open: Option<(DataPath, File)>,
    /// Whether the last unit was one of WAL.
    in_wal: bool,
}

/// Units that wait, and the memory they take.
pub(crate) struct QueuedUnits {
    pub(crate) units: Vec<Unit>,
    pub(crate) _held: HeldBytes,
}

/// What a worker is given.
pub(crate) struct StreamJob {
    pub(crate) pgdata: PathBuf,
    pub(crate) verdicts: Arc<KeyVerdicts>,
    pub(crate) units: Receiver<QueuedUnits>,
    pub(crate) frames: Sender<Result<Frame, Refusal>>,
    pub(crate) rates: Option<Arc<RateLimits>>,
    pub(crate) session: Arc<AuditSession>,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) peer: Arc<Peer>,
}

/// Works on all units of a stream. Blocks.
pub(crate) fn run(job: StreamJob, log: &RefusalLog) {
    let (frames, address) = (job.frames.clone(), job.peer.address);
    if let Err(refusal) = work(job) {
        log.note("refused a call", address, &refusal);
        // If the client is gone there is nobody to tell.
        drop(frames.blocking_send(Err(refusal)));
    }
}

fn work(job: StreamJob) -> Result<(), Refusal> {
    let StreamJob { pgdata, verdicts, mut units, frames, rates, session, allow, peer } = job;
    let directory = node::open(&pgdata)?;
    let node = node::inspect(&directory)?;
    let history = node.history().map_err(|error| {
        Refusal::new(
            Reason::Damaged,
            format!("the source's timeline history is not usable: {error}"),
        )
    })?;
    let version = tablespace_version_directory(node.control.major, node.control.catalog_version);
    let served = Served::new(&directory, node.control.major, version, verdicts)?;
    let mut worker = StreamWorker {
        directory,
        served,
        node,
        history,
        output: ReplyStream::new(frames, rates, session, &peer.fingerprint),
        allow,
        peer,
        open: None,
        in_wal: false,
    };
    while let Some(batch) = next_batch(&mut units)? {
        for unit in batch.units {
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
fn next_batch(units: &mut Receiver<QueuedUnits>) -> Result<Option<QueuedUnits>, Refusal> {
    let waiting = tokio::time::timeout(STREAM_IDLE_TIMEOUT, units.recv());
    tokio::runtime::Handle::current().block_on(waiting).map_err(|_| {
        Refusal::new(Reason::InvalidRequest, "the client sent no request for too long")
    })
}

impl StreamWorker {
    fn unit(&mut self, unit: Unit) -> Result<(), Refusal> {
        // A name removed from the list is refused at its next unit, whatever is queued.
        self.allow.check(&self.peer)?;
        let id = unit.id;
        self.output.begin(id);
        // The client writes WAL to its place and stores other frames as they come, so a frame has only one of
        // the two.
        let in_wal = matches!(unit.kind, UnitKind::Wal { .. });
        if std::mem::replace(&mut self.in_wal, in_wal) != in_wal {
            self.output.flush()?;
        }
        let Answered { vanished, bytes } = self.answer(id, unit.kind)?;
        self.output.send(Item { unit: id, body: ItemBody::End { vanished, bytes } })
    }

    fn answer(&mut self, id: u64, kind: UnitKind) -> Result<Answered, Refusal> {
        match kind {
            UnitKind::Blocks { path, ranges, signatures } => {
                self.file(id, &path, |control, output, requested| {
                    pages::answer(control, output, requested, &ranges, signatures.as_ref())
                })
            }
            UnitKind::Hashes { path, range, own } => {
                self.file(id, &path, |control, output, requested| {
                    hashes::answer(control, output, requested, range, &own)
                })
            }
            UnitKind::File { path, offset, length } => {
                self.file(id, &path, |control, output, requested| {
                    let range = offset..offset.saturating_add(length);
                    file::answer(control.major, output, requested, range)
                })
            }
            UnitKind::Wal { timeline, number, offset, length } => self.wal(
                id,
                SegmentName { timeline, number },
                offset..offset.saturating_add(length),
            ),
            UnitKind::Proof { from, to, each_record } => {
                let Self { directory, history, output, node, .. } = self;
                let wal =
                    LocalWal { directory, history, context: node::wal_context(&node.control) };
                proof::answer(&wal, output, id, proof::ProofRange { from, to, each_record })
            }
            UnitKind::Changes { from, to, rebuilt } => {
                let Self { directory, history, output, node, .. } = self;
                let wal =
                    LocalWal { directory, history, context: node::wal_context(&node.control) };
                let wanted = match rebuilt {
                    true => changes::ChangesWanted::Rebuilt,
                    false => changes::ChangesWanted::Changes,
                };
                changes::answer(&wal, output, id, from..to, wanted)
            }
            UnitKind::Measure(units) => self.measure(units),
        }
    }

    /// Answers units without sending anything; returns how many bytes the answers would take.
    fn measure(&mut self, units: Vec<Unit>) -> Result<Answered, Refusal> {
        self.output.flush()?;
        self.output.measure();
        units.into_iter().try_for_each(|unit| self.unit(unit))?;
        self.output.measured().map(Answered::of)
    }

    /// Answers a unit that asks for a file, if it is there.
    fn file(
        &mut self,
        id: u64,
        path: &DataPath,
        answer: impl FnOnce(&ControlFile, &mut ReplyStream, Requested<'_>) -> Result<Answered, Refusal>,
    ) -> Result<Answered, Refusal> {
        match self.open(path)? {
            Some(file) => {
                let requested = Requested { id, path, file: &file };
                answer(&self.node.control, &mut self.output, requested)
            }
            None => Ok(Answered::GONE),
        }
    }

    fn wal(
        &mut self,
        id: u64,
        name: SegmentName,
        range: std::ops::Range<u64>,
    ) -> Result<Answered, Refusal> {
        let size = self.node.control.wal_segment_size;
        let path = DataPath::new(format!("pg_wal/{}", name.file_name(size)))
            .map_err(|e| Refusal::new(Reason::InvalidRequest, e.to_string()))?;
        match self.directory.open_file(&path) {
            Ok(file) => {
                let requested = Requested { id, path: &path, file: &file };
                wal::answer(&mut self.output, requested, name.start(size), range)
            }
            Err(error) => missing(&path, &error),
        }
    }

    /// Opens a file the client asked for, or the one that is open already.
    fn open(&mut self, path: &DataPath) -> Result<Option<File>, Refusal> {
        if let Some((open, file)) = &self.open
            && open == path
        {
            return file.try_clone().map(Some).map_err(|e| node::internal(path.as_str(), &e));
        }
        let Self { served, directory, output, .. } = self;
        match served.serves(directory, path, &mut |bytes| output.read("searched", bytes)) {
            Ok(true) => {}
            Ok(false) => {
                let message = format!("{path} is not a file that this server serves");
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
}

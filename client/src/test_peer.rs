//! A source within this process: a real server of the protocol over streams in memory. What it answers is decided
//! by each test.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use pg_format::{BLOCK_SIZE, Lsn};
use proto::fetch::{Item, ItemBody, PageContent, Unit, UnitKind, VerifiedChunk, VerifiedPage};
use proto::frame::{Frame, FrameEncoder};
use proto::model::{Description, FileEntry, Sealed};
use proto::service::{
    FileEntries, FrameReceiver, Handler, ListPart, PackedEntries, Units, service,
};
use proto::tls::Peer;
use proto::{Reason, Refusal};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_stream::StreamExt as _;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;

use crate::error::RewindError;
use crate::source::dial::{ByteStream, Dial, Dialled};

/// Bytes of a stream that may be on their way in each direction.
const STREAM_BYTES: usize = 1 << 20;

/// What the peer does about a unit.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Sends these, and its end.
    Whole(Vec<ItemBody>),
    /// Sends these, whatever they are, and goes on with the next unit.
    Items(Vec<ItemBody>),
    /// Sends these, and then the connection is lost.
    Cut(Vec<ItemBody>),
    /// Refuses.
    Refused(Refusal),
    /// Sends a frame without anything in it.
    EmptyFrame,
    /// Sends nothing any more.
    Silence,
}

type Answer = Box<dyn Fn(&Unit) -> Reply + Send + Sync>;

/// See the module. Clones are the same peer.
#[derive(Clone)]
pub(crate) struct TestPeer(Arc<State>);

struct State {
    /// What it says of itself.
    description: Mutex<Result<Description, Refusal>>,
    /// The files that it lists.
    files: Vec<FileEntry>,
    /// Redo position that comes with each list.
    list_redo: Lsn,
    answer: Answer,
    /// Connections that may be made.
    connections_max: AtomicUsize,
    links: Mutex<Vec<AbortHandle>>,
    asked: Mutex<Vec<Unit>>,
    lists: AtomicUsize,
    /// Where replay must end.
    end: Lsn,
}

impl std::fmt::Debug for TestPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestPeer").finish_non_exhaustive()
    }
}

fn locked<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock()
}

impl TestPeer {
    /// A peer that says this of itself, lists no file and answers units like this.
    pub(crate) fn new(
        description: Description,
        answer: impl Fn(&Unit) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let list_redo = description.node.control.checkpoint_copy.redo;
        Self(Arc::new(State {
            description: Mutex::new(Ok(description)),
            files: Vec::new(),
            list_redo,
            answer: Box::new(answer),
            connections_max: AtomicUsize::new(usize::MAX),
            links: Mutex::default(),
            asked: Mutex::default(),
            lists: AtomicUsize::new(0),
            end: Lsn::INVALID,
        }))
    }

    /// The same peer before anybody knows it, changed.
    fn changed(mut self, change: impl FnOnce(&mut State)) -> Self {
        change(Arc::get_mut(&mut self.0).expect("nobody knows it yet"));
        self
    }

    /// Lists these files, with this redo position.
    pub(crate) fn listing(self, files: Vec<FileEntry>, redo: Lsn) -> Self {
        self.changed(|state| (state.files, state.list_redo) = (files, redo))
    }

    /// Says that replay must end there.
    pub(crate) fn ending(self, end: Lsn) -> Self {
        self.changed(|state| state.end = end)
    }

    /// Says this of itself from now on.
    pub(crate) fn say(&self, now: Result<Description, Refusal>) {
        *locked(&self.0.description) = now;
    }

    /// Lets nobody connect any more who would be one more than these.
    pub(crate) fn limit_connections(&self, most: usize) {
        self.0.connections_max.store(most, Ordering::Relaxed);
    }

    /// Breaks all connections that there are.
    pub(crate) fn cut(&self) {
        locked(&self.0.links).iter().for_each(AbortHandle::abort);
    }

    /// Connections that were made.
    pub(crate) fn connections(&self) -> usize {
        locked(&self.0.links).len()
    }

    /// Units that were asked for, in the order in which they came.
    pub(crate) fn asked(&self) -> Vec<Unit> {
        locked(&self.0.asked).clone()
    }

    /// File lists that were asked for.
    pub(crate) fn lists(&self) -> usize {
        self.0.lists.load(Ordering::Relaxed)
    }
}

#[tonic::async_trait]
impl Dial for TestPeer {
    async fn reach(&self) -> Result<Dialled, RewindError> {
        if self.connections() >= self.0.connections_max.load(Ordering::Relaxed) {
            return Err(RewindError::transient("the peer takes no connection"));
        }
        let (ours, mut near) = tokio::io::duplex(STREAM_BYTES);
        let (mut far, theirs) = tokio::io::duplex(STREAM_BYTES);
        let link = tokio::spawn(async move {
            drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
        });
        locked(&self.0.links).push(link.abort_handle());
        let peer = Arc::new(client_identity());
        let service = InterceptedService::new(
            service(Arc::new(self.clone())),
            move |mut request: tonic::Request<()>| {
                request.extensions_mut().insert(Arc::clone(&peer));
                Ok(request)
            },
        );
        let incoming = tokio_stream::once(Ok::<_, io::Error>(theirs));
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming.chain(tokio_stream::pending()));
        tokio::spawn(serving);
        let handshake = async move { Ok(Box::new(ours) as Box<dyn ByteStream>) };
        Ok(Dialled { round_trip: Duration::ZERO, handshake: Box::pin(handshake) })
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}

fn client_identity() -> Peer {
    Peer {
        alternative_names: None,
        common_name: Some("target.example".to_owned()),
        fingerprint: String::new(),
        expires: i64::MAX,
        chain: Vec::new(),
        address: ([127, 0, 0, 1], 1).into(),
        congestion_control: None,
    }
}

#[tonic::async_trait]
impl Handler for TestPeer {
    async fn describe(&self, _peer: Arc<Peer>) -> Result<Description, Refusal> {
        locked(&self.0.description).clone()
    }

    async fn list_files(&self, _peer: Arc<Peer>) -> Result<FileEntries, Refusal> {
        self.0.lists.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel(2);
        let entries = PackedEntries::new(self.0.files.clone())?;
        for part in [ListPart::Entries(entries), ListPart::Complete { redo: self.0.list_redo }] {
            sender.try_send(Ok(part)).expect("there is room");
        }
        Ok(receiver)
    }

    async fn fetch(&self, _peer: Arc<Peer>, mut units: Units) -> Result<FrameReceiver, Refusal> {
        let (frames, receiver) = mpsc::channel(1);
        let state = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut encoder = FrameEncoder::new();
            while let Ok(Some(batch)) = units.next().await {
                for unit in batch.units {
                    locked(&state.asked).push(unit.clone());
                    let reply = (state.answer)(&unit);
                    if !send(&mut encoder, &frames, unit.id, reply).await {
                        return;
                    }
                }
            }
        });
        Ok(receiver)
    }

    async fn seal(&self, peer: Arc<Peer>) -> Result<Sealed, Refusal> {
        let node = self.describe(peer).await?.node;
        let (end, end_timeline) = (self.0.end, node.timeline);
        Ok(Sealed { node, end, end_timeline })
    }
}

/// Sends a reply; returns whether the stream goes on.
async fn send(
    encoder: &mut FrameEncoder,
    frames: &mpsc::Sender<Result<Frame, Refusal>>,
    unit: u64,
    reply: Reply,
) -> bool {
    let end = ItemBody::End { vanished: false, bytes: 0 };
    let (bodies, refusal) = match reply {
        Reply::Whole(bodies) => (bodies.into_iter().chain([end]).collect(), None),
        Reply::Items(bodies) => (bodies, None),
        Reply::Cut(bodies) => (bodies, Some(Refusal::new(Reason::ShuttingDown, "it is cut"))),
        Reply::Refused(refusal) => (Vec::new(), Some(refusal)),
        Reply::EmptyFrame => return frames.send(Ok(empty_frame())).await.is_ok(),
        Reply::Silence => {
            frames.closed().await;
            return false;
        }
    };
    let mut made: Vec<_> =
        bodies.into_iter().filter_map(|body| encoder.push(Item { unit, body })).collect();
    made.extend(encoder.flush());
    for frame in made {
        if frames.send(Ok(frame)).await.is_err() {
            return false;
        }
    }
    match refusal {
        Some(refusal) => {
            drop(frames.send(Err(refusal)).await);
            false
        }
        None => true,
    }
}

fn empty_frame() -> Frame {
    let payload = Bytes::new();
    let payload_crc = crc32c::crc32c(&payload);
    Frame { sequence: 0, codec: proto::frame::Codec::Plain, batch_bytes: 0, payload, payload_crc }
}

/// A page whose bytes are all this one.
pub(crate) fn page_of(byte: u8) -> VerifiedPage {
    VerifiedPage::read(Bytes::from(vec![byte; BLOCK_SIZE])).expect("of the right size")
}

/// Answers as an honest source would whose relations have pages of their block numbers and whose other files, WAL
/// segments among them, are these.
pub(crate) fn honest(files: BTreeMap<String, Vec<u8>>) -> impl Fn(&Unit) -> Reply + Send + Sync {
    move |unit| {
        let part = |name: String, offset: u64, length: u64| {
            let all = files.get(&name).map(Vec::as_slice).unwrap_or_default();
            let from = usize::try_from(offset).expect("small").min(all.len());
            let to = usize::try_from(offset + length).expect("small").min(all.len());
            let pieces = all[from..to].chunks(64 << 10).scan(offset, |at, piece| {
                let chunk = VerifiedChunk::read(*at, Bytes::copy_from_slice(piece));
                *at += piece.len() as u64;
                Some(ItemBody::Chunk(chunk))
            });
            let bytes = all.len() as u64;
            let end = ItemBody::End { vanished: !files.contains_key(&name), bytes };
            Reply::Items(pieces.chain([end]).collect())
        };
        match &unit.kind {
            UnitKind::Blocks { ranges, .. } => Reply::Whole(pages(ranges)),
            UnitKind::File { path, offset, length } => part(path.to_string(), *offset, *length),
            UnitKind::Wal { timeline, number, offset, length } => {
                let name = pg_format::wal::SegmentName { timeline: *timeline, number: *number };
                let size = crate::test_values::control().wal_segment_size;
                part(format!("pg_wal/{}", name.file_name(size)), *offset, *length)
            }
            _ => Reply::Whole(Vec::new()),
        }
    }
}

/// The pages of these ranges, each of which has its block number in every byte.
pub(crate) fn pages(ranges: &[proto::fetch::BlockRange]) -> Vec<ItemBody> {
    let blocks = ranges.iter().flat_map(|range| range.first..range.first + range.count);
    let page = |block: u32| {
        let content = PageContent::Present(page_of(u8::try_from(block % 256).expect("a byte")));
        ItemBody::Page { block, content }
    };
    blocks.map(page).collect()
}

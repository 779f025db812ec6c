//! The calls, as a server answers them: a trait in domain types and its adapter to tonic.

use std::pin::Pin;
use std::sync::Arc;

use pg_format::Lsn;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::fetch::Unit;
use crate::frame::Frame;
use crate::limits::{REQUEST_MESSAGE_BYTES_MAX, UNITS_PER_MESSAGE_MAX, ZSTD_LEVEL};
use crate::model::{Description, FileEntry, Sealed};
use crate::refusal::{CallError, Reason, Refusal};
use crate::tls::Peer;
use crate::wire::rejoin_server::{Rejoin, RejoinServer};
use crate::{PROTOCOL_VERSION, wire};

/// Answers the calls of the protocol. Streams are bounded channels: a slow client holds the
/// producer back.
#[tonic::async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Describes the node.
    async fn describe(&self, peer: Arc<Peer>) -> Result<Description, Refusal>;
    /// Lists every file that may be asked for.
    async fn list_files(&self, peer: Arc<Peer>) -> Result<FileEntries, Refusal>;
    /// Starts a data stream that answers units.
    async fn fetch(&self, peer: Arc<Peer>, units: Units) -> Result<FrameReceiver, Refusal>;
    /// Finds the position at which replay must end.
    async fn seal(&self, peer: Arc<Peer>) -> Result<Sealed, Refusal>;
}

/// Some entries of a file list, compressed as they are sent.
#[derive(Debug)]
pub struct PackedEntries(wire::ListFilesReply);

impl PackedEntries {
    /// Compresses entries; for blocking workers.
    pub fn new(entries: Vec<FileEntry>) -> Result<Self, Refusal> {
        let entries = entries.into_iter().map(Into::into).collect();
        let plain = wire::FileEntries { entries }.encode_to_vec();
        let failed = |error| {
            Refusal::new(Reason::Internal, format!("could not compress the file list: {error}"))
        };
        let packed = zstd::bulk::compress(&plain, ZSTD_LEVEL).map_err(failed)?;
        let entries_bytes = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        let entries = packed.into();
        Ok(Self(wire::ListFilesReply { entries, entries_bytes, ..Default::default() }))
    }

    /// Bytes after compression.
    pub fn bytes(&self) -> usize {
        self.0.entries.len()
    }
}

/// A part of a file list.
#[derive(Debug)]
pub enum ListPart {
    /// Some entries.
    Entries(PackedEntries),
    /// The end of the list. A list that ends without this part is incomplete, because an error interrupted
    /// it.
    Complete {
        /// Redo position of the newest checkpoint when the listing began.
        redo: Lsn,
    },
}

/// A file list as it is made.
pub type FileEntries = mpsc::Receiver<Result<ListPart, Refusal>>;
/// Frames to be sent.
pub type FrameReceiver = mpsc::Receiver<Result<Frame, Refusal>>;

/// The units of one message.
#[derive(Debug)]
pub struct UnitBatch {
    /// The units.
    pub units: Vec<Unit>,
    /// Bytes of the message.
    pub bytes: usize,
}

/// Units being received.
#[derive(Debug)]
pub struct Units {
    stream: Streaming<wire::FetchRequest>,
}

impl Units {
    /// The next units; `None` when the client has sent all.
    pub async fn next(&mut self) -> Result<Option<UnitBatch>, Refusal> {
        let gone = |status: Status| match CallError::from(status) {
            CallError::Refused(refusal) => refusal,
            CallError::Broken(text) | CallError::InvalidReply(text) => {
                Refusal::new(Reason::InvalidRequest, text)
            }
        };
        let Some(request) = self.stream.message().await.map_err(gone)? else {
            return Ok(None);
        };
        if request.units.len() > UNITS_PER_MESSAGE_MAX {
            let message = format!("more than {UNITS_PER_MESSAGE_MAX} units in one message");
            return Err(Refusal::new(Reason::InvalidRequest, message));
        }
        let bytes = request.encoded_len();
        let units: Result<_, _> = request.units.into_iter().map(Unit::try_from).collect();
        Ok(Some(UnitBatch { units: units?, bytes }))
    }
}

/// The tonic service of a handler.
pub fn service<H: Handler>(handler: Arc<H>) -> RejoinServer<impl Rejoin> {
    RejoinServer::new(Adapter { handler }).max_decoding_message_size(REQUEST_MESSAGE_BYTES_MAX)
}

struct Adapter<H> {
    handler: Arc<H>,
}

fn peer<T>(request: &Request<T>) -> Result<Arc<Peer>, Status> {
    let peer = request.extensions().get::<Arc<Peer>>().cloned();
    peer.ok_or_else(|| Refusal::new(Reason::NotAllowed, "the client sent no certificate").into())
}

type BoxedReplies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl<H: Handler> Rejoin for Adapter<H> {
    type ListFilesStream = BoxedReplies<wire::ListFilesReply>;
    type FetchStream = BoxedReplies<wire::FetchFrame>;

    async fn describe(
        &self,
        request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeReply>, Status> {
        let peer = peer(&request)?;
        let theirs = request.into_inner().protocol_version;
        if theirs != PROTOCOL_VERSION {
            let message = format!(
                "the server speaks protocol version {PROTOCOL_VERSION}, the client {theirs}: \
                 install the same pgrejoin release on both nodes"
            );
            return Err(Refusal::new(Reason::WrongVersion, message).into());
        }
        Ok(Response::new(self.handler.describe(peer).await?.into()))
    }

    async fn list_files(
        &self,
        request: Request<wire::ListFilesRequest>,
    ) -> Result<Response<Self::ListFilesStream>, Status> {
        let batches = self.handler.list_files(peer(&request)?).await?;
        let replies = ReceiverStream::new(batches).map(|part| {
            Ok(match part? {
                ListPart::Entries(list) => list.0,
                ListPart::Complete { redo } => wire::ListFilesReply {
                    complete: true,
                    redo: redo.as_u64(),
                    ..Default::default()
                },
            })
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<wire::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let peer = peer(&request)?;
        let units = Units { stream: request.into_inner() };
        let frames = self.handler.fetch(peer, units).await?;
        let replies = ReceiverStream::new(frames).map(|frame| Ok(frame?.into()));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn seal(
        &self,
        request: Request<wire::SealRequest>,
    ) -> Result<Response<wire::SealReply>, Status> {
        Ok(Response::new(self.handler.seal(peer(&request)?).await?.into()))
    }
}

#[cfg(test)]
mod tests {
    use pg_format::DataPath;

    use super::*;

    /// A list of many files costs little on the link, whatever their names are like.
    #[test]
    fn a_file_costs_at_most_forty_bytes() {
        let mut packed = 0;
        let files: Vec<FileEntry> = (0..200_000_u64)
            .map(|n| {
                let oid = 16_384 + n * 7 % 1_000_003;
                let path = match n % 4 {
                    0 => format!("pg_tblspc/90210/PG_18_202506291/16385/{oid}"),
                    1 => format!("base/16385/{oid}_fsm"),
                    _ => format!("base/16385/{oid}"),
                };
                FileEntry { path: DataPath::new(path).unwrap(), bytes: Some(n * 8192 % 4_000_000) }
            })
            .collect();
        for batch in files.chunks(crate::limits::LIST_BATCH_ENTRIES) {
            packed += PackedEntries::new(batch.to_vec()).unwrap().bytes();
        }
        let each = packed as f64 / files.len() as f64;
        assert!(each < 40.0, "{each} bytes a file");
    }
}

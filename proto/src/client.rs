//! The client's side of the protocol's calls.

use std::time::Duration;

use pg_format::Lsn;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

use crate::fetch::Unit;
use crate::frame::Frame;
use crate::limits::{
    FRAME_MESSAGE_BYTES_MAX, LIST_BATCH_BYTES_MAX, LIST_BATCH_ENTRIES, NODE_MESSAGE_BYTES_MAX,
    UNARY_TIMEOUT,
};
use crate::model::{Description, FileEntry, Sealed};
use crate::refusal::CallError;
use crate::wire::has_at_most;
use crate::wire::rejoin_client::RejoinClient;
use crate::{PROTOCOL_VERSION, wire};

/// One connection to a server.
#[derive(Debug, Clone)]
pub struct Client {
    calls: RejoinClient<Channel>,
    limit: Duration,
}

/// Runs a call that must answer within `limit`.
async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => {
            let seconds = limit.as_secs();
            Err(CallError::Broken(format!("the server did not answer for {seconds} seconds")))
        }
    }
}

impl Client {
    /// A client on an open connection, each of whose calls must be answered within `patience`.
    pub fn new(channel: Channel, patience: Duration) -> Self {
        let message_bytes_max = FRAME_MESSAGE_BYTES_MAX.max(NODE_MESSAGE_BYTES_MAX);
        let calls = RejoinClient::new(channel).max_decoding_message_size(message_bytes_max);
        Self { calls, limit: UNARY_TIMEOUT.min(patience) }
    }

    /// Asks the server to describe its node; it must answer within `limit`.
    pub async fn describe(&mut self, limit: Duration) -> Result<Description, CallError> {
        let request =
            wire::DescribeRequest { protocol_version: PROTOCOL_VERSION, features: Vec::new() };
        within(limit, self.calls.describe(request)).await?.into_inner().try_into()
    }

    /// Asks for the source's file list.
    pub async fn list_files(&mut self) -> Result<FileList, CallError> {
        let stream = within(self.limit, self.calls.list_files(wire::ListFilesRequest {})).await?;
        Ok(FileList { stream: stream.into_inner(), redo: None })
    }

    /// Starts a data stream. Units are sent as they arrive in `units`, and frames are read from the result.
    /// The caller must serve both at the same time, or each side may wait for the other.
    pub async fn fetch(&mut self, units: mpsc::Receiver<Vec<Unit>>) -> Result<Frames, CallError> {
        let requests = ReceiverStream::new(units)
            .map(|units| wire::FetchRequest { units: units.into_iter().map(Into::into).collect() });
        let stream = within(self.limit, self.calls.fetch(Request::new(requests))).await?;
        Ok(Frames { stream: stream.into_inner(), sequence: 0 })
    }

    /// Asks for the position at which replay must end so that it covers everything fetched so far.
    pub async fn seal(&mut self) -> Result<Sealed, CallError> {
        within(self.limit, self.calls.seal(wire::SealRequest {})).await?.into_inner().try_into()
    }
}

/// A file list being received.
#[derive(Debug)]
pub struct FileList {
    stream: Streaming<wire::ListFilesReply>,
    redo: Option<Lsn>,
}

impl FileList {
    /// The next entries; `None` after the last. A list that ends before it is complete is an error.
    pub async fn next(&mut self) -> Result<Option<Vec<FileEntry>>, CallError> {
        if self.redo.is_some() {
            return Ok(None);
        }
        let Some(reply) = self.stream.message().await? else {
            return Err(CallError::Broken("the file list ended before it was complete".to_owned()));
        };
        self.redo = reply.complete.then_some(Lsn::new(reply.redo));
        let entries = entries_of(&reply)?;
        // A peer must not keep a run alive with parts that bring nothing.
        if entries.is_empty() && self.redo.is_none() {
            return Err(CallError::InvalidReply("a part of its file list is empty".to_owned()));
        }
        Ok(Some(entries))
    }

    /// Redo position of the source's newest checkpoint when the listing began; `None` until all has come.
    pub fn redo(&self) -> Option<Lsn> {
        self.redo
    }
}

/// The entries of one message.
fn entries_of(reply: &wire::ListFilesReply) -> Result<Vec<FileEntry>, CallError> {
    let invalid = |why: &str| CallError::InvalidReply(format!("its file list {why}"));
    if reply.entries.is_empty() {
        return Ok(Vec::new());
    }
    let promised = reply.entries_bytes as usize;
    if promised > LIST_BATCH_BYTES_MAX {
        return Err(invalid("has a part that is too long"));
    }
    let plain = zstd::bulk::decompress(&reply.entries, promised);
    let plain = plain.map_err(|_| invalid("does not decompress"))?;
    if !has_at_most(&plain, LIST_BATCH_ENTRIES) {
        return Err(invalid("has a part with too many entries"));
    }
    let entries =
        wire::FileEntries::decode(&plain[..]).map_err(|_| invalid("cannot be decoded"))?;
    entries.entries.into_iter().map(TryInto::try_into).collect()
}

/// Frames being received.
#[derive(Debug)]
pub struct Frames {
    stream: Streaming<wire::FetchFrame>,
    sequence: u64,
}

impl Frames {
    /// The next frame; `None` when the server is done with all units.
    pub async fn next(&mut self) -> Result<Option<Frame>, CallError> {
        let Some(frame) = self.stream.message().await? else {
            return Ok(None);
        };
        let frame = Frame::try_from(frame).map_err(|e| CallError::InvalidReply(e.to_string()))?;
        if frame.sequence != self.sequence {
            let (got, expected) = (frame.sequence, self.sequence);
            return Err(CallError::InvalidReply(format!(
                "it sent frame {got} instead of frame {expected}"
            )));
        }
        self.sequence += 1;
        Ok(Some(frame))
    }
}

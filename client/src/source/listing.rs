//! The source's file list, as it comes.

use std::time::Duration;

use pg_format::Lsn;
use proto::limits::{LIST_ENTRIES_MAX, LIST_PATH_BYTES_MAX};
use proto::model::FileEntry;
use proto::refusal::CallError;
use tokio_util::task::AbortOnDropHandle;

use crate::source::connect::Connection;

/// A file list that is being received.
pub(super) type Listing = AbortOnDropHandle<Result<ReceivedList, CallError>>;

/// A file list as it came.
#[derive(Debug)]
pub(super) struct ReceivedList {
    pub(super) entries: Vec<FileEntry>,
    /// Redo position of the source's newest checkpoint when the listing began.
    pub(super) redo: Lsn,
}

/// Asks for the whole file list.
pub(super) async fn listed(
    mut connection: Connection,
    patience: Duration,
) -> Result<ReceivedList, CallError> {
    let mut list = connection.client.list_files().await?;
    let (mut entries, mut path_bytes) = (Vec::new(), 0);
    while let Some(batch) = within(patience, list.next()).await? {
        path_bytes += batch.iter().map(|entry| entry.path.as_str().len()).sum::<usize>();
        entries.extend(batch);
        let too_much = |what: String| CallError::InvalidReply(format!("it lists more than {what}"));
        if entries.len() > LIST_ENTRIES_MAX {
            return Err(too_much(format!("{LIST_ENTRIES_MAX} files")));
        }
        if path_bytes > LIST_PATH_BYTES_MAX {
            return Err(too_much(format!("{LIST_PATH_BYTES_MAX} bytes of names")));
        }
    }
    Ok(ReceivedList { entries, redo: list.redo().unwrap_or(Lsn::INVALID) })
}

/// Waits for a part of a stream, no longer than `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    part: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    let stalled = |_| CallError::Broken("the source has stalled".to_owned());
    tokio::time::timeout(limit, part).await.map_err(stalled)?
}

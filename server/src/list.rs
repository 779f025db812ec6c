//! Lists the data directory.

use std::io;
use std::path::Path;

use data_dir::{Entry, EntryKind};
use pg_format::relation::tablespace_version_directory;
use proto::limits::LIST_BATCH_ENTRIES;
use proto::model::FileEntry;
use proto::{Reason, Refusal};
use tokio::sync::mpsc::Sender;

use crate::node;
use crate::served::Served;

/// Sends every file that may be asked for and every directory, in batches. Blocks.
pub(crate) fn list(
    pgdata: &Path,
    batches: &Sender<Result<Vec<FileEntry>, Refusal>>,
) -> Result<(), Refusal> {
    let directory = node::open(pgdata)?;
    let control = directory.control().map_err(node::control_refusal)?.file;
    let version = tablespace_version_directory(control.major, control.catalog_version);
    let served = Served::new(&directory, version.clone());
    let mut batch = Vec::with_capacity(LIST_BATCH_ENTRIES);
    let mut visit = |entry: Entry| {
        let bytes = match entry.kind {
            EntryKind::Directory { .. } if Served::lists_directory(&entry.path) => None,
            EntryKind::File { bytes } => match served.serves(&directory, &entry.path) {
                Ok(true) => Some(bytes),
                Ok(false) => return Ok(()),
                // Vanished between the two looks, or closed to us: PostgreSQL's own files are
                // looked at by their names alone, so this is none of them.
                Err(_) => return Ok(()),
            },
            EntryKind::Directory { .. } | EntryKind::Link { .. } | EntryKind::Other => {
                return Ok(());
            }
        };
        batch.push(FileEntry { path: entry.path, bytes });
        if batch.len() == LIST_BATCH_ENTRIES {
            let full = std::mem::replace(&mut batch, Vec::with_capacity(LIST_BATCH_ENTRIES));
            batches.blocking_send(Ok(full)).map_err(|_| io::Error::other("client is gone"))?;
        }
        Ok(())
    };
    directory
        .walk(&version, &mut visit)
        .map_err(|error| node::internal("its data directory", &error))?;
    let gone = |_| Refusal::new(Reason::InvalidRequest, "client is gone");
    batches.blocking_send(Ok(batch)).map_err(gone)
}

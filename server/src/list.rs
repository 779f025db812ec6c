//! Lists the data directory.

use std::io;
use std::path::Path;
use std::sync::Arc;

use data_dir::private_keys::KeyVerdicts;
use data_dir::{Entry, EntryKind};
use pg_format::relation::{is_oid, tablespace_version_directory};
use pg_format::{DataPath, FileClass};
use proto::limits::{LIST_BATCH_BYTES_MAX, LIST_BATCH_ENTRIES, STREAM_IDLE_TIMEOUT};
use proto::model::FileEntry;
use proto::service::{ListPart, PackedEntries};
use proto::{Reason, Refusal};
use tokio::sync::mpsc::Sender;

use crate::node;
use crate::served_files::Served;

/// Bytes of an entry besides its path, at most.
const ENTRY_BYTES: usize = 32;

/// Sends every file that may be asked for and every directory, in batches, and says at the end that
/// it is the end. Blocks.
pub(crate) fn list(
    pgdata: &Path,
    verdicts: Arc<KeyVerdicts>,
    reading: &mut dyn FnMut(u64),
    batches: &Sender<Result<ListPart, Refusal>>,
) -> Result<(), Refusal> {
    // The checkpoint that the list is valid for is read before everything else, the links of tablespaces
    // included.
    let control = node::open(pgdata)?.control().map_err(node::control_refusal)?.file;
    let directory = node::open(pgdata)?;
    let version = tablespace_version_directory(control.major, control.catalog_version);
    let served = Served::new(&directory, control.major, version.clone(), verdicts)?;
    let mut batch = Vec::with_capacity(LIST_BATCH_ENTRIES);
    let mut batch_bytes = 0;
    let mut visit = |entry: Entry| {
        if batches.is_closed() {
            return Err(io::Error::other("the client has disconnected"));
        }
        let bytes = match entry.kind {
            EntryKind::Directory { .. } if Served::lists_directory(&entry.path) => None,
            EntryKind::File { bytes } => match served.serves(&directory, &entry.path, reading) {
                Ok(true) => Some(bytes),
                Ok(false) => return Ok(()),
                // The file vanished meanwhile, or it cannot be read. PostgreSQL's own files are judged by
                // their names alone, so this is not one of them.
                Err(_) => return Ok(()),
            },
            // A tablespace that was created after this listing began, and so after the checkpoint that the
            // list is valid for.
            EntryKind::Link { .. } if is_tablespace(&entry.path) => None,
            // If this were left out, the file would count as absent on the source, and the client would
            // remove the target's.
            EntryKind::Link { .. } | EntryKind::Other if is_databases_own(&entry.path) => {
                let message = format!(
                    "{} on the source is a symbolic link or not a regular file: only pg_wal and \
                     tablespaces may be links, move it back into the data directory",
                    entry.path
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, message));
            }
            EntryKind::Directory { .. }
            | EntryKind::Link { .. }
            | EntryKind::Unreadable
            | EntryKind::Other => return Ok(()),
        };
        batch_bytes += entry.path.as_str().len() + ENTRY_BYTES;
        batch.push(FileEntry { path: entry.path, bytes });
        // The rest of the limit is kept free: no entry is that long.
        if batch.len() == LIST_BATCH_ENTRIES || batch_bytes > LIST_BATCH_BYTES_MAX / 2 {
            batch_bytes = 0;
            let full = std::mem::replace(&mut batch, Vec::with_capacity(LIST_BATCH_ENTRIES));
            let packed = PackedEntries::new(full).map_err(io::Error::other)?;
            give(batches, Ok(ListPart::Entries(packed))).map_err(io::Error::other)?;
        }
        Ok(())
    };
    directory.walk(&version, &Served::lists_directory, &mut visit).map_err(|error| match error
        .kind()
    {
        io::ErrorKind::Unsupported => Refusal::new(Reason::NotServed, error.to_string()),
        _ => node::internal("its data directory", &error),
    })?;
    if !batch.is_empty() {
        give(batches, Ok(ListPart::Entries(PackedEntries::new(batch)?)))?;
    }
    let redo = control.checkpoint_copy.redo;
    give(batches, Ok(ListPart::Complete { redo }))
}

/// Hands a part of the list over. A client that takes nothing for too long must not keep a thread.
pub(crate) fn give(
    batches: &Sender<Result<ListPart, Refusal>>,
    part: Result<ListPart, Refusal>,
) -> Result<(), Refusal> {
    let giving = tokio::time::timeout(STREAM_IDLE_TIMEOUT, batches.send(part));
    let gone = |why| Refusal::new(Reason::InvalidRequest, why);
    match tokio::runtime::Handle::current().block_on(giving) {
        Ok(given) => given.map_err(|_| gone("the client has disconnected")),
        Err(_) => Err(gone("the client has stopped reading the file list")),
    }
}

fn is_tablespace(path: &DataPath) -> bool {
    path.as_str().strip_prefix("pg_tblspc/").is_some_and(is_oid)
}

/// Whether a path lies where only PostgreSQL keeps things that a rewind makes equal.
fn is_databases_own(path: &DataPath) -> bool {
    ["base", "global", "pg_tblspc", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase"]
        .iter()
        .any(|directory| path.is_within(directory))
        && !matches!(FileClass::of(path), FileClass::Discarded | FileClass::Own)
}

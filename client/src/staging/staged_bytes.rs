//! What an earlier run has staged: how much it is, and what becomes of it for another plan.

use std::io;

use crate::staging::disk::{Disk, remove_tree};
use crate::staging::layout::{CACHE, STAGED_DIRECTORIES, own};

/// Bytes that an earlier run has staged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StagedBytes {
    /// In packs.
    pub packs: u64,
    /// Of WAL.
    pub wal: u64,
    /// In undo images.
    pub undo: u64,
}

/// What is staged so far.
pub fn staged_bytes(disk: &dyn Disk) -> io::Result<StagedBytes> {
    let bytes_in = |directory: &str| -> io::Result<u64> {
        let directory = own(directory);
        if disk.is_directory(&directory)? != Some(true) {
            return Ok(0);
        }
        let mut bytes = 0;
        for name in disk.names(&directory)? {
            let file = directory.join(&name).map_err(io::Error::other)?;
            bytes += disk.stat(&file)?.map_or(0, |stat| stat.bytes);
        }
        Ok(bytes)
    };
    let [packs, wal, undo, _] = STAGED_DIRECTORIES;
    Ok(StagedBytes { packs: bytes_in(packs)?, wal: bytes_in(wal)?, undo: bytes_in(undo)? })
}

/// Makes the packs a cache for another plan.
pub fn retire_packs(disk: &dyn Disk) -> io::Result<()> {
    if disk.is_directory(&own(STAGED_DIRECTORIES[0]))?.is_none() {
        // This was done before, and the run ended before it had made another plan.
        return match disk.is_directory(&own(CACHE))? {
            Some(true) => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        };
    }
    remove_tree(disk, &own(CACHE))?;
    disk.rename(&own(STAGED_DIRECTORIES[0]), &own(CACHE))
}

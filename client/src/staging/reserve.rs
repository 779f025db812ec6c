//! Disk space that is reserved before the target is changed. With it, resume and rollback can begin on a disk
//! that has filled up since, and a rollback can extend the files that were cut. The space for the last marks
//! is reserved separately, and freed only when they are written.

use std::collections::BTreeMap;
use std::io;

use data_dir::DataDir;
use pg_format::DataPath;

use crate::plan::FileAction;
use crate::staging::disk::Disk;
use crate::staging::layout::{self, own, state_directories};
use crate::staging::manifest::Manifest;

/// What marks, `pg_control`, `backup_label` and directories take at most.
const MARKS_BYTES: u64 = 128 << 10;
/// What a small file takes beside its content.
const SMALL_FILE_BYTES: u64 = 8 << 10;
const NAME: &str = "reserve";
const FOR_MARKS: &str = ".pgrejoin/reserve-marks";

/// Bytes that a rollback needs on each file system of the target, by its state directory.
fn wanted(directory: &DataDir, manifest: &Manifest) -> BTreeMap<DataPath, u64> {
    let mut wanted: BTreeMap<DataPath, u64> =
        state_directories(directory).into_iter().map(|own| (own, 0)).collect();
    let mut add = |path: &DataPath, bytes: u64| {
        let own = layout::trash(directory, path, 0).parent();
        if let Some(reserved) = own.and_then(|own| wanted.get_mut(&own)) {
            *reserved = reserved.saturating_add(bytes);
        }
    };
    let Some(undo) = &manifest.undo else {
        return root_alone(wanted);
    };
    for (index, file) in manifest.files.iter().enumerate() {
        if let (FileAction::Patch { bytes }, Some(before)) = (&file.action, manifest.before(index))
        {
            add(&file.path, before.bytes.saturating_sub(manifest.final_bytes(index, *bytes)));
        }
    }
    for old in &undo.small {
        let bytes = old.content.as_ref().map_or(0, |(bytes, _)| bytes.len() as u64);
        add(&old.path, bytes + SMALL_FILE_BYTES);
    }
    root_alone(wanted)
}

/// Adds the space for the marks, which are in the data directory's own state directory.
fn root_alone(mut wanted: BTreeMap<DataPath, u64>) -> BTreeMap<DataPath, u64> {
    let main = wanted.iter_mut().find(|(own, _)| own.parent().is_none());
    if let Some((_, bytes)) = main {
        *bytes = bytes.saturating_add(MARKS_BYTES);
    }
    wanted.retain(|_, bytes| *bytes > 0);
    wanted
}

/// Reserves the space, before the seal.
pub fn take(disk: &dyn Disk, directory: &DataDir, manifest: &Manifest) -> io::Result<()> {
    for (own, bytes) in wanted(directory, manifest) {
        let path = own.join(NAME).map_err(io::Error::other)?;
        disk.create_file(&path)?;
        disk.allocate(&path, bytes)?;
        disk.sync_file(&path)?;
    }
    let path = own(FOR_MARKS);
    disk.create_file(&path)?;
    disk.allocate(&path, MARKS_BYTES)?;
    disk.sync_file(&path)
}

/// Frees the space that is reserved for the last marks, `pg_control` and `backup_label`.
pub fn release_for_marks(disk: &dyn Disk) -> io::Result<()> {
    let path = own(FOR_MARKS);
    if disk.is_directory(&path)?.is_some() { disk.remove_file(&path) } else { Ok(()) }
}

/// Frees the rest of the reserved space, when resume or rollback begins.
pub fn release(disk: &dyn Disk, directory: &DataDir) -> io::Result<()> {
    for own in state_directories(directory) {
        let path = own.join(NAME).map_err(io::Error::other)?;
        if disk.is_directory(&path)?.is_some() {
            disk.remove_file(&path)?;
        }
    }
    Ok(())
}

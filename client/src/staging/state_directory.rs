//! Makes the state directory `.pgrejoin`, and removes it.

use std::io;

use data_dir::DataDir;
use pg_format::file_class::OWN_DIRECTORY;

use super::disk::{Disk, read_all, remove_tree, replace_file};
use super::external::{Staging, is_not_ours};
use super::layout::{DIVERGED, STAGED_DIRECTORIES, own, state_directories};
use super::{header, marks, pid_file};

/// File that records the staging directory, if it is not the state directory itself.
const STAGING: &str = ".pgrejoin/staging";

/// Makes an empty state directory, throwing away what an unsealed attempt left.
pub fn prepare(disk: &dyn Disk, directory: &DataDir, staging: Option<&Staging>) -> io::Result<()> {
    discard(disk, directory)?;
    make_directories(disk, directory, staging)
}

/// The staging directory outside the state directory, as an earlier run recorded it; `None` if there is none
/// or the record cannot be used.
pub fn staging(disk: &dyn Disk) -> io::Result<Option<Staging>> {
    match read_all(disk, &own(STAGING)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(bytes) => Ok(header::open(&bytes).ok().and_then(|body| postcard::from_bytes(body).ok())),
    }
}

fn make_directories(
    disk: &dyn Disk,
    directory: &DataDir,
    staging: Option<&Staging>,
) -> io::Result<()> {
    for path in state_directories(directory) {
        disk.create_directory(&path)?;
        disk.set_mode(&path, 0o700)?;
    }
    // The directory is recorded before it is created, so that clean-up finds it.
    if let Some(staging) = staging {
        let body = postcard::to_stdvec(staging).map_err(io::Error::other)?;
        replace_file(disk, &own(STAGING), &header::seal(&body))?;
    }
    for path in STAGED_DIRECTORIES {
        disk.create_directory(&own(path))?;
    }
    for path in state_directories(directory) {
        disk.sync_directory(Some(&path))?;
        disk.sync_directory(path.parent().as_ref())?;
    }
    Ok(())
}

/// What of an earlier run is kept in the state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Its plan holds, and with it all that was fetched.
    Plan,
    /// Its pages are a cache for another plan.
    Cache,
}

/// Makes the state directory ready for a run that uses what an earlier one left; the rest goes.
pub fn prepare_again(
    disk: &dyn Disk,
    directory: &DataDir,
    staging: Option<&Staging>,
    keep: Keep,
) -> io::Result<()> {
    let kept: &[&str] = match keep {
        Keep::Plan => &["packs", "wal", "undo", "plan"],
        Keep::Cache => &["cache"],
    };
    let kept =
        |name: &str| kept.contains(&name) || [DIVERGED, "postmaster.pid.stale"].contains(&name);
    // Directories that are staged elsewhere are not among these names.
    let staged = STAGED_DIRECTORIES.iter().filter_map(|path| path.rsplit_once('/'));
    let staged = staged.map(|(_, name)| name.to_owned());
    for name in disk.names(&own(OWN_DIRECTORY))?.into_iter().chain(staged) {
        if !kept(&name) {
            remove_tree(disk, &own(format!("{OWN_DIRECTORY}/{name}")))?;
        }
    }
    make_directories(disk, directory, staging)
}

/// Leaves a target that was not changed as it was found.
pub fn remove(disk: &dyn Disk, directory: &DataDir) -> io::Result<()> {
    marks::unseal(disk)?;
    pid_file::restore(disk)?;
    discard(disk, directory)
}

/// Removes everything but the WAL of lost transactions; the directories too if they are then empty.
pub fn discard(disk: &dyn Disk, directory: &DataDir) -> io::Result<()> {
    for staged in STAGED_DIRECTORIES {
        match remove_tree(disk, &own(staged)) {
            // A directory that is not ours stays as it is.
            Err(error) if is_not_ours(&error) => {}
            removed => removed?,
        }
    }
    // The directory with the marks is emptied last: the marks describe all of them.
    for path in state_directories(directory).into_iter().rev() {
        if disk.is_directory(&path)? != Some(true) {
            continue;
        }
        // The marks are removed last, and among them last those that say how the rewind ended: until then the
        // state is read correctly, also after a power cut.
        let names = disk.names(&path)?;
        let order = |name: &str| match name {
            "sealed" => 1,
            "committed" | "rolled-back" => 2,
            _ => 0,
        };
        let kept = names.iter().any(|name| name == DIVERGED);
        for turn in 0..=2 {
            let mut any = false;
            for name in names.iter().filter(|name| *name != DIVERGED && order(name) == turn) {
                remove_tree(disk, &path.join(name).map_err(io::Error::other)?)?;
                any = true;
            }
            if any {
                disk.sync_directory(Some(&path))?;
            }
        }
        if !kept {
            disk.remove_directory(&path)?;
        }
        disk.sync_directory(path.parent().as_ref())?;
    }
    Ok(())
}

//! Our own `postmaster.pid` in the target, so that no server starts while the target is changed.
//!
//! It has our process id as a negative number, as PostgreSQL's single-user mode writes its own: a server
//! refuses to start, and `pg_ctl` does not take us for a server and signal us.

use std::io;

use pg_format::DataPath;
use pg_format::postmaster_pid::PostmasterPid;

use crate::error::{Class, RewindError};
use crate::staging::disk::Disk;

const PID_FILE: &str = "postmaster.pid";
/// A stale file that was found, kept to be put back if the target stays as it was.
const STALE: &str = ".pgrejoin/postmaster.pid.stale";

/// Our file before it is put in place.
const NEW: &str = ".pgrejoin/postmaster.pid.new";

#[expect(clippy::expect_used, reason = "the names are constants of ours")]
fn path(name: &str) -> DataPath {
    DataPath::new(name).expect("our own paths are plain")
}

/// Puts our `postmaster.pid` in place. The state directory must exist.
pub fn take(disk: &dyn Disk, pgdata: &std::path::Path) -> Result<(), RewindError> {
    let failed = |error: io::Error| {
        RewindError::because(
            Class::Preflight,
            "could not create pgrejoin's postmaster.pid in the target",
            error,
        )
    };
    let (pid_file, stale) = (path(PID_FILE), path(STALE));
    if disk.is_directory(&pid_file).map_err(failed)?.is_some() {
        if is_ours(disk).map_err(failed)? {
            disk.remove_file(&pid_file).map_err(failed)?;
        } else {
            disk.rename(&pid_file, &stale).map_err(failed)?;
        }
    }
    let us = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
    let started = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    let started = started.unwrap_or_default().as_secs();
    let pgdata = pgdata.display().to_string();
    let text = PostmasterPid::text_of_another_program(us, &pgdata, started);
    // It appears whole or not at all: an empty one would keep the server from starting for ever.
    let new = path(NEW);
    disk.create_file(&new)
        .and_then(|()| disk.write_at(&new, 0, text.as_bytes()))
        .and_then(|()| disk.sync_file(&new))
        .map_err(failed)?;
    let taken = disk.link(&new, &pid_file);
    disk.remove_file(&new).map_err(failed)?;
    match taken {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(RewindError::new(
            Class::Target,
            "a server is just starting in the target's data directory: stop it first",
        )),
        Err(error) => Err(failed(error)),
    }
}

/// Whether the file is one that a rewind left: its number is negative. If a single-user server had written
/// it, its process would have been found in the directory.
fn is_ours(disk: &dyn Disk) -> io::Result<bool> {
    let mut text = String::new();
    io::Read::read_to_string(&mut disk.open(&path(PID_FILE))?, &mut text)?;
    Ok(PostmasterPid::is_of_another_program(&text))
}

/// Removes our file after the target was rewound.
pub fn release(disk: &dyn Disk) -> io::Result<()> {
    if disk.is_directory(&path(PID_FILE))?.is_some() && is_ours(disk)? {
        disk.remove_file(&path(PID_FILE))?;
        // The removal must survive a power cut: after it, our process id may be that of another process.
        disk.sync_directory(None)?;
    }
    Ok(())
}

/// Removes our file and puts a stale one that was found back in place: the target was not changed.
pub fn restore(disk: &dyn Disk) -> io::Result<()> {
    release(disk)?;
    let stale = path(STALE);
    if disk.is_directory(&stale)?.is_some() && disk.is_directory(&path(PID_FILE))?.is_none() {
        disk.rename(&stale, &path(PID_FILE))?;
    }
    Ok(())
}

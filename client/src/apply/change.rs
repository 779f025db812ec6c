//! One run that changes the target: on to the source's history ([`TargetChange::redo`]) or back to what it was
//! ([`TargetChange::roll_back`]). Both walk over the same manifest, and either can follow the other from wherever
//! that one stopped.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use data_dir::DataDir;
use parking_lot::Mutex;
use pg_format::DataPath;

use crate::apply::pg_wal::PgWal;
use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::staging::disk::Disk;
use crate::staging::manifest::Manifest;
use crate::staging::marks;
use crate::task::Signals;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct TargetChange<'a> {
    /// What is done or taken back.
    pub manifest: &'a Manifest,
    /// Through this door.
    pub disk: &'a dyn Disk,
    /// On this directory.
    pub directory: &'a DataDir,
    /// Whether the operator wants to stop.
    pub signals: &'a Signals,
    /// Told what happens.
    pub monitor: &'a dyn Monitor,
}

impl<'a> TargetChange<'a> {
    /// Whether the operator insists on an end.
    pub(crate) fn go_on(&self) -> Result<(), RewindError> {
        if self.signals.stop_at_once() {
            let message = "stopped by a second signal while the target was being changed: run pgrejoin \
                           resume or pgrejoin rollback, do not start PostgreSQL";
            return Err(RewindError::new(Class::Unfinished, message));
        }
        Ok(())
    }

    /// Locks PostgreSQL out again, whatever an interrupted run or somebody else left of the locks. A `pg_control`
    /// that a server has changed is evidence and stays.
    pub(crate) fn lock_again(&self) -> Result<(), RewindError> {
        let locked = || {
            let live = DataPath::of("global/pg_control");
            if self.disk.is_directory(&live)?.is_some() {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut self.disk.open(&live)?, &mut bytes)?;
                if marks::is_of_a_server(&bytes, self.manifest) {
                    return Err(io::Error::other("PostgreSQL has changed global/pg_control"));
                }
            }
            marks::hide_again(self.disk)
        };
        locked().map_err(failed("could not block PostgreSQL from starting on the target"))
    }

    /// The part of it in `pg_wal`.
    pub(crate) fn pg_wal(&self) -> PgWal<'a> {
        let Self { manifest, disk, directory, .. } = *self;
        PgWal { changes: &manifest.wal, disk, directory }
    }
}

/// What is left when both ways are blocked.
pub(crate) const NO_WAY_OUT: &str = ", and neither resume nor rollback is possible: make the files in \
                                     .pgrejoin or the staging directory readable again, or take a \
                                     new base backup";

/// Works on all `items` in so many threads at most. After the first error, which is returned, no item is
/// begun, and the work on others can see that there was one.
pub(crate) fn in_parallel<T: Sync>(
    items: &[T],
    threads: usize,
    work: &(dyn Fn(&T, &AtomicBool) -> Result<(), RewindError> + Sync),
) -> Result<(), RewindError> {
    let waiting = Mutex::new(items.iter());
    let fault: Mutex<Option<RewindError>> = Mutex::new(None);
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(items.len()) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let next = waiting.lock().next();
                    let Some(item) = next else { return };
                    if let Err(error) = work(item, &failed) {
                        let mut fault = fault.lock();
                        fault.get_or_insert(error);
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    fault.into_inner().map_or(Ok(()), Err)
}

/// An error while the target is being changed.
pub(crate) fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> RewindError {
    let what = what.into();
    move |error| RewindError::because(Class::Unfinished, what, error)
}

/// Makes names durable in all of `directories`.
pub(crate) fn sync_directories(
    disk: &dyn Disk,
    directories: impl IntoIterator<Item = Option<DataPath>>,
) -> Result<(), RewindError> {
    for directory in directories {
        match disk.sync_directory(directory.as_ref()) {
            // Gone with a tree that was removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => {
                let name = directory.map_or_else(String::new, |path| path.to_string());
                result.map_err(failed(format!("could not sync directory \"{name}\" to disk")))?;
            }
        }
    }
    Ok(())
}

//! One run that changes the target: forward to the source's history ([`TargetChange::redo`]) or back to its
//! state before the rewind ([`TargetChange::roll_back`]). Both follow the same manifest, and either can
//! follow the other from wherever that one stopped.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use data_dir::DataDir;
use parking_lot::Mutex;
use pg_format::DataPath;

use crate::apply::pg_wal::PgWal;
use crate::error::{Class, RewindError, TargetState};
use crate::monitor::Monitor;
use crate::staging::disk::Disk;
use crate::staging::manifest::Manifest;
use crate::staging::marks;
use crate::task::Signals;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct TargetChange<'a> {
    /// The changes that are made or rolled back.
    pub manifest: &'a Manifest,
    /// The disk through which the target is changed.
    pub disk: &'a dyn Disk,
    /// The target's data directory.
    pub directory: &'a DataDir,
    /// Whether the operator wants to stop.
    pub signals: &'a Signals,
    /// Receives the progress.
    pub monitor: &'a dyn Monitor,
}

impl<'a> TargetChange<'a> {
    /// An error if a second signal has come, with which the operator insists on a stop.
    pub(crate) fn check_signals(&self) -> Result<(), RewindError> {
        if self.signals.stop_at_once() {
            let message = "stopped by a second signal while the target was being changed: run pgrejoin \
                           resume or pgrejoin rollback, do not start PostgreSQL";
            return Err(partly_changed(message));
        }
        Ok(())
    }

    /// Restores the locks that keep PostgreSQL from starting, whatever an interrupted run or somebody else
    /// left of them. A `pg_control` that a server has changed is evidence: it stays, and this fails.
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

    /// The changes in `pg_wal`.
    pub(crate) fn pg_wal(&self) -> PgWal<'a> {
        let Self { manifest, disk, directory, .. } = *self;
        PgWal { changes: &manifest.wal, disk, directory }
    }
}

/// The end of an error message where neither resume nor rollback is possible.
pub(crate) const NEITHER_POSSIBLE: &str = ", and neither resume nor rollback is possible: make the files in \
                                     .pgrejoin or the staging directory readable again, or take a \
                                     new base backup";

/// Works on all `items` with at most `threads` threads. After the first error, which is returned, no other
/// item is begun, and the work on other items can see from its second argument that there was an error.
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
pub(crate) fn failed<E: Into<Box<dyn Error + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> RewindError {
    let what = what.into();
    move |error| {
        let message = format!(
            "{what}; the target is only partly changed: run pgrejoin resume or pgrejoin rollback, do not start \
             PostgreSQL"
        );
        RewindError::because(Class::Other, message, error).leaving(TargetState::PartlyChanged)
    }
}

/// An error without a deeper cause while the target is being changed.
pub(crate) fn partly_changed(message: impl Into<String>) -> RewindError {
    RewindError::new(Class::Other, message).leaving(TargetState::PartlyChanged)
}

/// Makes the names in all of `directories` durable.
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

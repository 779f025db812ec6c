//! What an earlier run left behind: finished, cleared away, or told about.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use data_dir::DataDir;

use crate::apply::disk::{Disk, RealDisk};
use crate::apply::hold;
use crate::apply::manifest::Manifest;
use crate::apply::plan_file::PlanFile;
use crate::apply::redo::{Redo, changed_file};
use crate::apply::rollback::Rollback;
use crate::apply::state::{self, State};
use crate::config::Config;
use crate::error::{Class, RewindError};
use crate::inspect;
use crate::monitor::Monitor;
use crate::outcome::{Outcome, Result as Ended};
use crate::rewind::{Stop, blocking};

/// Makes an error say what the marks say: while the target is being changed it is unfinished,
/// whatever else is wrong.
pub(crate) fn by_marks<T>(target: &Path, result: Result<T, RewindError>) -> Result<T, RewindError> {
    result.map_err(|error| match error.class() {
        Class::Rewound | Class::Unfinished => error,
        _ if state::is_being_changed(target) => error.unfinished(),
        _ => error,
    })
}

/// Deals with what an earlier run left: finishes it if it had begun to change the target, clears it
/// away if it had not. A dry run only says so.
pub(crate) async fn earlier(
    directory: &Arc<DataDir>,
    config: &Config,
    monitor: &Arc<dyn Monitor>,
    stop: &Stop,
) -> Result<Option<Outcome>, RewindError> {
    let (disk, state) = disk_of_state(directory)?;
    if config.dry_run {
        return match state {
            State::None
            | State::Preparing
            | State::Sealed(_)
            | State::Cleaning
            | State::RolledBack(_)
            | State::CleaningBack => Ok(None),
            State::Hidden(_) | State::Exposed(_) | State::Committed(_) | State::Undoing(_) => {
                Ok(Some(Outcome::new(Ended::WouldRewind, describe_state(&state))))
            }
        };
    }
    let (directory, monitor, flag) =
        (Arc::clone(directory), Arc::clone(monitor), Arc::clone(&stop.flag));
    blocking(move || {
        let work = Work { directory: &directory, disk: &*disk, monitor: &*monitor, stop: &flag };
        match state {
            State::None => Ok(None),
            // With its plan it may be gone on with.
            State::Preparing if PlanFile::read(&*disk).map_err(state_error)?.is_some() => Ok(None),
            State::Preparing | State::Sealed(_) => {
                clear_away(&*disk, &directory).map_err(state_error)?;
                Ok(None)
            }
            // If the node has run since, it is looked at like any other.
            State::Committed(manifest) => {
                let live = directory.control().map(|control| control.bytes).unwrap_or_default();
                let never_started = live == manifest.new_control;
                let outcome = work.clean_up(&manifest)?;
                Ok(never_started.then_some(outcome))
            }
            State::Cleaning => {
                let never_started = directory.has("backup_label");
                state::discard(&*disk, &directory).map_err(state_error)?;
                Ok(never_started.then(|| Outcome::new(Ended::Resumed, "the target is rewound")))
            }
            State::Hidden(manifest) => {
                monitor.note(
                    "an earlier rewind was interrupted while it changed the target: finishing it",
                );
                work.finish(&manifest).map(Some)
            }
            State::Exposed(_) => Err(exposed()),
            State::Undoing(manifest) => {
                monitor.note("a rollback was interrupted: finishing it before anything else");
                work.take_back(&manifest).map(|_| None)
            }
            State::RolledBack(manifest) => {
                work.rollback(&manifest).clean_up()?;
                Ok(None)
            }
            State::CleaningBack => {
                state::discard(&*disk, &directory).map_err(state_error)?;
                Ok(None)
            }
        }
    })
    .await
}

/// Leaves a target that was not changed as it was found.
pub(crate) fn clear_away(disk: &dyn Disk, directory: &DataDir) -> std::io::Result<()> {
    state::unseal(disk)?;
    hold::restore(disk)?;
    state::discard(disk, directory)
}

fn exposed() -> RewindError {
    RewindError::new(
        Class::Unfinished,
        "the target is being changed, and somebody put a pg_control back: PostgreSQL would start \
         from a mixture. Remove global/pg_control and run pgrejoin resume or pgrejoin rollback",
    )
}

fn nothing(reason: &str) -> Result<Outcome, RewindError> {
    Ok(Outcome::new(Ended::NothingToDo, reason))
}

/// What it takes to finish an interrupted run, without the source.
struct Work<'a> {
    directory: &'a DataDir,
    disk: &'a dyn Disk,
    monitor: &'a dyn Monitor,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    fn redo<'m>(&'m self, manifest: &'m Manifest) -> Redo<'m> {
        let Self { directory, disk, monitor, stop } = *self;
        Redo { manifest, disk, directory, stop, monitor }
    }

    /// Changes the target as the manifest says; what was done before is done again.
    fn finish(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        hold::take(self.disk, self.directory.path())?;
        inspect::running::refuse_running(self.directory)?;
        self.redo(manifest).run()?;
        Ok(Outcome::new(Ended::Resumed, manifest.summary.clone()))
    }

    fn rollback<'m>(&'m self, manifest: &'m Manifest) -> Rollback<'m> {
        let Self { directory, disk, monitor, stop } = *self;
        Rollback { manifest, disk, directory, stop, monitor }
    }

    /// Makes the target what it was before the rewind.
    fn take_back(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        hold::take(self.disk, self.directory.path())?;
        inspect::running::refuse_running(self.directory)?;
        self.rollback(manifest).run()?;
        Ok(Outcome::new(Ended::RolledBack, "the target is as it was before the rewind"))
    }

    /// Only removes what is left over.
    fn clean_up(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        self.redo(manifest).clean_up()?;
        Ok(Outcome::new(Ended::Resumed, manifest.summary.clone()))
    }
}

/// `pgrejoin resume`
pub fn resume(
    target: &Path,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    by_marks(target, resume_locked(target, monitor, stop))
}

fn resume_locked(
    target: &Path,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    let directory = Arc::new(inspect::lock_only(target)?);
    let (disk, state) = disk_of_state(&directory)?;
    if !state.is_over() {
        inspect::running::refuse_running(&directory)?;
    }
    let work = Work { directory: &directory, disk: &*disk, monitor, stop };
    match state {
        State::None => nothing("no rewind is unfinished here: the target is as it was"),
        State::Preparing => {
            clear_away(&*disk, &directory).map_err(state_error)?;
            nothing("nothing was complete yet: it is cleared away, the target is as it was")
        }
        State::Sealed(manifest) => {
            let same_control = directory.control()?.bytes == manifest.old_control;
            if same_control && changed_file(&*disk, &manifest).map_err(state_error)?.is_none() {
                return work.finish(&manifest);
            }
            clear_away(&*disk, &directory).map_err(state_error)?;
            nothing(
                "PostgreSQL was started here, or a file was changed, since the rewind was prepared: \
                 what was prepared is discarded, the target was not changed by it",
            )
        }
        State::Hidden(manifest) | State::Undoing(manifest) => work.finish(&manifest),
        State::Exposed(_) => Err(exposed()),
        State::Committed(manifest) => work.clean_up(&manifest),
        State::Cleaning => {
            state::discard(&*disk, &directory).map_err(state_error)?;
            nothing("the target is rewound, and the last temporary files are gone")
        }
        State::RolledBack(_) | State::CleaningBack => Err(RewindError::new(
            Class::Target,
            "the rewind was taken back and the target is as it was: there is nothing to resume; \
             run pgrejoin rollback to remove what is left, or pgrejoin rewind",
        )),
    }
}

/// `pgrejoin rollback`
pub fn rollback(
    target: &Path,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    by_marks(target, rollback_locked(target, monitor, stop))
}

fn rollback_locked(
    target: &Path,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    let directory = Arc::new(inspect::lock_only(target)?);
    let (disk, state) = disk_of_state(&directory)?;
    if !state.is_over() {
        inspect::running::refuse_running(&directory)?;
    }
    let work = Work { directory: &directory, disk: &*disk, monitor, stop };
    match state {
        State::None => nothing("no rewind is unfinished here: there is nothing to take back"),
        State::Preparing | State::Sealed(_) => {
            clear_away(&*disk, &directory).map_err(state_error)?;
            nothing("the target had not been changed yet: what was prepared is cleared away")
        }
        State::Hidden(manifest) | State::Undoing(manifest) => work.take_back(&manifest),
        State::Exposed(_) => Err(exposed()),
        State::Committed(_) | State::Cleaning => Err(RewindError::new(
            Class::Target,
            "the target is rewound and PostgreSQL may have run on it: that cannot be taken back",
        )),
        State::RolledBack(manifest) => {
            work.rollback(&manifest).clean_up()?;
            nothing("the target is as it was, and the last temporary files are gone")
        }
        State::CleaningBack => {
            state::discard(&*disk, &directory).map_err(state_error)?;
            nothing("the target is as it was, and the last temporary files are gone")
        }
    }
}

/// `pgrejoin status`: looks and touches nothing, whoever is at work there.
pub fn status(target: &Path) -> Result<String, RewindError> {
    by_marks(target, look(target))
}

fn look(target: &Path) -> Result<String, RewindError> {
    let directory = Arc::new(DataDir::open(target)?);
    let disk = RealDisk::new(Arc::clone(&directory), None, true).map_err(state_error)?;
    let state = state::load(&disk).map_err(state_error)?;
    let unsynced = matches!(
        &state,
        State::Sealed(manifest)
            | State::Hidden(manifest)
            | State::Exposed(manifest)
            | State::Undoing(manifest)
            if !manifest.sync
    );
    let warning = match unsynced {
        true => " It was begun with --no-sync: after a power failure it cannot be relied on.",
        false => "",
    };
    let one_way = matches!(
        &state,
        State::Hidden(manifest) | State::Exposed(manifest) if manifest.undo.is_none()
    );
    let one_way = match one_way {
        true => " It has no undo images: it can be finished, not taken back.",
        false => "",
    };
    Ok(format!("{}{one_way}{warning}", describe_state(&state)))
}

fn describe_state(state: &State) -> &'static str {
    match state {
        State::None => "no rewind is under way",
        State::Preparing => {
            "a rewind is being prepared, or was and did not finish; the data directory is \
             unchanged. Run pgrejoin rewind to go on, or pgrejoin rollback to clear away what was \
             fetched"
        }
        State::Sealed(_) => {
            "a rewind is prepared and has changed nothing yet. Run pgrejoin resume to go on \
             without the source, or pgrejoin rollback to clear it away"
        }
        State::Hidden(_) => {
            "a rewind is changing this data directory and has not finished. Do not start \
             PostgreSQL: run pgrejoin resume to finish it or pgrejoin rollback to take it back, \
             both without the source"
        }
        State::Exposed(_) => {
            "a rewind is changing this data directory and has not finished, and somebody put a \
             pg_control back. Do not start PostgreSQL: remove global/pg_control, then run pgrejoin \
             resume or pgrejoin rollback"
        }
        State::Committed(_) | State::Cleaning => {
            "the data directory is rewound; only temporary files are left. Start PostgreSQL, or \
             run pgrejoin resume to remove them"
        }
        State::Undoing(_) => {
            "a rewind of this data directory is being taken back and that has not finished. Do not \
             start PostgreSQL: run pgrejoin rollback to finish, or pgrejoin resume to finish the \
             rewind after all"
        }
        State::RolledBack(_) | State::CleaningBack => {
            "a rewind was taken back and the data directory is as it was; only temporary files are \
             left. Run pgrejoin rollback to remove them, or pgrejoin rewind"
        }
    }
}

/// The disk of a locked target whose packs may lie elsewhere, as its manifest says, and its state.
fn disk_of_state(directory: &Arc<DataDir>) -> Result<(Arc<dyn Disk>, State), RewindError> {
    let plain = RealDisk::new(Arc::clone(directory), None, true).map_err(state_error)?;
    let state = state::load(&plain).map_err(state_error)?;
    let (staging, sync) = match &state {
        State::Sealed(manifest)
        | State::Hidden(manifest)
        | State::Exposed(manifest)
        | State::Committed(manifest)
        | State::Undoing(manifest)
        | State::RolledBack(manifest) => (manifest.staging.clone(), manifest.sync),
        State::None | State::Preparing | State::Cleaning | State::CleaningBack => (None, true),
    };
    let disk = RealDisk::new(Arc::clone(directory), staging, sync);
    Ok((Arc::new(disk.map_err(state_error)?), state))
}

pub(crate) fn state_error(
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> RewindError {
    RewindError::because(Class::Other, "the target's .pgrejoin directory is not usable", error)
}

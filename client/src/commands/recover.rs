//! What an earlier run left behind: it is finished, rolled back or cleared away.

use std::path::Path;
use std::sync::Arc;

use data_dir::DataDir;

use super::status::{SPOILED, UNSTARTED, by_marks, describe_state};
use crate::apply::change::{TargetChange, partly_changed};
use crate::apply::plan_validity;
use crate::config::Config;
use crate::error::{Class, RewindError};
use crate::monitor::{Monitor, Step};
use crate::outcome::{Outcome, Result as Ended};
use crate::staging::disk::{Disk, RealDisk};
use crate::staging::external::Staging;
use crate::staging::manifest::{self, Manifest};
use crate::staging::marks::{self, State};
use crate::staging::saved_plan::SavedPlan;
use crate::staging::{pid_file, reserve, state_directory, state_error};
use crate::target;
use crate::target::unstarted::is_unstarted;
use crate::task::{Context, Signals, blocking};

/// Finishes a run that had begun to change the target, and clears away what a run left that had not. A dry
/// run only reports it. `None` if the rewind goes on.
pub(crate) async fn finish_earlier(
    cx: &Context,
    config: &Config,
    directory: &Arc<DataDir>,
) -> Result<Option<Outcome>, RewindError> {
    let FoundState { directory, disk, state } = open_state(directory)?;
    if config.dry_run {
        let outcome = || Outcome::new(Ended::WouldRewind, describe_state(&state));
        return Ok(ends_there(&directory, &state).then(outcome));
    }
    let wanted = config.staging_dir.clone();
    let (monitor, signals) = (Arc::clone(&cx.monitor), Arc::clone(&cx.stop.signals));
    blocking(move || {
        let (monitor, signals) = (&*monitor, &*signals);
        let work = UnfinishedRewind { directory: &directory, disk: &*disk, monitor, signals };
        match state {
            State::None => Ok(None),
            State::Preparing | State::Sealed(_) => {
                let stored = SavedPlan::read(&*disk).map_err(state_error)?;
                if state.manifest().is_some() {
                    monitor.note(
                        "an earlier rewind is prepared and has changed nothing yet: pgrejoin resume \
                         would finish it without the source",
                    );
                }
                let left = match stored.is_some_and(|stored| staging_is(stored.staging.as_ref(), wanted.as_deref())) {
                    // The plan of that run may still be valid, and then everything that is staged is of use.
                    // A sealed set stays sealed until the source has answered.
                    true => pid_file::restore(&*disk),
                    false => state_directory::remove(&*disk, &directory),
                };
                left.map_err(state_error)?;
                Ok(None)
            }
            // If PostgreSQL has run on the node since, it is inspected like any other target.
            State::Committed(manifest) => {
                let never_started = never_started(&directory, &manifest);
                let outcome = work.clean_up(&manifest)?;
                Ok(never_started.then_some(outcome))
            }
            State::Cleaning => {
                let never_started = directory.has("backup_label");
                state_directory::discard(&*disk, &directory).map_err(state_error)?;
                Ok(never_started.then(|| Outcome::new(Ended::Resumed, "the target is rewound")))
            }
            State::Hidden(manifest) | State::Exposed(manifest) => {
                monitor.note(
                    "an earlier rewind was interrupted while it changed the target: finishing it",
                );
                work.finish(&manifest).map(Some)
            }
            State::Spoiled(_) => Err(spoiled()),
            State::Undoing(manifest) => {
                monitor.note("a rollback was interrupted: finishing it before anything else");
                work.take_back(&manifest).map(|_| None)
            }
            State::RolledBack(manifest) => {
                work.change(&manifest).clean_up_after_rollback()?;
                Ok(None)
            }
            State::CleaningBack => {
                state_directory::discard(&*disk, &directory).map_err(state_error)?;
                Ok(None)
            }
        }
    })
    .await
}

/// Whether the earlier run staged its data in the same directory as this run does.
fn staging_is(staging: Option<&Staging>, wanted: Option<&Path>) -> bool {
    staging.map(|staging| staging.directory.as_path()) == wanted
}

/// Whether `rewind` would only finish what an earlier run left, and then end.
fn ends_there(directory: &DataDir, state: &State) -> bool {
    match state {
        State::None
        | State::Preparing
        | State::Sealed(_)
        | State::RolledBack(_)
        | State::CleaningBack => false,
        State::Committed(manifest) => never_started(directory, manifest),
        State::Cleaning => directory.has("backup_label"),
        State::Hidden(_) | State::Exposed(_) | State::Spoiled(_) | State::Undoing(_) => true,
    }
}

/// Whether PostgreSQL has not run on a rewound target.
fn never_started(directory: &DataDir, manifest: &Manifest) -> bool {
    directory.control().is_ok_and(|control| control.bytes == manifest.new_control)
}

fn spoiled() -> RewindError {
    partly_changed(SPOILED)
}

fn nothing(reason: &str) -> Result<Outcome, RewindError> {
    Ok(Outcome::new(Ended::NothingToDo, reason))
}

/// What it takes to finish an interrupted run, without the source.
struct UnfinishedRewind<'a> {
    directory: &'a DataDir,
    disk: &'a dyn Disk,
    monitor: &'a dyn Monitor,
    signals: &'a Signals,
}

impl UnfinishedRewind<'_> {
    fn change<'m>(&'m self, manifest: &'m Manifest) -> TargetChange<'m> {
        let Self { directory, disk, monitor, signals } = *self;
        TargetChange { manifest, disk, directory, signals, monitor }
    }

    /// Changes the target as the manifest says. Changes that were made before are made again.
    fn finish(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        self.release_reserve()?;
        pid_file::take(self.disk, self.directory.path())?;
        target::running::refuse_running(self.directory)?;
        self.monitor.step(Step::Apply);
        if let Err(error) = self.change(manifest).redo() {
            let unchanged = match marks::load(self.disk) {
                Ok(state) => matches!(state, State::Sealed(_)),
                // What cannot be read whole may still show by its names.
                Err(_) => !marks::is_being_changed(self.directory.path()),
            };
            if unchanged {
                // Nothing was changed: our process id in `postmaster.pid` must not keep the next server from
                // starting.
                pid_file::restore(self.disk).map_err(state_error)?;
            }
            return Err(error);
        }
        Ok(Outcome::new(Ended::Resumed, manifest.summary.clone()))
    }

    /// Frees the reserved disk space. Resume and rollback begin with this, because even `postmaster.pid`
    /// needs space. While the target is unchanged, the space stays reserved.
    fn release_reserve(&self) -> Result<(), RewindError> {
        if !marks::is_being_changed(self.directory.path()) {
            return Ok(());
        }
        reserve::release(self.disk, self.directory).map_err(state_error)
    }

    fn clear_away(&self) -> Result<(), RewindError> {
        state_directory::remove(self.disk, self.directory).map_err(state_error)
    }

    /// Restores the target's state before the rewind.
    fn take_back(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        self.release_reserve()?;
        pid_file::take(self.disk, self.directory.path())?;
        target::running::refuse_running(self.directory)?;
        self.change(manifest).roll_back()?;
        Ok(Outcome::new(Ended::RolledBack, "the target is as it was before the rewind"))
    }

    /// Only removes what a finished rewind left in the state directory.
    fn clean_up(&self, manifest: &Manifest) -> Result<Outcome, RewindError> {
        self.change(manifest).clean_up()?;
        Ok(Outcome::new(Ended::Resumed, manifest.summary.clone()))
    }
}

/// Locks a target and ends its unfinished rewind by `ending`, which is resume or rollback.
fn end(
    target: &Path,
    monitor: &dyn Monitor,
    signals: &Signals,
    ending: impl FnOnce(&UnfinishedRewind<'_>, State) -> Result<Outcome, RewindError>,
) -> Result<Outcome, RewindError> {
    let locked = || {
        let held = Arc::new(target::lock_only(target)?);
        let FoundState { directory, disk, state } = open_state(&held)?;
        if !state.is_over() {
            target::running::refuse_running(&directory)?;
        }
        ending(&UnfinishedRewind { directory: &directory, disk: &*disk, monitor, signals }, state)
    };
    by_marks(target, locked())
}

/// `pgrejoin resume`
pub fn resume(
    target: &Path,
    monitor: &dyn Monitor,
    signals: &Signals,
) -> Result<Outcome, RewindError> {
    end(target, monitor, signals, |work, state| match state {
        State::None if is_unstarted(work.directory)? => {
            Ok(Outcome::new(Ended::AlreadyRewound, UNSTARTED))
        }
        State::None => {
            nothing("there is no unfinished rewind in this data directory: nothing to resume")
        }
        State::Preparing if SavedPlan::read(work.disk).map_err(state_error)?.is_some() => nothing(
            "the fetch is not complete and the target is unchanged. Run pgrejoin rewind to \
             continue, or pgrejoin rollback to remove the fetched data",
        ),
        State::Preparing => {
            work.clear_away()?;
            nothing("nothing was fetched yet: the preparation is removed, the target is unchanged")
        }
        State::Sealed(manifest) => {
            match plan_validity::check(work.disk, &manifest).map_err(state_error)? {
                None => work.finish(&manifest),
                Some(why) => {
                    work.clear_away()?;
                    nothing(&format!(
                        "{why}: the prepared rewind is discarded; it had not changed the target"
                    ))
                }
            }
        }
        State::Hidden(manifest) | State::Exposed(manifest) | State::Undoing(manifest) => {
            work.finish(&manifest)
        }
        State::Spoiled(_) => Err(spoiled()),
        State::Committed(manifest) => work.clean_up(&manifest),
        State::Cleaning => {
            state_directory::discard(work.disk, work.directory).map_err(state_error)?;
            nothing("the target is rewound, and the last temporary files are gone")
        }
        State::RolledBack(_) | State::CleaningBack => Err(RewindError::new(
            Class::Target,
            "the rewind was rolled back and the target is as it was before: there is nothing to \
             resume; run pgrejoin rollback to remove temporary files, or pgrejoin rewind to start \
             again",
        )),
    })
}

/// `pgrejoin rollback`
pub fn rollback(
    target: &Path,
    monitor: &dyn Monitor,
    signals: &Signals,
) -> Result<Outcome, RewindError> {
    end(target, monitor, signals, |work, state| match state {
        State::None => {
            nothing("there is no unfinished rewind in this data directory: nothing to roll back")
        }
        State::Preparing | State::Sealed(_) => {
            work.clear_away()?;
            nothing(
                "the target had not been changed yet: the prepared rewind and its fetched data are \
                 removed",
            )
        }
        State::Hidden(manifest) | State::Exposed(manifest) | State::Undoing(manifest) => {
            work.take_back(&manifest)
        }
        State::Spoiled(_) => Err(spoiled()),
        State::Committed(_) | State::Cleaning => Err(RewindError::new(
            Class::Target,
            "the target is rewound and PostgreSQL may have run on it: the rewind cannot be rolled \
             back",
        )),
        State::RolledBack(manifest) => {
            work.change(&manifest).clean_up_after_rollback()?;
            nothing("the target is as it was, and the last temporary files are gone")
        }
        State::CleaningBack => {
            state_directory::discard(work.disk, work.directory).map_err(state_error)?;
            nothing("the target is as it was, and the last temporary files are gone")
        }
    })
}

/// A locked target, the disk through which it is changed, and the state that an earlier run left.
struct FoundState {
    /// The data directory with all its tablespaces, also those whose link was removed.
    directory: Arc<DataDir>,
    disk: Arc<dyn Disk>,
    state: State,
}

fn open_state(locked: &Arc<DataDir>) -> Result<FoundState, RewindError> {
    let plain = RealDisk::new(Arc::clone(locked), None, true).map_err(state_error)?;
    let state = marks::load(&plain).map_err(state_error)?;
    let (staging, sync) = match (state.manifest(), &state) {
        (Some(manifest), _) => (manifest.staging.clone(), manifest.sync),
        (None, State::Preparing) => {
            let sync = SavedPlan::read(&plain).map_err(state_error)?.is_none_or(|plan| plan.sync);
            (state_directory::staging(&plain).map_err(state_error)?, sync)
        }
        (None, _) => (None, true),
    };
    let directory = match state.manifest() {
        Some(manifest) => Arc::new(manifest::reopen(locked, manifest).map_err(state_error)?),
        None => Arc::clone(locked),
    };
    // A rewind that is over needs nothing that was staged, so its staging directory may have been removed.
    let gone = |staging: &Staging| state.is_over() && !staging.directory.exists();
    let staging = staging.filter(|staging| !gone(staging));
    let place = staging.as_ref().map(|staging| staging.directory.display().to_string());
    let disk = RealDisk::new(Arc::clone(&directory), staging, sync);
    let disk = disk.map_err(|error| match place {
        Some(place) => {
            let message = format!(
                "the staging directory {place}, which has the data fetched for this rewind, cannot \
                 be opened: make it accessible again"
            );
            RewindError::because(Class::Other, message, error)
        }
        None => state_error(error),
    })?;
    Ok(FoundState { directory, disk: Arc::new(disk), state })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Result as Ended;
    use crate::test_values::{EmptyTarget, RecordingMonitor, control_bytes, manifest, put_file};

    /// Seals a rewind that changes nothing but `pg_control`.
    fn seal(target: &EmptyTarget) -> Manifest {
        let disk = &*target.target.disk;
        state_directory::prepare(disk, &target.target.directory, None).unwrap();
        let mut new_control = control_bytes();
        new_control.reverse();
        let manifest = Manifest { old_control: control_bytes(), new_control, ..manifest() };
        marks::seal(disk, &manifest.encode().unwrap()).unwrap();
        manifest
    }

    fn ended(
        target: &EmptyTarget,
        by: fn(&Path, &dyn Monitor, &Signals) -> Result<Outcome, RewindError>,
    ) -> Result<Ended, Class> {
        let done = by(target.home.path(), &RecordingMonitor::default(), &Signals::default());
        done.map(|outcome| outcome.result).map_err(|error| error.class())
    }

    fn control(target: &EmptyTarget) -> Vec<u8> {
        std::fs::read(target.home.path().join("global/pg_control")).unwrap()
    }

    #[test]
    fn where_nothing_was_begun_there_is_nothing_to_end() {
        let target = EmptyTarget::new();
        let before = target.names();
        assert_eq!(ended(&target, resume), Ok(Ended::NothingToDo));
        assert_eq!(ended(&target, rollback), Ok(Ended::NothingToDo));
        assert_eq!(target.names(), before);
    }

    #[test]
    fn what_is_sealed_is_finished_by_resume_and_discarded_by_rollback() {
        let target = EmptyTarget::new();
        let manifest = seal(&target);
        assert_eq!(ended(&target, rollback), Ok(Ended::NothingToDo));
        assert_eq!(control(&target), manifest.old_control);
        assert!(!target.home.path().join(".pgrejoin").exists());
        seal(&target);
        assert_eq!(ended(&target, resume), Ok(Ended::Resumed));
        assert_eq!(control(&target), manifest.new_control);
        assert!(!target.home.path().join("postmaster.pid").exists());
    }

    #[test]
    fn what_is_sealed_for_another_state_of_the_target_is_discarded() {
        let target = EmptyTarget::new();
        seal(&target);
        let mut started = control_bytes();
        started.push(1);
        put_file(&target.home.path().join("global/pg_control"), &started);
        assert_eq!(ended(&target, resume), Ok(Ended::NothingToDo));
        assert_eq!(control(&target), started);
        assert!(!target.home.path().join(".pgrejoin").exists());
    }

    #[test]
    fn a_change_that_was_interrupted_is_finished_and_without_images_not_taken_back() {
        let target = EmptyTarget::new();
        let manifest = seal(&target);
        marks::hide(&*target.target.disk).unwrap();
        assert_eq!(ended(&target, rollback), Err(Class::Unfinished), "it has no undo images");
        assert_eq!(ended(&target, resume), Ok(Ended::Resumed));
        assert_eq!(control(&target), manifest.new_control);
    }

    #[test]
    fn rewind_ends_after_finishing_what_was_changed_and_goes_on_after_what_was_not() {
        let target = EmptyTarget::new();
        let directory = &target.target.directory;
        let manifest = || Box::new(manifest());
        for state in [
            State::None,
            State::Preparing,
            State::Sealed(manifest()),
            State::RolledBack(manifest()),
            State::CleaningBack,
            State::Cleaning,
        ] {
            assert!(!ends_there(directory, &state), "{state:?}");
        }
        for state in [
            State::Hidden(manifest()),
            State::Exposed(manifest()),
            State::Spoiled(manifest()),
            State::Undoing(manifest()),
        ] {
            assert!(ends_there(directory, &state), "{state:?}");
        }
        // It is over. If PostgreSQL has not run since, another rewind has nothing new to do.
        let committed =
            |new_control| State::Committed(Box::new(Manifest { new_control, ..*manifest() }));
        assert!(ends_there(directory, &committed(control_bytes())));
        assert!(!ends_there(directory, &committed(b"another".to_vec())));
    }

    #[test]
    fn an_earlier_run_staged_in_the_same_directory_or_in_another() {
        let wanted = Path::new("/staging");
        assert!(staging_is(None, None));
        assert!(!staging_is(None, Some(wanted)));
        let home = tempfile::tempdir().unwrap();
        let staging = Staging::new(home.path()).unwrap();
        assert!(staging_is(Some(&staging), Some(home.path())));
        assert!(!staging_is(Some(&staging), Some(wanted)));
        assert!(!staging_is(Some(&staging), None));
    }
}

//! What an earlier run left behind: finished, cleared away, or told about.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use data_dir::DataDir;

use crate::apply::disk::{Disk, RealDisk};
use crate::apply::hold;
use crate::apply::redo::Redo;
use crate::apply::state::{self, State};
use crate::config::Config;
use crate::error::{Class, RewindError};
use crate::inspect;
use crate::monitor::Monitor;
use crate::outcome::{Outcome, Result as Ended};
use crate::rewind::{Stop, blocking};

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
            State::None | State::Preparing | State::Sealed(_) => Ok(None),
            State::Hidden(_) | State::Committed(_) => {
                Ok(Some(Outcome::new(Ended::WouldRewind, describe_state(&state))))
            }
        };
    }
    let (directory, monitor, flag) =
        (Arc::clone(directory), Arc::clone(monitor), Arc::clone(&stop.flag));
    blocking(move || match state {
        State::None => Ok(None),
        State::Preparing | State::Sealed(_) => {
            clear_away(&*disk, &directory).map_err(state_error)?;
            Ok(None)
        }
        // The node may have run since: it is looked at like any other.
        State::Committed(_) => finish(&directory, &*disk, &*monitor, &flag).map(|_| None),
        State::Hidden(_) => {
            monitor.note(
                "an earlier rewind was interrupted while it changed the target: finishing it",
            );
            finish(&directory, &*disk, &*monitor, &flag).map(Some)
        }
    })
    .await
}

/// Leaves a target that was not changed as it was found.
pub(crate) fn clear_away(disk: &dyn Disk, directory: &DataDir) -> std::io::Result<()> {
    hold::restore(disk).and_then(|()| state::discard(disk, directory))
}

/// Finishes what an interrupted run began, without the source.
fn finish(
    directory: &DataDir,
    disk: &dyn Disk,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    let state = state::load(disk).map_err(state_error)?;
    let hidden = matches!(state, State::Hidden(_));
    let (manifest, committed) = match state {
        State::Hidden(manifest) => (manifest, false),
        State::Committed(manifest) => (manifest, true),
        State::Sealed(manifest) => (manifest, false),
        State::None | State::Preparing => {
            let reason = "no rewind is unfinished here: the target is as it was";
            return Ok(Outcome::new(Ended::NothingToDo, reason));
        }
    };
    // What fails before the redo of a target that is hidden already leaves it unfinished.
    let begun = |error: RewindError| if hidden { error.unfinished() } else { error };
    if !committed {
        hold::take(disk, directory.path()).map_err(begun)?;
    }
    let redo = Redo { manifest: &manifest, disk, directory, stop, monitor };
    if committed {
        redo.clean_up()?;
    } else {
        redo.check_packs().map_err(begun)?;
        redo.run()?;
    }
    Ok(Outcome::new(Ended::Resumed, manifest.summary.clone()))
}

/// `pgrejoin resume`
pub fn resume(
    target: &Path,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Outcome, RewindError> {
    let directory = Arc::new(inspect::lock(target)?);
    let (disk, state) = disk_of_state(&directory)?;
    if let State::Sealed(manifest) = state {
        let control = directory.control()?;
        if control.bytes != manifest.old_control {
            clear_away(&*disk, &directory).map_err(state_error)?;
            let reason = "PostgreSQL was started here since the rewind was prepared: what was \
                          prepared is discarded, the target was not changed by it";
            return Ok(Outcome::new(Ended::NothingToDo, reason));
        }
    }
    finish(&directory, &*disk, monitor, stop)
}

/// `pgrejoin status`
pub fn status(target: &Path) -> Result<String, RewindError> {
    let directory = Arc::new(inspect::lock(target)?);
    Ok(describe_state(&disk_of_state(&directory)?.1).to_owned())
}

fn describe_state(state: &State) -> &'static str {
    match state {
        State::None => "no rewind is under way",
        State::Preparing => {
            "a rewind was being prepared and did not finish; the data directory is unchanged. Run \
             pgrejoin rewind again"
        }
        State::Sealed(_) => {
            "a rewind is prepared and has changed nothing yet. Run pgrejoin resume to go on \
             without the source, or pgrejoin rewind to begin again"
        }
        State::Hidden(_) => {
            "a rewind is changing this data directory and has not finished. Do not start \
             PostgreSQL: run pgrejoin resume"
        }
        State::Committed(_) => {
            "the data directory is rewound; only temporary files are left. Start PostgreSQL, or \
             run pgrejoin resume to remove them"
        }
    }
}

/// The disk of a locked target whose packs may lie elsewhere, as its manifest says, and its state.
fn disk_of_state(directory: &Arc<DataDir>) -> Result<(Arc<dyn Disk>, State), RewindError> {
    let plain = RealDisk::new(Arc::clone(directory), None, true).map_err(state_error)?;
    let state = state::load(&plain).map_err(state_error)?;
    let (staging, sync) = match &state {
        State::Sealed(manifest) | State::Hidden(manifest) | State::Committed(manifest) => {
            (manifest.staging_dir.clone(), manifest.sync)
        }
        State::None | State::Preparing => (None, true),
    };
    let disk = RealDisk::new(Arc::clone(directory), staging.as_deref(), sync);
    Ok((Arc::new(disk.map_err(state_error)?), state))
}

pub(crate) fn state_error(
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> RewindError {
    RewindError::because(Class::Other, "the target's .pgrejoin directory is not usable", error)
}

//! `pgrejoin status`: in which state a data directory is, and what to do.

use std::path::Path;
use std::sync::Arc;

use data_dir::DataDir;

use crate::error::{Class, RewindError};
use crate::staging::disk::RealDisk;
use crate::staging::marks::{self, State};
use crate::staging::state_error;
use crate::target::unstarted::is_unstarted;

/// Makes an error agree with the marks: while the target is being changed it is reported as unfinished,
/// whatever else is wrong.
pub(crate) fn by_marks<T>(target: &Path, result: Result<T, RewindError>) -> Result<T, RewindError> {
    result.map_err(|error| match error.class() {
        Class::Rewound | Class::Unfinished => error,
        _ if marks::is_being_changed(target) => error.unfinished(),
        _ => error,
    })
}

pub(crate) const SPOILED: &str = "pg_control was put back during a rewind, and PostgreSQL has run \
                                  on the partly changed data directory: it can be neither resumed \
                                  nor rolled back. Save .pgrejoin/diverged if its WAL is needed, \
                                  then take a new base backup";

/// `pgrejoin status`. It changes nothing and takes no lock, so another program may be working in the data
/// directory.
pub fn status(target: &Path) -> Result<String, RewindError> {
    by_marks(target, look(target))
}

fn look(target: &Path) -> Result<String, RewindError> {
    let directory = Arc::new(DataDir::open(target)?);
    let disk = RealDisk::new(Arc::clone(&directory), None, true).map_err(state_error)?;
    let state = marks::load(&disk).map_err(state_error)?;
    let unsynced = matches!(
        &state,
        State::Sealed(manifest)
            | State::Hidden(manifest)
            | State::Exposed(manifest)
            | State::Undoing(manifest)
            if !manifest.sync
    );
    let warning = match unsynced {
        true => " It was started with --no-sync: do not rely on it after a power failure.",
        false => "",
    };
    let one_way = matches!(
        &state,
        State::Hidden(manifest) | State::Exposed(manifest) if manifest.undo.is_none()
    );
    let one_way = match one_way {
        true => " It has no undo images: it can be resumed, but not rolled back.",
        false => "",
    };
    let said = match state {
        State::None if is_unstarted(&directory)? => UNSTARTED,
        state => describe_state(&state),
    };
    Ok(format!("{said}{one_way}{warning}"))
}

pub(crate) const UNSTARTED: &str = "the data directory is rewound and PostgreSQL has not been \
                                    started on it yet: start PostgreSQL";

pub(crate) fn describe_state(state: &State) -> &'static str {
    match state {
        State::None => "no rewind is under way",
        State::Preparing => {
            "a rewind is being prepared, or its preparation was interrupted; the data directory is \
             unchanged. Run pgrejoin rewind to continue, or pgrejoin rollback to remove the \
             fetched data"
        }
        State::Sealed(_) => {
            "a rewind is prepared and has changed nothing yet. Run pgrejoin resume to finish it \
             without the source, or pgrejoin rollback to discard it"
        }
        State::Hidden(_) | State::Exposed(_) => {
            "a rewind is changing this data directory and has not finished. Do not start \
             PostgreSQL: run pgrejoin resume to finish it or pgrejoin rollback to undo it. Neither \
             needs the source."
        }
        State::Spoiled(_) => SPOILED,
        State::Committed(_) | State::Cleaning => {
            "the data directory is rewound; only temporary files are left. Start PostgreSQL, or \
             run pgrejoin resume to remove them"
        }
        State::Undoing(_) => {
            "a rollback of this data directory has not finished. Do not start PostgreSQL: run \
             pgrejoin rollback to finish it, or pgrejoin resume to finish the rewind instead"
        }
        State::RolledBack(_) | State::CleaningBack => {
            "a rewind was rolled back and the data directory is as it was before; only temporary \
             files are left. Run pgrejoin rollback to remove them, or pgrejoin rewind to start \
             again"
        }
    }
}

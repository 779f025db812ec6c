//! `pgrejoin status`: in which state a data directory is, and what to do.

use std::path::Path;
use std::sync::Arc;

use data_dir::DataDir;

use crate::error::{Class, RewindError};
use crate::staging::disk::RealDisk;
use crate::staging::marks::{self, State};
use crate::staging::state_error;
use crate::target::unstarted::is_unstarted;

/// Makes an error say what the marks say: while the target is being changed it is unfinished,
/// whatever else is wrong.
pub(crate) fn by_marks<T>(target: &Path, result: Result<T, RewindError>) -> Result<T, RewindError> {
    result.map_err(|error| match error.class() {
        Class::Rewound | Class::Unfinished => error,
        _ if marks::is_being_changed(target) => error.unfinished(),
        _ => error,
    })
}

pub(crate) const SPOILED: &str = "a rewind was changing the target when somebody put a pg_control back, and \
                       PostgreSQL has run on it: neither the source's nor the old history can be made \
                       of this mixture. Save .pgrejoin/diverged if its WAL is needed, and make a new \
                       base backup";

/// `pgrejoin status`: looks and touches nothing, whoever is at work there.
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
    let said = match state {
        State::None if is_unstarted(&directory)? => UNSTARTED,
        state => describe_state(&state),
    };
    Ok(format!("{said}{one_way}{warning}"))
}

pub(crate) const UNSTARTED: &str =
    "the data directory is rewound and PostgreSQL has not been started on it yet: start it";

pub(crate) fn describe_state(state: &State) -> &'static str {
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
        State::Hidden(_) | State::Exposed(_) => {
            "a rewind is changing this data directory and has not finished. Do not start \
             PostgreSQL: run pgrejoin resume to finish it or pgrejoin rollback to take it back, \
             both without the source."
        }
        State::Spoiled(_) => SPOILED,
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

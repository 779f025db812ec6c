//! `pgrejoin status`: in which state a data directory is, and what to do.

use std::path::Path;
use std::sync::Arc;

use data_dir::DataDir;

use crate::error::{RewindError, TargetState};
use crate::node_state::NodeState;
use crate::outcome::utc;
use crate::staging::disk::{Disk as _, RealDisk};
use crate::staging::marks::{self, State};
use crate::staging::saved_plan::SavedPlan;
use crate::staging::state_error;
use crate::target::unstarted::is_unstarted;

/// Makes an error agree with the marks: while the target is being changed it is reported as unfinished,
/// whatever else is wrong. If another `pgrejoin` works on the target, its marks are not ours to judge.
pub(crate) fn by_marks<T>(target: &Path, result: Result<T, RewindError>) -> Result<T, RewindError> {
    result.map_err(|error| match error.target() {
        TargetState::Unchanged if marks::is_being_changed(target) => error.unfinished(),
        TargetState::Unchanged
        | TargetState::InUse
        | TargetState::PartlyChanged
        | TargetState::Rewound => error,
    })
}

pub(crate) const SPOILED: &str = "pg_control was put back during a rewind, and PostgreSQL has run \
                                  on the partly changed data directory: it can be neither resumed \
                                  nor rolled back. Save .pgrejoin/diverged if its WAL is needed, \
                                  then take a new base backup";

/// The state that the marks stand for.
fn state_of(state: &State, alive: bool) -> NodeState {
    match state {
        State::None => NodeState::Idle,
        State::Preparing if alive => NodeState::Fetching,
        State::Preparing => NodeState::FetchEnded,
        State::Sealed(_) => NodeState::Prepared,
        State::Hidden(_) | State::Exposed(_) | State::Undoing(_) if alive => NodeState::Changing,
        State::Hidden(_) | State::Exposed(_) | State::Undoing(_) => NodeState::PartlyChanged,
        State::Spoiled(_) => NodeState::Spoiled,
        State::Committed(_) | State::Cleaning | State::RolledBack(_) | State::CleaningBack => {
            NodeState::FilesLeft
        }
    }
}

/// What `pgrejoin status` reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The state.
    pub state: NodeState,
    /// The state in words, and what to do.
    pub text: String,
}

/// `pgrejoin status`. It changes nothing and takes no lock, so another program may be working in the data
/// directory.
pub fn status(target: &Path) -> Result<Status, RewindError> {
    by_marks(target, look(target))
}

fn look(target: &Path) -> Result<Status, RewindError> {
    let directory = Arc::new(DataDir::open(target)?);
    let disk = RealDisk::new(Arc::clone(&directory), None, true).map_err(state_error)?;
    let state = marks::load(&disk).map_err(state_error)?;
    if matches!(state, State::None) {
        return Ok(
            match (has_control(&directory), has_control(&directory) && is_unstarted(&directory)?) {
                (false, _) => Status { state: NodeState::Damaged, text: DAMAGED.to_owned() },
                (_, true) => Status { state: NodeState::NotStarted, text: UNSTARTED.to_owned() },
                _ => Status { state: NodeState::Idle, text: describe_state(&state).to_owned() },
            },
        );
    }
    let holder = lock_holder(&directory);
    let mut parts = vec![describe_state(&state).to_owned()];
    if let State::Hidden(manifest) | State::Exposed(manifest) = &state
        && manifest.undo.is_none()
    {
        parts.push("It has no undo images: it can be resumed, but not rolled back.".to_owned());
    }
    parts.extend(holder.map(|pid| format!("Process {pid} is at work.")));
    if let State::Preparing = state
        && let Some(plan) = SavedPlan::read(&disk).map_err(state_error)?
    {
        let since = disk.stat(&SavedPlan::path()).ok().flatten().map(|file| utc(file.modified.0));
        let since = since.map_or_else(String::new, |since| format!(", planned at {since}"));
        parts.push(format!("The source is {}{since}.", plan.source));
    }
    let unsynced = state.manifest().is_some_and(|manifest| !manifest.sync);
    if unsynced && !state.is_over() {
        let warning = "It was started with --no-sync: do not rely on it after a power failure.";
        parts.push(warning.to_owned());
    }
    Ok(Status { state: state_of(&state, holder.is_some()), text: sentences(&parts) })
}

/// Sentences, each with its end.
fn sentences(parts: &[String]) -> String {
    let ended = parts.iter().map(|part| match part.ends_with('.') {
        true => part.clone(),
        false => format!("{part}."),
    });
    ended.collect::<Vec<_>>().join(" ")
}

fn has_control(directory: &DataDir) -> bool {
    directory.path().join("global/pg_control").symlink_metadata().is_ok()
}

/// The process that has locked a data directory, as the kernel lists it.
fn lock_holder(directory: &DataDir) -> Option<u32> {
    let ours = rustix::fs::fstat(directory.root()).ok()?;
    let (major, minor) = (rustix::fs::major(ours.st_dev), rustix::fs::minor(ours.st_dev));
    let place = format!("{major:02x}:{minor:02x}:{}", ours.st_ino);
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        match columns[..] {
            [_, "FLOCK", _, "WRITE", pid, at, ..] if at == place => pid.parse().ok(),
            _ => None,
        }
    })
}

const DAMAGED: &str = "global/pg_control is missing, and there is no .pgrejoin directory that says why. If it was \
                       removed during a rewind, the data directory is partly changed: put .pgrejoin back and run \
                       pgrejoin resume or pgrejoin rollback, or take a new base backup";

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;
    use crate::staging::manifest::Manifest;
    use crate::test_values::{EmptyTarget, control_bytes, manifest};

    /// Seals a rewind that changes nothing but `pg_control`.
    fn seal(target: &EmptyTarget) {
        let disk = &*target.target.disk;
        crate::staging::state_directory::prepare(disk, &target.target.directory, None).unwrap();
        let manifest = Manifest { old_control: control_bytes(), ..manifest() };
        marks::seal(disk, &manifest.encode().unwrap()).unwrap();
    }

    fn class(target: &EmptyTarget, error: RewindError) -> Class {
        by_marks::<()>(target.home.path(), Err(error)).unwrap_err().class()
    }

    #[test]
    fn an_error_on_a_target_that_is_being_changed_says_so() {
        let target = EmptyTarget::new();
        let lost = || RewindError::transient("the link broke");
        seal(&target);
        assert_eq!(class(&target, lost()), Class::Transient, "nothing is changed yet");
        marks::hide(&*target.target.disk).unwrap();
        assert_eq!(class(&target, lost()), Class::Unfinished);
        let rewound = lost().leaving(TargetState::Rewound);
        assert_eq!(class(&target, rewound), Class::Rewound);
    }

    #[test]
    fn another_run_on_a_target_is_waited_for_and_not_resumed() {
        let target = EmptyTarget::new();
        seal(&target);
        marks::hide(&*target.target.disk).unwrap();
        let busy = RewindError::new(Class::Target, "another pgrejoin is running");
        let busy = busy.leaving(TargetState::InUse);
        let error = by_marks::<()>(target.home.path(), Err(busy)).unwrap_err();
        assert_eq!(error.class(), Class::Target);
        assert_eq!(error.to_string(), "another pgrejoin is running");
    }

    #[test]
    fn a_live_run_is_told_from_one_that_is_gone() {
        let target = EmptyTarget::new();
        let state = || status(target.home.path()).unwrap();
        seal(&target);
        marks::hide(&*target.target.disk).unwrap();
        let held = crate::target::lock_only(target.home.path()).unwrap();
        let alive = state();
        assert_eq!(alive.state, NodeState::Changing);
        assert!(alive.text.contains(&std::process::id().to_string()), "{}", alive.text);
        drop(held);
        assert_eq!(state().state, NodeState::PartlyChanged);
    }

    #[test]
    fn a_control_file_that_nobody_accounts_for_is_damage() {
        let target = EmptyTarget::new();
        std::fs::remove_file(target.home.path().join("global/pg_control")).unwrap();
        let found = status(target.home.path()).unwrap();
        assert_eq!(found.state, NodeState::Damaged);
        assert!(found.text.contains("take a new base backup"), "{}", found.text);
    }

    #[test]
    fn each_state_has_its_advice() {
        let manifest = || Box::new(manifest());
        let states = [
            (State::None, None),
            (State::Preparing, Some("Run pgrejoin rewind to continue")),
            (State::Sealed(manifest()), Some("Run pgrejoin resume to finish it")),
            (State::Hidden(manifest()), Some("Do not start PostgreSQL: run pgrejoin resume")),
            (State::Exposed(manifest()), Some("Do not start PostgreSQL: run pgrejoin resume")),
            (State::Spoiled(manifest()), Some("take a new base backup")),
            (State::Committed(manifest()), Some("Start PostgreSQL")),
            (State::Cleaning, Some("Start PostgreSQL")),
            (State::Undoing(manifest()), Some("Do not start PostgreSQL: run pgrejoin rollback")),
            (State::RolledBack(manifest()), Some("Run pgrejoin rollback to remove them")),
            (State::CleaningBack, Some("Run pgrejoin rollback to remove them")),
        ];
        for (state, advice) in states {
            let said = describe_state(&state);
            assert!(advice.is_none_or(|advice| said.contains(advice)), "{state:?}: {said}");
        }
    }

    #[test]
    fn status_says_what_the_marks_say_and_what_cannot_be_done() {
        let target = EmptyTarget::new();
        let said = || status(target.home.path()).unwrap().text;
        let state = || status(target.home.path()).unwrap().state;
        assert_eq!(said(), describe_state(&State::None));
        assert_eq!(state(), NodeState::Idle);
        seal(&target);
        assert!(said().starts_with("a rewind is prepared"), "{}", said());
        assert_eq!(state(), NodeState::Prepared);
        marks::hide(&*target.target.disk).unwrap();
        assert_eq!(state(), NodeState::PartlyChanged);
        assert!(said().starts_with("a rewind is changing this data directory"), "{}", said());
        assert!(said().ends_with("it can be resumed, but not rolled back."), "{}", said());
    }
}

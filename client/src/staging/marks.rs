//! The marks in the state directory `.pgrejoin`, and the state of the rewind that they stand for.

use std::io;

use pg_format::ControlFile;
use pg_format::file_class::OWN_DIRECTORY;

use crate::staging::disk::{Disk, read_all, replace_file};
use crate::staging::header::{self, HEADER_BYTES, HeaderError};
use crate::staging::layout::{CACHE, DIVERGED, STAGED_DIRECTORIES, own};
use crate::staging::manifest::{Manifest, ManifestError};
use crate::staging::warning;

const CONTROL: &str = "global/pg_control";
const SEALED: &str = ".pgrejoin/sealed";
const HIDDEN: &str = ".pgrejoin/hidden";
/// Everything but the new `pg_control` is in place and durable: from here on a `pg_control` in place is the
/// new one.
const REDONE: &str = ".pgrejoin/redone";
const COMMITTED: &str = ".pgrejoin/committed";
/// The target is being rolled back.
const UNDOING: &str = ".pgrejoin/undoing";
/// Everything but the old `pg_control` is restored and durable: from here on a `pg_control` in place is the
/// old one.
const UNDONE: &str = ".pgrejoin/undone";
const ROLLED_BACK: &str = ".pgrejoin/rolled-back";
/// The target's `pg_control` while it is hidden.
const SAVED_CONTROL: &str = ".pgrejoin/pg_control.saved";
/// The new one before it is put in place.
const NEW_CONTROL: &str = ".pgrejoin/pg_control.new";

/// What the marks say.
#[derive(Debug)]
pub enum State {
    /// No rewind is under way.
    None,
    /// One was being prepared; the target is unchanged.
    Preparing,
    /// Everything is staged; the target is unchanged.
    Sealed(Box<Manifest>),
    /// The target is being changed.
    Hidden(Box<Manifest>),
    /// The target is being changed and has a `pg_control`: the run was killed before it moved the file aside,
    /// or somebody put the old or the new one back. PostgreSQL has not run on it.
    Exposed(Box<Manifest>),
    /// The target was being changed when a `pg_control` was put back and PostgreSQL ran on the partly changed
    /// files. Neither resume nor rollback knows what it wrote.
    Spoiled(Box<Manifest>),
    /// The target is rewound; only clean-up is left.
    Committed(Box<Manifest>),
    /// The same, and the clean-up had almost finished.
    Cleaning,
    /// The target is being rolled back.
    Undoing(Box<Manifest>),
    /// The target is as it was again; only clean-up is left.
    RolledBack(Box<Manifest>),
    /// The same, and the clean-up had almost finished.
    CleaningBack,
}

impl State {
    /// The manifest, in the states that have one.
    pub fn manifest(&self) -> Option<&Manifest> {
        match self {
            Self::Sealed(manifest)
            | Self::Hidden(manifest)
            | Self::Exposed(manifest)
            | Self::Spoiled(manifest)
            | Self::Committed(manifest)
            | Self::Undoing(manifest)
            | Self::RolledBack(manifest) => Some(manifest),
            Self::None | Self::Preparing | Self::Cleaning | Self::CleaningBack => None,
        }
    }

    /// Whether PostgreSQL may run on the target: nothing was begun, or all of it is over.
    pub fn is_over(&self) -> bool {
        match self {
            Self::None
            | Self::Committed(_)
            | Self::Cleaning
            | Self::RolledBack(_)
            | Self::CleaningBack => true,
            Self::Preparing
            | Self::Sealed(_)
            | Self::Hidden(_)
            | Self::Exposed(_)
            | Self::Spoiled(_)
            | Self::Undoing(_) => false,
        }
    }
}

/// Why the state cannot be determined.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error("could not read the state directory")]
    Io(#[from] io::Error),
    /// The manifest is unusable.
    #[error("{SEALED} is not usable")]
    Manifest(#[from] ManifestError),
    /// A file was written by another release.
    #[error("{0} is not usable")]
    Header(String, #[source] HeaderError),
}

fn exists(disk: &dyn Disk, path: &str) -> io::Result<bool> {
    disk.is_directory(&own(path)).map(|found| found.is_some())
}

/// Reads the marks of a locked target.
pub fn load(disk: &dyn Disk) -> Result<State, StateError> {
    if !exists(disk, SEALED)? {
        if exists(disk, COMMITTED)? {
            return Ok(State::Cleaning);
        }
        if exists(disk, ROLLED_BACK)? {
            return Ok(State::CleaningBack);
        }
        return Ok(if is_preparing(disk)? { State::Preparing } else { State::None });
    }
    let manifest = Box::new(Manifest::decode(&read_all(disk, &own(SEALED))?)?);
    if exists(disk, COMMITTED)? {
        return Ok(State::Committed(manifest));
    }
    if exists(disk, ROLLED_BACK)? {
        return Ok(State::RolledBack(manifest));
    }
    let undoing = exists(disk, UNDOING)?;
    let warns = warning::stands(disk)?;
    if !exists(disk, CONTROL)? {
        return Ok(if undoing { State::Undoing(manifest) } else { State::Hidden(manifest) });
    }
    // The last rename came before its mark, and a server may have run since and changed the file. So any
    // `pg_control` counts as the one that was put in place, unless it is the other of the two.
    let live = read_all(disk, &own(CONTROL))?;
    let has_run = is_of_a_server(&live, &manifest);
    let put_back = |manifest| match has_run {
        true => State::Spoiled(manifest),
        false => State::Exposed(manifest),
    };
    if undoing {
        let done = exists(disk, UNDONE)? && live != manifest.new_control && !warns;
        return Ok(if done { State::RolledBack(manifest) } else { put_back(manifest) });
    }
    Ok(match (exists(disk, HIDDEN)?, exists(disk, REDONE)?) {
        (_, true) if live != manifest.old_control && !warns => State::Committed(manifest),
        (false, false) if !warns => State::Sealed(manifest),
        (_, _) => put_back(manifest),
    })
}

/// Whether a server has written this `pg_control`, which it does when it starts. A file that is neither the
/// old nor the new one and is not valid is an incomplete copy, not a server's.
pub(crate) fn is_of_a_server(live: &[u8], manifest: &Manifest) -> bool {
    if live == manifest.old_control || live == manifest.new_control {
        return false;
    }
    let Ok(own) = ControlFile::parse(&manifest.new_control) else {
        return true;
    };
    live.len() == manifest.new_control.len()
        && ControlFile::parse(live)
            .is_ok_and(|live| live.system_identifier == own.system_identifier)
}

/// Whether the state directory has more than what a finished rewind leaves. Files of another release are an
/// error.
fn is_preparing(disk: &dyn Disk) -> Result<bool, StateError> {
    if !exists(disk, OWN_DIRECTORY)? {
        return Ok(false);
    }
    let names = disk.names(&own(OWN_DIRECTORY))?;
    for name in &names {
        let path = format!("{OWN_DIRECTORY}/{name}");
        if disk.stat(&own(path.as_str()))?.is_none() {
            continue;
        }
        let mut head = Vec::new();
        let file = disk.open(&own(path.as_str()))?;
        io::Read::read_to_end(&mut io::Read::take(file, HEADER_BYTES as u64), &mut head)?;
        if let Err(error @ HeaderError::Version { .. }) = header::check(&head) {
            return Err(StateError::Header(path, error));
        }
    }
    Ok(names.iter().any(|name| name != DIVERGED))
}

/// Whether a data directory is being changed, decided by file names alone: even if no file in it can be read,
/// the caller must not be told that the target is unchanged.
pub fn is_being_changed(pgdata: &std::path::Path) -> bool {
    let has = |name: &str| pgdata.join(name).symlink_metadata().is_ok();
    let open = has(SEALED) && !has(COMMITTED) && !has(ROLLED_BACK);
    let last = if has(UNDOING) { UNDONE } else { REDONE };
    open && (!has(CONTROL) || has(HIDDEN) && !has(last) || warning::stands_in(pgdata))
}

/// Whether a target that has a `pg_control` is being changed all the same.
pub fn has_begun(disk: &dyn Disk) -> io::Result<bool> {
    Ok(exists(disk, HIDDEN)? || warning::stands(disk)?)
}

/// Removes the seal: from here on the rewind cannot be finished with what is staged.
pub fn unseal(disk: &dyn Disk) -> io::Result<()> {
    unmark(disk, SEALED)
}

/// From here on the rewind can be finished without the source: the contents of what was staged are
/// durable, and now their names are.
pub fn seal(disk: &dyn Disk, manifest: &[u8]) -> io::Result<()> {
    for directory in STAGED_DIRECTORIES.iter().filter(|directory| **directory != CACHE) {
        disk.sync_directory(Some(&own(*directory)))?;
    }
    replace_file(disk, &own(SEALED), manifest)
}

fn mark(disk: &dyn Disk, name: &str) -> io::Result<()> {
    replace_file(disk, &own(name), &header::header())
}

fn unmark(disk: &dyn Disk, name: &str) -> io::Result<()> {
    if exists(disk, name)? {
        disk.remove_file(&own(name))?;
        disk.sync_directory(Some(&own(OWN_DIRECTORY)))?;
    }
    Ok(())
}

/// Locks PostgreSQL out, in two ways: it refuses to start from here on.
pub fn hide(disk: &dyn Disk) -> io::Result<()> {
    warning::put(disk)?;
    disk.rename(&own(CONTROL), &own(SAVED_CONTROL))?;
    mark_hidden(disk)
}

/// Restores both locks, whatever a killed run or somebody else left of them.
pub fn hide_again(disk: &dyn Disk) -> io::Result<()> {
    warning::put(disk)?;
    if exists(disk, CONTROL)? {
        disk.remove_file(&own(CONTROL))?;
    }
    mark_hidden(disk)
}

/// Makes it durable that `pg_control` was moved aside, and writes the mark for it, unless the mark exists: a
/// full disk must not keep resume or rollback from starting.
fn mark_hidden(disk: &dyn Disk) -> io::Result<()> {
    sync_control(disk)?;
    mark_once(disk, HIDDEN)
}

fn mark_once(disk: &dyn Disk, name: &str) -> io::Result<()> {
    if exists(disk, name)? { Ok(()) } else { mark(disk, name) }
}

/// The target is changed from here on: nothing that an earlier run marked as done holds any longer.
pub fn begin_redo(disk: &dyn Disk) -> io::Result<()> {
    unmark(disk, REDONE)?;
    unmark(disk, UNDONE)?;
    unmark(disk, UNDOING)
}

/// The target is rolled back from here on.
pub fn begin_undo(disk: &dyn Disk) -> io::Result<()> {
    unmark(disk, UNDONE)?;
    unmark(disk, REDONE)?;
    mark_once(disk, UNDOING)
}

/// Puts the new `pg_control` in place: the commit.
pub fn commit(disk: &dyn Disk, control: &[u8]) -> io::Result<()> {
    put_control(disk, control, REDONE)
}

/// Puts the old `pg_control` back: the end of a rollback.
pub fn put_back(disk: &dyn Disk, control: &[u8]) -> io::Result<()> {
    put_control(disk, control, UNDONE)
}

/// Marks that everything else is in place, then puts a `pg_control` there.
fn put_control(disk: &dyn Disk, control: &[u8], done: &str) -> io::Result<()> {
    let new = own(NEW_CONTROL);
    disk.create_file(&new)?;
    disk.write_at(&new, 0, control)?;
    disk.sync_file(&new)?;
    mark(disk, done)?;
    disk.rename(&new, &own(CONTROL))?;
    sync_control(disk).inspect_err(|_| {
        // It is not known whether the rename would survive a power cut, so nobody may start from this file.
        // The mark stays: if the file is in place after a power cut, everything else is, too.
        disk.rename(&own(CONTROL), &new).ok();
    })
}

/// Makes it durable that `pg_control` was renamed between its two directories.
fn sync_control(disk: &dyn Disk) -> io::Result<()> {
    disk.sync_directory(Some(&own("global")))?;
    disk.sync_directory(Some(&own(OWN_DIRECTORY)))
}

/// Makes a commit durable once more and writes the mark that says so.
pub fn mark_committed(disk: &dyn Disk) -> io::Result<()> {
    sync_control(disk)?;
    mark(disk, COMMITTED)
}

/// Makes the end of a rollback durable once more and writes the mark that says so.
pub fn mark_rolled_back(disk: &dyn Disk) -> io::Result<()> {
    sync_control(disk)?;
    mark(disk, ROLLED_BACK)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use data_dir::DataDir;

    use super::*;
    use crate::staging::disk::RealDisk;
    use crate::staging::state_directory::prepare;
    use crate::test_values::{control_bytes, manifest};

    #[test]
    fn a_server_started_before_the_commit_was_marked_does_not_hide_the_commit() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("global")).unwrap();
        std::fs::File::create(home.path().join("PG_VERSION")).unwrap();
        let directory = Arc::new(DataDir::open(home.path()).unwrap());
        let disk = RealDisk::new(Arc::clone(&directory), None, true).unwrap();
        let control = |bytes: &[u8]| replace_file(&disk, &own("global/pg_control"), bytes);
        prepare(&disk, &directory, None).unwrap();
        control(b"old").unwrap();
        seal(&disk, &manifest().encode().unwrap()).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Sealed(_)));
        // Killed between the two locks.
        warning::put(&disk).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Exposed(_)));
        assert!(is_being_changed(home.path()));
        hide(&disk).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Hidden(_)));
        assert!(is_being_changed(home.path()));
        // Somebody helps with a copy: whatever it is, the directory is a mixture.
        control(b"old").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Exposed(_)));
        assert!(is_being_changed(home.path()));
        hide_again(&disk).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Hidden(_)));
        control(b"old, and the server has run").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Spoiled(_)));
        assert!(is_being_changed(home.path()));
        std::fs::remove_file(home.path().join("global/pg_control")).unwrap();
        // A way back that had come to its end once is not over while the warning stands again.
        begin_undo(&disk).unwrap();
        mark(&disk, UNDONE).unwrap();
        control(b"old").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Exposed(_)));
        hide_again(&disk).unwrap();
        begin_redo(&disk).unwrap();
        // The commit's rename, then a crash before its mark.
        warning::replace(&disk, b"START").unwrap();
        commit(&disk, b"new").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Committed(_)));
        assert!(!is_being_changed(home.path()));
        control(b"old").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Exposed(_)));
        control(b"new, and the server has run").unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Committed(_)));
        mark_committed(&disk).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Committed(_)));
        std::fs::remove_file(home.path().join(SEALED)).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Cleaning));
    }

    #[test]
    fn half_a_copy_of_pg_control_is_no_sign_of_a_server() {
        let own = control_bytes();
        let manifest = Manifest { new_control: own.clone(), ..manifest() };
        let mut later = own.clone();
        later.truncate(4096);
        assert!(!is_of_a_server(&later, &manifest), "it was not copied whole");
        assert!(!is_of_a_server(b"", &manifest));
        assert!(!is_of_a_server(&own, &manifest));
        // The same cluster's, written since.
        let mut later = own;
        later.get_mut(24..28).unwrap().copy_from_slice(&5_u32.to_le_bytes());
        let crc = crc32c::crc32c(&later[..288]).to_le_bytes();
        later.get_mut(288..292).unwrap().copy_from_slice(&crc);
        assert!(is_of_a_server(&later, &manifest));
    }
}

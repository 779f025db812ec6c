//! The state directory `.pgrejoin`: what is in it, and which state it tells.

use std::io;

use data_dir::DataDir;
use pg_format::DataPath;
use pg_format::file_class::OWN_DIRECTORY;

use super::disk::{Disk, remove_tree, replace_file};
use super::manifest::{Manifest, ManifestError};

/// Directories that `--staging-dir` moves elsewhere.
pub const STAGED_DIRECTORIES: [&str; 2] = [".pgrejoin/packs", ".pgrejoin/wal"];

const SEALED: &str = ".pgrejoin/sealed";
const HIDDEN: &str = ".pgrejoin/hidden";
/// Everything but the new `pg_control` is in place and durable: from here on a live one is ours.
const REDONE: &str = ".pgrejoin/redone";
const COMMITTED: &str = ".pgrejoin/committed";
/// The target's `pg_control` while it is hidden.
const SAVED_CONTROL: &str = ".pgrejoin/pg_control.saved";
/// The new one before it is put in place.
const NEW_CONTROL: &str = ".pgrejoin/pg_control.new";
/// Where the WAL of lost transactions is kept; stays when everything else goes.
const DIVERGED: &str = "diverged";

/// A path below the data directory that this program made up.
#[expect(clippy::expect_used, reason = "the names are constants and numbers of ours")]
fn own(path: impl Into<String>) -> DataPath {
    DataPath::new(path).expect("our own paths are plain")
}

/// Where a fetched WAL segment is staged.
pub fn staged_wal(name: &str) -> DataPath {
    own(format!("{OWN_DIRECTORY}/wal/{name}"))
}

/// Where the pack of a connection is. Each attempt has names of its own: what a thread of an earlier
/// one still writes must not land in it.
pub fn pack(name: &str) -> DataPath {
    own(format!("{OWN_DIRECTORY}/packs/{name}"))
}

/// The state directory of the file system that holds `path`: renames must not leave it.
fn beside(directory: &DataDir, path: &DataPath) -> String {
    let parts: Vec<&str> = path.components().collect();
    match parts[..] {
        ["pg_tblspc", oid, _, ..]
            if directory.linked_tablespaces().any(|(linked, ..)| linked == oid) =>
        {
            format!("pg_tblspc/{oid}/{OWN_DIRECTORY}")
        }
        ["pg_wal", ..] if directory.wal_is_elsewhere() => format!("pg_wal/{OWN_DIRECTORY}"),
        _ => OWN_DIRECTORY.to_owned(),
    }
}

/// Where the planned file `index` is put together before it is renamed to `path`.
pub fn temporary(directory: &DataDir, path: &DataPath, index: usize) -> DataPath {
    own(format!("{}/new-{index}", beside(directory, path)))
}

/// Where the planned removal `index` of `path` goes until clean-up.
pub fn trash(directory: &DataDir, path: &DataPath, index: usize) -> DataPath {
    own(format!("{}/trash-{index}", beside(directory, path)))
}

/// Where a segment of lost transactions is kept.
pub fn diverged(directory: &DataDir, fork: &str, name: &str) -> DataPath {
    let wal = own(format!("pg_wal/{name}"));
    own(format!("{}/{DIVERGED}/{fork}/{name}", beside(directory, &wal)))
}

/// Every state directory of the target: its own, and one on each file system it links to.
pub fn state_directories(directory: &DataDir) -> Vec<DataPath> {
    let mut all = vec![own(OWN_DIRECTORY)];
    if directory.wal_is_elsewhere() {
        all.push(own(format!("pg_wal/{OWN_DIRECTORY}")));
    }
    for (oid, ..) in directory.linked_tablespaces() {
        all.push(own(format!("pg_tblspc/{oid}/{OWN_DIRECTORY}")));
    }
    all
}

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
    /// The target is being changed, and somebody put a `pg_control` back: PostgreSQL would start
    /// from a mixture.
    Exposed(Box<Manifest>),
    /// The target is rewound; only clean-up is left.
    Committed(Box<Manifest>),
    /// The same, and the clean-up had almost finished.
    Cleaning,
}

/// Why the state cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error("could not read the state directory")]
    Io(#[from] io::Error),
    /// The manifest is unusable.
    #[error("{SEALED} is not usable")]
    Manifest(#[from] ManifestError),
}

fn exists(disk: &dyn Disk, path: &str) -> io::Result<bool> {
    disk.is_directory(&own(path)).map(|found| found.is_some())
}

fn read(disk: &dyn Disk, path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut disk.open(&own(path))?, &mut bytes)?;
    Ok(bytes)
}

/// Reads the marks of a locked target.
pub fn load(disk: &dyn Disk) -> Result<State, StateError> {
    if !exists(disk, SEALED)? {
        if exists(disk, COMMITTED)? {
            return Ok(State::Cleaning);
        }
        // `diverged` alone is what a finished rewind leaves.
        let names = match exists(disk, OWN_DIRECTORY)? {
            true => disk.names(&own(OWN_DIRECTORY))?,
            false => Vec::new(),
        };
        let busy = names.iter().any(|name| name != DIVERGED);
        return Ok(if busy { State::Preparing } else { State::None });
    }
    let manifest = Box::new(Manifest::decode(&read(disk, SEALED)?)?);
    if exists(disk, COMMITTED)? {
        return Ok(State::Committed(manifest));
    }
    match (exists(disk, "global/pg_control")?, exists(disk, HIDDEN)?, exists(disk, REDONE)?) {
        (false, ..) => Ok(State::Hidden(manifest)),
        // The commit's rename came before its mark; a server may have run since and changed it. Only
        // the old one is surely no commit.
        (true, _, true) if read(disk, "global/pg_control")? != manifest.old_control => {
            Ok(State::Committed(manifest))
        }
        (true, _, true) => Ok(State::Exposed(manifest)),
        (true, true, false) => Ok(State::Exposed(manifest)),
        (true, false, false) => Ok(State::Sealed(manifest)),
    }
}

/// Whether a data directory is being changed, told by names alone: also where nothing in it can be
/// read, whoever asks must not be told that it is as it was.
pub fn is_being_changed(pgdata: &std::path::Path) -> bool {
    let has = |name: &str| pgdata.join(name).symlink_metadata().is_ok();
    let open = has(SEALED) && !has(COMMITTED);
    open && (!has("global/pg_control") || has(HIDDEN) && !has(REDONE))
}

/// Makes an empty state directory, throwing away what an unsealed attempt left.
pub fn prepare(disk: &dyn Disk, directory: &DataDir) -> io::Result<()> {
    discard(disk, directory)?;
    for path in state_directories(directory) {
        disk.create_directory(&path)?;
        disk.set_mode(&path, 0o700)?;
    }
    for path in STAGED_DIRECTORIES {
        disk.create_directory(&own(path))?;
    }
    for path in state_directories(directory) {
        disk.sync_directory(Some(&path))?;
        disk.sync_directory(path.parent().as_ref())?;
    }
    Ok(())
}

/// Removes everything but the WAL of lost transactions; the directories too if they are then empty.
pub fn discard(disk: &dyn Disk, directory: &DataDir) -> io::Result<()> {
    for staged in STAGED_DIRECTORIES {
        remove_tree(disk, &own(staged))?;
    }
    // The one with the marks last: what it tells holds for all of them.
    for path in state_directories(directory).into_iter().rev() {
        if disk.is_directory(&path)? != Some(true) {
            continue;
        }
        // The marks go last, the one that says most last of all: until then the state is told
        // rightly.
        let mut names = disk.names(&path)?;
        names.sort_by_key(|name| match name.as_str() {
            "hidden" | "redone" => 1,
            "sealed" => 2,
            "committed" => 3,
            _ => 0,
        });
        let mut kept = false;
        for name in names {
            if name == DIVERGED {
                kept = true;
                continue;
            }
            remove_tree(disk, &path.join(&name).map_err(io::Error::other)?)?;
        }
        if !kept {
            disk.remove_directory(&path)?;
        }
        disk.sync_directory(path.parent().as_ref())?;
    }
    Ok(())
}

/// Takes the seal back: from here on what is staged is worth nothing, however much of it is left.
pub fn unseal(disk: &dyn Disk) -> io::Result<()> {
    if exists(disk, SEALED)? {
        disk.remove_file(&own(SEALED))?;
        disk.sync_directory(Some(&own(OWN_DIRECTORY)))?;
    }
    Ok(())
}

/// From here on the rewind can be finished without the source.
pub fn seal(disk: &dyn Disk, manifest: &[u8]) -> io::Result<()> {
    replace_file(disk, &own(SEALED), manifest)
}

/// Takes `pg_control` away: PostgreSQL refuses to start from here on.
pub fn hide(disk: &dyn Disk) -> io::Result<()> {
    disk.rename(&own("global/pg_control"), &own(SAVED_CONTROL))?;
    disk.sync_directory(Some(&own("global")))?;
    disk.sync_directory(Some(&own(OWN_DIRECTORY)))?;
    mark_hidden(disk)
}

/// Writes the mark that says so.
pub fn mark_hidden(disk: &dyn Disk) -> io::Result<()> {
    replace_file(disk, &own(HIDDEN), b"hidden\n")
}

/// Puts the new `pg_control` in place: the commit.
pub fn commit(disk: &dyn Disk, control: &[u8]) -> io::Result<()> {
    let new = own(NEW_CONTROL);
    disk.create_file(&new)?;
    disk.write_at(&new, 0, control)?;
    disk.sync_file(&new)?;
    replace_file(disk, &own(REDONE), b"redone\n")?;
    disk.rename(&new, &own("global/pg_control"))?;
    disk.sync_directory(Some(&own("global"))).inspect_err(|_| {
        // It is not known whether the commit would survive: everything is done again.
        disk.rename(&own("global/pg_control"), &new).ok();
        unmark_redone(disk).ok();
    })
}

/// Takes back that everything is in place.
pub fn unmark_redone(disk: &dyn Disk) -> io::Result<()> {
    if exists(disk, REDONE)? {
        disk.remove_file(&own(REDONE))?;
        disk.sync_directory(Some(&own(OWN_DIRECTORY)))?;
    }
    Ok(())
}

/// Makes a commit durable once more and writes the mark that says so.
pub fn mark_committed(disk: &dyn Disk) -> io::Result<()> {
    disk.sync_directory(Some(&own("global")))?;
    replace_file(disk, &own(COMMITTED), b"committed\n")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::apply::disk::RealDisk;
    use crate::apply::manifest::WalChanges;

    #[test]
    fn a_server_started_before_the_commit_was_marked_does_not_hide_the_commit() {
        let home = tempfile::tempdir().unwrap();
        for directory in ["global", OWN_DIRECTORY] {
            std::fs::create_dir(home.path().join(directory)).unwrap();
        }
        std::fs::File::create(home.path().join("PG_VERSION")).unwrap();
        let directory = Arc::new(DataDir::open(home.path()).unwrap());
        let disk = RealDisk::new(Arc::clone(&directory), None, true).unwrap();
        let manifest = Manifest {
            program_version: String::new(),
            old_control: b"old".to_vec(),
            new_control: b"new".to_vec(),
            files: Vec::new(),
            packs: Vec::new(),
            staging: None,
            shorter: Vec::new(),
            vanished: Vec::new(),
            wal: WalChanges::default(),
            settings: Vec::new(),
            remove: Vec::new(),
            backup_label: Vec::new(),
            sync: true,
            summary: String::new(),
        };
        let control = |bytes: &[u8]| replace_file(&disk, &own("global/pg_control"), bytes);
        control(b"old").unwrap();
        seal(&disk, &manifest.encode().unwrap()).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Sealed(_)));
        hide(&disk).unwrap();
        assert!(matches!(load(&disk).unwrap(), State::Hidden(_)));
        assert!(is_being_changed(home.path()));
        // Somebody helps with a copy: whatever it is, the directory is a mixture.
        for meddled in [&b"old"[..], b"of pg_resetwal"] {
            control(meddled).unwrap();
            assert!(matches!(load(&disk).unwrap(), State::Exposed(_)));
            assert!(is_being_changed(home.path()));
        }
        std::fs::remove_file(home.path().join("global/pg_control")).unwrap();
        // The commit's rename, then a crash before its mark.
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
}

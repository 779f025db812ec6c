//! Inspects the target without changing it: whether it is stopped, belongs to our user and is sound, and what
//! is in it.

pub mod places;
pub mod recovery_conf;
pub mod running;
pub mod settings;
pub mod start;
pub mod unstarted;
pub mod wal_archive;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use data_dir::control::Control;
use data_dir::dir::read_at;
use data_dir::private_keys::{self, is_key_name};
use data_dir::settings::Settings;
use data_dir::wal::LocalWal;
use data_dir::{DataDir, Entry, EntryKind};
use pg_format::page::{SPGIST_METAPAGE_BYTES, is_spgist_metapage};
use pg_format::relation::tablespace_version_directory;
use pg_format::wal::WalContext;
use pg_format::{
    BLOCK_BYTES, ControlFile, DataPath, FileClass, Fork, RelationPath, TimelineHistory,
};
use rustix::fs::FlockOperation;

use crate::config::Config;
use crate::error::{Class, RewindError, TargetState};
use crate::monitor::Monitor;
use crate::plan::input::file_bytes;
use crate::staging::disk::{Disk, RealDisk};
use crate::staging::external::Staging;
use crate::staging::state_error;
use crate::target::unstarted::is_unstarted;

/// Directories of `pg_wal` with something in them that a rewind changes.
const WAL_DIRECTORIES: [&str; 3] = ["pg_wal", "pg_wal/archive_status", "pg_wal/summaries"];

/// The target, locked: nobody else rewinds it as long as this value lives.
#[derive(Debug)]
pub struct Target {
    /// Its data directory; the lock is on its handle.
    pub directory: Arc<DataDir>,
    /// The disk through which it is changed.
    pub disk: Arc<dyn Disk>,
    /// Where packs and WAL are staged, if not in the state directory.
    pub staging: Option<Staging>,
    /// Its `pg_control`.
    pub control: Control,
    /// The history of its timeline.
    pub history: TimelineHistory,
    /// Its settings.
    pub settings: Settings,
    /// Everything in it.
    pub files: BTreeMap<DataPath, Entry>,
    /// Whether it was rewound before and not started since: its pages are right only once its WAL was replayed.
    pub unstarted: bool,
}

/// Opens and locks a data directory that belongs to our user and in which no server runs.
pub fn lock(path: &Path) -> Result<DataDir, RewindError> {
    let directory = lock_only(path)?;
    running::refuse_running_unless_ending(&directory)?;
    Ok(directory)
}

/// Opens and locks a data directory that belongs to our user, whatever runs there.
pub fn lock_only(path: &Path) -> Result<DataDir, RewindError> {
    let directory = DataDir::open(path)?;
    let target = |message: String| RewindError::new(Class::Target, message);
    let io = |error| {
        RewindError::because(
            Class::Target,
            format!("could not read the owner of data directory {}", path.display()),
            error,
        )
    };
    let (owner, _) = directory.owner_and_mode().map_err(io)?;
    let us = rustix::process::geteuid().as_raw();
    if owner != us {
        return Err(target(format!(
            "data directory {} belongs to user id {owner}, but this program runs as user id {us}: \
             run it as the owner",
            path.display()
        )));
    }
    let operation = FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(directory.root(), operation).map_err(|_| {
        target(format!(
            "another pgrejoin is running on data directory {}: wait until it has finished",
            path.display()
        ))
        .leaving(TargetState::InUse)
    })?;
    Ok(directory)
}

/// Looks at a locked target and refuses one that cannot be rewound.
pub fn inspect(
    directory: &Arc<DataDir>,
    staging: Option<Staging>,
    config: &Config,
) -> Result<Target, RewindError> {
    let disk = RealDisk::new(Arc::clone(directory), staging.clone(), config.sync);
    let disk: Arc<dyn Disk> = Arc::new(disk.map_err(state_error)?);
    let refuse = |message: String| Err(RewindError::new(Class::Target, message));
    // R16: what a killed server left in the kernel's cache must survive before it is built on.
    disk.sync_all().map_err(|error| {
        let message = "could not sync the target's files to disk";
        RewindError::because(Class::Target, message, error)
    })?;
    let control = directory.control()?;
    let backup = control.file.backup_start_point;
    let unstarted = is_unstarted(directory)?;
    if !unstarted && (directory.has("backup_label") || backup.is_valid()) {
        return refuse(format!(
            "target {} is a base backup whose recovery has not finished (backup_label or backup \
             start point {backup}): start PostgreSQL on it until recovery ends, or take a new base \
             backup",
            directory.path().display()
        ));
    }
    let named = config.config_file.as_deref();
    let settings = settings::read(directory, control.file.major, named)?;
    settings::refuse_recovery_target(&settings)?;
    let history = directory.history(control.file.timeline())?;
    let mut files = BTreeMap::new();
    let version_directory =
        tablespace_version_directory(control.file.major, control.file.catalog_version);
    // Directories whose content stays as it is are not entered: they may not even be readable.
    let enter = |path: &DataPath| match FileClass::of(path) {
        FileClass::Log => false,
        FileClass::Wal => WAL_DIRECTORIES.contains(&path.as_str()),
        _ => true,
    };
    let walked = directory.walk(&version_directory, &enter, &mut |entry| {
        files.insert(entry.path.clone(), entry);
        Ok(())
    });
    walked.map_err(|error| {
        RewindError::because(Class::Target, "could not list the target's files", error)
    })?;
    let directory = Arc::clone(directory);
    Ok(Target { directory, disk, staging, control, history, settings, files, unstarted })
}

/// Directories that are not PostgreSQL's and cannot be read stay as they are, which is not what mirroring promises.
pub fn check_unreadable(
    config: &Config,
    target: &Target,
    monitor: &dyn Monitor,
) -> Result<(), RewindError> {
    let is_unreadable = |entry: &&Entry| entry.kind == EntryKind::Unreadable;
    for Entry { path, .. } in target.files.values().filter(is_unreadable) {
        if config.mirror_extra_files {
            let message = format!(
                "{path} on the target cannot be read, so it cannot be mirrored: make it readable, or leave out \
                 --extra-files mirror"
            );
            return Err(RewindError::new(Class::Target, message));
        }
        monitor.note(&format!("{path} cannot be read and stays as it is"));
    }
    Ok(())
}

/// Files of the target that are private keys, among those PostgreSQL does not know.
pub fn private_keys(target: &Target) -> BTreeSet<DataPath> {
    let configured = target.settings.get("ssl_key_file").and_then(|file| file.rsplit('/').next());
    let mut keys = BTreeSet::new();
    for path in target.files.keys() {
        if FileClass::of(path) != FileClass::Unknown {
            continue;
        }
        let name = path.file_name();
        let known = is_key_name(name) || configured == Some(name);
        let held = match target.directory.open_file(path) {
            Ok(file) => private_keys::search(&file).map_or(true, |search| search.holds_key),
            Err(_) => false,
        };
        if known || held {
            keys.insert(path.clone());
        }
    }
    keys
}

/// Relations whose first page PostgreSQL changes without WAL, found by what that page holds: the first page of
/// an `SP-GiST` index remembers pages with room (`SpGistUpdateMetaPage`). docs/RULES.md, R1a.
///
/// # Errors
/// A file cannot be read, and which.
pub fn changed_without_wal(target: &Target) -> io::Result<Vec<RelationPath>> {
    let mut found = Vec::new();
    for (path, entry) in &target.files {
        let FileClass::Relation(segment) = FileClass::of(path) else {
            continue;
        };
        let first = segment.fork == Fork::Main && segment.segment == 0;
        if !first || file_bytes(entry).is_none_or(|bytes| bytes < BLOCK_BYTES) {
            continue;
        }
        let mut first = [0; SPGIST_METAPAGE_BYTES];
        let read = target.directory.open_file(path).and_then(|file| read_at(&file, &mut first, 0));
        let bytes =
            read.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        if is_spgist_metapage(first.get(..bytes).unwrap_or_default()) {
            found.push(segment.relation);
        }
    }
    Ok(found)
}

/// How a node's WAL is read.
pub fn wal_context(control: &ControlFile) -> WalContext {
    WalContext {
        format: control.major.wal_format(),
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
    }
}

pub(crate) fn local_wal(target: &Target) -> LocalWal<'_> {
    LocalWal {
        directory: &target.directory,
        history: &target.history,
        context: wal_context(&target.control.file),
    }
}

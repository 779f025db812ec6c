//! Checks before anything is fetched: disk space on every file system, and permission for every change.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use data_dir::DataDir;
use data_dir::confined::open_below;
use data_dir::dir::mount_of;
use pg_format::{DataPath, FileClass};
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Statx, StatxAttributes, StatxFlags};

use crate::error::{Class, RewindError};
use crate::plan::input::{TargetFiles, file_bytes};
use crate::plan::{FileAction, Plan};

/// Kept free beyond what is needed: the file system's own metadata and the server's first minutes.
const SPARE_BYTES: u64 = 16 << 20;

/// Bytes needed on one file system.
#[derive(Debug, Default)]
struct Need {
    path: String,
    bytes: u64,
    free: u64,
}

/// The disk space that a rewind needs.
#[derive(Debug)]
pub struct NeededSpace<'a> {
    /// The target.
    pub directory: &'a DataDir,
    /// `--staging-dir`
    pub staging: Option<&'a Path>,
    /// Bytes of data still to be staged.
    pub staged_bytes: u64,
    /// Bytes of undo images still to be saved.
    pub undo_bytes: u64,
    /// Bytes of WAL still to be staged.
    pub wal_bytes: u64,
    /// Bytes of staged WAL that will be copied into `pg_wal`, because it cannot be renamed there.
    pub copied_wal_bytes: u64,
    /// Whether the space of files that are cut must stay free, so that a rollback can extend them again.
    pub keeps_cut: bool,
}

impl<'a> NeededSpace<'a> {
    /// Space for the changed files alone.
    pub fn on(directory: &'a DataDir, staging: Option<&'a Path>) -> Self {
        let (staged_bytes, undo_bytes, wal_bytes, copied_wal_bytes) = (0, 0, 0, 0);
        Self {
            directory,
            staging,
            staged_bytes,
            undo_bytes,
            wal_bytes,
            copied_wal_bytes,
            keeps_cut: false,
        }
    }

    /// Refuses a plan for which a file system has too little space.
    pub fn check(&self, plan: &Plan, target: &TargetFiles) -> Result<(), RewindError> {
        let Self { directory, staging, copied_wal_bytes, .. } = *self;
        let mut needs: BTreeMap<u64, Need> = BTreeMap::new();
        let staged = [self.staged_bytes, self.undo_bytes, self.wal_bytes];
        let staged = staged.into_iter().fold(0, u64::saturating_add);
        match staging {
            Some(path) => {
                let opened = std::fs::File::open(path).map_err(|error| {
                    let message = format!("could not open staging directory {}", path.display());
                    RewindError::because(Class::Usage, message, error)
                })?;
                add(&mut needs, opened, &path.display().to_string(), staged)?;
            }
            None => {
                let name = directory.path().display().to_string();
                add(&mut needs, directory.root(), &name, staged)?;
            }
        }
        let wal = DataPath::of("pg_wal");
        let wal = directory.open_directory(&wal).map_err(|e| unwritable(&wal, e))?;
        add(&mut needs, &wal, "pg_wal", copied_wal_bytes)?;
        self.changed_files(plan, target, &mut needs)?;
        refuse_short(&needs)
    }

    /// Adds the space that changed files need in addition to the files that they replace.
    fn changed_files(
        &self,
        plan: &Plan,
        target: &TargetFiles,
        needs: &mut BTreeMap<u64, Need>,
    ) -> Result<(), RewindError> {
        for file in &plan.files {
            let bytes = match file.action {
                // The old file stays until the new one is in place.
                FileAction::Replace { bytes } => bytes.unwrap_or_default(),
                FileAction::Patch { bytes } => {
                    let before = target.get(&file.path).and_then(file_bytes).unwrap_or(0);
                    let cut = if self.keeps_cut { before.saturating_sub(bytes) } else { 0 };
                    bytes.saturating_sub(before).max(cut)
                }
                FileAction::Remove | FileAction::RemoveTree | FileAction::MakeDirectory { .. } => 0,
            };
            if bytes > 0 {
                let (base, _) = self.directory.resolve(&file.path);
                let name = file.path.components().take(2).collect::<Vec<_>>().join("/");
                add(needs, base, &name, bytes)?;
            }
        }
        Ok(())
    }
}

fn refuse_short(needs: &BTreeMap<u64, Need>) -> Result<(), RewindError> {
    for need in needs.values() {
        if need.bytes.saturating_add(SPARE_BYTES) > need.free {
            let message = format!(
                "not enough space on the file system of {}: about {} bytes are needed, {} are \
                 free; free some space, or give --staging-dir on another file system",
                need.path, need.bytes, need.free
            );
            return Err(RewindError::new(Class::Preflight, message));
        }
    }
    Ok(())
}

fn add(
    needs: &mut BTreeMap<u64, Need>,
    directory: impl AsFd,
    path: &str,
    bytes: u64,
) -> Result<(), RewindError> {
    let failed = |error: std::io::Error| {
        RewindError::because(
            Class::Preflight,
            format!("could not determine the free space at {path}"),
            error,
        )
    };
    let owned = directory.as_fd().try_clone_to_owned().map_err(failed)?;
    let device = std::fs::File::from(owned).metadata().map_err(failed)?.dev();
    let need = needs.entry(device).or_default();
    if need.path.is_empty() {
        let stat = rustix::fs::fstatvfs(&directory).map_err(|e| failed(e.into()))?;
        need.free = stat.f_bavail.saturating_mul(stat.f_frsize);
        path.clone_into(&mut need.path);
    }
    need.bytes = need.bytes.saturating_add(bytes);
    Ok(())
}

/// Refuses a plan with files on mounts inside the data directory that are not `pg_wal`: nothing can
/// be renamed between them and the rest.
pub fn check_mounts(directory: &DataDir, plan: &Plan) -> Result<(), RewindError> {
    let files = plan.files.iter().filter(|file| FileClass::of(&file.path) != FileClass::Discarded);
    let parents: BTreeSet<DataPath> = files.filter_map(|file| file.path.parent()).collect();
    for parent in parents {
        let (base, rest) = directory.resolve(&parent);
        let Ok(opened) = directory.open_directory(&parent) else {
            // The plan creates this directory.
            continue;
        };
        let mounts = mount_of(base, ".").and_then(|base| Ok((base, mount_of(&opened, ".")?)));
        let (base, here) = mounts.map_err(|error| unwritable(&parent, error))?;
        if base != here && !rest.is_empty() {
            let message = format!(
                "{parent} on the target is a mount point of its own: only pg_wal and tablespaces \
                 may be on other file systems"
            );
            return Err(RewindError::new(Class::Preflight, message));
        }
    }
    Ok(())
}

/// Refuses a plan that would fail halfway because it cannot write a file or a directory.
pub fn check_permissions(directory: &DataDir, plan: &Plan) -> Result<(), RewindError> {
    let mut parents = BTreeSet::new();
    for file in &plan.files {
        if let FileAction::Patch { .. } = file.action {
            // Opening for writing changes nothing and finds what permission bits do not show, as
            // an immutable file or a file system mounted read-only.
            let (base, rest) = directory.resolve(&file.path);
            let opened = open_below(base, rest, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty());
            opened.map_err(|error| unwritable(&file.path, error))?;
        } else {
            let replaced = matches!(file.action, FileAction::Replace { .. });
            refuse_immovable(directory, &file.path, replaced)?;
        }
        parents.insert(file.path.parent());
    }
    // Files that the commit writes or removes.
    for name in ["postgresql.auto.conf", "standby.signal", "recovery.signal", "backup_label"] {
        if let Ok(path) = DataPath::new(name) {
            refuse_immovable(directory, &path, false)?;
        }
    }
    parents.insert(None);
    for name in ["global", "pg_wal"] {
        parents.extend(DataPath::new(name).ok().map(Some));
    }
    for parent in parents {
        match parent {
            None => writable(directory.root()).map_err(|error| {
                let message = format!("{} cannot be written", directory.path().display());
                RewindError::because(Class::Preflight, message, error)
            })?,
            Some(path) => match directory.open_directory(&path) {
                Ok(opened) => {
                    writable(&opened).map_err(|error| unwritable(&path, error))?;
                }
                // The plan creates this directory.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(unwritable(&path, error)),
            },
        }
    }
    Ok(())
}

fn is_strange(stat: &Statx) -> bool {
    let is_file = FileType::from_raw_mode(u32::from(stat.stx_mode)).is_file();
    is_file && stat.stx_uid != rustix::process::geteuid().as_raw()
}

/// An immutable file cannot even be replaced or removed.
fn refuse_immovable(
    directory: &DataDir,
    path: &DataPath,
    replaced: bool,
) -> Result<(), RewindError> {
    let (base, rest) = directory.resolve(path);
    let name = if rest.is_empty() { "." } else { rest };
    let stat = rustix::fs::statx(base, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS);
    let immutable = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    match stat {
        // A file that is replaced gets a second name for a rollback, which the kernel may not allow for a
        // file of another user.
        Ok(stat) if stat.stx_attributes.intersects(immutable) || replaced && is_strange(&stat) => {
            let error = std::io::Error::from(rustix::io::Errno::PERM);
            Err(unwritable(path, error))
        }
        // The file does not exist yet, or the file system does not report attributes.
        _ => Ok(()),
    }
}

fn writable(directory: impl AsFd) -> std::io::Result<()> {
    Ok(rustix::fs::accessat(directory, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
}

fn unwritable(path: &DataPath, error: std::io::Error) -> RewindError {
    let message = format!("{path} on the target cannot be written: correct its owner and mode");
    RewindError::because(Class::Preflight, message, error)
}

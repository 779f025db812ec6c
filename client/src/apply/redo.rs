//! Changes the target as a sealed manifest says, then commits.
//!
//! Every step can be repeated: after a crash the whole of it runs again from the start and ends in
//! the same bytes, so nothing is remembered but the marks.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pg_format::{BLOCK_BYTES, DataPath};
use proto::fetch::{Item, ItemBody, PageContent};

use crate::apply::change::{TargetChange, failed, in_parallel, sync_directories};
use crate::apply::{pg_wal, plan_validity};
use crate::error::{Class, RewindError, TargetState};
use crate::monitor::Step;
use crate::plan::FileAction;
use crate::plan::units::file_of_unit;
use crate::staging::disk::{beside, move_away, replace_file};
use crate::staging::manifest::{self, PackDigest};
use crate::staging::{layout, marks, pack, reserve, state_directory, warning};

/// Threads that wait for the disk; one file after the other would leave it idle.
const SYNC_THREADS: usize = 8;

impl TargetChange<'_> {
    /// Hides `pg_control`, changes everything, commits, cleans up.
    pub fn redo(&self) -> Result<(), RewindError> {
        // Staged data that cannot be read back must be found while the target is as it was.
        let begun = self.has_begun()?;
        self.check_staged(begun)?;
        if begun {
            self.lock_again()?;
        } else {
            self.refuse_a_changed_target()?;
            self.check_signals_before_the_change()?;
            marks::hide(self.disk).map_err(|error| self.not_hidden(error))?;
        }
        self.change_all().map_err(|error| self.with_bytes_needed(error))
    }

    /// Whether an earlier run has begun to change the target.
    fn has_begun(&self) -> Result<bool, RewindError> {
        let has_control = self.has("global/pg_control");
        let begun = has_control.and_then(|has| Ok(!has || marks::has_begun(self.disk)?));
        begun.map_err(|error| {
            let message = "could not determine the state of the target: run pgrejoin status";
            RewindError::because(Class::Other, message, error).leaving(TargetState::PartlyChanged)
        })
    }

    /// Adds to an error because of a full disk how much space all changes need.
    fn with_bytes_needed(&self, error: RewindError) -> RewindError {
        if !error.is_disk_full() {
            return error;
        }
        let files = self.manifest.files.iter().enumerate();
        let bytes: u64 = files
            .map(|(index, file)| match file.action {
                FileAction::Replace { bytes } => bytes.unwrap_or(0),
                FileAction::Patch { bytes } => {
                    bytes.saturating_sub(self.manifest.before(index).map_or(0, |file| file.bytes))
                }
                FileAction::Remove | FileAction::RemoveTree | FileAction::MakeDirectory { .. } => 0,
            })
            .sum();
        let wal: u64 = self.manifest.segments.iter().map(|segment| segment.bytes).sum();
        error.advise(&format!(
            "all changes need up to {} bytes: free some space and run pgrejoin resume, or run \
             pgrejoin rollback, which needs none",
            bytes.saturating_add(wal)
        ))
    }

    fn change_all(&self) -> Result<(), RewindError> {
        if !self.links()? {
            return self.change();
        }
        // New tablespaces are reached through their links, so the data directory is opened again.
        let reopen = failed("could not open the target again");
        let directory = manifest::reopen(self.directory, self.manifest);
        let directory = Arc::new(directory.map_err(reopen)?);
        let reopen = failed("could not open the target again");
        let disk = self.disk.reopen(&directory).map_err(reopen)?;
        TargetChange { disk: &*disk, directory: &directory, ..*self }.change()
    }

    /// Refuses a target that somebody has changed since the plan was made.
    fn refuse_a_changed_target(&self) -> Result<(), RewindError> {
        let void = plan_validity::check(self.disk, self.manifest).map_err(|error| {
            RewindError::because(
                Class::Other,
                "could not check whether the target's files have changed",
                error,
            )
        })?;
        void.map_or(Ok(()), |why| {
            let message = format!(
                "{why}: the plan is no longer valid; keep PostgreSQL on the target stopped and run \
                 pgrejoin rewind again"
            );
            Err(RewindError::transient(message))
        })
    }

    /// The error of a failed attempt to move `pg_control` aside. Its class depends on whether the file was
    /// moved nevertheless.
    fn not_hidden(&self, error: io::Error) -> RewindError {
        if self.is_changing() {
            return failed("could not block PostgreSQL from starting on the target")(error);
        }
        let message = "could not move pg_control aside; the target is unchanged";
        RewindError::because(Class::Other, message, error)
    }

    /// Creates the links of new tablespaces. Returns whether the plan has any.
    fn links(&self) -> Result<bool, RewindError> {
        let mut any = false;
        for file in &self.manifest.files {
            let FileAction::MakeDirectory { link: Some(target) } = &file.action else {
                continue;
            };
            any = true;
            let made = match self.disk.is_directory(&file.path) {
                Ok(None) => self.disk.symlink(target, &file.path),
                other => other.map(|_| ()),
            };
            made.map_err(failed(format!("could not create symbolic link {}", file.path)))?;
        }
        Ok(any)
    }

    fn change(&self) -> Result<(), RewindError> {
        marks::begin_redo(self.disk)
            .map_err(failed("could not write the state of the rewind to .pgrejoin"))?;
        for path in layout::state_directories(self.directory) {
            let made = self.disk.create_directory(&path);
            made.map_err(failed(format!("could not create directory {path}")))?;
        }
        self.remove()?;
        self.check_signals()?;
        self.make()?;
        self.write()?;
        self.check_signals()?;
        self.complete()?;
        self.pg_wal().put().map_err(failed("could not put the WAL in place"))?;
        self.check_signals()?;
        self.monitor.step(Step::Commit);
        reserve::release_for_marks(self.disk)
            .and_then(|()| self.settings())
            .map_err(failed("could not write the recovery settings"))?;
        marks::commit(self.disk, &self.manifest.new_control)
            .map_err(failed("could not put pg_control in place"))?;
        self.clean_up()
    }

    /// An error after the commit: whatever fails, the target stays rewound.
    fn left(what: &'static str) -> impl FnOnce(io::Error) -> RewindError {
        move |error| {
            let message = format!("the target is rewound, but {what}: run pgrejoin resume");
            RewindError::because(Class::Other, message, error).leaving(TargetState::Rewound)
        }
    }

    /// Removes everything the rewind needed, after the commit.
    pub fn clean_up(&self) -> Result<(), RewindError> {
        marks::mark_committed(self.disk)
            .map_err(Self::left("that could not be recorded in .pgrejoin"))?;
        crate::staging::pid_file::release(self.disk)
            .and_then(|()| state_directory::discard(self.disk, self.directory))
            .map_err(Self::left("temporary files in .pgrejoin are left"))
    }

    /// Reads all that was staged and checks it, before anything depends on it.
    fn check_staged(&self, begun: bool) -> Result<(), RewindError> {
        // Once the target is being changed, finishing the rewind does not need the undo images.
        let sound = self.staged().and_then(|()| if begun { Ok(()) } else { self.images() });
        if sound.is_err() {
            match begun {
                true => self.check_signals()?,
                false => self.check_signals_before_the_change()?,
            }
        }
        sound.map_err(|(name, error)| self.damaged(&name, error))
    }

    fn not_stopped(&self) -> io::Result<()> {
        match self.signals.stop_at_once() || self.signals.stop() && !self.is_changing() {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }

    /// Checks that everything that finishes the rewind can be read back. The error has the file that cannot,
    /// and why.
    pub(crate) fn staged(&self) -> Result<(), (DataPath, pack::PackError)> {
        for digest in &self.manifest.packs {
            let name = layout::pack(&digest.name);
            let file = self.disk.open(&name).map_err(pack::PackError::Io);
            file.and_then(|file| pack::check(file, digest, &|| self.not_stopped()))
                .map_err(|error| (name, error))?;
        }
        self.staged_wal()
    }

    /// Checks that each WAL segment is staged as it was sealed or, once the target is being changed, already
    /// in place. Before that, a file of the same name in `pg_wal` is the target's own.
    fn staged_wal(&self) -> Result<(), (DataPath, pack::PackError)> {
        let changing = self.is_changing();
        for sealed in &self.manifest.segments {
            let name = &sealed.name;
            if changing && !self.pg_wal().is_staged(name) && self.pg_wal().is_placed(name) {
                continue;
            }
            let found = self.not_stopped().and_then(|()| pg_wal::digest(self.disk, name));
            let why = match found {
                Ok(found) if found == *sealed => continue,
                Ok(_) => {
                    pack::PackError::Damaged("its content changed after it was staged".to_owned())
                }
                Err(error) => pack::PackError::Io(error),
            };
            return Err((layout::staged_wal(name), why));
        }
        Ok(())
    }

    /// Checks that all undo images can be read back, if there are any. The error has the file that cannot,
    /// and why.
    pub(crate) fn images(&self) -> Result<(), (DataPath, pack::PackError)> {
        for digest in self.manifest.undo.iter().flat_map(|undo| &undo.images) {
            let name = layout::undo(&digest.name);
            let file = self.disk.open(&name).map_err(pack::PackError::Io);
            file.and_then(|file| pack::check(file, digest, &|| self.not_stopped()))
                .map_err(|error| (name, error))?;
        }
        Ok(())
    }

    fn has(&self, path: &str) -> io::Result<bool> {
        let path = DataPath::new(path).map_err(io::Error::other)?;
        Ok(self.disk.is_directory(&path)?.is_some())
    }

    fn damaged(&self, name: &DataPath, error: pack::PackError) -> RewindError {
        let can_go_back = || self.manifest.undo.is_some() && self.images().is_ok();
        let (left, advice) = match self.is_changing() {
            false => {
                (TargetState::Unchanged, ": run pgrejoin rollback, then pgrejoin rewind again")
            }
            true if can_go_back() => (TargetState::PartlyChanged, ": run pgrejoin rollback"),
            true => (TargetState::PartlyChanged, crate::apply::change::NEITHER_POSSIBLE),
        };
        let message = format!("staged data is damaged on this node's disk ({name}){advice}");
        RewindError::because(Class::Other, message, error).leaving(left)
    }

    fn is_changing(&self) -> bool {
        !self.has("global/pg_control").unwrap_or(true)
            || marks::has_begun(self.disk).unwrap_or(true)
    }

    fn check_signals_before_the_change(&self) -> Result<(), RewindError> {
        match self.signals.stop() {
            true => {
                let message = "stopped by a signal; the target is unchanged";
                Err(RewindError::interrupted(message))
            }
            false => Ok(()),
        }
    }

    fn temporary(&self, index: usize) -> Option<DataPath> {
        let file = self.manifest.files.get(index)?;
        Some(layout::temporary(self.directory, &file.path, index))
    }

    fn remove(&self) -> Result<(), RewindError> {
        for (index, file) in self.manifest.files.iter().enumerate() {
            self.check_signals()?;
            let goes = matches!(file.action, FileAction::Remove | FileAction::RemoveTree);
            if goes || self.manifest.is_gone(index) {
                let trash = layout::trash(self.directory, &file.path, index);
                move_away(self.disk, &file.path, &trash)
                    .map_err(failed(format!("could not remove {}", file.path)))?;
            }
        }
        Ok(())
    }

    fn make(&self) -> Result<(), RewindError> {
        let mut directories: Vec<_> = self.manifest.files.iter().enumerate().collect();
        directories.sort_by_key(|(_, file)| &file.path);
        for (index, file) in directories {
            self.check_signals()?;
            let made = match &file.action {
                FileAction::MakeDirectory { link: None } => self.disk.create_directory(&file.path),
                FileAction::MakeDirectory { link: Some(_) } => Ok(()),
                FileAction::Replace { .. } if !self.manifest.is_gone(index) => {
                    self.temporary(index).map_or(Ok(()), |path| self.disk.create_file(&path))
                }
                FileAction::Replace { .. }
                | FileAction::Patch { .. }
                | FileAction::Remove
                | FileAction::RemoveTree => Ok(()),
            };
            made.map_err(failed(format!("could not create {}", file.path)))?;
        }
        Ok(())
    }

    /// Writes the content of the packs, with one thread for each processor. If a page is in two packs, replay
    /// makes it the same whichever is written last.
    fn write(&self) -> Result<(), RewindError> {
        let total: u64 = self.manifest.packs.iter().map(|pack| pack.bytes).sum();
        let done = AtomicU64::new(0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let written = in_parallel(&self.manifest.packs, threads, &|digest, others_failed| {
            self.write_pack(digest, others_failed)?;
            let bytes = done.fetch_add(digest.bytes, Ordering::Relaxed) + digest.bytes;
            self.monitor.progress(bytes, total);
            Ok(())
        });
        self.check_signals()?;
        written
    }

    fn write_pack(
        &self,
        digest: &PackDigest,
        others_failed: &AtomicBool,
    ) -> Result<(), RewindError> {
        let name = layout::pack(&digest.name);
        let unreadable = failed(format!("could not read {name}"));
        let file = self.disk.open(&name).map_err(unreadable)?;
        let signer = pack::Signer::new(self.disk, &digest.name);
        let read = pack::read(file, digest, signer, &mut |items| {
            if self.signals.stop_at_once() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if others_failed.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            items.iter().try_for_each(|item| self.write_item(item))
        });
        read.map_err(failed(format!("could not apply {name}")))
    }

    fn write_item(&self, item: &Item) -> io::Result<()> {
        let index = file_of_unit(item.unit);
        if self.manifest.is_gone(index) {
            return Ok(());
        }
        let Some(file) = self.manifest.files.get(index) else {
            return Ok(());
        };
        let path = match file.action {
            FileAction::Replace { .. } => layout::temporary(self.directory, &file.path, index),
            FileAction::Patch { .. } => file.path.clone(),
            FileAction::Remove | FileAction::RemoveTree | FileAction::MakeDirectory { .. } => {
                return Ok(());
            }
        };
        match &item.body {
            ItemBody::Page {
                block,
                content: PageContent::Present(page) | PageContent::Torn(page),
            } => self.disk.write_at(&path, u64::from(*block) * BLOCK_BYTES, page.data()),
            ItemBody::Chunk(chunk) => self.disk.write_at(&path, chunk.offset(), chunk.data()),
            // Packs have whole pages only: differences were rebuilt before.
            ItemBody::Page { content: PageContent::Difference(_), .. } => {
                Err(io::Error::other("a pack has a page difference instead of a whole page"))
            }
            ItemBody::Page { content: PageContent::BeyondEnd, .. }
            | ItemBody::PageHashes { .. }
            | ItemBody::Same { .. }
            | ItemBody::Waiting
            | ItemBody::SegmentDigest { .. }
            | ItemBody::RecordCrc { .. }
            | ItemBody::Change(_)
            | ItemBody::End { .. } => Ok(()),
        }
    }

    /// Sets lengths, makes content durable, puts new files in place, makes names durable.
    fn complete(&self) -> Result<(), RewindError> {
        let mut written = Vec::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            self.check_signals()?;
            if self.manifest.is_gone(index) {
                continue;
            }
            let length = |bytes: u64| self.manifest.final_bytes(index, bytes);
            let (path, bytes) = match file.action {
                FileAction::Replace { bytes } => {
                    (layout::temporary(self.directory, &file.path, index), bytes.map(length))
                }
                FileAction::Patch { bytes } => (file.path.clone(), Some(length(bytes))),
                FileAction::Remove | FileAction::RemoveTree | FileAction::MakeDirectory { .. } => {
                    continue;
                }
            };
            if let Some(bytes) = bytes {
                let set = self.disk.set_length(&path, bytes);
                set.map_err(failed(format!("could not set the length of {path}")))?;
            }
            written.push(path);
        }
        self.sync_files(&written)?;
        self.keep_replaced()?;
        let mut directories: BTreeSet<Option<DataPath>> = BTreeSet::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            let gone = self.manifest.is_gone(index);
            if let (FileAction::Replace { .. }, false) = (&file.action, gone) {
                let renamed = self.put_in_place(&file.path, index);
                renamed.map_err(failed(format!("could not put {} in place", file.path)))?;
            }
            directories.insert(file.path.parent());
            if let FileAction::MakeDirectory { .. } = file.action {
                directories.insert(Some(file.path.clone()));
            }
        }
        directories.extend(layout::state_directories(self.directory).into_iter().map(Some));
        sync_directories(self.disk, directories)
    }

    /// Keeps each file that will be replaced under a second name for a rollback, durably, before the new file
    /// takes its name. At no moment is the file missing: without `PG_VERSION` nobody would recognize the data
    /// directory.
    fn keep_replaced(&self) -> Result<(), RewindError> {
        if self.manifest.undo.is_none() {
            return Ok(());
        }
        let mut directories = BTreeSet::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            let replaced = matches!(file.action, FileAction::Replace { .. });
            if replaced && self.manifest.before(index).is_some() {
                let trash = layout::trash(self.directory, &file.path, index);
                let kept = match self.disk.is_directory(&trash) {
                    Ok(None) => self.disk.link(&file.path, &trash),
                    other => other.map(|_| ()),
                };
                kept.map_err(failed(format!(
                    "could not keep the old {} for a rollback",
                    file.path
                )))?;
                directories.extend([file.path.parent(), trash.parent()]);
            }
        }
        sync_directories(self.disk, directories)
    }

    /// Renames a new file to its place, with the permission bits of the file that it replaces.
    fn put_in_place(&self, path: &DataPath, index: usize) -> io::Result<()> {
        let from = layout::temporary(self.directory, path, index);
        if let Some(before) = self.manifest.before(index) {
            self.disk.set_mode(&from, before.mode)?;
        }
        self.disk.rename(&from, path)
    }

    /// Makes files durable, and everything that was written to the target's file systems before.
    pub(crate) fn sync_files(&self, paths: &[DataPath]) -> Result<(), RewindError> {
        let synced = in_parallel(paths, SYNC_THREADS, &|path, _| {
            self.check_signals()?;
            let synced = self.disk.sync_file(path);
            synced.map_err(failed(format!("could not sync {path} to disk")))
        });
        self.check_signals()?;
        synced?;
        // Only this reports an error of a write to a file that was closed since.
        let synced = self.disk.sync_all();
        synced.map_err(failed("could not sync the target's file systems to disk"))
    }

    /// R13: settings and `standby.signal` before `backup_label`, that before `pg_control`.
    fn settings(&self) -> io::Result<()> {
        for file in &self.manifest.settings {
            replace_file(self.disk, &file.path, &file.bytes)?;
        }
        for path in &self.manifest.remove {
            // A rollback that was interrupted may have begun to write it.
            for path in [path, &beside(path)?] {
                if self.disk.is_directory(path)?.is_some() {
                    self.disk.remove_file(path)?;
                }
            }
        }
        self.disk.sync_directory(None)?;
        warning::replace(self.disk, &self.manifest.backup_label)
    }
}

//! Rolls a target that was being changed back to its state before the rewind, without the source.
//!
//! Like redo, rollback can be repeated from the start after any crash. It leaves everything that redo needs:
//! until one of the two has ended, the other can still be chosen.

use std::collections::BTreeSet;
use std::io;

use pg_format::DataPath;

use crate::apply::before_images;
use crate::apply::change::{
    NEITHER_POSSIBLE, TargetChange, failed, partly_changed, sync_directories,
};
use crate::error::{Class, RewindError, TargetState};
use crate::monitor::Step;
use crate::plan::FileAction;
use crate::staging::disk::{beside, remove_tree, replace_file};
use crate::staging::manifest::Undo;
use crate::staging::{layout, marks, pid_file, reserve, state_directory};

impl TargetChange<'_> {
    /// Puts everything back where it was, `pg_control` last, and cleans up.
    pub fn roll_back(&self) -> Result<(), RewindError> {
        let Some(way_back) = &self.manifest.undo else {
            return Err(partly_changed(
                "this rewind has no undo images (--no-undo, or too little disk space), so it \
                 cannot be rolled back: run pgrejoin resume",
            ));
        };
        self.check_undo_images()?;
        self.lock_again()?;
        self.drop_temporaries().map_err(failed("could not remove temporary files"))?;
        marks::begin_undo(self.disk)
            .map_err(failed("could not write the state of the rollback to .pgrejoin"))?;
        self.monitor.step(Step::Rollback);
        self.take_away().map_err(failed("could not remove new files"))?;
        self.bring_back()?;
        self.check_signals()?;
        self.write_images(way_back)?;
        self.pg_wal().take_back().map_err(failed("could not restore pg_wal"))?;
        reserve::release_for_marks(self.disk)
            .and_then(|()| self.small(way_back))
            .map_err(failed("could not restore the settings"))?;
        self.check_signals()?;
        self.sync_back()?;
        marks::put_back(self.disk, &self.manifest.old_control)
            .map_err(failed("could not restore pg_control"))?;
        self.clean_up_after_rollback()
    }

    /// Removes everything the rewind left, after the target is as it was.
    pub fn clean_up_after_rollback(&self) -> Result<(), RewindError> {
        let left = |error: io::Error| {
            let message = "the target is as it was, but temporary files in .pgrejoin are left: run \
                           pgrejoin rollback again";
            RewindError::because(Class::Other, message, error)
        };
        marks::mark_rolled_back(self.disk).map_err(left)?;
        pid_file::restore(self.disk).map_err(left)?;
        state_directory::discard(self.disk, self.directory).map_err(left)
    }

    /// Checks the undo images, as long as the rewind can still be finished instead.
    fn check_undo_images(&self) -> Result<(), RewindError> {
        let sound = self.images();
        if sound.is_err() {
            self.check_signals()?;
        }
        sound.map_err(|(name, error)| {
            let advice = match self.staged() {
                Ok(()) => ": run pgrejoin resume",
                Err(_) => NEITHER_POSSIBLE,
            };
            let message = format!(
                "data needed for the rollback is damaged on this node's disk ({name}){advice}"
            );
            RewindError::because(Class::Other, message, error).leaving(TargetState::PartlyChanged)
        })
    }

    /// Removes new files that were not put in place yet: on a full disk a rollback begins with the space that
    /// they free.
    fn drop_temporaries(&self) -> io::Result<()> {
        for (index, file) in self.manifest.files.iter().enumerate() {
            if let FileAction::Replace { .. } = file.action {
                let path = layout::temporary(self.directory, &file.path, index);
                if self.disk.is_directory(&path)?.is_some() {
                    self.disk.remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Removes what the rewind created, the innermost first.
    fn take_away(&self) -> io::Result<()> {
        let mut made: Vec<_> = self.manifest.files.iter().enumerate().collect();
        made.sort_by(|(_, a), (_, b)| b.path.cmp(&a.path));
        for (index, file) in made {
            match &file.action {
                FileAction::Replace { .. } if self.manifest.before(index).is_none() => {
                    remove_tree(self.disk, &file.path)?;
                }
                FileAction::MakeDirectory { link: None } => remove_tree(self.disk, &file.path)?,
                FileAction::MakeDirectory { link: Some(_) } => self.unlink(&file.path)?,
                FileAction::Replace { .. }
                | FileAction::Patch { .. }
                | FileAction::Remove
                | FileAction::RemoveTree => {}
            }
        }
        Ok(())
    }

    /// Removes the link of a new tablespace, and the state directory that was made behind the link.
    fn unlink(&self, path: &DataPath) -> io::Result<()> {
        if self.disk.is_directory(path)?.is_none() {
            return Ok(());
        }
        for own in layout::state_directories(self.directory) {
            if own.parent().as_ref() == Some(path) {
                remove_tree(self.disk, &own)?;
                self.disk.sync_directory(Some(path))?;
            }
        }
        self.disk.remove_file(path)
    }

    /// Moves back what was moved aside.
    fn bring_back(&self) -> Result<(), RewindError> {
        for (index, file) in self.manifest.files.iter().enumerate() {
            self.check_signals()?;
            let trash = layout::trash(self.directory, &file.path, index);
            let back = match self.disk.is_directory(&trash) {
                Ok(None) => Ok(()),
                Ok(Some(_)) => self.disk.rename(&trash, &file.path),
                Err(error) => Err(error),
            };
            back.map_err(failed(format!("could not restore {}", file.path)))?;
        }
        Ok(())
    }

    /// Writes the images and sets the lengths.
    fn write_images(&self, way_back: &Undo) -> Result<(), RewindError> {
        let total: u64 = way_back.images.iter().map(|digest| digest.bytes).sum();
        let mut done = 0;
        for digest in &way_back.images {
            let name = layout::undo(&digest.name);
            let file = self.disk.open(&name).map_err(crate::staging::pack::PackError::Io);
            let read = file.and_then(|file| {
                let signer = crate::staging::pack::Signer::new(self.disk, &digest.name);
                before_images::read(file, digest, signer, &mut |index, offset, bytes| {
                    if self.signals.stop_at_once() {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    let planned = self.manifest.files.get(index);
                    let planned = planned.ok_or_else(|| {
                        io::Error::other("an undo image is of a file that is not in the plan")
                    })?;
                    self.disk.write_at(&planned.path, offset, bytes)
                })
            });
            if read.is_err() {
                self.check_signals()?;
            }
            read.map_err(failed(format!("could not apply {name}")))?;
            done += digest.bytes;
            self.monitor.progress(done, total);
        }
        for (file, before) in self.patched() {
            let set = self.disk.set_length(file, before);
            set.map_err(failed(format!("could not set the length of {file}")))?;
        }
        Ok(())
    }

    /// Files that were changed in place, with their old length. Files that were moved aside are restored by
    /// renaming.
    fn patched(&self) -> impl Iterator<Item = (&DataPath, u64)> {
        let files = self.manifest.files.iter().enumerate();
        files.filter_map(|(index, file)| match file.action {
            FileAction::Patch { .. } if !self.manifest.is_gone(index) => {
                Some((&file.path, self.manifest.before(index)?.bytes))
            }
            _ => None,
        })
    }

    fn small(&self, way_back: &Undo) -> io::Result<()> {
        for old in &way_back.small {
            let half = beside(&old.path)?;
            if self.disk.is_directory(&half)? == Some(false) {
                self.disk.remove_file(&half)?;
            }
            match &old.content {
                Some((bytes, mode)) => {
                    replace_file(self.disk, &old.path, bytes)?;
                    self.disk.set_mode(&old.path, *mode)?;
                }
                None if self.disk.is_directory(&old.path)? == Some(false) => {
                    self.disk.remove_file(&old.path)?;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Makes contents and names durable.
    fn sync_back(&self) -> Result<(), RewindError> {
        let patched: Vec<DataPath> = self.patched().map(|(path, _)| path.clone()).collect();
        self.sync_files(&patched)?;
        let files = self.manifest.files.iter().map(|file| file.path.parent());
        let small = self.manifest.undo.iter().flat_map(|undo| &undo.small);
        let small = small.map(|old| old.path.parent());
        let own = layout::state_directories(self.directory).into_iter().map(Some);
        let all: BTreeSet<_> = files.chain(small).chain(own).collect();
        sync_directories(self.disk, all)
    }
}

//! Changes the target as a sealed manifest says, then commits.
//!
//! Every step can be repeated: after a crash the whole of it runs again from the start and ends in
//! the same bytes, so nothing is remembered but the marks.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use data_dir::DataDir;
use pg_format::{BLOCK_BYTES, DataPath, FileClass};
use proto::fetch::{Item, ItemBody, PageContent};

use super::disk::{Disk, remove_tree, replace_file};
use super::manifest::{Manifest, WalChanges};
use super::{pack, state};
use crate::error::{Class, RewindError};
use crate::monitor::{Monitor, Step};
use crate::plan::FileAction;

/// Threads that wait for the disk; one file after the other would leave it idle.
const SYNC_THREADS: usize = 8;

/// One run of the redo.
#[derive(Debug, Clone, Copy)]
pub struct Redo<'a> {
    /// What to do.
    pub manifest: &'a Manifest,
    /// Through this door.
    pub disk: &'a dyn Disk,
    /// On this directory.
    pub directory: &'a DataDir,
    /// Set when the operator wants to stop.
    pub stop: &'a AtomicBool,
    /// Told what happens.
    pub monitor: &'a dyn Monitor,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> RewindError {
    let what = what.into();
    move |error| RewindError::because(Class::Unfinished, what, error)
}

/// The path of a manifest that must be plain.
fn wal_path(name: &str) -> io::Result<DataPath> {
    DataPath::new(format!("pg_wal/{name}")).map_err(io::Error::other)
}

impl Redo<'_> {
    /// Hides `pg_control`, changes everything, commits, cleans up.
    pub fn run(&self) -> Result<(), RewindError> {
        // Staged data that cannot be read back must be found while the target is as it was.
        self.check_packs()?;
        self.check_wal()?;
        if self.has("global/pg_control").map_err(failed("could not look at pg_control"))? {
            self.refuse_other_control()?;
            state::hide(self.disk).map_err(failed("could not hide pg_control"))?;
        } else {
            state::mark_hidden(self.disk).map_err(failed("could not mark the target"))?;
        }
        self.monitor.step(Step::Apply);
        if !self.links()? {
            return self.change();
        }
        // New tablespaces are reached through their links: everything is opened anew.
        let reopen = failed("could not open the target again");
        let directory = DataDir::open(self.directory.path()).map_err(io::Error::other);
        let directory = Arc::new(directory.map_err(reopen)?);
        let reopen = failed("could not open the target again");
        let disk = self.disk.reopen(&directory).map_err(reopen)?;
        Redo { disk: &*disk, directory: &directory, ..*self }.change()
    }

    /// Nobody may have started the server since the plan was made.
    fn refuse_other_control(&self) -> Result<(), RewindError> {
        let mut live = Vec::new();
        let path = DataPath::new("global/pg_control").map_err(io::Error::other);
        let read = path
            .and_then(|path| self.disk.open(&path))
            .and_then(|mut file| io::Read::read_to_end(&mut file, &mut live));
        read.map_err(|error| {
            RewindError::because(Class::Other, "could not read the target's pg_control", error)
        })?;
        if live == self.manifest.old_control {
            return Ok(());
        }
        Err(RewindError::new(
            Class::Transient,
            "PostgreSQL was started on the target while the rewind was prepared: the plan is void; \
             keep it stopped and run again",
        ))
    }

    /// Makes the links of new tablespaces; whether the plan has any.
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
            made.map_err(failed(format!("could not make {}", file.path)))?;
        }
        Ok(any)
    }

    fn change(&self) -> Result<(), RewindError> {
        state::unmark_redone(self.disk).map_err(failed("could not mark the target"))?;
        for path in state::state_directories(self.directory) {
            let made = self.disk.create_directory(&path);
            made.map_err(failed(format!("could not make {path}")))?;
        }
        self.remove()?;
        self.go_on()?;
        self.make()?;
        self.write()?;
        self.go_on()?;
        self.complete()?;
        self.wal().map_err(failed("could not put the WAL in place"))?;
        self.go_on()?;
        self.monitor.step(Step::Commit);
        self.settings().map_err(failed("could not write the recovery settings"))?;
        state::commit(self.disk, &self.manifest.new_control)
            .map_err(failed("could not put pg_control in place"))?;
        self.clean_up()
    }

    /// After the commit nothing can make the target unfinished again.
    fn left(what: &'static str) -> impl FnOnce(io::Error) -> RewindError {
        move |error| {
            let message = format!("the target is rewound, but {what}: run pgrejoin resume");
            RewindError::because(Class::Rewound, message, error)
        }
    }

    /// Removes everything the rewind needed, after the commit.
    pub fn clean_up(&self) -> Result<(), RewindError> {
        state::mark_committed(self.disk).map_err(Self::left("the mark that says so is missing"))?;
        super::hold::release(self.disk)
            .and_then(|()| state::discard(self.disk, self.directory))
            .map_err(Self::left("temporary files in .pgrejoin are left"))
    }

    /// Reads all packs and checks them, before anything depends on them.
    fn check_packs(&self) -> Result<(), RewindError> {
        for digest in &self.manifest.packs {
            self.go_on_before_the_change()?;
            let name = state::pack(&digest.name);
            let file = self.disk.open(&name).map_err(pack::PackError::Io);
            file.and_then(|file| pack::read(file, digest, &mut |_| Ok(()))).map_err(|error| {
                let message = format!("what was staged is damaged on this node's disk ({name})");
                RewindError::because(Class::Other, message, error)
            })?;
        }
        Ok(())
    }

    /// Whether all WAL to be put in place is staged or, once the target is being changed, in place
    /// already: before that a file of the same name there is the target's own.
    fn check_wal(&self) -> Result<(), RewindError> {
        let changing = !self.has("global/pg_control").unwrap_or(true);
        let is_file = |path: io::Result<DataPath>| {
            matches!(path.and_then(|path| self.disk.is_directory(&path)), Ok(Some(false)))
        };
        for name in &self.manifest.wal.place {
            let staged = is_file(Ok(state::staged_wal(name)));
            let placed = changing && is_file(wal_path(name));
            if !staged && !placed {
                let message = format!("staged WAL segment {name} is missing on this node's disk");
                return Err(RewindError::new(Class::Other, message));
            }
        }
        Ok(())
    }

    fn has(&self, path: &str) -> io::Result<bool> {
        let path = DataPath::new(path).map_err(io::Error::other)?;
        Ok(self.disk.is_directory(&path)?.is_some())
    }

    fn go_on_before_the_change(&self) -> Result<(), RewindError> {
        let unchanged = self.has("global/pg_control").unwrap_or(false);
        if unchanged && self.stop.load(Ordering::Relaxed) {
            let message = "stopped by a signal; the target is as it was";
            return Err(RewindError::new(Class::Interrupted, message));
        }
        self.go_on()
    }

    fn go_on(&self) -> Result<(), RewindError> {
        if self.stop.load(Ordering::Relaxed) {
            let message = "stopped by a signal while the target was being changed: run pgrejoin \
                           resume, do not start PostgreSQL";
            return Err(RewindError::new(Class::Unfinished, message));
        }
        Ok(())
    }

    fn temporary(&self, index: usize) -> Option<DataPath> {
        let file = self.manifest.files.get(index)?;
        Some(state::temporary(self.directory, &file.path, index))
    }

    fn is_gone(&self, index: usize) -> bool {
        self.manifest.vanished.contains(&index)
    }

    /// Moves `path` to `to`, unless an earlier run did.
    fn move_away(&self, path: &DataPath, to: &DataPath) -> io::Result<()> {
        if self.disk.is_directory(to)?.is_some() || self.disk.is_directory(path)?.is_none() {
            return Ok(());
        }
        match self.disk.rename(path, to) {
            // Files PostgreSQL would throw away itself may lie on a mount of their own.
            Err(error)
                if error.kind() == io::ErrorKind::CrossesDevices
                    && FileClass::of(path) == FileClass::Discarded =>
            {
                remove_tree(self.disk, path)
            }
            result => result,
        }
    }

    fn remove(&self) -> Result<(), RewindError> {
        for (index, file) in self.manifest.files.iter().enumerate() {
            self.go_on()?;
            let goes = matches!(file.action, FileAction::Remove | FileAction::RemoveTree);
            if goes || self.is_gone(index) {
                let trash = state::trash(self.directory, &file.path, index);
                self.move_away(&file.path, &trash)
                    .map_err(failed(format!("could not remove {}", file.path)))?;
            }
        }
        Ok(())
    }

    fn make(&self) -> Result<(), RewindError> {
        let mut directories: Vec<_> = self.manifest.files.iter().enumerate().collect();
        directories.sort_by_key(|(_, file)| &file.path);
        for (index, file) in directories {
            self.go_on()?;
            let made = match &file.action {
                FileAction::MakeDirectory { link: None } => self.disk.create_directory(&file.path),
                FileAction::MakeDirectory { link: Some(_) } => Ok(()),
                FileAction::Replace { .. } if !self.is_gone(index) => {
                    self.temporary(index).map_or(Ok(()), |path| self.disk.create_file(&path))
                }
                FileAction::Replace { .. }
                | FileAction::Patch { .. }
                | FileAction::Remove
                | FileAction::RemoveTree => Ok(()),
            };
            made.map_err(failed(format!("could not make {}", file.path)))?;
        }
        Ok(())
    }

    /// Writes what the packs hold.
    fn write(&self) -> Result<(), RewindError> {
        let total: u64 = self.manifest.packs.iter().map(|pack| pack.bytes).sum();
        let mut done = 0;
        for digest in &self.manifest.packs {
            let name = state::pack(&digest.name);
            let unreadable = failed(format!("could not read {name}"));
            let file = self.disk.open(&name).map_err(unreadable)?;
            let read = pack::read(file, digest, &mut |item| {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                self.write_item(&item)
            });
            if read.is_err() {
                self.go_on()?;
            }
            read.map_err(|error| {
                RewindError::because(Class::Unfinished, format!("could not apply {name}"), error)
            })?;
            done += digest.bytes;
            self.monitor.progress(done, total);
        }
        Ok(())
    }

    fn write_item(&self, item: &Item) -> io::Result<()> {
        let index = file_of_unit(item.unit);
        if self.is_gone(index) {
            return Ok(());
        }
        let Some(file) = self.manifest.files.get(index) else {
            return Ok(());
        };
        let path = match file.action {
            FileAction::Replace { .. } => state::temporary(self.directory, &file.path, index),
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
            ItemBody::Page { content: PageContent::BeyondEnd, .. }
            | ItemBody::PageHashes { .. }
            | ItemBody::SegmentDigest { .. }
            | ItemBody::RecordCrc { .. }
            | ItemBody::End { .. } => Ok(()),
        }
    }

    /// Sets lengths, makes content durable, puts new files in place, makes names durable.
    fn complete(&self) -> Result<(), RewindError> {
        let mut written = Vec::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            self.go_on()?;
            if self.is_gone(index) {
                continue;
            }
            let shorter = self.manifest.shorter.iter().find(|(of, _)| *of == index);
            let length = |bytes: u64| shorter.map_or(bytes, |(_, shorter)| bytes.min(*shorter));
            let (path, bytes) = match file.action {
                FileAction::Replace { bytes } => {
                    (state::temporary(self.directory, &file.path, index), bytes.map(length))
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
        let mut directories: BTreeSet<Option<DataPath>> = BTreeSet::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            if let (FileAction::Replace { .. }, false) = (&file.action, self.is_gone(index)) {
                let renamed = self.put_in_place(&file.path, index);
                renamed.map_err(failed(format!("could not put {} in place", file.path)))?;
            }
            directories.insert(file.path.parent());
            if let FileAction::MakeDirectory { .. } = file.action {
                directories.insert(Some(file.path.clone()));
            }
        }
        directories.extend(state::state_directories(self.directory).into_iter().map(Some));
        for directory in directories {
            match self.disk.sync_directory(directory.as_ref()) {
                // Gone with a tree that was removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => {
                    let name = directory.map_or_else(String::new, |path| path.to_string());
                    result
                        .map_err(failed(format!("could not make names in \"{name}\" durable")))?;
                }
            }
        }
        Ok(())
    }

    /// Renames a new file to its place; one that it replaces hands its mode on.
    fn put_in_place(&self, path: &DataPath, index: usize) -> io::Result<()> {
        let from = state::temporary(self.directory, path, index);
        if let Some(mode) = self.disk.mode(path)? {
            self.disk.set_mode(&from, mode)?;
        }
        self.disk.rename(&from, path)
    }

    fn sync_files(&self, paths: &[DataPath]) -> Result<(), RewindError> {
        let waiting = Mutex::new(paths.iter());
        let fault: Mutex<Option<RewindError>> = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..SYNC_THREADS.min(paths.len()) {
                scope.spawn(|| {
                    loop {
                        let next = waiting.lock().ok().and_then(|mut waiting| waiting.next());
                        let Some(path) = next else { return };
                        if self.stop.load(Ordering::Relaxed) {
                            return;
                        }
                        if let Err(error) = self.disk.sync_file(path)
                            && let Ok(mut fault) = fault.lock()
                        {
                            let what = format!("could not make {path} durable");
                            fault.get_or_insert(failed(what)(error));
                        }
                    }
                });
            }
        });
        self.go_on()?;
        if let Some(fault) = fault.into_inner().ok().flatten() {
            return Err(fault);
        }
        // A write that failed after its file was closed shows here alone.
        if self.manifest.sync {
            let synced = self.directory.sync_file_systems();
            synced.map_err(failed("could not make the target's file systems durable"))?;
        }
        Ok(())
    }

    fn wal(&self) -> io::Result<()> {
        let changes: &WalChanges = &self.manifest.wal;
        if let Some(fork) = &changes.keep_as {
            let place = state::diverged(self.directory, fork, "x");
            let kept = place.parent().into_iter().chain(place.parent().and_then(|p| p.parent()));
            for directory in kept.collect::<Vec<_>>().iter().rev() {
                self.disk.create_directory(directory)?;
            }
        }
        let status = DataPath::new("pg_wal/archive_status").map_err(io::Error::other)?;
        self.disk.create_directory(&status)?;
        for name in &changes.diverged {
            let to = match &changes.keep_as {
                Some(fork) => state::diverged(self.directory, fork, name),
                None => self.wal_trash(name)?,
            };
            self.move_away(&wal_path(name)?, &to)?;
        }
        for name in &changes.remove {
            let to = self.wal_trash(&name.replace('/', "-"))?;
            self.move_away(&wal_path(name)?, &to)?;
        }
        for name in &changes.place {
            self.place(name)?;
        }
        for file in &changes.write {
            replace_file(self.disk, &file.path, &file.bytes)?;
        }
        if let Some(fork) = &changes.keep_as {
            // Every directory made for them, from the innermost out.
            let mut place = state::diverged(self.directory, fork, "x").parent();
            while let Some(directory) = place {
                self.disk.sync_directory(Some(&directory))?;
                place = directory.parent();
            }
        }
        let summaries = DataPath::new("pg_wal/summaries").map_err(io::Error::other)?;
        if self.disk.is_directory(&summaries)? == Some(true) {
            self.disk.sync_directory(Some(&summaries))?;
        }
        self.disk.sync_directory(Some(&status))?;
        let wal = DataPath::new("pg_wal").map_err(io::Error::other)?;
        self.disk.sync_directory(Some(&wal))
    }

    fn wal_trash(&self, name: &str) -> io::Result<DataPath> {
        let trash = state::trash(self.directory, &wal_path("x")?, 0);
        let parent = trash.parent().map_or_else(String::new, |path| path.to_string());
        DataPath::new(format!("{parent}/trash-wal-{name}")).map_err(io::Error::other)
    }

    /// Puts a staged segment in place: by renaming, or by a durable copy where that cannot be.
    fn place(&self, name: &str) -> io::Result<()> {
        let (from, to) = (state::staged_wal(name), wal_path(name)?);
        if self.disk.is_directory(&from)?.is_none() {
            // An earlier run put it in place.
            return match self.disk.is_directory(&to)? {
                Some(false) => Ok(()),
                _ => Err(io::Error::other(format!("{name} is neither staged nor in place"))),
            };
        }
        match self.disk.rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
            result => return result,
        }
        let beside = DataPath::new(format!("{to}.pgrejoin-new")).map_err(io::Error::other)?;
        self.disk.create_file(&beside)?;
        let mut file = self.disk.open(&from)?;
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        loop {
            let bytes = io::Read::read(&mut file, &mut buffer)?;
            if bytes == 0 {
                break;
            }
            self.disk.write_at(&beside, offset, buffer.get(..bytes).unwrap_or_default())?;
            offset += bytes as u64;
        }
        self.disk.sync_file(&beside)?;
        self.disk.rename(&beside, &to)
    }

    /// R13: settings and `standby.signal` before `backup_label`, that before `pg_control`.
    fn settings(&self) -> io::Result<()> {
        for file in &self.manifest.settings {
            replace_file(self.disk, &file.path, &file.bytes)?;
        }
        for path in &self.manifest.remove {
            if self.disk.is_directory(path)?.is_some() {
                self.disk.remove_file(path)?;
            }
        }
        self.disk.sync_directory(None)?;
        let label = DataPath::new("backup_label").map_err(io::Error::other)?;
        replace_file(self.disk, &label, &self.manifest.backup_label)
    }
}

/// The planned file a unit belongs to: the high half of its number.
pub fn file_of_unit(unit: u64) -> usize {
    usize::try_from(unit >> 32).unwrap_or(usize::MAX)
}

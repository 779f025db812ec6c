//! Changes in `pg_wal`, and their rollback. Each of the two can be repeated, and each can follow the other
//! from wherever that one stopped.

use std::io;

use data_dir::DataDir;
use pg_format::DataPath;

use crate::plan::pg_wal::WalChanges;
use crate::staging::disk::{Disk, beside, move_away, replace_file};
use crate::staging::layout;
use crate::staging::manifest::PackDigest;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct PgWal<'a> {
    /// What changes.
    pub changes: &'a WalChanges,
    /// The disk through which `pg_wal` is changed.
    pub disk: &'a dyn Disk,
    /// The target's data directory.
    pub directory: &'a DataDir,
}

fn wal_path(name: &str) -> io::Result<DataPath> {
    DataPath::new(format!("pg_wal/{name}")).map_err(io::Error::other)
}

/// Length and CRC of a staged segment, which the seal records and every later use checks.
pub fn digest(disk: &dyn Disk, name: &str) -> io::Result<PackDigest> {
    let mut file = disk.open(&layout::staged_wal(name))?;
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, mut crc) = (0, 0);
    loop {
        let read = io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            return Ok(PackDigest { name: name.to_owned(), bytes, crc });
        }
        bytes += read as u64;
        crc = crc32c::crc32c_append(crc, buffer.get(..read).unwrap_or_default());
    }
}

impl PgWal<'_> {
    fn is_file(&self, path: &DataPath) -> io::Result<bool> {
        Ok(self.disk.is_directory(path)? == Some(false))
    }

    /// Whether a segment waits to be put in place.
    pub fn is_staged(&self, name: &str) -> bool {
        self.is_file(&layout::staged_wal(name)).unwrap_or(false)
    }

    /// Whether a file of that name is in place.
    pub fn is_placed(&self, name: &str) -> bool {
        wal_path(name).and_then(|path| self.is_file(&path)).unwrap_or(false)
    }

    /// Moves aside the files that do not belong to the new history, and puts the staged files in place.
    pub fn put(&self) -> io::Result<()> {
        self.make_directories()?;
        // A directory must be durable before a file is moved into it.
        self.sync()?;
        for (path, aside) in self.aside()? {
            move_away(self.disk, &path, &aside)?;
        }
        // The old file's new name must be durable before a segment takes its old name.
        self.sync()?;
        for name in &self.changes.place {
            self.place(name)?;
        }
        for file in &self.changes.write {
            replace_file(self.disk, &file.path, &file.bytes)?;
        }
        self.sync()
    }

    /// Rolls these changes back, except for the small files, which are restored with the settings.
    pub fn take_back(&self) -> io::Result<()> {
        let aside = self.aside()?;
        for name in &self.changes.place {
            self.unplace(name, &aside)?;
        }
        self.sync()?;
        for (path, aside) in &aside {
            if self.disk.is_directory(aside)?.is_some() {
                self.disk.rename(aside, path)?;
            }
        }
        self.sync()?;
        self.remove_directories()
    }

    /// The files that are moved aside: their path, and where they are kept until clean-up or for good.
    fn aside(&self) -> io::Result<Vec<(DataPath, DataPath)>> {
        let mut all = Vec::new();
        for name in &self.changes.diverged {
            let aside = match &self.changes.keep_as {
                Some(fork) => layout::diverged(self.directory, fork, name),
                None => self.trash(name)?,
            };
            all.push((wal_path(name)?, aside));
        }
        for name in &self.changes.remove {
            all.push((wal_path(name)?, self.trash(&name.replace('/', "-"))?));
        }
        Ok(all)
    }

    fn trash(&self, name: &str) -> io::Result<DataPath> {
        let trash = layout::trash(self.directory, &wal_path("x")?, 0);
        let parent = trash.parent().map_or_else(String::new, |path| path.to_string());
        DataPath::new(format!("{parent}/trash-wal-{name}")).map_err(io::Error::other)
    }

    /// Directories for the WAL of lost transactions, the innermost first.
    fn kept(&self) -> Vec<DataPath> {
        let place = self.changes.keep_as.as_ref();
        let place = place.map(|fork| layout::diverged(self.directory, fork, "x"));
        let inner = place.and_then(|place| place.parent());
        let outer = inner.as_ref().and_then(DataPath::parent);
        inner.into_iter().chain(outer).collect()
    }

    fn make_directories(&self) -> io::Result<()> {
        for directory in self.kept().iter().rev() {
            self.disk.create_directory(directory)?;
        }
        self.disk.create_directory(&wal_path("archive_status")?)
    }

    fn remove_directories(&self) -> io::Result<()> {
        for directory in self.kept() {
            let there = self.disk.is_directory(&directory)? == Some(true);
            if there && self.disk.names(&directory)?.is_empty() {
                self.disk.remove_directory(&directory)?;
            }
        }
        Ok(())
    }

    /// Makes names durable in every directory where one changed.
    fn sync(&self) -> io::Result<()> {
        let mut directories = Vec::new();
        // The directories for the WAL of lost transactions and all their parents, from the innermost out.
        let mut next = self.kept().into_iter().next();
        while let Some(directory) = next {
            next = directory.parent();
            directories.push(directory);
        }
        let trash = self.trash("x")?.parent();
        let staged = layout::staged_wal("x").parent();
        directories.extend(trash.into_iter().chain(staged));
        for name in ["summaries", "archive_status"] {
            directories.push(wal_path(name)?);
        }
        directories.push(DataPath::of("pg_wal"));
        for directory in directories {
            if self.disk.is_directory(&directory)?.is_some() {
                self.disk.sync_directory(Some(&directory))?;
            }
        }
        Ok(())
    }

    /// Puts a staged segment in place: by renaming it, or by a durable copy if it is on another file system.
    fn place(&self, name: &str) -> io::Result<()> {
        let (from, to) = (layout::staged_wal(name), wal_path(name)?);
        if !self.is_file(&from)? {
            // An earlier run put it in place.
            return match self.is_file(&to)? {
                true => Ok(()),
                false => Err(io::Error::other(format!(
                    "WAL segment {name} is neither in the staging directory nor in pg_wal"
                ))),
            };
        }
        match self.disk.rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
            result => return result,
        }
        let beside = beside(&to)?;
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

    /// Moves a segment that this rewind has placed back to where it was staged. If a file of the same name
    /// was to be moved aside and was not yet, the file in `pg_wal` is the target's own and stays.
    fn unplace(&self, name: &str, aside: &[(DataPath, DataPath)]) -> io::Result<()> {
        let (from, to) = (layout::staged_wal(name), wal_path(name)?);
        let half = beside(&to)?;
        if self.is_file(&half)? {
            self.disk.remove_file(&half)?;
        }
        let own = match aside.iter().find(|(path, _)| *path == to) {
            Some((_, aside)) => self.disk.is_directory(aside)?.is_none(),
            None => false,
        };
        if own || !self.is_file(&to)? {
            return Ok(());
        }
        if self.is_file(&from)? {
            return self.disk.remove_file(&to);
        }
        self.disk.rename(&to, &from)
    }
}

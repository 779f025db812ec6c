//! The only place through which the target and the state directory are changed.
//!
//! Paths are those of the data directory. Tests implement the trait to record operations, to cut them short
//! and to make them fail. The real disk opens everything below its handles, without following a link.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::{fmt, io};

use data_dir::confined::open_below;
use data_dir::{DataDir, Entry, EntryKind};
use parking_lot::Mutex;
use pg_format::{DataPath, FileClass};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::staging::external::{OpenStaging, Staging, is_ours, is_owned};

/// Files kept open between writes, so that a page costs one system call.
const OPEN_FILES_MAX: usize = 128;
/// Bytes written at once, and in all, where a file system cannot reserve space without writing: writing more
/// would take more time than the reserve is worth.
const ALLOCATION_BYTES: usize = 1 << 20;
const ALLOCATION_BYTES_MAX: u64 = 64 << 20;

/// The attributes of a regular file by which a change of it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// Length in bytes.
    pub bytes: u64,
    /// Permission bits.
    pub mode: u32,
    /// Its inode.
    pub inode: u64,
    /// When it was last modified: seconds and nanoseconds since 1970.
    pub modified: (i64, u32),
}

impl FileStat {
    /// The attributes of a regular file when the target was inspected; `None` for anything else.
    pub fn of(entry: &Entry) -> Option<Self> {
        let EntryKind::File { bytes } = entry.kind else {
            return None;
        };
        let Entry { mode, inode, modified, .. } = *entry;
        Some(Self { bytes, mode, inode, modified })
    }
}

/// Changes to the target. Nothing is durable before it was synced: a file's content by
/// [`Disk::sync_file`], names by [`Disk::sync_directory`] of their directory.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Makes a directory if it does not exist.
    fn create_directory(&self, path: &DataPath) -> io::Result<()>;
    /// Makes an empty file; one that exists loses its content.
    fn create_file(&self, path: &DataPath) -> io::Result<()>;
    /// Writes bytes of an existing file.
    fn write_at(&self, path: &DataPath, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Gives an empty file a length and reserves the disk space for it; only a part of it where the file
    /// system cannot do that without writing.
    fn allocate(&self, path: &DataPath, bytes: u64) -> io::Result<()>;
    /// Cuts or extends a file; the new part reads as zeros.
    fn set_length(&self, path: &DataPath, bytes: u64) -> io::Result<()>;
    /// Gives a file or directory these permission bits.
    fn set_mode(&self, path: &DataPath, mode: u32) -> io::Result<()>;
    /// Gives a file a second name; a file that has the name is an error.
    fn link(&self, from: &DataPath, to: &DataPath) -> io::Result<()>;
    /// Gives a file another name; a file that has the name is replaced.
    fn rename(&self, from: &DataPath, to: &DataPath) -> io::Result<()>;
    /// Makes a symbolic link.
    fn symlink(&self, target: &str, path: &DataPath) -> io::Result<()>;
    /// Removes a file or a symbolic link.
    fn remove_file(&self, path: &DataPath) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_directory(&self, path: &DataPath) -> io::Result<()>;
    /// Makes a file's content and length durable.
    fn sync_file(&self, path: &DataPath) -> io::Result<()>;
    /// Makes the names in a directory durable; `None` is the data directory itself.
    fn sync_directory(&self, path: Option<&DataPath>) -> io::Result<()>;
    /// Makes everything any process wrote to the file systems of the target durable. Fails if a
    /// write that was still pending could not be written.
    fn sync_all(&self) -> io::Result<()>;

    /// The key that signs staged records; `None` if they are where nobody else can write.
    fn staging_key(&self) -> Option<[u8; 32]>;
    /// The same disk after links of `directory` have changed.
    fn reopen(&self, directory: &Arc<DataDir>) -> io::Result<Box<dyn Disk>>;
    /// The attributes of a regular file; `None` if there is none of that name.
    fn stat(&self, path: &DataPath) -> io::Result<Option<FileStat>>;
    /// Opens a file for reading.
    fn open(&self, path: &DataPath) -> io::Result<File>;
    /// Names in a directory.
    fn names(&self, path: &DataPath) -> io::Result<Vec<String>>;
    /// What has this name: a directory, or something else; `None` if nothing.
    fn is_directory(&self, path: &DataPath) -> io::Result<Option<bool>>;
}

/// The real disk.
#[derive(Debug)]
pub struct RealDisk {
    directory: Arc<DataDir>,
    /// Where packs and WAL are staged, if not in the state directory.
    staging: Option<OpenStaging>,
    file_mode: Mode,
    directory_mode: Mode,
    sync: bool,
    open: Mutex<HashMap<DataPath, Arc<File>>>,
}

impl RealDisk {
    /// The disk of a locked target. New files follow the mode of the data directory, as
    /// PostgreSQL's do: group access is all or nothing.
    pub fn new(directory: Arc<DataDir>, staging: Option<Staging>, sync: bool) -> io::Result<Self> {
        let (_, mode) = directory.owner_and_mode()?;
        let group = mode & 0o050 == 0o050;
        Ok(Self {
            directory,
            staging: staging.map(OpenStaging::new).transpose()?,
            file_mode: Mode::from_raw_mode(if group { 0o640 } else { 0o600 }),
            directory_mode: Mode::from_raw_mode(if group { 0o750 } else { 0o700 }),
            sync,
            open: Mutex::default(),
        })
    }

    /// The staging directory outside the data directory, if `path` is staged there.
    fn staged(&self, path: &DataPath) -> Option<&OpenStaging> {
        let staging = self.staging.as_ref()?;
        let inside =
            crate::staging::layout::STAGED_DIRECTORIES.iter().any(|staged| path.is_within(staged));
        inside.then_some(staging)
    }

    fn resolve<'p>(&self, path: &'p DataPath) -> io::Result<(Base<'_>, &'p str)> {
        if let Some(staging) = self.staged(path) {
            let own = pg_format::file_class::OWN_DIRECTORY;
            let rest = path.as_str().trim_start_matches(own).trim_start_matches('/');
            return Ok((Base::Staging(staging.own()?), rest));
        }
        let (fd, rest) = self.directory.resolve(path);
        Ok((Base::Target(fd), rest))
    }

    /// The open directory that holds `path`, and its name there.
    fn parent(&self, path: &DataPath) -> io::Result<(OwnedFd, String)> {
        let (base, rest) = self.resolve(path)?;
        // A link that is itself the path, as a tablespace's, lies in the directory that holds it.
        let (base, rest) = if rest.is_empty() {
            (Base::Target(self.directory.root()), path.as_str())
        } else {
            (base, rest)
        };
        let (parent, name) = rest.rsplit_once('/').unwrap_or(("", rest));
        if parent.is_empty() {
            return Ok((base.as_fd().try_clone_to_owned()?, name.to_owned()));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Ok((open_below(&base, parent, flags, Mode::empty())?, name.to_owned()))
    }

    fn open_with(&self, path: &DataPath, flags: OFlags) -> io::Result<File> {
        let (base, rest) = self.resolve(path)?;
        let file = open_below(&base, rest, flags | OFlags::NOCTTY, self.file_mode)?;
        // What an earlier run left is used only if nobody else can have written it.
        let own = path.components().any(|part| part == pg_format::file_class::OWN_DIRECTORY);
        if own && !base.trusts(&file, FileType::RegularFile)? {
            let message = format!("{path} belongs to another user, or others may write it");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(File::from(file))
    }

    /// A file open for writing, from the cache if it is there.
    fn writable(&self, path: &DataPath) -> io::Result<Arc<File>> {
        let mut open = self.open.lock();
        if let Some(file) = open.get(path) {
            return Ok(Arc::clone(file));
        }
        if open.len() >= OPEN_FILES_MAX {
            open.clear();
        }
        let file = Arc::new(self.open_with(path, OFlags::RDWR)?);
        open.insert(path.clone(), Arc::clone(&file));
        Ok(file)
    }

    fn forget(&self, path: &DataPath) {
        let mut open = self.open.lock();
        open.retain(|known, _| !known.is_within(path.as_str()));
    }
}

impl Disk for RealDisk {
    fn create_directory(&self, path: &DataPath) -> io::Result<()> {
        if let Some(staging) = self.staged(path) {
            staging.create(self.sync)?;
        }
        let (parent, name) = self.parent(path)?;
        match rustix::fs::mkdirat(&parent, &*name, self.directory_mode) {
            // The umask must not decide who may read a database.
            Ok(()) => self.set_mode(path, self.directory_mode.as_raw_mode())?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Also if the directory existed: the run that created it may have been killed before it was durable.
        if self.sync && self.staged(path).is_some() {
            rustix::fs::fsync(&parent)?;
        }
        Ok(())
    }

    fn create_file(&self, path: &DataPath) -> io::Result<()> {
        // One that an interrupted run left may have a mode with which it cannot be opened.
        match self.remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = self.open_with(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        rustix::fs::fchmod(&file, self.file_mode)?;
        Ok(())
    }

    fn write_at(&self, path: &DataPath, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writable(path)?.write_all_at(bytes, offset)
    }

    fn allocate(&self, path: &DataPath, bytes: u64) -> io::Result<()> {
        let file = self.writable(path)?;
        match rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(()),
            // Bytes that are not zeros take disk space on every file system.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                let filler = vec![0xA5; ALLOCATION_BYTES];
                let bytes = bytes.min(ALLOCATION_BYTES_MAX);
                let mut offset = 0;
                while offset < bytes {
                    let left = usize::try_from(bytes - offset).unwrap_or(usize::MAX);
                    let part = filler.get(..left.min(filler.len())).unwrap_or_default();
                    file.write_all_at(part, offset)?;
                    offset += part.len() as u64;
                }
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn set_length(&self, path: &DataPath, bytes: u64) -> io::Result<()> {
        self.writable(path)?.set_len(bytes)
    }

    fn set_mode(&self, path: &DataPath, mode: u32) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let file = open_below(&parent, &name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
        Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?)
    }

    fn stat(&self, path: &DataPath) -> io::Result<Option<FileStat>> {
        let (parent, name) = match self.parent(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found?,
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = match rustix::fs::statx(&parent, &*name, flags, StatxFlags::BASIC_STATS) {
            Ok(stat) => stat,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let mode = u32::from(stat.stx_mode);
        let is_file = FileType::from_raw_mode(mode).is_file();
        Ok(is_file.then_some(FileStat {
            bytes: stat.stx_size,
            mode: mode & 0o7777,
            inode: stat.stx_ino,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        }))
    }

    fn link(&self, from: &DataPath, to: &DataPath) -> io::Result<()> {
        let (old_parent, old_name) = self.parent(from)?;
        let (new_parent, new_name) = self.parent(to)?;
        let none = AtFlags::empty();
        Ok(rustix::fs::linkat(&old_parent, old_name, &new_parent, new_name, none)?)
    }

    fn rename(&self, from: &DataPath, to: &DataPath) -> io::Result<()> {
        self.forget(from);
        self.forget(to);
        let (old_parent, old_name) = self.parent(from)?;
        let (new_parent, new_name) = self.parent(to)?;
        Ok(rustix::fs::renameat(&old_parent, old_name, &new_parent, new_name)?)
    }

    fn symlink(&self, target: &str, path: &DataPath) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Ok(rustix::fs::symlinkat(target, &parent, &*name)?)
    }

    fn remove_file(&self, path: &DataPath) -> io::Result<()> {
        self.forget(path);
        let (parent, name) = self.parent(path)?;
        Ok(rustix::fs::unlinkat(&parent, &*name, AtFlags::empty())?)
    }

    fn remove_directory(&self, path: &DataPath) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::unlinkat(&parent, &*name, AtFlags::REMOVEDIR)?;
        // The staging directory itself is removed once the last directory in it is gone.
        self.staged(path).map_or(Ok(()), OpenStaging::remove_if_empty)
    }

    fn reopen(&self, directory: &Arc<DataDir>) -> io::Result<Box<dyn Disk>> {
        let staging = self.staging.as_ref().map(OpenStaging::try_clone).transpose()?;
        Ok(Box::new(Self {
            directory: Arc::clone(directory),
            staging,
            open: Mutex::default(),
            ..*self
        }))
    }

    fn staging_key(&self) -> Option<[u8; 32]> {
        self.staging.as_ref().map(OpenStaging::key)
    }

    fn sync_all(&self) -> io::Result<()> {
        if self.sync { self.directory.sync_file_systems() } else { Ok(()) }
    }

    fn sync_file(&self, path: &DataPath) -> io::Result<()> {
        if self.sync { self.writable(path)?.sync_all() } else { Ok(()) }
    }

    fn sync_directory(&self, path: Option<&DataPath>) -> io::Result<()> {
        if !self.sync {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match path.map(|path| self.resolve(path)).transpose()? {
            None => Ok(rustix::fs::fsync(self.directory.root())?),
            Some((base, "")) => Ok(rustix::fs::fsync(&base)?),
            Some((base, rest)) => {
                Ok(rustix::fs::fsync(open_below(&base, rest, flags, Mode::empty())?)?)
            }
        }
    }

    fn open(&self, path: &DataPath) -> io::Result<File> {
        self.open_with(path, OFlags::RDONLY | OFlags::NONBLOCK)
    }

    fn names(&self, path: &DataPath) -> io::Result<Vec<String>> {
        let (base, rest) = self.resolve(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = if rest.is_empty() {
            rustix::fs::openat(&base, ".", flags, Mode::empty())?
        } else {
            open_below(&base, rest, flags, Mode::empty())?
        };
        let own = path.file_name() == pg_format::file_class::OWN_DIRECTORY;
        if own && !base.trusts(&directory, FileType::Directory)? {
            let message = format!("{path} belongs to another user, or others may write to it");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn is_directory(&self, path: &DataPath) -> io::Result<Option<bool>> {
        let (parent, name) = match self.parent(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match rustix::fs::statat(&parent, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let kind = FileType::from_raw_mode(stat.st_mode);
                Ok(Some(kind == FileType::Directory))
            }
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// What a path is resolved below.
enum Base<'a> {
    Target(BorrowedFd<'a>),
    Staging(Arc<OwnedFd>),
}

impl Base<'_> {
    /// Whether nobody else can have written an open file or directory. In the data directory, the directory's
    /// own mode keeps others out, whatever the modes of its files: some orchestrators reset those.
    fn trusts(&self, fd: impl AsFd, kind: FileType) -> io::Result<bool> {
        match self {
            Self::Target(_) => is_owned(fd, kind),
            Self::Staging(_) => is_ours(fd, kind),
        }
    }
}

impl AsFd for Base<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Target(fd) => *fd,
            Self::Staging(fd) => fd.as_fd(),
        }
    }
}

/// All that a file holds.
pub fn read_all(disk: &dyn Disk, path: &DataPath) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut disk.open(path)?, &mut bytes)?;
    Ok(bytes)
}

/// Removes whatever is at `path`, with everything below it. If nothing is there, that is no error.
pub fn remove_tree(disk: &dyn Disk, path: &DataPath) -> io::Result<()> {
    match disk.is_directory(path)? {
        None => Ok(()),
        Some(false) => disk.remove_file(path),
        Some(true) => {
            for name in disk.names(path)? {
                remove_tree(disk, &path.join(&name).map_err(io::Error::other)?)?;
            }
            disk.remove_directory(path)
        }
    }
}

/// Moves `path` to `to`, unless an earlier run has done so.
pub(crate) fn move_away(disk: &dyn Disk, path: &DataPath, to: &DataPath) -> io::Result<()> {
    if disk.is_directory(to)?.is_some() || disk.is_directory(path)?.is_none() {
        return Ok(());
    }
    match disk.rename(path, to) {
        // Files PostgreSQL would throw away itself may lie on a mount of their own.
        Err(error)
            if error.kind() == io::ErrorKind::CrossesDevices
                && FileClass::of(path) == FileClass::Discarded =>
        {
            remove_tree(disk, path)
        }
        result => result,
    }
}

/// Path at which a file is written before it is renamed to `path`.
pub fn beside(path: &DataPath) -> io::Result<DataPath> {
    DataPath::new(format!("{path}.pgrejoin-new")).map_err(io::Error::other)
}

/// Replaces a small file so that after a crash either the old or the new one is there: the new one is written
/// under another name, made durable and renamed. It keeps the mode of the one that it replaces.
pub fn replace_file(disk: &dyn Disk, path: &DataPath, bytes: &[u8]) -> io::Result<()> {
    let beside = beside(path)?;
    disk.create_file(&beside)?;
    disk.write_at(&beside, 0, bytes)?;
    disk.sync_file(&beside)?;
    // Set last: the mode may be one with which even the owner cannot write.
    if let Some(stat) = disk.stat(path)? {
        disk.set_mode(&beside, stat.mode)?;
    }
    disk.rename(&beside, path)?;
    disk.sync_directory(path.parent().as_ref())
}

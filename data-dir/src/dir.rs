//! [`DataDir`], the handle of an open data directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use pg_format::relation::is_oid;
use pg_format::{DataPath, FormatError};
use rustix::fs::{AtFlags, Mode, OFlags, SeekFrom, StatxFlags};

use crate::confined::open_below;

/// File with a random number that the kernel makes at every boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why a directory could not be opened as a data directory.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system reported an error.
    #[error("could not open data directory {path}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has no `PG_VERSION`, so it is no data directory.
    #[error("{path} is not a PostgreSQL data directory: it has no PG_VERSION")]
    NotADataDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// A name or a file in the directory is not valid.
    #[error("data directory {path} cannot be read")]
    Format {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: FormatError,
    },
}

/// An open data directory. The links of tablespaces and of `pg_wal` are followed once, when it is opened.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    root: OwnedFd,
    linked_wal: Option<OwnedFd>,
    /// Whether `pg_wal` is reached through a link or is a mount of its own.
    wal_is_elsewhere: bool,
    linked_tablespaces: BTreeMap<String, (PathBuf, OwnedFd)>,
}

impl DataDir {
    /// Opens `path`, which must hold a `PG_VERSION`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(path, directory, Mode::empty()).map_err(|errno| io(errno.into()))?;
        if open_below(&root, "PG_VERSION", OFlags::RDONLY, Mode::empty()).is_err() {
            return Err(OpenError::NotADataDirectory { path: path.to_owned() });
        }
        let linked_wal = open_link(&root, "pg_wal").map_err(io)?.map(|(_, fd)| fd);
        let wal_is_elsewhere = linked_wal.is_some() || is_mount(&root, "pg_wal").map_err(io)?;
        let mut linked_tablespaces = BTreeMap::new();
        for name in names_in(&root, "pg_tblspc").map_err(io)? {
            if !is_oid(&name) {
                continue;
            }
            if let Some(opened) = open_link(&root, &format!("pg_tblspc/{name}")).map_err(io)? {
                linked_tablespaces.insert(name, opened);
            }
        }
        Ok(Self { path: path.to_owned(), root, linked_wal, wal_is_elsewhere, linked_tablespaces })
    }

    /// From here on, reaches the tablespace `oid` through the link at `link`, to which a rewind has moved it.
    /// Does nothing if there is no link at that path.
    pub fn adopt_tablespace(&mut self, oid: &str, link: &DataPath) -> io::Result<()> {
        if let Some(opened) = open_link(&self.root, link.as_str())? {
            self.linked_tablespaces.insert(oid.to_owned(), opened);
        }
        Ok(())
    }

    /// The path with which the directory was opened. For messages only: files are opened through the handle.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The handle of the directory itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Tablespaces that are symbolic links: OID as text, where the link points, and the handle.
    pub fn linked_tablespaces(&self) -> impl Iterator<Item = (&str, &Path, BorrowedFd<'_>)> {
        self.linked_tablespaces
            .iter()
            .map(|(oid, (target, fd))| (oid.as_str(), target.as_path(), fd.as_fd()))
    }

    /// The handle of `pg_wal`'s real directory if it is a symbolic link.
    pub fn linked_wal(&self) -> Option<BorrowedFd<'_>> {
        self.linked_wal.as_ref().map(AsFd::as_fd)
    }

    /// Whether files cannot be renamed between `pg_wal` and the data directory's root: it is a link
    /// or a mount.
    pub fn wal_is_elsewhere(&self) -> bool {
        self.wal_is_elsewhere
    }

    /// The handle from which `path` is reached without a symbolic link, and the rest of the path;
    /// the rest is empty if `path` is itself such a link.
    pub fn resolve<'p>(&self, path: &'p DataPath) -> (BorrowedFd<'_>, &'p str) {
        let text = path.as_str();
        if let Some(wal) = &self.linked_wal
            && let Some(rest) = text.strip_prefix("pg_wal")
            && (rest.is_empty() || rest.starts_with('/'))
        {
            return (wal.as_fd(), rest.trim_start_matches('/'));
        }
        if let Some(rest) = text.strip_prefix("pg_tblspc/") {
            let (oid, rest) = rest.split_once('/').unwrap_or((rest, ""));
            if let Some((_, fd)) = self.linked_tablespaces.get(oid) {
                return (fd.as_fd(), rest);
            }
        }
        (self.root.as_fd(), text)
    }

    /// Opens a regular file for reading. Never blocks on a FIFO, never follows a link.
    pub fn open_file(&self, path: &DataPath) -> io::Result<File> {
        let (base, rest) = self.resolve(path);
        if rest.is_empty() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(open_below(base, rest, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(file)
    }

    /// Opens a directory.
    pub fn open_directory(&self, path: &DataPath) -> io::Result<OwnedFd> {
        let (base, rest) = self.resolve(path);
        if rest.is_empty() {
            return base.try_clone_to_owned();
        }
        open_below(base, rest, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Reads a whole file of at most `bytes_max`.
    pub fn read(&self, path: &DataPath, bytes_max: u64) -> io::Result<Vec<u8>> {
        let file = self.open_file(path)?;
        let length = file.metadata()?.len();
        if length > bytes_max {
            let message = format!(
                "it has {length} bytes, more than the {bytes_max} bytes allowed for this file"
            );
            return Err(io::Error::other(message));
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&file, bytes_max), &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a small file at the top level if it exists.
    pub fn read_if_exists(&self, name: &str, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
        let path = DataPath::new(name).map_err(io::Error::other)?;
        match self.read(&path, bytes_max) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(Some),
        }
    }

    /// Whether anything has this name at the top level, a dangling link included.
    pub fn has(&self, name: &str) -> bool {
        rustix::fs::statat(&self.root, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Names in a directory, unordered.
    pub fn names(&self, path: &DataPath) -> io::Result<Vec<String>> {
        names(&self.open_directory(path)?)
    }

    /// Owner and permission bits of the directory.
    pub fn owner_and_mode(&self) -> io::Result<(u32, u32)> {
        let metadata = File::from(self.root.try_clone()?).metadata()?;
        Ok((metadata.uid(), metadata.mode() & 0o7777))
    }

    /// A name for this directory that no other one on this machine has now. After a reboot the same
    /// directory may have another.
    pub fn name_on_this_machine(&self) -> io::Result<String> {
        let stat = rustix::fs::fstat(&self.root)?;
        Ok(format!("pgrejoin-{:x}-{:x}", stat.st_dev, stat.st_ino))
    }

    /// Identifies this directory, among those of all machines, until the machine is rebooted: a hash of its
    /// device, its inode and the kernel's boot id. Containers of one machine have only the boot id in common.
    pub fn identity(&self) -> io::Result<[u8; 16]> {
        let stat = rustix::fs::fstat(&self.root)?;
        let boot = std::fs::read(BOOT_ID).unwrap_or_default();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&stat.st_dev.to_le_bytes()).update(&stat.st_ino.to_le_bytes()).update(&boot);
        Ok(hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default())
    }

    /// Makes everything any process wrote to the data directory's file systems durable. Fails if a
    /// write that was still pending could not be written (Linux 5.8 and later report it).
    pub fn sync_file_systems(&self) -> io::Result<()> {
        rustix::fs::syncfs(&self.root)?;
        for fd in self.linked_wal.iter().chain(self.linked_tablespaces.values().map(|(_, fd)| fd)) {
            rustix::fs::syncfs(fd)?;
        }
        if self.wal_is_elsewhere && self.linked_wal.is_none() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            rustix::fs::syncfs(open_below(&self.root, "pg_wal", flags, Mode::empty())?)?;
        }
        Ok(())
    }
}

/// Device and mount of a file. A file can be renamed only where both stay the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mount {
    device: (u32, u32),
    /// The mount's id; 0 where the kernel does not report it (before 5.8), and then only devices are
    /// compared.
    number: u64,
}

/// The mount on which `name` in `directory` is.
pub fn mount_of(directory: impl AsFd, name: &str) -> io::Result<Mount> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
    let known = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    let number = if known { stat.stx_mnt_id } else { 0 };
    Ok(Mount { device: (stat.stx_dev_major, stat.stx_dev_minor), number })
}

/// Whether `name` is on another mount than `directory`; `false` if it does not exist.
fn is_mount(directory: &OwnedFd, name: &str) -> io::Result<bool> {
    match mount_of(directory, name) {
        Ok(there) => Ok(there != mount_of(directory, ".")?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Fills as much of `buffer` as the file has at `offset`; returns the bytes read.
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Names in an open directory without `.` and `..`. In a name that is not UTF-8 the invalid bytes are
/// replaced, so that it does not lead to the file any more.
pub(crate) fn names(directory: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(names)
}

fn names_in(root: &OwnedFd, directory: &str) -> io::Result<Vec<String>> {
    match open_below(root, directory, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
        Ok(fd) => names(&fd),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Some releases of ZFS report data that was written a moment ago as a hole (its issue 15526).
const ZFS_SUPER_MAGIC: rustix::fs::FsWord = 0x2FC1_2FC1;

/// Whether a range of a file is a hole, which reads as zeros. `false` if the range reaches behind the end of
/// the file, or if the file system does not report holes reliably.
pub fn is_hole(file: &File, offset: u64, length: u64) -> bool {
    let end = offset.saturating_add(length);
    if rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type == ZFS_SUPER_MAGIC) {
        return false;
    }
    if file.metadata().map_or(0, |metadata| metadata.len()) < end {
        return false;
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data >= end,
        Err(errno) => errno == rustix::io::Errno::NXIO,
    }
}

/// Opens the directory that a symbolic link at `path` points to, and returns it with the link's content;
/// `None` if `path` is not a link.
fn open_link(root: &OwnedFd, path: &str) -> io::Result<Option<(PathBuf, OwnedFd)>> {
    let target = match rustix::fs::readlinkat(root, path, Vec::new()) {
        Ok(target) => PathBuf::from(String::from_utf8_lossy(target.as_bytes()).into_owned()),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::openat(root, path, flags, Mode::empty()) {
        Ok(fd) => Ok(Some((target, fd))),
        Err(errno) => {
            let message = format!(
                "{path} is a link to {}, which cannot be opened: {errno}",
                target.display()
            );
            Err(io::Error::new(io::Error::from(errno).kind(), message))
        }
    }
}

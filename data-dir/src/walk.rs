//! Lists a data directory.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use pg_format::file_class::OWN_DIRECTORY;
use pg_format::relation::is_of_version;
use pg_format::{DataPath, FileClass};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};

use crate::DataDir;
use crate::confined::open_below;
use crate::dir::names;

/// Deepest directory level entered; PostgreSQL's own trees have five.
const DEPTH_MAX: usize = 32;

/// A file, directory or link in a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path.
    pub path: DataPath,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Its inode.
    pub inode: u64,
    /// When it was last modified: seconds and nanoseconds since 1970.
    pub modified: (i64, u32),
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file of so many bytes.
    File {
        /// Length in bytes.
        bytes: u64,
    },
    /// A directory, also one that is reached through the link of `pg_wal` or of a tablespace.
    Directory {
        /// The content of the symbolic link through which it is reached, if there is one.
        link: Option<String>,
    },
    /// Any other symbolic link; it is not followed.
    Link {
        /// The content of the link.
        target: String,
    },
    /// A directory that is not PostgreSQL's and that this user may not read, as `lost+found` of a file system.
    Unreadable,
    /// A socket, FIFO or device.
    Other,
}

/// An error with the path at which it occurred.
fn named(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

impl DataDir {
    /// Visits everything below the data directory except pgrejoin's own files, each directory before its
    /// content and otherwise in no particular order. A file that vanishes during the walk is left out. So is
    /// everything in a tablespace outside `version_directory`, which belongs to another cluster. A directory
    /// that `enter` rejects is visited, but its content is not.
    pub fn walk(
        &self,
        version_directory: &str,
        enter: &dyn Fn(&DataPath) -> bool,
        visit: &mut dyn FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        let root = self.root().try_clone_to_owned()?;
        self.walk_directory(&root, None, version_directory, enter, visit)
    }

    fn walk_directory(
        &self,
        directory: &OwnedFd,
        path: Option<&DataPath>,
        version_directory: &str,
        enter: &dyn Fn(&DataPath) -> bool,
        visit: &mut dyn FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        if path.is_some_and(|path| path.components().count() > DEPTH_MAX) {
            return Err(io::Error::other("directories are nested too deeply"));
        }
        let whole = || path.map_or_else(|| self.path().display().to_string(), ToString::to_string);
        for name in names(directory).map_err(|error| named(&whole(), &error))? {
            if name == OWN_DIRECTORY {
                continue;
            }
            let child = match path {
                Some(path) => path.join(&name),
                None => DataPath::new(name.as_str()),
            };
            let Ok(child) = child else { continue };
            if !is_of_version(&child, version_directory) {
                continue;
            }
            let open = enter(&child);
            let shown = child.to_string();
            match self.entry(directory, &name, child, open) {
                Ok((entry, below)) => {
                    let path = entry.path.clone();
                    visit(entry)?;
                    if let Some(below) = below {
                        self.walk_directory(&below, Some(&path), version_directory, enter, visit)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(named(&shown, &error)),
            }
        }
        Ok(())
    }

    /// Examines one name. A directory is also opened if `open` is set.
    fn entry(
        &self,
        directory: &OwnedFd,
        name: &str,
        path: DataPath,
        open: bool,
    ) -> io::Result<(Entry, Option<OwnedFd>)> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS)?;
        let mode = u32::from(stat.stx_mode);
        let (kind, below) = match FileType::from_raw_mode(mode) {
            FileType::RegularFile => (EntryKind::File { bytes: stat.stx_size }, None),
            FileType::Directory if !open => (EntryKind::Directory { link: None }, None),
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                match open_below(directory, name, flags, Mode::empty()) {
                    Ok(below) => (EntryKind::Directory { link: None }, Some(below)),
                    Err(error)
                        if error.kind() == io::ErrorKind::PermissionDenied
                            && FileClass::of(&path) == FileClass::Unknown =>
                    {
                        (EntryKind::Unreadable, None)
                    }
                    Err(error) => return Err(error),
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new())?;
                let target = String::from_utf8_lossy(target.as_bytes()).into_owned();
                match self.resolve(&path) {
                    (real, "") => {
                        let below = real.as_fd().try_clone_to_owned()?;
                        // Its own handle: a directory's read position belongs to the open file.
                        let below = rustix::fs::openat(
                            &below,
                            ".",
                            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                            Mode::empty(),
                        )?;
                        (EntryKind::Directory { link: Some(target) }, Some(below))
                    }
                    _ => (EntryKind::Link { target }, None),
                }
            }
            _ => (EntryKind::Other, None),
        };
        let (inode, modified) = (stat.stx_ino, (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec));
        Ok((Entry { path, kind, mode: mode & 0o7777, inode, modified }, below))
    }
}

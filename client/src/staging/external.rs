//! Our own directory inside the one that the operator named. Others may be able to write there, so nothing in
//! it is trusted because of its name: the directory is opened once, must belong to us alone, and must have a
//! mark that only this target's state directory can make.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The file that holds the mark.
const OWNER: &str = "owner";
const KEY_BYTES: usize = 32;

/// The staging directory, as recorded in the target's own state directory, which nobody else can read.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staging {
    /// The directory that the operator named, as an absolute path: resume may run in another working
    /// directory.
    pub directory: PathBuf,
    /// Name of our directory in it. It is random, so that nobody can create it before we do.
    pub name: String,
    /// Key of the mark and of the signatures of staged records.
    pub key: [u8; KEY_BYTES],
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { directory, name, .. } = self;
        f.debug_struct("Staging")
            .field("directory", directory)
            .field("name", name)
            .finish_non_exhaustive()
    }
}

impl Staging {
    /// A new staging directory in `directory`, which is not created yet.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let mut random = [0; KEY_BYTES + 16];
        File::open("/dev/urandom")
            .and_then(|mut file| io::Read::read_exact(&mut file, &mut random))?;
        let (key, name) = random.split_first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
        let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { directory: directory.to_owned(), name: format!("pgrejoin-{name}"), key: *key })
    }

    fn mark(&self) -> [u8; KEY_BYTES] {
        *blake3::keyed_hash(&self.key, self.name.as_bytes()).as_bytes()
    }
}

/// Whether an open file has this type and belongs to our user.
pub(crate) fn is_owned(fd: impl AsFd, kind: FileType) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    Ok(ours && FileType::from_raw_mode(stat.st_mode) == kind)
}

/// Whether an open file has this type, belongs to our user, and cannot be written by others.
pub(crate) fn is_ours(fd: impl AsFd, kind: FileType) -> io::Result<bool> {
    let stat = rustix::fs::fstat(&fd)?;
    Ok(stat.st_mode & 0o022 == 0 && is_owned(fd, kind)?)
}

/// The staging directory is not as this rewind left it, so it is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not the staging directory that this rewind created: its owner, mode or content is not \
     as this rewind left it; remove it if nobody needs it and run pgrejoin rollback, which removes \
     the rest"
)]
pub struct NotOurs(String);

/// Whether an error is [`NotOurs`].
pub(crate) fn is_not_ours(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(inner) if inner.is::<NotOurs>())
}

/// The staging directory, opened when it is used first.
#[derive(Debug)]
pub(crate) struct OpenStaging {
    parent: OwnedFd,
    staging: Staging,
    own: Mutex<Option<Arc<OwnedFd>>>,
}

impl OpenStaging {
    pub(crate) fn new(staging: Staging) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(&staging.directory, flags, Mode::empty())?;
        Ok(Self { parent, staging, own: Mutex::default() })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let parent = self.parent.try_clone()?;
        Ok(Self { parent, staging: self.staging.clone(), own: Mutex::default() })
    }

    pub(crate) fn key(&self) -> [u8; KEY_BYTES] {
        self.staging.key
    }

    fn slot(&self) -> parking_lot::MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.own.lock()
    }

    /// The handle of our directory, which is checked when it is opened.
    pub(crate) fn own(&self) -> io::Result<Arc<OwnedFd>> {
        let mut slot = self.slot();
        if let Some(own) = &*slot {
            return Ok(Arc::clone(own));
        }
        let own = match self.open() {
            // Closed to us, a link, or no directory.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::ACCESS | Errno::LOOP | Errno::NOTDIR)
                ) =>
            {
                return Err(self.not_ours());
            }
            own => Arc::new(own?),
        };
        self.judge(own.as_fd())?;
        *slot = Some(Arc::clone(&own));
        Ok(own)
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.parent, &self.staging.name, flags, Mode::empty())?)
    }

    fn not_ours(&self) -> io::Error {
        let path = self.staging.directory.join(&self.staging.name);
        io::Error::new(io::ErrorKind::PermissionDenied, NotOurs(path.display().to_string()))
    }

    fn judge(&self, own: BorrowedFd<'_>) -> io::Result<()> {
        let refuse = || Err(self.not_ours());
        if !is_ours(own, FileType::Directory)? {
            return refuse();
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let marked = match rustix::fs::openat(own, OWNER, flags, Mode::empty()) {
            Err(Errno::NOENT) => None,
            opened => Some(File::from(opened?)),
        };
        let Some(file) = marked else {
            // The run that created the directory was killed before it wrote the mark, so there must be
            // nothing in it.
            return if is_empty(own)? { self.write_mark(own) } else { refuse() };
        };
        let mut found = [0; KEY_BYTES];
        let read = data_dir::dir::read_at(&file, &mut found, 0)?;
        let right = read == KEY_BYTES && found == self.staging.mark();
        if right && is_ours(&file, FileType::RegularFile)? { Ok(()) } else { refuse() }
    }

    fn write_mark(&self, own: BorrowedFd<'_>) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(own, OWNER, flags, Mode::from_raw_mode(0o600))?);
        file.write_all_at(&self.staging.mark(), 0)?;
        file.sync_all()?;
        Ok(rustix::fs::fsync(own)?)
    }

    /// Creates our directory if it does not exist.
    pub(crate) fn create(&self, sync: bool) -> io::Result<()> {
        match rustix::fs::mkdirat(&self.parent, &self.staging.name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.own()?;
        if sync { Ok(rustix::fs::fsync(&self.parent)?) } else { Ok(()) }
    }

    /// Removes our directory if only its mark is left in it.
    pub(crate) fn remove_if_empty(&self) -> io::Result<()> {
        let own = self.own()?;
        if names(own.as_fd())?.iter().any(|name| name != OWNER) {
            return Ok(());
        }
        match rustix::fs::unlinkat(&*own, OWNER, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        *self.slot() = None;
        Ok(rustix::fs::unlinkat(&self.parent, &self.staging.name, AtFlags::REMOVEDIR)?)
    }
}

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn is_empty(directory: BorrowedFd<'_>) -> io::Result<bool> {
    names(directory).map(|names| names.is_empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn opened(staging: &Staging) -> io::Result<Arc<OwnedFd>> {
        OpenStaging::new(staging.clone()).unwrap().own()
    }

    fn is_refused(staging: &Staging) -> bool {
        let error = opened(staging).expect_err("it is not ours");
        is_not_ours(&error)
    }

    #[test]
    fn a_staging_directory_of_somebody_else_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        let staging = Staging::new(home.path()).unwrap();
        assert_ne!(staging.name, Staging::new(home.path()).unwrap().name);
        OpenStaging::new(staging.clone()).unwrap().create(true).unwrap();
        let own = home.path().join(&staging.name);
        assert!(opened(&staging).is_ok());
        // Others may write into it.
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(is_refused(&staging));
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o700)).unwrap();
        // Another target's, or one made to look like it.
        let other = Staging { key: [7; KEY_BYTES], ..staging.clone() };
        assert!(is_refused(&other));
        std::fs::remove_file(own.join(OWNER)).unwrap();
        std::fs::create_dir(own.join("packs")).unwrap();
        assert!(is_refused(&staging));
        // A link to a directory that is ours.
        std::fs::remove_dir_all(&own).unwrap();
        let other = home.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&other, &own).unwrap();
        assert!(opened(&staging).is_err());
    }
}

//! Opening paths below a directory handle so that nothing outside can be reached.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Opens `path` below `directory`. No component may be a symbolic link, and `..` cannot leave.
///
/// Uses `openat2` where the kernel has it and permits it (it is often filtered in containers), and
/// otherwise opens one component after the other without following links.
pub fn open_below(
    directory: impl AsFd,
    path: &str,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // openat2 refuses a mode where nothing is created.
    let mode = if flags.contains(OFlags::CREATE) { mode } else { Mode::empty() };
    match rustix::fs::openat2(&directory, path, flags, mode, resolve) {
        Err(Errno::NOSYS | Errno::PERM) => open_by_component(&directory, path, flags, mode),
        result => Ok(result?),
    }
}

/// What [`open_below`] does without `openat2`.
pub fn open_by_component(
    directory: impl AsFd,
    path: &str,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut parts = path.split('/').peekable();
    let mut current: Option<OwnedFd> = None;
    while let Some(part) = parts.next() {
        if part.is_empty() || part == "." || part == ".." {
            return Err(Errno::XDEV.into());
        }
        let last = parts.peek().is_none();
        let (flags, mode) = if last {
            (flags, mode)
        } else {
            (OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::PATH, Mode::empty())
        };
        let opened = match &current {
            Some(parent) => rustix::fs::openat(parent, part, flags, mode),
            None => rustix::fs::openat(&directory, part, flags, mode),
        };
        // A symbolic link gives ENOTDIR where a directory is wanted. It is reported as ELOOP, as by openat2.
        current = Some(opened.map_err(|e| if e == Errno::NOTDIR { Errno::LOOP } else { e })?);
    }
    current.ok_or_else(|| Errno::NOENT.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    type Opener = fn(&std::fs::File, &str) -> io::Result<OwnedFd>;

    const OPENERS: [Opener; 2] = [
        |dir, path| open_below(dir, path, OFlags::RDONLY, Mode::empty()),
        |dir, path| open_by_component(dir, path, OFlags::RDONLY, Mode::empty()),
    ];

    #[test]
    fn hostile_paths_reach_nothing_outside() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::File::create(outer.path().join("secret")).unwrap();
        std::fs::File::create(root.join("in/file")).unwrap();
        symlink(outer.path(), root.join("out")).unwrap();
        symlink("in/file", root.join("link")).unwrap();
        symlink("in", root.join("dirlink")).unwrap();
        let dir = std::fs::File::open(&root).unwrap();
        for open in OPENERS {
            assert!(open(&dir, "in/file").is_ok());
            for bad in [
                "../secret",
                "/etc/passwd",
                "out/secret",
                "link",
                "dirlink/file",
                "in/../../secret",
                "in/missing",
            ] {
                assert!(open(&dir, bad).is_err(), "{bad}");
            }
        }
    }
}

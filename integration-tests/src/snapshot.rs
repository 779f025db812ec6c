//! Everything there is to know about a directory tree, for "nothing was changed".

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Path to type, mode, owner, size, time and content.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<PathBuf, String>);

impl Snapshot {
    /// Looks at everything below `root`.
    pub fn of(root: &Path) -> Self {
        let mut seen = BTreeMap::new();
        visit(root, true, &mut seen);
        Self(seen)
    }

    /// Fails with the paths that are not the same.
    pub fn assert_same(&self, later: &Self) {
        let mut different = Vec::new();
        for path in self.0.keys().chain(later.0.keys()) {
            if self.0.get(path) != later.0.get(path) && !different.contains(&path) {
                different.push(path);
            }
        }
        assert!(different.is_empty(), "changed: {different:?}");
    }
}

/// Path below the root to kind, mode and content: what must be the same after something was changed
/// and taken back, whatever the clock says. Contents are kept as their hash: a process that holds much memory forks
/// slowly.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content(BTreeMap<PathBuf, (u32, u64)>);

impl Content {
    /// Looks at everything below `root`; links are not followed.
    pub fn of(root: &Path) -> Self {
        Self::without(root, &[])
    }

    /// The same without these names at the top.
    pub fn without(root: &Path, names: &[&str]) -> Self {
        let mut seen = BTreeMap::new();
        let mut waiting = vec![root.to_owned()];
        while let Some(path) = waiting.pop() {
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            let mut content = DefaultHasher::new();
            if metadata.is_dir() {
                let entries = fs::read_dir(&path).expect("directory").flatten();
                waiting.extend(entries.map(|entry| entry.path()));
            } else if metadata.is_symlink() {
                fs::read_link(&path).expect("link").hash(&mut content);
            } else {
                fs::read(&path).expect("content").hash(&mut content);
            }
            let below = path.strip_prefix(root).expect("below").to_owned();
            if !names.iter().any(|name| below.starts_with(name)) {
                seen.insert(below, (metadata.mode(), content.finish()));
            }
        }
        Self(seen)
    }

    /// Paths that are not the same.
    pub fn differences(&self, other: &Self) -> Vec<PathBuf> {
        let mut different: Vec<PathBuf> = self.0.keys().chain(other.0.keys()).cloned().collect();
        different.retain(|path| self.0.get(path) != other.0.get(path));
        different.sort();
        different.dedup();
        different
    }

    /// Fails with the paths that are not the same.
    pub fn assert_same(&self, later: &Self) {
        let different = self.differences(later);
        assert!(different.is_empty(), "changed: {different:?}");
    }
}

fn visit(path: &Path, root: bool, seen: &mut BTreeMap<PathBuf, String>) {
    let metadata = fs::symlink_metadata(path).expect("metadata");
    let mut content = DefaultHasher::new();
    if metadata.is_file() {
        fs::read(path).expect("content").hash(&mut content);
    } else if metadata.is_symlink() {
        fs::read_link(path).expect("link").hash(&mut content);
    }
    let facts = format!(
        "{:o} {}:{} {} {}.{} {:x}",
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
        if metadata.is_dir() { 0 } else { metadata.size() },
        // Making and removing the state directory touches the root's time, not its content.
        if root { 0 } else { metadata.mtime() },
        if root { 0 } else { metadata.mtime_nsec() },
        content.finish()
    );
    seen.insert(path.to_owned(), facts);
    if metadata.is_dir() {
        for entry in fs::read_dir(path).expect("directory").flatten() {
            visit(&entry.path(), false, seen);
        }
    }
}

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

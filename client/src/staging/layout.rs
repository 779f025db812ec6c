//! Where everything of a rewind lies: the paths in the state directory `.pgrejoin` and in those beside it on other
//! file systems.

use data_dir::DataDir;
use pg_format::DataPath;
use pg_format::file_class::OWN_DIRECTORY;

/// Directories that `--staging-dir` moves elsewhere.
pub const STAGED_DIRECTORIES: [&str; 4] =
    [".pgrejoin/packs", ".pgrejoin/wal", ".pgrejoin/undo", CACHE];

/// Packs of a plan that does not hold any more.
pub const CACHE: &str = ".pgrejoin/cache";

/// Where the WAL of lost transactions is kept; stays when everything else goes.
pub const DIVERGED: &str = "diverged";

/// A path below the data directory that this program made up.
#[expect(clippy::expect_used, reason = "the names are constants and numbers of ours")]
pub(crate) fn own(path: impl Into<String>) -> DataPath {
    DataPath::new(path).expect("our own paths are plain")
}

/// Where a fetched WAL segment is staged.
pub fn staged_wal(name: &str) -> DataPath {
    own(format!("{OWN_DIRECTORY}/wal/{name}"))
}

/// Path of a pack. Each attempt has names of its own, so that a thread of an earlier attempt cannot write
/// into its packs.
pub fn pack(name: &str) -> DataPath {
    own(format!("{OWN_DIRECTORY}/packs/{name}"))
}

/// Where undo images are saved.
pub fn undo(name: &str) -> DataPath {
    own(format!("{OWN_DIRECTORY}/undo/{name}"))
}

/// The state directory of the file system that holds `path`: renames must not leave it.
fn beside(directory: &DataDir, path: &DataPath) -> String {
    let parts: Vec<&str> = path.components().collect();
    match parts[..] {
        ["pg_tblspc", oid, _, ..]
            if directory.linked_tablespaces().any(|(linked, ..)| linked == oid) =>
        {
            format!("pg_tblspc/{oid}/{OWN_DIRECTORY}")
        }
        ["pg_wal", ..] if directory.wal_is_elsewhere() => format!("pg_wal/{OWN_DIRECTORY}"),
        _ => OWN_DIRECTORY.to_owned(),
    }
}

/// Path at which the planned file `index` is written before it is renamed to `path`.
pub fn temporary(directory: &DataDir, path: &DataPath, index: usize) -> DataPath {
    own(format!("{}/new-{index}", beside(directory, path)))
}

/// Path to which `path`, the planned file `index`, is moved until clean-up.
pub fn trash(directory: &DataDir, path: &DataPath, index: usize) -> DataPath {
    own(format!("{}/trash-{index}", beside(directory, path)))
}

/// Where a segment of lost transactions is kept.
pub fn diverged(directory: &DataDir, fork: &str, name: &str) -> DataPath {
    let wal = own(format!("pg_wal/{name}"));
    own(format!("{}/{DIVERGED}/{fork}/{name}", beside(directory, &wal)))
}

/// Every state directory of the target: its own, and one on each file system it links to.
pub fn state_directories(directory: &DataDir) -> Vec<DataPath> {
    let mut all = vec![own(OWN_DIRECTORY)];
    if directory.wal_is_elsewhere() {
        all.push(own(format!("pg_wal/{OWN_DIRECTORY}")));
    }
    for (oid, ..) in directory.linked_tablespaces() {
        all.push(own(format!("pg_tblspc/{oid}/{OWN_DIRECTORY}")));
    }
    all
}

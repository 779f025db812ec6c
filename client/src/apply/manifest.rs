//! Everything that is needed to finish a rewind or to take it back, in one checked file.

use pg_format::DataPath;
use serde::{Deserialize, Serialize};

use super::disk::FileStat;
use super::header::{self, HeaderError};
use super::staging::Staging;
use crate::plan::PlannedFile;

/// A staged file as it was when it was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackDigest {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32C of its content.
    pub crc: u32,
}

/// A small file with its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmallFile {
    /// Where it goes.
    pub path: DataPath,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// A small file as it was before it was written or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldFile {
    /// Where it is.
    pub path: DataPath,
    /// Its content and permission bits; `None` if there was none.
    pub content: Option<(Vec<u8>, u32)>,
}

/// The way back, but for what lies in the trash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Images of what is overwritten or cut.
    pub images: Vec<PackDigest>,
    /// Small files that are written or removed.
    pub small: Vec<OldFile>,
}

/// What happens in `pg_wal`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalChanges {
    /// Names of staged segments to put in place.
    pub place: Vec<String>,
    /// Names of files that hold lost transactions.
    pub diverged: Vec<String>,
    /// Name of the directory they are kept in; `None` if they are not kept.
    pub keep_as: Option<String>,
    /// Names of other files that go.
    pub remove: Vec<String>,
    /// Names of segments older than the start of replay that stay: those from the oldest one on that waits to be
    /// archived.
    pub waiting: Vec<String>,
    /// History files and archive marks to write.
    pub write: Vec<SmallFile>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program that wrote it.
    pub program_version: String,
    /// The target's `pg_control` when the plan was made: if another is found, somebody started the
    /// server and the plan is void.
    pub old_control: Vec<u8>,
    /// The `pg_control` that makes it a rewound node.
    pub new_control: Vec<u8>,
    /// The target's files.
    pub files: Vec<PlannedFile>,
    /// Each of them as it was when the plan was made; `None` if there was no such file.
    pub before: Vec<Option<FileStat>>,
    /// The packs.
    pub packs: Vec<PackDigest>,
    /// The staged WAL segments.
    pub segments: Vec<PackDigest>,
    /// Where packs and WAL are staged, if not in the state directory.
    pub staging: Option<Staging>,
    /// Files that were shorter on the source when they were read than when they were listed: index
    /// and bytes.
    pub shorter: Vec<(usize, u64)>,
    /// Files that were gone when they were read.
    pub vanished: Vec<usize>,
    /// Changes in `pg_wal`.
    pub wal: WalChanges,
    /// Settings and signal files, in the order they are written.
    pub settings: Vec<SmallFile>,
    /// Top-level files that go.
    pub remove: Vec<DataPath>,
    /// Replay begins here; written last before `pg_control`.
    pub backup_label: Vec<u8>,
    /// The way back; `None` if it was given up.
    pub undo: Option<Undo>,
    /// Whether the disk is waited for.
    pub sync: bool,
    /// What the operator is told at the end.
    pub summary: String,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is damaged, or another release wrote it.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It cannot be encoded or decoded.
    #[error("its content makes no sense")]
    Content(#[from] postcard::Error),
}

impl Manifest {
    /// The file's content.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        Ok(header::seal(&postcard::to_stdvec(self)?))
    }

    /// Reads and checks the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        Ok(postcard::from_bytes(header::open(bytes)?)?)
    }

    /// The length a planned file has at the end.
    pub fn final_bytes(&self, index: usize, planned: u64) -> u64 {
        let shorter = self.shorter.iter().find(|(of, _)| *of == index);
        shorter.map_or(planned, |(_, shorter)| planned.min(*shorter))
    }

    /// A planned file as it was; `None` if there was no such file.
    pub fn before(&self, index: usize) -> Option<&FileStat> {
        self.before.get(index).and_then(Option::as_ref)
    }

    /// Whether a planned file was gone on the source when it was read.
    pub fn is_gone(&self, index: usize) -> bool {
        self.vanished.contains(&index)
    }
}

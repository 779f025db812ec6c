//! Everything that is needed to finish a rewind, in one checked file.

use pg_format::DataPath;
use serde::{Deserialize, Serialize};

use crate::plan::PlannedFile;

/// First bytes of the file.
const MAGIC: &[u8; 8] = b"pgrejoin";
/// Version of the format of everything in the state directory.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes before the body: magic, format version, CRC of the body.
const HEADER_BYTES: usize = 16;

/// A pack as it was when it was sealed.
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
    /// History files and archive marks to write.
    pub write: Vec<SmallFile>,
}

/// Our own directory inside one the operator named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staging {
    /// The operator's, as an absolute path: whoever resumes may stand elsewhere.
    pub directory: std::path::PathBuf,
    /// Ours. Written down, because what it was made from may be another after a reboot.
    pub name: String,
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
    /// The packs.
    pub packs: Vec<PackDigest>,
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
    /// Whether the disk is waited for.
    pub sync: bool,
    /// What the operator is told at the end.
    pub summary: String,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not one.
    #[error("it is damaged ({0})")]
    Damaged(&'static str),
    /// Another release wrote it.
    #[error(
        "it has format version {0}, this program knows {FORMAT_VERSION}: finish it with the \
         pgrejoin release that began it"
    )]
    Version(u32),
    /// It cannot be encoded or decoded.
    #[error("its content makes no sense")]
    Content(#[from] postcard::Error),
}

impl Manifest {
    /// The file's content.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let body = postcard::to_stdvec(self)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Reads and checks the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let word = |at: usize| {
            let found = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
            found.map(u32::from_le_bytes).ok_or(ManifestError::Damaged("too short"))
        };
        if bytes.get(..8) != Some(MAGIC) {
            return Err(ManifestError::Damaged("wrong magic"));
        }
        let version = word(8)?;
        if version != FORMAT_VERSION {
            return Err(ManifestError::Version(version));
        }
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if word(12)? != crc32c::crc32c(body) {
            return Err(ManifestError::Damaged("wrong CRC"));
        }
        Ok(postcard::from_bytes(body)?)
    }
}

//! The plan of a rewind that is being prepared, in one checked file: a run that died, or whose source
//! was gone for too long, goes on with it and with what it had fetched.

use std::io;

use pg_format::backup_label::ReplayStart;
use pg_format::{DataPath, Lsn};
use serde::{Deserialize, Serialize};

use crate::plan::{Plan, SourceFiles};
use crate::staging::disk::{Disk, FileStat, replace_file};
use crate::staging::external::Staging;
use crate::staging::header::{self, HeaderError};

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedPlan {
    /// The target's `pg_control` when it was made.
    pub target_control: Vec<u8>,
    /// The planned files as they were then.
    pub before: Vec<Option<FileStat>>,
    /// Which life of which source it was made for.
    pub life: String,
    /// The operator's choices it depends on.
    pub options: String,
    /// Name of the strategy, and why it was chosen.
    pub strategy: (String, String),
    /// Where replay will begin.
    pub start: ReplayStart,
    /// Redo position of the source's newest checkpoint before anything was read from it.
    pub source_redo: Lsn,
    /// What is done, file by file.
    pub plan: Plan,
    /// What the source listed.
    pub listed: SourceFiles,
    /// Payload bytes of page hashes that were compared.
    pub hash_bytes: u64,
    /// Counts the runs: each names its packs by it.
    pub run: u32,
    /// Where packs and WAL are staged, if not in the state directory.
    pub staging: Option<Staging>,
    /// Whether the disk is waited for.
    pub sync: bool,
}

fn path() -> io::Result<DataPath> {
    DataPath::new(".pgrejoin/plan").map_err(io::Error::other)
}

impl SavedPlan {
    /// Writes it durably.
    pub fn write(&self, disk: &dyn Disk) -> io::Result<()> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        replace_file(disk, &path()?, &header::seal(&body))
    }

    /// Reads it; `None` if there is none that can be used.
    pub fn read(disk: &dyn Disk) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        match disk.open(&path()?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => io::Read::read_to_end(&mut file?, &mut bytes)?,
        };
        match header::open(&bytes) {
            Ok(body) => Ok(postcard::from_bytes(body).ok()),
            Err(HeaderError::Damaged(_)) => Ok(None),
            Err(error @ HeaderError::Version { .. }) => Err(io::Error::other(error)),
        }
    }
}

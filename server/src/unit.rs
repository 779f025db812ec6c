//! Answers single units, each kind in a file of its own.

pub(crate) mod changes;
pub(crate) mod file;
pub(crate) mod hashes;
pub(crate) mod pages;
pub(crate) mod proof;
pub(crate) mod wal;

use std::fs::File;
use std::io;

use pg_format::DataPath;
use proto::Refusal;

use crate::node;

/// What the end of an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answered {
    /// Whether the file did not exist.
    pub(crate) vanished: bool,
    /// Its length when it was read; for a proof, where the records end.
    pub(crate) bytes: u64,
}

impl Answered {
    /// The file does not exist.
    pub(crate) const GONE: Self = Self { vanished: true, bytes: 0 };

    pub(crate) fn of(bytes: u64) -> Self {
        Self { vanished: false, bytes }
    }
}

/// A file that a unit asks for, and the unit's number.
#[derive(Clone, Copy)]
pub(crate) struct Requested<'a> {
    pub(crate) id: u64,
    pub(crate) path: &'a DataPath,
    pub(crate) file: &'a File,
}

impl Requested<'_> {
    /// The file's length by now.
    pub(crate) fn length(&self) -> Result<u64, Refusal> {
        let metadata = self.file.metadata();
        metadata.map(|found| found.len()).map_err(|error| self.unreadable(&error))
    }

    pub(crate) fn unreadable(&self, error: &io::Error) -> Refusal {
        node::internal(self.path.as_str(), error)
    }
}

/// A file that vanished is normal on a live node; any other error is not.
pub(crate) fn missing(path: &DataPath, error: &io::Error) -> Result<Answered, Refusal> {
    if error.kind() == io::ErrorKind::NotFound {
        return Ok(Answered::GONE);
    }
    Err(node::internal(path.as_str(), error))
}

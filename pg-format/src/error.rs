//! The one error of the parsers: what was read and what is wrong with it.

use crate::Lsn;

/// Why bytes could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end before the structure does.
    #[error("{what} is {actual} bytes long, expected at least {expected}")]
    TooShort {
        /// The structure.
        what: &'static str,
        /// Bytes needed.
        expected: usize,
        /// Bytes found.
        actual: usize,
    },
    /// A checksum stored beside the data does not match the data.
    #[error("{what} has CRC {stored:08x} but its content has {computed:08x}")]
    Crc {
        /// The structure.
        what: &'static str,
        /// The value stored.
        stored: u32,
        /// The value computed.
        computed: u32,
    },
    /// A format version this program does not know.
    #[error("{what} has version {version}, which this program does not know")]
    UnknownVersion {
        /// The structure.
        what: &'static str,
        /// The version number found.
        version: u32,
    },
    /// A field holds a value that PostgreSQL never writes.
    #[error("{what} is invalid: {why}")]
    Invalid {
        /// The structure or field.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A WAL record is not acceptable.
    #[error("WAL record at {at}: {why}")]
    Record {
        /// Where the record begins.
        at: Lsn,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl FormatError {
    pub(crate) fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { what, why: why.into() }
    }
}

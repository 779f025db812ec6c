//! The state directory `.pgrejoin`: what was fetched for a rewind, and what is needed to finish it or to roll
//! it back.
//!
//! Every change of the target and of this directory goes through [`disk::Disk`].

pub mod disk;
pub mod external;
pub mod header;
pub mod layout;
pub mod manifest;
pub mod marks;
pub mod notes;
pub mod pack;
pub mod partial_fetch;
pub mod pid_file;
pub mod reserve;
pub mod saved_plan;
pub mod staged_bytes;
pub mod state_directory;
pub(crate) mod warning;

use crate::error::{Class, RewindError, io_kind};

pub(crate) fn state_error(
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> RewindError {
    use std::io::ErrorKind;
    let error = error.into();
    let class = match io_kind(&*error) {
        // The operator can correct these, and checks before the first change should find them.
        Some(
            ErrorKind::ReadOnlyFilesystem
            | ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::PermissionDenied,
        ) => Class::Preflight,
        _ => Class::Other,
    };
    RewindError::because(class, "the target's .pgrejoin directory is not usable", error)
}

/// What is fetched cannot be kept on this node's disk.
pub(crate) fn staging_error(error: std::io::Error) -> RewindError {
    RewindError::because(
        Class::Preflight,
        "could not write fetched data to the staging directory",
        error,
    )
}

/// Fetched data cannot be read back from this node's disk.
pub(crate) fn read_back_error(error: std::io::Error) -> RewindError {
    RewindError::because(
        Class::Preflight,
        "could not read fetched data back from the staging directory: pgrejoin rollback removes it",
        error,
    )
}

/// The target's own WAL cannot be read.
pub(crate) fn own_wal_error(error: std::io::Error) -> RewindError {
    RewindError::because(Class::Target, "could not read the target's WAL in pg_wal", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_takes_nothing_is_for_the_operator_to_mend() {
        use rustix::io::Errno;
        for errno in [Errno::ROFS, Errno::NOSPC, Errno::DQUOT, Errno::ACCESS] {
            let error = std::io::Error::from(errno);
            assert_eq!(state_error(error).class(), Class::Preflight, "{errno}");
        }
        assert_eq!(state_error(std::io::Error::from(Errno::IO)).class(), Class::Other);
    }
}

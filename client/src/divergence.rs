//! Where the histories of the two nodes part, and which pages either of them changed since.

pub mod common_wal;
pub mod compat;
pub mod fork_point;
pub mod hint_logging;
pub mod source_changes;

//! A PostgreSQL data directory behind one handle: read-only and confined.
//!
//! Both ends read data directories whose names a peer may choose, so both go through the same
//! handle: [`DataDir`] opens every path relative to a directory handle and follows no symbolic link
//! but those the local node itself has for `pg_wal` and its tablespaces. Nothing here writes; the
//! client's `staging::disk` does that on its own.

pub mod confined;
pub mod control;
pub mod dir;
pub mod private_keys;
pub mod settings;
pub mod wal;
pub mod walk;

pub use dir::{DataDir, OpenError};
pub use walk::{Entry, EntryKind};

//! A PostgreSQL data directory behind one handle: read-only and confined.
//!
//! Both ends read data directories whose names a peer may choose, so both go through the same
//! door: [`DataDir`] opens every path relative to a directory handle and follows no symbolic link
//! but those the local node itself has for `pg_wal` and its tablespaces. Nothing here writes; the
//! client's apply room does that on its own.

pub mod confined;
pub mod control;
pub mod dir;
pub mod proof;
pub mod runs;
pub mod secret;
pub mod wal;
pub mod walk;
pub mod window;
pub mod window_scan;

pub use dir::{DataDir, OpenError};
pub use walk::{Entry, EntryKind};

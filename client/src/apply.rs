//! Changes the target so that no crash can leave a wrong node.
//!
//! The steps and their order are those of design 6: everything is staged and sealed first, then
//! `pg_control` is hidden, the files are changed, and a new `pg_control` is put in place last. Until
//! then [`rollback`] can take all of it back.
//! Every mutation goes through [`disk::Disk`].

pub mod change;
pub mod disk;
pub mod header;
pub mod hold;
pub mod manifest;
pub mod pack;
pub mod pg_wal;
pub mod plan_file;
pub mod preflight;
pub mod redo;
pub mod reserve;
pub mod rollback;
pub mod staged;
pub mod staging;
pub mod state;
pub mod undo;
pub mod void;
pub(crate) mod warning;

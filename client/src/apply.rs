//! Changes the target so that no crash can leave a wrong node.
//!
//! `pg_control` is hidden first, then the files are changed, and a new `pg_control` is put in place last. Until then
//! a rollback can take all of it back.

pub mod before_images;
pub mod change;
pub mod pg_wal;
pub mod plan_validity;
pub mod preflight;
pub mod redo;
pub mod rollback;

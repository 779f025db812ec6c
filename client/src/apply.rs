//! Changes the target so that no crash can leave a node that starts and is wrong.
//!
//! `pg_control` is moved aside first, then the files are changed, and a new `pg_control` is put in place
//! last. Until then the rewind can be rolled back.

pub mod before_images;
pub mod change;
pub mod pg_wal;
pub mod plan_validity;
pub mod preflight;
pub mod redo;
pub mod rollback;

//! Makes a rewind ready to be applied: a plan, everything that it needs from the source in staging, and the manifest
//! that seals it. The target is not changed.

pub mod build_manifest;
pub mod claim;
pub mod disk_space;
pub mod fetch;
pub mod hazards;
pub mod local_wal;
mod pack_sink;
pub mod page_cache;
pub mod plan_reuse;
pub mod planning;
pub mod prefetch;
pub mod replay_check;
pub mod save_before_images;
pub mod seal;
pub mod stage;
pub mod timeline_ends;
pub mod wal_follower;
pub mod wal_pieces;

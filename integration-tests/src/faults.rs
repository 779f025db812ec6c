//! Faults of the disk: what a rewind does is recorded at its one door, and then replayed onto disks
//! that lost power, were full or failed.

pub mod judge;
pub mod recorder;
pub mod sample;
pub mod simulated;
pub mod small;

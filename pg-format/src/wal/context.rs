//! How a node's WAL is read.

use crate::{WalFormat, WalSegmentSize};

/// What must be known about a cluster to read its WAL. All of it comes from `pg_control`, never
/// from a WAL file: a zero-filled segment would otherwise look like an empty log.
#[derive(Debug, Clone, Copy)]
pub struct WalContext {
    /// The rules of its major.
    pub format: WalFormat,
    /// Its identifier, which every segment repeats.
    pub system_identifier: u64,
    /// Its segment size.
    pub segment_size: WalSegmentSize,
}

//! How the link to the source is used: its connections, how long the source is waited for, and what may be on
//! its way.

use std::time::Duration;

use proto::limits::RECEIVE_BUDGET_BYTES;

use crate::config::Connections;

/// How the link to the source is used.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// How many data connections there may be.
    pub connections: Connections,
    /// How long the source may be silent.
    pub patience: Duration,
    /// Bytes a second that are received at most.
    pub max_rate: Option<u64>,
    /// What may be on its way or wait to be worked on.
    pub buffers: Buffers,
}

/// Bounds of what is on its way or queued between the source's disk and this node's.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Bytes on their way to us, over all connections.
    pub receive_bytes: u32,
    /// Frames of each connection that were received and not checked yet. With the one that is being checked,
    /// and at most 2 MiB in each, sixteen connections have the receive budget once more in memory.
    pub frames: usize,
    /// Messages with requests of each connection that were made and not sent.
    pub requests: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { receive_bytes: RECEIVE_BUDGET_BYTES, frames: 2, requests: 4 }
    }
}

impl Link {
    /// Receive window of data connection `number`, in bytes. The windows of all connections there may be,
    /// with the control connection, add up to the receive budget, so it stays the same when connections are
    /// added.
    pub fn window(self, number: usize, first: usize) -> u32 {
        let budget = self.buffers.receive_bytes;
        let share = |budget: u32, number: usize| budget / u32::try_from(number).unwrap_or(u32::MAX);
        match self.connections.most() - first {
            0 => share(budget, first + 1),
            // Half of it for the first data connections and the control connection.
            more if number >= first => share(budget / 2, more),
            _ => share(budget / 2, first + 1),
        }
    }
}

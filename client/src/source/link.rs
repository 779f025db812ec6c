//! How the link to the source is used: connections, patience, and what may be on its way.

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

/// Bounds of what waits somewhere between the source's disk and ours.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Bytes on their way to us, over all connections.
    pub receive_bytes: u32,
    /// Frames of each connection that were received and not looked at. With the one in work and 2 MiB
    /// at most in each, sixteen connections have the receive budget once more in memory.
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
    /// Bytes the data connection of this number may have on their way. The sum over all there may be, and
    /// the one that asks questions, is the receive budget: it does not change when some are added.
    pub fn window(self, number: usize, first: usize) -> u32 {
        let budget = self.buffers.receive_bytes;
        let share = |budget: u32, number: usize| budget / u32::try_from(number).unwrap_or(u32::MAX);
        match self.connections.most() - first {
            0 => share(budget, first + 1),
            // Half for those that are there from the beginning and the one that asks.
            more if number >= first => share(budget / 2, more),
            _ => share(budget / 2, first + 1),
        }
    }
}

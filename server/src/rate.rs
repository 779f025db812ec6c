//! A limit on the bytes read and sent a second, shared by all streams.

use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Unused allowance that may be saved up: bursts no longer than this.
const BURST: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub(crate) struct RateLimit {
    bytes_per_second: u64,
    /// When everything granted so far will have been sent at the allowed rate.
    free_at: Mutex<Instant>,
}

impl RateLimit {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be sent. Blocks the thread: for blocking workers alone.
    pub(crate) fn wait(&self, bytes: usize) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let now = Instant::now();
        let due = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let due = (*free_at).max(now.checked_sub(BURST).unwrap_or(now));
            *free_at = due + cost;
            due
        };
        if let Some(pause) = due.checked_duration_since(now) {
            sleep(pause);
        }
    }
}

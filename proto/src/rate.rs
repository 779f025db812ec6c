//! A limit on bytes per second, shared by all streams.

use std::thread::sleep;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Unused allowance that may be saved up: bursts no longer than this.
const BURST: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    /// When everything granted so far will have been sent at the allowed rate.
    free_at: Mutex<Instant>,
}

impl RateLimit {
    /// A limit of so many bytes a second, more than 0.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be sent. Blocks the thread: for blocking workers alone.
    pub fn wait(&self, bytes: usize) {
        sleep(self.reserve(bytes));
    }

    /// Grants `bytes` and returns how long the caller must wait before it uses them.
    pub fn reserve(&self, bytes: usize) -> Duration {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let now = Instant::now();
        let due = {
            let mut free_at = self.free_at.lock();
            let due = (*free_at).max(now.checked_sub(BURST).unwrap_or(now));
            *free_at = due + cost;
            due
        };
        due.saturating_duration_since(now)
    }
}

/// A text that is no rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a rate like 500k, 20M or 1G")]
pub struct NotARate(String);

/// Reads a rate like `500k`, `20M` or a plain number of bytes; k, M and G multiply by 1024.
///
/// # Errors
/// The text is not a rate, or the number is too large.
pub fn parse_rate(text: &str) -> Result<u64, NotARate> {
    let bad = || NotARate(text.to_owned());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let factor = match &text[digits.len()..] {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).filter(|rate| *rate > 0).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_units() {
        assert_eq!(parse_rate("20M"), Ok(20 << 20));
        for bad in ["", "0", "M", "1T", "-1", "1.5M"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}

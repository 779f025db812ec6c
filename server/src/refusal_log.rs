//! Warnings about connections that are refused. Whoever opens thousands of them must not fill the disk: a few of
//! each kind are written, the others are counted, and the count is written from time to time.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines of one kind that are written in a period before the others are only counted.
pub(crate) const LINES_MAX: u64 = 5;
/// The period.
pub(crate) const PERIOD: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(crate) struct RefusalLog(Mutex<Periods>);

#[derive(Debug)]
struct Periods {
    since: Instant,
    kinds: HashMap<&'static str, Count>,
}

#[derive(Debug)]
struct Count {
    seen: u64,
    last: SocketAddr,
}

impl Default for RefusalLog {
    fn default() -> Self {
        Self(Mutex::new(Periods { since: Instant::now(), kinds: HashMap::new() }))
    }
}

impl RefusalLog {
    /// Notes a refused connection: what kind of refusal it is, and why it was refused.
    pub(crate) fn note(&self, kind: &'static str, address: SocketAddr, why: &dyn fmt::Display) {
        self.end_period(Instant::now());
        if self.count(kind, address) {
            tracing::warn!(%address, why = %proto::text::of_peer(&why.to_string()), "{kind}");
        }
    }

    /// Writes what was only counted, if the period is over.
    pub(crate) fn end_period(&self, now: Instant) {
        let mut periods = self.0.lock();
        if now.saturating_duration_since(periods.since) < PERIOD {
            return;
        }
        periods.since = now;
        for (kind, Count { seen, last }) in std::mem::take(&mut periods.kinds) {
            let more = seen.saturating_sub(LINES_MAX);
            if more > 0 {
                let seconds = PERIOD.as_secs();
                tracing::warn!(more, %last, "{kind}: more connections in {seconds} seconds");
            }
        }
    }

    /// Counts a refusal; whether its line is to be written.
    fn count(&self, kind: &'static str, address: SocketAddr) -> bool {
        let mut periods = self.0.lock();
        let count = periods.kinds.entry(kind).or_insert(Count { seen: 0, last: address });
        (count.seen, count.last) = (count.seen + 1, address);
        count.seen <= LINES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_are_written_and_the_others_counted() {
        let log = RefusalLog::default();
        let address = SocketAddr::from(([10, 0, 0, 1], 1));
        let written =
            |log: &RefusalLog| (0..1000).filter(|_| log.count("refused", address)).count();
        assert_eq!(written(&log) as u64, LINES_MAX);
        assert!(log.count("another kind", address));
        log.end_period(Instant::now() + PERIOD);
        assert_eq!(written(&log) as u64, LINES_MAX, "a new period");
    }
}

//! How many connections are worth having: more are tried as long as they improve the throughput.
//!
//! On a link with packet loss each connection carries what its congestion control allows, so the sum grows
//! with their number. On a link that is already full more connections gain nothing, and they are closed
//! again.

use std::time::Duration;

use crate::config::Connections;

/// More connections are kept only if the rate grows by this factor.
const GAIN_MIN: f64 = 1.15;
/// No more connections are tried if the rest takes less time: opening them would cost more than they gain.
const LEFT_MIN: Duration = Duration::from_secs(3);
/// Least time for which a rate is measured.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Round trips for which it is measured at least: slow start takes some of them.
const INTERVAL_ROUND_TRIPS: u32 = 10;

/// See the module.
#[derive(Debug)]
pub struct Adapt {
    /// Connections there are.
    at: usize,
    most: usize,
    /// How many there were before, and the rate then.
    before: Option<(usize, f64)>,
    /// The interval under way began with connections that were just opened.
    warming: bool,
    settled: bool,
}

impl Adapt {
    /// Begins with the first connections.
    pub fn new(connections: Connections, round_trip: Duration) -> Self {
        let (at, most) = (connections.first(round_trip), connections.most());
        Self { at, most, before: None, warming: true, settled: at >= most }
    }

    /// For how long a rate is to be measured on a link with this round trip.
    pub fn interval(round_trip: Duration) -> Duration {
        INTERVAL_MIN.max(round_trip.saturating_mul(INTERVAL_ROUND_TRIPS))
    }

    /// Takes the rate of the last interval, in bytes per second, and what is still to come, in bytes of the
    /// same kind. Returns the new number of connections if it changes.
    pub fn observe(&mut self, rate: f64, left: f64) -> Option<usize> {
        // A source that sends nothing is not helped by more connections.
        if self.settled || rate <= 0.0 || std::mem::take(&mut self.warming) {
            return None;
        }
        if let Some((fewer, before)) = self.before
            && rate < before * GAIN_MIN
        {
            self.settled = true;
            self.at = fewer;
            return Some(fewer);
        }
        if left < rate * LEFT_MIN.as_secs_f64() {
            return None;
        }
        if self.at >= self.most {
            self.settled = true;
            return None;
        }
        self.before = Some((self.at, rate));
        self.at = (self.at * 2).min(self.most);
        self.warming = true;
        Some(self.at)
    }
}

#[cfg(test)]
mod tests {
    use proto::limits::CONNECTIONS_DEFAULT;

    use super::*;

    /// Connections at each step on a link where `rate` of them arrives.
    fn course(rate: impl Fn(usize) -> f64, left: f64) -> Vec<usize> {
        let mut adapt = Adapt::new(Connections::Adaptive, Duration::ZERO);
        let mut at = CONNECTIONS_DEFAULT;
        let mut course = vec![at];
        for _ in 0..20 {
            if let Some(now) = adapt.observe(rate(at), left) {
                at = now;
                course.push(at);
            }
        }
        course
    }

    #[test]
    fn more_are_opened_while_they_bring_something() {
        // Each carries the same: as many as there may be.
        assert_eq!(course(|n| n as f64, 1e9), [4, 8, 16]);
        // The link is full with four, or with eight.
        assert_eq!(course(|_| 100.0, 1e9), [4, 8, 4]);
        assert_eq!(course(|n| n.min(8) as f64, 1e9), [4, 8, 16, 8]);
        // Nothing comes.
        assert_eq!(course(|_| 0.0, 1e9), [4]);
        // Almost done.
        assert_eq!(course(|n| n as f64, 5.0), [4]);
        assert_eq!(Adapt::new(Connections::Fixed(2), Duration::ZERO).observe(1.0, 1e9), None);
    }
}

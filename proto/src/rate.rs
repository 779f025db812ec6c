//! A limit on bytes per second, shared by all streams.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use parking_lot::Mutex;

/// Unused allowance that may be saved up: bursts no longer than this.
const BURST: Duration = Duration::from_millis(100);
/// A client counts as long as it has asked for something within this time.
const ACTIVE: Duration = Duration::from_secs(2);

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

    /// Grants `bytes` and returns how long the caller must wait before it uses them.
    pub fn reserve(&self, bytes: usize) -> Duration {
        let now = Instant::now();
        grant(&mut self.free_at.lock(), now, bytes as u64, self.bytes_per_second as f64)
    }
}

/// Grants bytes of one allowance: the time until they may be used.
fn grant(free_at: &mut Instant, now: Instant, bytes: u64, bytes_per_second: f64) -> Duration {
    let due = (*free_at).max(now.checked_sub(BURST).unwrap_or(now));
    *free_at = due + Duration::from_secs_f64(bytes as f64 / bytes_per_second);
    due.saturating_duration_since(now)
}

/// A limit on bytes per second that clients share: each that asks gets an equal part of it.
#[derive(Debug)]
pub struct SharedRate {
    bytes_per_second: u64,
    clients: Mutex<HashMap<String, Allowance>>,
}

#[derive(Debug)]
struct Allowance {
    free_at: Instant,
    asked: Instant,
}

impl SharedRate {
    /// A limit of so many bytes a second, more than 0.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, clients: Mutex::default() }
    }

    /// Grants `bytes` and returns how long the caller must wait before it uses them.
    pub fn reserve(&self, client: &str, bytes: u64) -> Duration {
        self.reserve_at(client, bytes, Instant::now())
    }

    fn reserve_at(&self, client: &str, bytes: u64, now: Instant) -> Duration {
        let mut clients = self.clients.lock();
        clients.retain(|_, one| one.asked.max(one.free_at) + ACTIVE > now);
        let others = clients.keys().filter(|name| *name != client).count();
        let new = || Allowance { free_at: now, asked: now };
        let own = clients.entry(client.to_owned()).or_insert_with(new);
        own.asked = now;
        let share = self.bytes_per_second as f64 / (others + 1) as f64;
        grant(&mut own.free_at, now, bytes, share)
    }
}

/// A text that is no rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a rate like 500k, 20M, 1.5MiB or 10MB/s")]
pub struct NotARate(String);

/// Reads a rate like `500k`, `1.5MiB`, `10MB/s` or a plain number of bytes. `k`, `M` and `G` alone multiply by 1024, as
/// `KiB`, `MiB` and `GiB` do; `kB`, `MB` and `GB` by 1000.
///
/// # Errors
/// The text is not a rate.
pub fn parse_rate(text: &str) -> Result<u64, NotARate> {
    let bad = || NotARate(text.to_owned());
    let plain = text.trim().trim_end_matches("/s");
    let short = plain.ends_with(['k', 'K', 'M', 'G', 'T']);
    let spelled = if short { format!("{plain}iB") } else { plain.to_owned() };
    let rate = spelled.parse::<ByteSize>().map_err(|_| bad())?.as_u64();
    if rate > 0 { Ok(rate) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds until the last of these clients has got `bytes`, in pieces that they ask for in turns.
    fn seconds(rate: &SharedRate, clients: &[&str], bytes: u64) -> f64 {
        let begin = Instant::now();
        let mut at: Vec<Duration> = vec![Duration::ZERO; clients.len()];
        for _ in 0..bytes / 1000 {
            for (client, at) in clients.iter().zip(&mut at) {
                *at += rate.reserve_at(client, 1000, begin + *at);
            }
        }
        at.into_iter().max().unwrap_or_default().as_secs_f64()
    }

    #[test]
    fn clients_share_a_rate_and_one_alone_has_all_of_it() {
        let alone = seconds(&SharedRate::new(10_000), &["one"], 100_000);
        assert!((9.0..11.0).contains(&alone), "{alone}");
        let two = seconds(&SharedRate::new(10_000), &["one", "two"], 100_000);
        assert!((18.0..22.0).contains(&two), "{two}");
    }

    #[test]
    fn a_client_with_many_streams_does_not_take_the_part_of_another() {
        let (rate, begin) = (SharedRate::new(10_000), Instant::now());
        for _ in 0..32 {
            rate.reserve_at("greedy", 10_000, begin);
        }
        let wait = (0..10).map(|_| rate.reserve_at("honest", 1000, begin)).max().unwrap();
        assert!(wait < Duration::from_secs(3), "{wait:?}");
    }

    #[test]
    fn a_client_that_is_gone_has_no_part() {
        let (rate, begin) = (SharedRate::new(10_000), Instant::now());
        rate.reserve_at("gone", 1000, begin);
        let later = begin + 2 * ACTIVE;
        rate.reserve_at("one", 10_000, later);
        let wait = rate.reserve_at("one", 1, later);
        assert!(wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(rate.clients.lock().len(), 1);
    }

    #[test]
    fn rates_have_units() {
        assert_eq!(parse_rate("20M"), Ok(20 << 20));
        assert_eq!(parse_rate("500k"), Ok(500 << 10));
        assert_eq!(parse_rate("1.5M"), Ok(3 << 19));
        assert_eq!(parse_rate("10MB"), Ok(10_000_000));
        assert_eq!(parse_rate("10 MB/s"), Ok(10_000_000));
        assert_eq!(parse_rate("2MiB"), Ok(2 << 20));
        assert_eq!(parse_rate("1000"), Ok(1000));
        for bad in ["", "0", "M", "-1", "1X", "ten", "1M/h"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}

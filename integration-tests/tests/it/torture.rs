//! Random forks without end: `make torture MINUTES=n`. `PGREJOIN_SEED=n` repeats one.

use std::time::{Duration, Instant, SystemTime};

use integration_tests::torture::random_fork;

fn variable(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

/// One fork in an ordinary test run; as many as fit where minutes are given.
#[test]
fn random_forks_come_back() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let fixed = variable("PGREJOIN_SEED");
    let mut seed = fixed.unwrap_or(now.subsec_nanos() % 1_000_000);
    let minutes = variable("PGREJOIN_TORTURE_MINUTES").unwrap_or(0);
    let (since, limit) = (Instant::now(), Duration::from_secs(u64::from(minutes) * 60));
    loop {
        random_fork(seed);
        if fixed.is_some() || since.elapsed() >= limit {
            break;
        }
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) % 1_000_000;
    }
}

//! Random lives: `make torture MINUTES=n`. `PGREJOIN_SEED=n` begins with that one; `PGREJOIN_LIVES=n` lives so
//! many on each major, with the next seeds.

#![expect(clippy::print_stdout, reason = "a seed must be seen to be repeated")]

use std::panic::catch_unwind;
use std::time::{Duration, Instant, SystemTime};

use integration_tests::torture::live;
use integration_tests::torture::story::Story;

fn variable(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

/// One life in an ordinary test run; as many as fit where minutes are given, or as many as are asked for.
fn lives(major: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let count = variable("PGREJOIN_LIVES").unwrap_or(1);
    let first = variable("PGREJOIN_SEED").unwrap_or(now.subsec_nanos() % 1_000_000);
    // Each major has seeds of its own; where there is one life alone, the seed is as it was given.
    let mut seed = if count > 1 { first + (major - 14) * count } else { first };
    let minutes = variable("PGREJOIN_TORTURE_MINUTES").unwrap_or(0);
    let (since, limit) = (Instant::now(), Duration::from_secs(u64::from(minutes) * 60));
    let (mut lived, mut wrong) = (0, Vec::new());
    while lived < count || since.elapsed() < limit {
        let began = Instant::now();
        let ended = catch_unwind(|| live(Story::draw(seed, major)));
        let how = if ended.is_ok() { "right" } else { "WRONG" };
        println!("life {seed} on {major}: {how} after {} s", began.elapsed().as_secs());
        if ended.is_err() {
            wrong.push(seed);
        }
        (lived, seed) = (lived + 1, seed + 1);
    }
    assert!(
        wrong.is_empty(),
        "{} of {lived} lives went wrong: PGREJOIN_SEED={wrong:?}",
        wrong.len()
    );
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn a_random_life_goes_well() {
            super::lives($major);
        }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

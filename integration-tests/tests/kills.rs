//! Kills everywhere, on a real cluster. `PGREJOIN_KILLS=n` does n of them in each test instead of
//! twenty, `PGREJOIN_SEED=n` repeats one run.

use std::time::SystemTime;

use integration_tests::kills::Frozen;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn kill_some() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seed = variable("PGREJOIN_SEED").unwrap_or(u64::from(now.subsec_nanos()) % 1_000_000);
    let kills = variable("PGREJOIN_KILLS").and_then(|kills| usize::try_from(kills).ok());
    let frozen = Frozen::new();
    frozen.kill(seed, kills.unwrap_or(20));
    frozen.verify();
}

#[test]
fn a_rewind_killed_at_any_call_comes_to_a_right_end() {
    kill_some();
}

#[test]
fn a_rewind_killed_at_any_call_comes_to_a_right_end_again() {
    kill_some();
}

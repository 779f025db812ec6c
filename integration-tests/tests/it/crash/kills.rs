//! Kills everywhere, on a real cluster. `PGREJOIN_KILLS=n` does n of them in each test instead of
//! twenty, `PGREJOIN_SEED=n` repeats one run.

use std::time::SystemTime;

use integration_tests::client::state_command;
use integration_tests::cluster::{Node, append, write};
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

/// Starts PostgreSQL and stops it again.
fn run_for_a_while(node: &Node) {
    node.start();
    node.sql("create table while_it_waited as select 1 a");
    node.stop("fast");
}

fn ends(what: &str, node: &Node, code: i32, words: &str) {
    let ended = state_command(what, node);
    assert_eq!(ended.code, code, "{what}: {}", ended.text);
    assert!(ended.text.contains(words), "{what}: \"{words}\" is not in: {}", ended.text);
}

/// Plan only: gone on with, or cleared away, or void once PostgreSQL ran.
#[test]
fn a_target_with_a_plan_only_is_as_it_was() {
    let frozen = Frozen::new();
    let prepared = || frozen.killed_where("pwrite64", ("a rewind is being prepared", "plan"));
    let target = prepared();
    assert!(frozen.is_unchanged(&target));
    ends("rollback", &target, 0, "fetched data are removed");
    assert!(frozen.is_unchanged(&target) && !target.data.join(".pgrejoin").exists());
    assert_eq!(frozen.rewind(&target).code, 0);
    assert!(frozen.is_rewound(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = prepared();
    // There is nothing to resume without the source, and nothing is thrown away.
    ends("resume", &target, 0, "Run pgrejoin rewind to continue");
    assert!(frozen.is_unchanged(&target) && target.data.join(".pgrejoin/plan").exists());
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = prepared();
    run_for_a_while(&target);
    let ended = frozen.rewind(&target);
    assert_eq!(ended.code, 0, "{}", ended.text);
    target.start();
    assert_eq!(target.sql("select pg_is_in_recovery()"), "t");
    target.stop("fast");
}

/// Sealed: finished without the source, or cleared away, or void once PostgreSQL ran or a file changed.
#[test]
fn a_sealed_target_is_finished_or_its_plan_is_void() {
    let frozen = Frozen::new();
    let sealed = || frozen.killed_where("fsync", ("a rewind is prepared", "sealed"));
    let target = sealed();
    assert!(frozen.is_unchanged(&target));
    ends("resume", &target, 0, "is rewound");
    assert!(frozen.is_rewound(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = sealed();
    ends("rollback", &target, 0, "fetched data are removed");
    assert!(frozen.is_unchanged(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    // A complete set stays complete while the source cannot say whether it is still wanted.
    let target = sealed();
    assert_eq!(frozen.rewind_without_source(&target).code, 5);
    assert!(frozen.is_unchanged(&target) && !target.is_running());
    ends("resume", &target, 0, "is rewound");
    assert!(frozen.is_rewound(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    // With the source there it is gone on with, and nothing is fetched again.
    let target = sealed();
    let ended = frozen.rewind(&target);
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert_eq!(ended.field("pages_received"), "0", "{}", ended.text);
    assert_ne!(ended.field("pages_recovered"), "0", "{}", ended.text);
    assert!(frozen.is_rewound(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = sealed();
    run_for_a_while(&target);
    ends("resume", &target, 0, "it had not changed the target");
    target.start();
    assert_eq!(target.sql("select count(*) from while_it_waited"), "1");
    target.stop("fast");
    std::fs::remove_dir_all(&target.socket).expect("removed");
    // A planned file that somebody wrote to.
    let target = sealed();
    let version = target.data.join("PG_VERSION");
    write(&version, "15\n");
    target.user.own(&version);
    ends("resume", &target, 0, "PG_VERSION on the target changed");
    assert!(frozen.is_unchanged(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = sealed();
    append(&target.data.join("postgresql.auto.conf"), "work_mem = '5MB'\n");
    ends("resume", &target, 0, "postgresql.auto.conf on the target changed");
    std::fs::remove_dir_all(&target.socket).expect("removed");
    // What is staged turns out damaged: nothing of ours is left in the server's way.
    let target = sealed();
    let packs = target.data.join(".pgrejoin/packs");
    let pack = std::fs::read_dir(packs).expect("packs").flatten().next().expect("a pack").path();
    append(&pack, "x");
    let file = std::fs::File::options().write(true).open(&pack).expect("open");
    file.set_len(100).expect("cut");
    ends("resume", &target, 1, "staged data is damaged");
    assert!(!target.is_running() && frozen.is_unchanged(&target));
}

/// Hidden: finished or taken back, never started; what another release began is not touched.
#[test]
fn a_hidden_target_does_not_start_and_goes_either_way() {
    let frozen = Frozen::new();
    let hidden = || frozen.killed_where("ftruncate", ("has not finished", "hidden"));
    let target = hidden();
    assert!(!target.try_start());
    let sealed = target.data.join(".pgrejoin/sealed");
    let bytes = std::fs::read(&sealed).expect("a manifest");
    let mut other = bytes.clone();
    other[8] += 1;
    write(&sealed, &other);
    for what in ["status", "resume", "rollback"] {
        ends(what, &target, 8, "the rewind with pgrejoin 0.1.0, which wrote it");
    }
    let ended = frozen.rewind(&target);
    assert_eq!(ended.code, 8, "{}", ended.text);
    assert!(std::fs::read(&sealed).expect("a manifest") == other, "it was discarded");
    write(&sealed, &bytes);
    ends("rollback", &target, 0, "is as it was before the rewind");
    assert!(frozen.is_unchanged(&target) && !target.data.join(".pgrejoin").exists());
    ends("rollback", &target, 0, "nothing to roll back");
    assert_eq!(frozen.rewind(&target).code, 0);
    assert!(frozen.is_rewound(&target));
    std::fs::remove_dir_all(&target.socket).expect("removed");
    let target = hidden();
    let ended = frozen.rewind(&target);
    assert_eq!(ended.field("result"), "resumed", "{}", ended.text);
    assert!(frozen.is_rewound(&target));
}

/// Committed: PostgreSQL may run, and only left-overs go afterwards.
#[test]
fn a_committed_target_may_run_and_is_not_taken_back() {
    let frozen = Frozen::new();
    let target = frozen.killed_where("unlinkat", ("only temporary files are left", "committed"));
    assert!(frozen.is_rewound(&target));
    target.start();
    assert_eq!(target.sql("select pg_is_in_recovery()"), "t");
    target.stop("fast");
    ends("rollback", &target, 3, "cannot be rolled back");
    ends("resume", &target, 0, "rewound");
    assert!(!target.data.join(".pgrejoin/sealed").exists());
    target.start();
    assert_eq!(target.sql("select pg_is_in_recovery()"), "t");
    target.stop("fast");
}

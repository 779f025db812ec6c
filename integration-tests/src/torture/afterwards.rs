//! What a node has to live through after its rewind.

use super::work::work;
use super::world::World;
use crate::client::Rewind;
use crate::cluster::{Install, Node, append};
use crate::command::run;
use crate::faults::judge::Choices;
use crate::server::Server;
use crate::{health, oracle};

/// So many segments at most are kept by a node after ten checkpoints with three segments each.
const SEGMENTS_MAX: u64 = 15;

/// The rest of the life of `result`, which runs and follows `primary`.
pub fn live_on(world: &World, result: &Node, primary: &Node) {
    let mut choices = world.story.choices.clone();
    streams(result, primary);
    match choices.below(3) {
        0 => result.stop("fast"),
        1 => result.stop("immediate"),
        _ => result.kill(),
    }
    result.start();
    let third = third_node(world, result);
    primary.sql("insert into plain select g, 'later', 7 from generate_series(80001, 80200) g");
    streams(result, primary);
    let prepared = oracle::prepared_transactions(primary);
    let truth = truth(world, primary, result);
    is_true(&truth, result, "as a standby");
    result.promote();
    assert_eq!(oracle::prepared_transactions(result), prepared, "prepared transactions differ");
    is_true(&truth, result, "promoted");
    health::check(result);
    is_true_after_a_restart(result);
    streams(&third, result);
    if world.story.summarize {
        summarizes(world, result);
    }
    goes_back(world, primary, result);
    ten_checkpoints(world, result, &third);
    for node in [&third, result, primary] {
        node.stop("fast");
        if oracle::has_checksums(node) {
            oracle::checksums(node);
        }
    }
}

fn streams(standby: &Node, primary: &Node) {
    let lsn = primary.lsn();
    standby.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
}

/// What the rows are, read from a copy of the stopped primary; the result has all of its WAL then.
fn truth(world: &World, primary: &Node, result: &Node) -> oracle::Rows {
    primary.stop("fast");
    let end = oracle::checkpoint_lsn(primary);
    result.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{end}'"));
    let copy = primary.copy(&world.place("truth"));
    copy.start();
    let rows = oracle::rows(&copy);
    copy.stop("immediate");
    std::fs::remove_dir_all(&copy.data).expect("removed");
    rows
}

fn is_true(truth: &oracle::Rows, node: &Node, when: &str) {
    oracle::assert_same_rows(&oracle::rows(node), truth, when);
    oracle::check_indexes(node);
}

/// Rows and indexes once more after a restart: what was marked wrongly in memory is read from disk.
fn is_true_after_a_restart(result: &Node) {
    let rows = oracle::rows(result);
    result.stop("fast");
    result.start();
    is_true(&rows, result, "restarted");
}

/// A base backup of the standby follows it, is killed and starts again: what it needs begins where the replay
/// of the rewound node began.
fn third_node(world: &World, result: &Node) -> Node {
    let place = world.place("third");
    std::fs::create_dir_all(&place).expect("directory");
    result.user.own(&place);
    let third = Node { data: place.join("data"), socket: place, ..result.clone() };
    result.sql("select pg_create_physical_replication_slot('third', true)");
    base_backup(result, &[], &third.data);
    third.follow(result);
    append(&third.data.join("postgresql.auto.conf"), "primary_slot_name = 'third'\n");
    third.start();
    streams(&third, result);
    third.kill();
    third.start();
    streams(&third, result);
    third
}

/// The newest program takes backups of every major.
fn base_backup(of: &Node, args: &[&str], to: &std::path::Path) {
    let program = Install::of(18).program("pg_basebackup");
    let mut backup = of.user.command(program);
    backup.args(["-X", "none", "-c", "fast", "--no-sync", "-U", "postgres", "-p", "5432", "-h"]);
    run(backup.arg(&of.socket).arg("-D").arg(to).args(args));
}

/// WAL is summarized up to now; on 18 an incremental backup is combined with the one before.
fn summarizes(world: &World, result: &Node) {
    let full = world.place("full");
    if result.install.major == 18 {
        base_backup(result, &[], &full);
    }
    result.sql("insert into plain select g, 'summary', 7 from generate_series(90001, 90200) g");
    result.sql("checkpoint");
    let lsn = result.lsn();
    // What is summarized ends at a checkpoint's redo.
    result.sql("checkpoint");
    result.wait(
        "postgres",
        &format!("(select summarized_lsn >= '{lsn}' from pg_get_wal_summarizer_state())"),
    );
    if result.install.major < 18 {
        return;
    }
    let (part, whole) = (world.place("part"), world.place("whole"));
    let manifest = full.join("backup_manifest");
    base_backup(result, &["-i", &manifest.to_string_lossy()], &part);
    std::fs::create_dir_all(&whole).expect("directory");
    result.user.own(&whole);
    let combined = Node { data: whole.join("data"), socket: whole.clone(), ..result.clone() };
    let program = result.install.program("pg_combinebackup");
    let mut combine = result.user.command(program);
    run(combine.arg(&full).arg(&part).arg("-o").arg(&combined.data));
    combined.follow(result);
    combined.start();
    streams(&combined, result);
    oracle::assert_same_rows(&oracle::rows(&combined), &oracle::rows(result), "combined");
    combined.stop("immediate");
    for path in [full, part, whole] {
        std::fs::remove_dir_all(path).expect("removed");
    }
}

/// WAL does not pile up, and the slot of the third node does its work.
fn ten_checkpoints(world: &World, result: &Node, third: &Node) {
    let size = world.story.shape.segment_mb;
    result.sql("alter system set wal_keep_size = 0");
    result.sql(&format!("alter system set min_wal_size = '{}MB'", 2 * size));
    result.sql(&format!("alter system set max_wal_size = '{}MB'", 4 * size));
    result.sql("select pg_reload_conf()");
    for _ in 0..10 {
        for _ in 0..3 {
            result.sql("insert into grow select g, 'checkpoint' from generate_series(1, 50) g");
            result.sql("select pg_switch_wal()");
        }
        streams(third, result);
        result.sql("checkpoint");
    }
    let recent = format!("'{}'::pg_lsn - {}", result.lsn(), 2 * u64::from(size) * 1024 * 1024);
    if world.story.summarize {
        let summarized =
            format!("(select summarized_lsn >= {recent} from pg_get_wal_summarizer_state())");
        result.wait("postgres", &summarized);
    }
    let slot = "from pg_replication_slots where slot_name = 'third')";
    result.wait("postgres", &format!("(select restart_lsn >= {recent} {slot}"));
    result.wait("postgres", &format!("(select wal_status in ('reserved', 'extended') {slot}"));
    // What a slot holds is what was written down of it at the checkpoint before.
    result.sql("checkpoint");
    result.sql("checkpoint");
    // Those behind the newest are room for what comes, which PostgreSQL does not take away again.
    let segments = "select count(*) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$' \
                    and substr(name, 9) <= substr(pg_walfile_name(pg_current_wal_lsn()), 9)";
    let kept: u64 = result.sql(segments).parse().expect("a number");
    let state = "select string_agg(s::text, ' ') from pg_replication_slots s";
    let names = "select string_agg(name, ' ' order by name) from pg_ls_waldir()";
    assert!(
        kept <= SEGMENTS_MAX,
        "{kept} segments are kept after ten checkpoints: {}; {}; now {}\n{}",
        result.sql(names),
        result.sql(state),
        result.lsn(),
        result.log_tail()
    );
}

/// The next failover: what was the primary comes back to the node that was rewound before.
fn goes_back(world: &World, primary: &Node, result: &Node) {
    let mut choices: Choices = world.story.choices.clone();
    choices.below(2);
    primary.start();
    let lost = primary.load(&work("x", world.story.seed));
    primary.sql("insert into plain select g, 'lost', 7 from generate_series(95001, 95200) g");
    if choices.below(2) == 0 {
        primary.sql("checkpoint");
    }
    match choices.below(2) {
        0 => primary.stop("fast"),
        _ => primary.kill(),
    }
    drop(lost);
    let server = Server::start(result, &world.pki);
    let ended = Rewind::new(primary, &server, &world.pki).following(result).succeed();
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    let [strategy, reason] = ["strategy", "strategy_reason"].map(|name| ended.field(name));
    println!("life {}: back by {strategy}: {reason}", world.story.seed);
    primary.start();
    streams(primary, result);
    let rows = oracle::rows(primary);
    oracle::assert_same_rows(&rows, &oracle::rows(result), "rewound back from");
    oracle::check_indexes(primary);
}

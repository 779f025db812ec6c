//! What PostgreSQL changes on pages without WAL, and what of it a rewind must not leave behind.

use std::time::Duration;

use integration_tests::client::Ended;
use integration_tests::cluster::{Node, Session};
use integration_tests::health;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::{rewind, rewound};
use rustix::process::{Signal, kill_process};

/// How a standby that ran ahead came to its end.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Stopped,
    KilledAfterARestartpoint,
    PromotedAndKilled,
    StartedWithoutItsSignal,
}

/// A standby `b` ahead of `c`, which is elected: a transaction that was open at the last common checkpoint was
/// committed in what only `b` has, and somebody read its rows there. Returns `c`, which is promoted.
fn ahead_of_the_elected(pair: &Pair, ending: Ending) -> Node {
    let c = pair.b.copy_running(&pair.a, &pair.home.path().join("c"));
    pair.a.sql("create table seen(id int primary key)");
    pair.a.sql("insert into seen select generate_series(1, 10)");
    let mut open: Session = pair.a.session();
    open.run("begin; insert into seen select generate_series(11, 20);");
    pair.a.sql("checkpoint");
    let lsn = pair.a.lsn();
    for node in [&pair.b, &c] {
        node.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    }
    c.stop("fast");
    open.run("commit;");
    pair.a.sql("create table moves(id int)");
    pair.a.sql("drop table moves");
    pair.catch_up();
    assert_eq!(pair.b.sql("select count(*) from seen"), "20");
    match ending {
        Ending::Stopped => pair.b.stop("fast"),
        Ending::KilledAfterARestartpoint => {
            pair.b.sql("checkpoint");
            pair.b.kill();
        }
        Ending::PromotedAndKilled => {
            let checkpointer = pair.b.process("checkpointer");
            kill_process(checkpointer, Signal::STOP).expect("stopped");
            pair.b.promote();
            pair.b.kill();
        }
        Ending::StartedWithoutItsSignal => {
            pair.b.sql("checkpoint");
            pair.b.kill();
            std::fs::remove_file(pair.b.data.join("standby.signal")).expect("removed");
            pair.b.start();
            pair.b.stop("fast");
        }
    }
    drop(open);
    pair.a.kill();
    c.elect();
    c.sql("insert into plain select g, 'new', 1 from generate_series(70001, 70300) g");
    c
}

/// The rows of a transaction that was lost must be marked as committed on the node's disk: without that there is
/// nothing to get wrong.
fn assert_hints_are_on_disk(node: &Node, elected: &Node) {
    const XMIN_COMMITTED: u16 = 0x0100;
    let path = elected.sql("select pg_relation_filepath('seen')");
    let page = std::fs::read(node.data.join(path)).expect("the table");
    let number = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
    // Rows 11 to 20, each behind its line pointer; the marks are 20 bytes into the row's header.
    let marked = (10..20).all(|row| {
        let start = usize::from(number(24 + row * 4) & 0x7FFF);
        number(start + 20) & XMIN_COMMITTED != 0
    });
    assert!(marked, "the scenario needs marks on the disk");
}

/// The rows, looked at where looking heals nothing: on the result alone, before and after it takes over.
fn only_what_was_committed(result: &Node, source: &Node) {
    result.start();
    let lsn = source.lsn();
    result.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    let rows =
        |indexes: &str| health::by(result, "select count(*) from seen where id > 0", indexes);
    assert_eq!((rows("off"), rows("on")), ("10".to_owned(), "10".to_owned()), "as a standby");
    result.promote();
    assert_eq!((rows("off"), rows("on")), ("10".to_owned(), "10".to_owned()), "promoted");
    result.stop("fast");
    result.start();
    health::freeze(result);
    assert_eq!((rows("off"), rows("on")), ("10".to_owned(), "10".to_owned()), "restarted");
    result.stop("fast");
}

fn hints_of_recovery(major: u32, ending: Ending) {
    for strategy in ["auto", "latest", "fork"] {
        let pair = Pair::new(major, Shape::default());
        let c = ahead_of_the_elected(&pair, ending);
        assert_hints_are_on_disk(&pair.b, &c);
        c.sql("checkpoint");
        let args: &[&str] = if strategy == "auto" { &[] } else { &["--strategy", strategy] };
        let ended = rewind(&pair, &pair.b, &c, args);
        assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
        only_what_was_committed(&pair.b, &c);
    }
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn hints_of_a_standby_that_ran_ahead_are_gone() {
            super::hints_of_recovery($major, super::Ending::Stopped);
        }
    })* };
}
on_major!(pg14 14, pg15 15, pg18 18);

#[test]
fn hints_of_a_standby_that_was_killed_after_a_restartpoint_are_gone() {
    hints_of_recovery(15, Ending::KilledAfterARestartpoint);
}

/// It ends recovery on the same timeline, with a checkpoint that is like any other.
#[test]
fn hints_of_a_standby_that_was_started_without_its_signal_are_gone() {
    hints_of_recovery(15, Ending::StartedWithoutItsSignal);
}

#[test]
fn hints_of_a_standby_that_was_promoted_and_killed_are_gone() {
    let pair = Pair::new(15, Shape::default());
    let c = ahead_of_the_elected(&pair, Ending::PromotedAndKilled);
    let ended = rewind(&pair, &pair.b, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    only_what_was_committed(&pair.b, &c);
}

/// A transaction that began before or after the last common checkpoint deletes rows on a node that was promoted
/// by mistake, while its first own checkpoint is held up.
fn marks_after_a_promotion(began_before: bool) {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("create table seen(id int primary key)");
    pair.a.sql("insert into seen select generate_series(1, 10)");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.sql("checkpoint");
    // The index page changes behind the restartpoint and before the next checkpoint.
    pair.a.sql("insert into seen select generate_series(21, 30)");
    let mut open = pair.a.session();
    if began_before {
        open.run("begin; delete from seen where id <= 10; prepare transaction 'open';");
    }
    pair.catch_up();
    let checkpointer = pair.b.process("checkpointer");
    kill_process(checkpointer, Signal::STOP).expect("stopped");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    match began_before {
        true => pair.b.sql("commit prepared 'open'"),
        false => pair.b.sql("delete from seen where id <= 10"),
    };
    for _ in 0..3 {
        let left = health::by(&pair.b, "select count(*) from seen where id <= 10", "on");
        assert_eq!(left, "0");
    }
    kill_process(checkpointer, Signal::CONT).expect("continued");
    pair.b.sql("checkpoint");
    pair.b.stop("fast");
    if began_before {
        pair.a.sql("rollback prepared 'open'");
    }
    pair.a.sql("update plain set n = 3 where id < 100");
    let ended = rewind(&pair, &pair.b, &pair.a, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    pair.b.start();
    let lsn = pair.a.lsn();
    pair.b.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    for indexes in ["off", "on"] {
        let rows = health::by(&pair.b, "select count(*) from seen where id <= 10", indexes);
        assert_eq!(rows, "10", "indexes {indexes}");
    }
    oracle::verify(&pair.b, &pair.a);
}

#[test]
fn marks_of_a_transaction_open_at_the_checkpoint_are_gone() {
    marks_after_a_promotion(true);
}

#[test]
fn marks_of_a_transaction_that_began_after_the_promotion_are_gone() {
    marks_after_a_promotion(false);
}

/// The program that adds checksums to a stopped node.
fn pg_checksums(node: &Node, args: &[&str]) {
    let program = integration_tests::cluster::Install::of(15).program("pg_checksums");
    integration_tests::command::run(
        node.user.command(program).args(args).arg("-D").arg(&node.data),
    );
}

/// Lost rows that somebody read on the old node, on pages that no WAL names because nothing was logged for hints.
fn diverged_without_checksums() -> Pair {
    let pair = Pair::new(15, Shape { checksums: false, ..Shape::default() });
    pair.a.sql("create table seen(id int primary key)");
    pair.a.sql("insert into seen select generate_series(1, 10)");
    let mut open = pair.a.session();
    open.run("begin; insert into seen select generate_series(11, 20);");
    pair.catch_up();
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    open.run("commit;");
    assert_eq!(pair.a.sql("select count(*) from seen"), "20");
    pair.a.sql("checkpoint");
    pair.a.stop("fast");
    pair.b.stop("fast");
    pg_checksums(&pair.b, &["--enable"]);
    pair.b.start();
    pair.b.sql("update plain set n = 2 where id < 50");
    pair
}

/// What the refusal of different checksum settings invites to.
#[test]
fn checksums_that_were_switched_on_after_the_fork_mean_comparing() {
    let pair = diverged_without_checksums();
    pg_checksums(&pair.a, &["--enable"]);
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(ended.field("strategy_reason").contains("pg_checksums"), "{}", ended.text);
    only_what_was_committed(&pair.a, &pair.b);
}

/// Whoever switches them on starts the node next, which leaves no trace of it in the WAL.
#[test]
fn checksums_that_were_switched_on_before_the_last_start_mean_comparing() {
    for hints in [false, true] {
        let pair = diverged_without_checksums();
        pg_checksums(&pair.a, &["--enable"]);
        if hints {
            pair.a.configure("wal_log_hints = on");
        }
        pair.a.start();
        pair.a.sql("select pg_switch_wal()");
        pair.a.kill();
        let ended = rewind(&pair, &pair.a, &pair.b, &[]);
        assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
        assert!(ended.field("strategy_reason").contains("pg_checksums"), "{}", ended.text);
        only_what_was_committed(&pair.a, &pair.b);
    }
}

#[test]
fn a_copy_without_the_times_of_files_means_comparing() {
    let pair = Pair::new(15, Shape::default());
    integration_tests::steps::part(&pair);
    pair.a.stop("fast");
    std::thread::sleep(Duration::from_secs(4));
    let copy = pair.home.path().join("copy");
    let mut cp = pair.a.user.command("/bin/cp");
    integration_tests::command::run(cp.arg("-r").arg(&pair.a.data).arg(&copy));
    std::fs::remove_dir_all(&pair.a.data).expect("removed");
    let mut mv = pair.a.user.command("/bin/mv");
    integration_tests::command::run(mv.arg(&copy).arg(&pair.a.data));
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(
        ended.field("strategy_reason").contains("did not keep the modification times"),
        "{}",
        ended.text
    );
}

/// A shutdown that takes long to write its pages is no sign of anything.
#[test]
fn a_long_shutdown_checkpoint_is_not_taken_for_pg_checksums() {
    let pair = Pair::with(15, Shape::default(), "shared_buffers = 64MB");
    integration_tests::steps::part(&pair);
    pair.a
        .sql("create table bulk as select g, repeat('x', 100) t from generate_series(1, 300000) g");
    let checkpointer = pair.a.process("checkpointer");
    let stopping = std::thread::scope(|scope| {
        // Held up in the middle: its record is written long after its pages.
        let stop = scope.spawn(|| pair.a.stop("fast"));
        std::thread::sleep(Duration::from_millis(400));
        kill_process(checkpointer, Signal::STOP).ok();
        std::thread::sleep(Duration::from_secs(8));
        kill_process(checkpointer, Signal::CONT).ok();
        stop.join()
    });
    stopping.expect("stopped");
    let ended = rewound(&pair, &[]);
    assert_ne!(ended.field("strategy"), "compare", "{}", ended.text);
}

/// A standby that is stopped long after its primary went quiet.
#[test]
fn a_standby_that_was_idle_before_it_stopped_is_not_taken_for_pg_checksums() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 74000) g");
    pair.catch_up();
    pair.a.stop("immediate");
    std::thread::sleep(Duration::from_secs(6));
    pair.b.stop("fast");
    c.elect();
    c.sql("insert into plain select g, 'new', 1 from generate_series(70001, 70300) g");
    let ended = rewind(&pair, &pair.b, &c, &[]);
    assert_ne!(ended.field("strategy"), "compare", "{}", ended.text);
    oracle::verify(&pair.b, &c);
}

/// The pages that the first page of an `SP-GiST` index names, behind its magic number, must be there: which of them a
/// later insert meets is chance.
fn no_page_behind_the_end(file: &std::path::Path) {
    let bytes = std::fs::read(file).expect("the index");
    let blocks = u32::try_from(bytes.len() / 8192).expect("fits");
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let named: Vec<u32> = (0..8).map(|index| number(28 + index * 8)).collect();
    assert!(
        named.iter().all(|block| *block == u32::MAX || *block < blocks),
        "{named:?} in a file of {blocks} pages"
    );
}

/// The first page of an `SP-GiST` index names pages with room, without WAL: the old node's may be past the end of
/// what it has now.
fn spgist_metapage(strategy: &str) -> Ended {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("create table texts(t text)");
    pair.a.sql("create index texts_spgist on texts using spgist(t)");
    pair.a.sql("insert into texts select md5(g::text) from generate_series(1, 2000) g");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    // The old node alone fills many pages; the new one a few.
    pair.a.sql("insert into texts select chr(97 + g % 26) || md5(g::text) from generate_series(1, 20000) g");
    pair.b.sql("insert into plain values (70001, 'new', 1)");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let file = pair.b.sql("select pg_relation_filepath('texts_spgist')");
    let ended = rewind(&pair, &pair.a, &pair.b, &["--strategy", strategy]);
    no_page_behind_the_end(&pair.a.data.join(file));
    pair.a.start();
    let lsn = pair.b.lsn();
    pair.a.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    pair.a.promote();
    for round in 0..40 {
        pair.a.sql(&format!(
            "insert into texts select chr(97 + g % 26) || md5((g + {round})::text) from generate_series(1, 20) g"
        ));
    }
    let rows = |indexes| health::by(&pair.a, "select count(*) from texts where t > ''", indexes);
    assert_eq!(rows("off"), rows("on"));
    ended
}

#[test]
fn a_promoted_node_can_write_into_its_spgist_indexes() {
    for strategy in ["fork", "latest"] {
        let ended = spgist_metapage(strategy);
        assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    }
}

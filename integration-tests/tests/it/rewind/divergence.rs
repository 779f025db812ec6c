//! Ways in which the histories of two nodes part or do not.

use integration_tests::client::Rewind;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::steps::{Served, follow_instead, part, rewind, rewound, write_signal};

#[test]
fn on_the_same_timeline_there_is_nothing_to_do() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    pair.a.sql("insert into plain values (70001, 'later', 1)");
    let before = integration_tests::snapshot::Snapshot::of(&pair.b.data);
    let served = Served::start(pair.home.path(), &pair.a);
    let ended = served.rewind(&pair.b).succeed();
    assert_eq!(ended.field("result"), "no_rewind_required", "{}", ended.text);
    before.assert_same(&integration_tests::snapshot::Snapshot::of(&pair.b.data));
    oracle::verify(&pair.b, &pair.a);
}

#[test]
fn a_target_that_is_behind_without_wal_to_catch_up_is_resynchronised() {
    let pair = Pair::with(15, Shape::default(), "wal_keep_size = 0");
    pair.b.stop("fast");
    for round in 0..3 {
        pair.a.sql(&format!("update plain set n = {round}"));
        pair.a.sql("select pg_switch_wal()");
        pair.a.sql("checkpoint");
    }
    let ended = rewind(&pair, &pair.b, &pair.a, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.b, &pair.a);
}

#[test]
fn an_old_primary_that_lost_nothing_needs_no_rewind() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("insert into plain values (70001, 'shared', 1)");
    pair.a.stop("fast");
    pair.b.wait("postgres", "exists(select from plain where id = 70001)");
    pair.b.promote();
    pair.b.sql("insert into plain values (70002, 'new', 1)");
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(ended.field("result"), "no_rewind_required", "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_target_ahead_on_the_same_timeline_is_taken_back() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 75000) g");
    pair.a.stop("fast");
    pair.b.start();
    // A standby without a primary, still on timeline 1.
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    pair.b.promote();
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn the_same_timeline_number_can_be_another_history() {
    let pair = Pair::new(15, Shape::default());
    // Both are standbys of one primary and both are promoted at the same place: both are on 2.
    pair.b.stop("fast");
    pair.a.stop("fast");
    let c = pair.a.copy(&pair.home.path().join("c"));
    for node in [&pair.a, &c] {
        write_signal(node);
    }
    for node in [&pair.a, &c] {
        node.start();
        node.promote();
    }
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 72000) g");
    c.sql("insert into plain select g, 'new', 1 from generate_series(70001, 70500) g");
    pair.a.stop("fast");
    let ended = rewind(&pair, &pair.a, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

#[test]
fn a_live_standby_is_a_source_and_then_cascades() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    part(&pair);
    // c follows the new primary and is served.
    follow_instead(&c, &pair.b);
    c.start();
    pair.b.sql("checkpoint");
    let lsn = pair.b.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    c.sql("checkpoint");
    pair.a.stop("fast");
    let ended = rewind(&pair, &pair.a, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    pair.b.sql("create table marker_before as select 1");
    pair.a.start();
    pair.a.wait("postgres", "to_regclass('marker_before') is not null");
    c.stop("fast");
    pair.a.stop("fast");
    follow_instead(&pair.a, &pair.b);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_stopped_source_serves_too_and_replay_rebuilds_what_differs_after() {
    for strategy in ["fork", "latest"] {
        let pair = Pair::new(15, Shape::default());
        pair.a.sql("update plain set n = 4 where id % 9 = 0");
        pair.catch_up();
        part(&pair);
        pair.b.sql("update plain set n = 5 where id between 8000 and 12000");
        pair.b.sql("delete from words where id < 300");
        pair.b.stop("fast");
        pair.a.stop("fast");
        let pki = Pki::new(pair.home.path());
        let server = Server::start(&pair.b, &pki);
        let ended = Rewind::new(&pair.a, &server, &pki)
            .following(&pair.b)
            .args(["--strategy", strategy])
            .succeed();
        assert_eq!(ended.field("result"), "rewound");
        assert_eq!(ended.field("strategy"), strategy);
        oracle::only_replay_rebuilds_differences(&pair.a, &server, &pki);
        pair.b.start();
        oracle::verify(&pair.a, &pair.b);
    }
}

#[test]
fn a_standby_that_ran_ahead_and_stopped_without_a_checkpoint() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    // b gets what c does not; then c is promoted and b must go back.
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 74000) g");
    pair.catch_up();
    pair.a.stop("immediate");
    pair.b.stop("immediate");
    c.elect();
    c.sql("insert into plain select g, 'new', 1 from generate_series(70001, 70300) g");
    let ended = rewind(&pair, &pair.b, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.b, &c);
}

#[test]
fn a_crashed_standby_whose_restartpoint_is_older_than_the_common_checkpoint() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    c.start();
    pair.a.sql("update plain set n = 77");
    // Checkpoint records that no restartpoint follows: those wait for checkpoint_timeout.
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 78 where id < 4000");
    pair.a.sql("checkpoint");
    let lsn = pair.a.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    c.stop("fast");
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 74000) g");
    pair.catch_up();
    pair.b.kill();
    pair.a.kill();
    c.elect();
    c.sql("insert into plain select g, 'new', 1 from generate_series(70001, 70300) g");
    c.sql("checkpoint");
    let ended = rewind(&pair, &pair.b, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.b, &c);
}

#[test]
fn a_target_that_crashed_recovered_and_crashed_again() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.kill();
    pair.a.start();
    pair.a.sql("update plain set n = 9 where id between 100 and 5000");
    pair.a.kill();
    pair.b.sql("checkpoint");
    rewound(&pair, &[]);
}

#[test]
fn the_fork_lies_on_a_segment_boundary() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("update plain set n = 4 where id < 100");
    pair.a.sql("select pg_switch_wal()");
    pair.catch_up();
    part(&pair);
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert!(ended.field("fork_lsn").ends_with("000000"), "{}", ended.field("fork_lsn"));
}

#[test]
fn three_timelines_and_a_dead_branch() {
    let pair = Pair::new(15, Shape::default());
    // a was promoted twice (to 3), the other branch once (to 2): the target's number is higher.
    pair.b.stop("fast");
    pair.a.stop("fast");
    let c = pair.a.copy(&pair.home.path().join("c"));
    for _ in 0..2 {
        write_signal(&pair.a);
        pair.a.start();
        pair.a.promote();
        pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(1, 500) g on conflict do nothing");
        pair.a.sql("insert into grow select g, 'lost' from generate_series(1, 500) g");
        pair.a.stop("fast");
    }
    write_signal(&c);
    c.start();
    c.promote();
    c.sql("insert into grow select g, 'new' from generate_series(1, 50) g");
    let ended = rewind(&pair, &pair.a, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    assert!(!pair.a.data.join("pg_wal/00000003.history").exists());
    oracle::verify(&pair.a, &c);
}

/// R1: stock `pg_rewind` answers 50 rows here.
#[test]
fn hints_of_a_promotion_while_a_restartpoint_was_held_are_gone() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("create table h(id int)");
    pair.a.sql("insert into h select generate_series(1, 50)");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.sql("checkpoint");
    pair.a.script(
        "postgres",
        "begin; insert into h select generate_series(51, 60); prepare transaction 'open';",
    );
    pair.catch_up();
    // A restartpoint that takes minutes.
    let pid = pair.b.sql("select pid from pg_stat_activity where backend_type = 'checkpointer'");
    let checkpointer = pid.parse().ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
    rustix::process::kill_process(checkpointer, rustix::process::Signal::STOP).expect("stopped");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    pair.b.sql("rollback prepared 'open'");
    assert_eq!(pair.b.sql("select count(*) from h"), "50");
    rustix::process::kill_process(checkpointer, rustix::process::Signal::CONT).expect("continued");
    pair.b.sql("checkpoint");
    pair.b.stop("fast");
    pair.a.sql("commit prepared 'open'");
    let ended = rewind(&pair, &pair.b, &pair.a, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    pair.b.start();
    pair.b.wait("postgres", "(select count(*) from h) = 60");
    oracle::verify(&pair.b, &pair.a);
}

#[test]
fn the_fork_lies_on_a_page_boundary() {
    const PAGE: u64 = 8192;
    // What a message record has beside the text: its header, that of its data, and its own.
    const OVERHEAD: u64 = 24 + 5 + 24 + 2;
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("update plain set n = 4 where id < 100");
    let at = || pair.a.sql("select pg_current_wal_insert_lsn()").parse::<pg_format::Lsn>();
    let message = |bytes: u64| {
        pair.a.sql(&format!("select pg_logical_emit_message(false, 'p', repeat('x', {bytes}))"));
    };
    // A record that ends exactly where its page does.
    if PAGE - at().expect("LSN").as_u64() % PAGE < 1000 {
        message(1000);
    }
    message(PAGE - at().expect("LSN").as_u64() % PAGE - OVERHEAD);
    let next = at().expect("LSN").as_u64();
    assert_eq!(next % PAGE, 24, "the next record does not begin behind a page header");
    let boundary = pg_format::Lsn::new(next - 24);
    pair.b.wait("postgres", &format!("pg_last_wal_replay_lsn() = '{boundary}'"));
    part(&pair);
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("fork_lsn"), boundary.to_string());
    assert_eq!(ended.field("strategy"), "fork");
}

/// R8: what was fetched before is not believed, and the rewind plans again.
#[test]
fn a_standby_that_is_promoted_while_it_is_read() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    part(&pair);
    follow_instead(&c, &pair.b);
    c.start();
    pair.b.sql("create table bulk as select g, md5(g::text) from generate_series(1, 40000) g");
    pair.b.sql("checkpoint");
    let lsn = pair.b.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    c.sql("checkpoint");
    pair.a.stop("fast");
    let served = Served::with(pair.home.path(), &c, &["--max-rate", "2M"]);
    let mut running = served.rewind(&pair.a).following(&c).spawn();
    running.wait_for("fetch");
    c.promote();
    assert!(!running.has_begun("seal"), "the copy was over before the promotion");
    c.sql("insert into plain values (70002, 'after the promotion', 1)");
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert!(ended.text.contains("planning again"), "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

#[test]
fn a_source_that_is_restarted_while_it_is_read() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("create table bulk as select g, md5(g::text) from generate_series(1, 40000) g");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "2M"]);
    let mut running = served.rewind(&pair.a).following(&pair.b).spawn();
    running.wait_for("fetch");
    pair.b.stop("fast");
    pair.b.start();
    assert!(!running.has_begun("seal"), "the copy was over before the restart");
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert!(ended.text.contains("planning again"), "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

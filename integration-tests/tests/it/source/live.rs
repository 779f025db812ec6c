//! Targets that were killed under load and sources that go on working while they are read.

use std::thread::sleep;
use std::time::Duration;

use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::Served;
use integration_tests::torture::work::work;

/// Times a segment's worth of WAL is written before the oldest segment must have been recycled.
const RECYCLING_ROUNDS: u32 = 80;

/// The source makes checkpoints, recycles WAL, creates and drops relations while it is read: all of
/// it between the description and the seal, which the slowed copy keeps apart.
fn loaded_source(major: u32, strategy: &str) {
    let pair = Pair::with(
        major,
        Shape { segment_mb: 1, ..Shape::default() },
        "wal_keep_size = 40MB\nmin_wal_size = 2MB",
    );
    pair.b.promote();
    pair.a.sql("update plain set n = 5 where id % 3 = 0");
    pair.b.sql("create table bulk as select g id, md5(g::text) a, md5((g * 3)::text) b from generate_series(1, 100000) g");
    pair.a.stop("fast");
    pair.b.sql("checkpoint");
    // No faster than the slowed copy: what it writes has to be carried too.
    let load = pair.b.load_every(Duration::from_millis(250), &work("n", 3));
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "2M"]);
    let mut running =
        served.rewind(&pair.a).following(&pair.b).args(["--strategy", strategy]).spawn();
    running.wait_for("fetch");
    let (before, checkpoint) = (oldest_segment(&pair.b), last_checkpoint(&pair.b));
    for round in 0..3 {
        let (mut made, mut dropped) = (String::new(), String::new());
        for i in 0..30 {
            made.push_str(&format!(
                "create table made_{round}_{i}(id int); insert into made_{round}_{i} values ({i});"
            ));
            if i % 2 == 0 {
                dropped.push_str(&format!("drop table made_{round}_{i};"));
            }
        }
        pair.b.script("postgres", &format!("{made} {dropped} checkpoint;"));
    }
    for _ in 0..RECYCLING_ROUNDS {
        if oldest_segment(&pair.b) != before {
            break;
        }
        // Compresses to nothing: it pushes the log on without holding up the copy.
        pair.b.sql("select pg_logical_emit_message(false, 'x', repeat('y', 2000000))");
        pair.b.sql("checkpoint");
    }
    assert_ne!(oldest_segment(&pair.b), before, "no segment was recycled");
    assert_ne!(last_checkpoint(&pair.b), checkpoint, "no checkpoint was made");
    assert!(!running.has_begun("seal"), "the copy was over before the source had changed");
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    pair.a.start();
    sleep(Duration::from_millis(300));
    drop(load);
    oracle::verify(&pair.a, &pair.b);
}

/// The target is killed under `pgbench` and other work; the source goes on under the same.
fn killed(major: u32, strategy: &str) {
    let pair = Pair::new(major, Shape::default());
    pair.a.pgbench_init(1);
    let early = (pair.a.pgbench(), pair.a.load(&work("c", major)));
    sleep(Duration::from_millis(600));
    pair.b.promote();
    let old = pair.a.load(&work("o", major));
    let new = (pair.b.pgbench(), pair.b.load(&work("n", major)));
    sleep(Duration::from_millis(800));
    // By *latest* from what the target had on its disk, by *fork* mostly from memory that is lost.
    if strategy == "latest" {
        pair.a.sql("checkpoint");
        pair.b.sql("checkpoint");
    }
    pair.a.kill();
    drop((early, old));
    let served = Served::start(pair.home.path(), &pair.b);
    let ended = served.rewind(&pair.a).following(&pair.b).args(["--strategy", strategy]).succeed();
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    pair.a.start();
    sleep(Duration::from_millis(300));
    drop(new);
    oracle::verify(&pair.a, &pair.b);
}

fn oldest_segment(node: &Node) -> String {
    node.sql("select min(name) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'")
}

fn last_checkpoint(node: &Node) -> String {
    node.sql("select checkpoint_lsn from pg_control_checkpoint()")
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn killed_under_load() {
            super::killed($major, "fork");
            super::killed($major, "latest");
        }
        #[test]
        fn source_under_load_by_latest() { super::loaded_source($major, "latest"); }
        #[test]
        fn source_under_load_by_fork() { super::loaded_source($major, "fork"); }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

#[test]
fn source_under_load_by_compare() {
    loaded_source(15, "compare");
}

//! Targets that were killed under load and sources that go on working while they are read.

use std::thread::sleep;
use std::time::Duration;

use integration_tests::client::Rewind;
use integration_tests::cluster::{Pair, Shape};
use integration_tests::oracle;
use integration_tests::server::{Pki, Server};
use integration_tests::torture::work;

/// The source makes checkpoints, recycles WAL, creates and drops relations while it is read.
fn loaded_source(major: u32, strategy: &str) {
    let pair = Pair::with(
        major,
        Shape { segment_mb: 1, ..Shape::default() },
        "wal_keep_size = 40MB\nmin_wal_size = 2MB",
    );
    pair.b.promote();
    pair.a.sql("update plain set n = 5 where id % 3 = 0");
    pair.b.sql("create table bulk as select g id, md5(g::text) a, md5((g * 3)::text) b from generate_series(1, 40000) g");
    pair.a.stop("fast");
    pair.b.sql("checkpoint");
    let first_segment = |node: &integration_tests::cluster::Node| {
        let names = node.sql("select min(name) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'");
        names.trim().to_owned()
    };
    let (before, checkpoint) =
        (first_segment(&pair.b), pair.b.sql("select checkpoint_lsn from pg_control_checkpoint()"));
    let load = pair.b.load(&work("n", 3));
    let pki = Pki::new(pair.home.path());
    let server = Server::with(&pair.b, &pki, 0, &["--max-rate", "3M"]);
    let running = Rewind::new(&pair.a, &server, &pki)
        .following(&pair.b)
        .args(["--strategy", strategy])
        .spawn();
    for round in 0..4 {
        sleep(Duration::from_millis(400));
        pair.b.script(
            "postgres",
            &format!("{}; {}; checkpoint;",
                (0..30).map(|i| format!("create table made_{round}_{i}(id int); insert into made_{round}_{i} values ({i})")).collect::<Vec<_>>().join(";"),
                (0..30).filter(|i| i % 2 == 0).map(|i| format!("drop table made_{round}_{i}")).collect::<Vec<_>>().join(";")),
        );
    }
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    // All of it fell into the copy.
    assert_ne!(first_segment(&pair.b), before, "no segment was recycled");
    assert_ne!(pair.b.sql("select checkpoint_lsn from pg_control_checkpoint()"), checkpoint);
    pair.a.start();
    sleep(Duration::from_millis(300));
    drop(load);
    oracle::verify(&pair.a, &pair.b);
}

macro_rules! on_major {
    ($($name:ident $major:literal $seeds:expr),*) => { $(mod $name {
        #[test]
        fn killed_under_load() {
            for seed in $seeds { integration_tests::torture::killed($major, seed); }
        }
        #[test]
        fn source_under_load_by_fork() { super::loaded_source($major, "auto"); }
    })* };
}
on_major!(pg14 14 [1, 2], pg15 15 [3, 4, 5, 6, 7, 8], pg16 16 [9, 10], pg17 17 [11, 12], pg18 18 [13, 14]);

#[test]
fn source_under_load_by_compare() {
    loaded_source(15, "compare");
}

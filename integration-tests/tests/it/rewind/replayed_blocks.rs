//! Blocks that replay rebuilds whatever they hold never travel; all others do.

use integration_tests::client::Ended;
use integration_tests::cluster::Node;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::{Served, part, rewound};

fn number(ended: &Ended, name: &str) -> u64 {
    ended.field(name).parse().expect("a number")
}

/// Rewinds, verifies, and counts the pages that replay was left to rebuild.
fn left_to_replay(pair: &Pair, strategy: &str) -> (Ended, u64) {
    pair.a.stop("fast");
    let ended = rewound(pair, &["--strategy", strategy]);
    assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    let covered = number(&ended, "pages_covered");
    assert_eq!(number(&ended, "pages_received") + covered, number(&ended, "pages"));
    (ended, covered)
}

fn pages_of(node: &Node, table: &str) -> u64 {
    node.sql(&format!("select pg_relation_size('{table}') / 8192")).parse().expect("a number")
}

/// Both nodes change the same rows, the source after its checkpoint too, and it adds a relation and
/// lengthens another one.
fn busy_after_its_checkpoint(major: u32) -> Pair {
    let pair = Pair::with(major, Shape::default(), "autovacuum = off");
    part(&pair);
    pair.a.sql("update plain set body = 'lost'");
    pair.b.sql("update plain set n = 5 where id % 2 = 0");
    pair.b.sql("checkpoint");
    pair.b.sql("update plain set n = 6");
    pair.b
        .sql("create table afterwards as select g, md5(g::text) from generate_series(1, 30000) g");
    pair.b.sql("insert into grow select g, repeat('x', 90) from generate_series(1, 20000) g");
    pair
}

fn what_replay_rebuilds_does_not_travel(major: u32) {
    for strategy in ["latest", "fork", "compare"] {
        let pair = busy_after_its_checkpoint(major);
        let new = pages_of(&pair.b, "afterwards");
        let pages = new + pages_of(&pair.b, "plain");
        let tail = pages_of(&pair.b, "grow") - pages_of(&pair.a, "grow");
        let (ended, covered) = left_to_replay(&pair, strategy);
        assert!(new > 200 && tail > 200, "the scenario needs a new relation and a tail");
        assert!(covered > (pages + tail) * 9 / 10, "only {covered}: {}", ended.text);
    }
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn what_replay_rebuilds_does_not_travel() {
            super::what_replay_rebuilds_does_not_travel($major);
        }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

/// By *fork* what both nodes wrote before they parted is replayed: its images count.
#[test]
fn images_of_the_common_part_cover_by_fork() {
    let (_, covered) = left_to_replay(&changed_before_the_fork(), "fork");
    assert!(covered > 50, "{covered}");
}

/// By *latest* nothing before the source's checkpoint is replayed: its images cover nothing.
#[test]
fn images_of_the_common_part_cover_nothing_by_latest() {
    let pair = changed_before_the_fork();
    let (ended, covered) = left_to_replay(&pair, "latest");
    assert!(number(&ended, "pages_received") > 50, "{}", ended.text);
    assert!(covered < 50, "{covered}");
}

/// Pages with an image in the common part that the target alone changed afterwards.
fn changed_before_the_fork() -> Pair {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off");
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 1 where id % 2 = 0");
    pair.catch_up();
    pair.b.promote();
    pair.a.sql("update plain set body = 'lost' where id % 3 = 0");
    pair.b.sql("checkpoint");
    pair
}

/// A record without image needs the page as it was, even if one with an image follows.
fn first_reference_without_image(settings: &str) {
    let pair = Pair::with(15, Shape::default(), &format!("autovacuum = off\n{settings}"));
    pair.a.sql("create table few(id int, body text)");
    pair.a.sql("insert into few select g, repeat('c', 100) from generate_series(1, 1000) g");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.configure("full_page_writes = off");
    pair.b.sql("select pg_reload_conf()");
    pair.b.promote();
    // Where the source's records put a row the target has another one, and an older page: what is not
    // older than the record would be left alone until the image comes.
    pair.a.sql("insert into few select 1, 'lost' from generate_series(1, 20)");
    pair.b.sql("select pg_logical_emit_message(false, 'x', repeat('y', 100000))");
    pair.b.sql("insert into few select 2, 'new' from generate_series(1, 10)");
    pair.b.configure("full_page_writes = on");
    pair.b.sql("select pg_reload_conf()");
    pair.b.wait("postgres", "current_setting('full_page_writes') = 'on'");
    pair.b.sql("checkpoint");
    pair.b.sql("insert into few select 3, 'newer' from generate_series(1, 10)");
    left_to_replay(&pair, "fork");
}

#[test]
fn a_first_reference_without_image_does_not_cover() {
    first_reference_without_image("");
}

/// Images that only serve to check replay are not applied.
#[test]
fn an_image_for_checking_does_not_cover() {
    first_reference_without_image("wal_consistency_checking = 'heap'");
}

/// Pages that no record names are not rebuilt, wherever the target's file ends.
#[test]
fn a_tail_that_the_target_cut_off_travels() {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off");
    part(&pair);
    let before = pages_of(&pair.a, "shrink");
    pair.a.sql("delete from shrink where id > 100");
    pair.a.sql("vacuum shrink");
    let cut = before - pages_of(&pair.a, "shrink");
    assert!(cut > 10, "the scenario needs a cut");
    pair.b.sql("checkpoint");
    let (ended, _) = left_to_replay(&pair, "fork");
    assert!(number(&ended, "pages_received") >= cut, "{}", ended.text);
}

/// What the source made before its checkpoint is in no WAL that is replayed.
#[test]
fn a_relation_made_before_the_checkpoint_travels_by_latest() {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off");
    part(&pair);
    pair.b.sql("create table before as select g, md5(g::text) from generate_series(1, 30000) g");
    pair.b.sql("checkpoint");
    pair.b.sql("update before set g = -g where g % 1000 = 0");
    let pages = pages_of(&pair.b, "before");
    let (ended, covered) = left_to_replay(&pair, "latest");
    assert!(number(&ended, "pages_received") > pages / 2, "{}", ended.text);
    assert!(covered >= 10, "{covered}");
}

/// The source goes on while it is read: what it writes behind the WAL that was announced covers nothing,
/// and what is left to replay is right all the same.
#[test]
fn a_source_that_goes_on_is_followed() {
    let pair = busy_after_its_checkpoint(15);
    pair.a.stop("fast");
    let load = pair.b.load("update plain set n = n + 1 where id % 50 = 0");
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "4M"]);
    let ended = served.rewind(&pair.a).following(&pair.b).succeed();
    drop(load);
    assert!(number(&ended, "pages_covered") > 200, "{}", ended.text);
    integration_tests::oracle::verify(&pair.a, &pair.b);
}

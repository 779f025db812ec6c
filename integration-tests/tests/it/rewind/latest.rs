//! Strategy *latest*: replay from the source's newest checkpoint, and every block that either side changed
//! since the fork. What the source did before that checkpoint is in no WAL that is replayed.

use integration_tests::client::Ended;
use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::{Served, follow_instead, part, rewind, rewound};

const LATEST: [&str; 2] = ["--strategy", "latest"];

fn by_latest(pair: &Pair) -> Ended {
    let ended = rewound(pair, &LATEST);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    ended
}

/// Rows, cuts, drops, new relations and files of one path on both sides, most of it before the source's
/// checkpoint and some of it after.
fn both_sides(major: u32, stop: &str) {
    let pair = Pair::new(major, Shape::default());
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 1 where id % 5 = 0");
    pair.catch_up();
    pair.b.promote();
    for (node, side) in [(&pair.a, "old"), (&pair.b, "new")] {
        let cut = if side == "old" { 1000 } else { 2500 };
        node.script(
            "postgres",
            &format!(
                "update plain set body = '{side}' where id % 7 = length('{side}');
                 delete from shrink where id > {cut}; vacuum shrink;
                 insert into grow select g, repeat('{side}', 90) from generate_series(1, {cut}) g;
                 insert into shrink select g, repeat('{side}', 130) from generate_series(9000, 9500) g;
                 create table twin_{side} as select g, '{side}' s from generate_series(1, {cut}) g;
                 create index on twin_{side}(g);
                 insert into words select g, array[g % 10], point(g % 100, 3), '{side}' || g from generate_series(1, 500) g;"
            ),
        );
    }
    pair.a.sql("drop table dropme; truncate toasted; cluster plain using plain_pkey");
    pair.b.sql("drop table parted_high; truncate child; reindex table plain");
    pair.b.sql("checkpoint");
    pair.b.sql("update plain set n = 77 where id < 900; create table afterwards as select 1 x");
    match stop {
        "kill" => pair.a.kill(),
        mode => pair.a.stop(mode),
    }
    by_latest(&pair);
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn everything_changed_on_both_sides() { super::both_sides($major, "fast"); }
        #[test]
        fn everything_changed_and_the_target_was_killed() { super::both_sides($major, "kill"); }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

/// R2's rule for directories, on both sides: the old node's rows were changed where the database was before
/// it moved, so no record names the blocks where they are now.
#[test]
fn one_database_moved_to_one_tablespace_on_both_sides() {
    let pair = Pair::with(15, Shape::default(), "allow_in_place_tablespaces = on");
    pair.a.sql("create tablespace here location ''");
    pair.catch_up();
    part(&pair);
    pair.a
        .sql_in("second", "update other set id = -id where id % 2 = 0; select sum(id) from other");
    pair.a.sql("alter database second set tablespace here");
    pair.b.sql("alter database second set tablespace here");
    // Not so much as looked at: a hint that is set would name what the target changed.
    pair.b.sql_in("second", "create table extra as select 1 x");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    by_latest(&pair);
}

#[test]
fn a_database_was_made_on_each_side_under_one_oid() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    let make = |node: &Node, name: &str, strategy: &str| {
        node.sql(&format!("create database {name} template second strategy {strategy}"));
        node.sql_in(
            name,
            &format!("create table own as select '{name}' n from generate_series(1, 900)"),
        );
        node.sql_in(name, "delete from other where id % 2 = 0");
        node.sql(&format!("select oid from pg_database where datname = '{name}'"))
    };
    let ours = make(&pair.a, "made_there", "wal_log");
    let theirs = make(&pair.b, "made_here", "file_copy");
    assert_eq!(ours, theirs, "the scenario needs one OID");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    by_latest(&pair);
}

/// Growing by many pages at a time writes no WAL, and leaves pages behind that were never used: where the
/// source cut a relation before, the target still has old rows there, which nothing names but the cut.
#[test]
fn the_source_cut_a_relation_and_extended_it_in_bulk() {
    let pair = Pair::with(16, Shape::default(), "autovacuum = off");
    part(&pair);
    pair.b.sql("delete from plain where id > 100");
    pair.b.sql("vacuum plain");
    let file = pair.b.data.join(pair.b.sql("select pg_relation_filepath('plain')"));
    let ends_unused = || {
        let pages = std::fs::read(&file).expect("a relation");
        pages.len() > 8192 && pages[pages.len() - 8192..].iter().all(|byte| *byte == 0)
    };
    let rows = pair.home.path().join("rows");
    for round in 0..12 {
        let first = 100_000 + round * 10_000;
        pair.b.sql(&format!(
            "copy (select g, 'bulk', 1 from generate_series({first}, {first} + 2000 + {round} * 97) g) to '{}'",
            rows.display()
        ));
        pair.b.sql(&format!("copy plain from '{}'", rows.display()));
        pair.b.sql("checkpoint");
        if ends_unused() {
            break;
        }
    }
    assert!(ends_unused(), "the scenario needs a page that was never used");
    let size = |node: &Node| -> u64 {
        node.sql("select pg_relation_size('plain')").parse().expect("a size")
    };
    assert!(size(&pair.b) < size(&pair.a), "the scenario needs old rows in its place");
    pair.a.stop("fast");
    by_latest(&pair);
}

/// What the target had changed before the fork and not written out is replayed by nobody.
#[test]
fn what_a_killed_target_had_not_flushed_before_the_fork_is_carried() {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off\nbgwriter_lru_maxpages = 0");
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 41 where id % 3 = 0");
    pair.catch_up();
    pair.b.promote();
    pair.b.sql("checkpoint");
    pair.a.sql("insert into plain values (70001, 'lost', 1)");
    pair.a.kill();
    by_latest(&pair);
}

/// R11: replay from the fork would copy whatever the template's directory then holds.
#[test]
fn files_copied_before_the_checkpoint_are_right() {
    let pair = Pair::with(15, Shape::default(), "allow_in_place_tablespaces = on");
    part(&pair);
    pair.b.sql("create tablespace later location ''");
    pair.b.sql("create database copied template second strategy file_copy");
    pair.b.sql_in("second", "delete from other where id % 2 = 0");
    pair.b.sql("alter database second set tablespace later");
    pair.b.sql_in("copied", "delete from other where id % 3 = 0");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
}

/// The source's own WAL is read over all of its timelines, and a live standby is a source too.
#[test]
fn a_standby_of_a_node_that_was_promoted_twice_is_the_source() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    let d = pair.b.copy(&pair.home.path().join("d"));
    pair.b.start();
    part(&pair);
    pair.a.stop("fast");
    let caught_up = |standby: &Node, primary: &Node| {
        let lsn = primary.lsn();
        standby.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    };
    for standby in [&c, &d] {
        follow_instead(standby, &pair.b);
        standby.start();
    }
    pair.b.sql("update plain set n = 3 where id % 2 = 0");
    caught_up(&c, &pair.b);
    caught_up(&d, &pair.b);
    pair.b.stop("fast");
    c.promote();
    d.stop("fast");
    follow_instead(&d, &c);
    d.start();
    c.sql("update plain set n = 4 where id % 3 = 0");
    c.sql("checkpoint");
    c.sql("insert into plain values (91000, 'later', 1)");
    caught_up(&d, &c);
    d.sql("checkpoint");
    let served = Served::start(pair.home.path(), &d);
    let ended = served.rewind(&pair.a).following(&c).args(LATEST).succeed();
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

/// Without its WAL since the fork the source cannot tell what it changed.
#[test]
fn a_source_without_its_wal_since_the_fork_is_compared() {
    let pair = Pair::with(15, Shape::default(), "wal_keep_size = 0");
    pair.a.sql("checkpoint");
    pair.catch_up();
    part(&pair);
    for _ in 0..3 {
        pair.b.sql("select pg_switch_wal()");
        pair.b.sql("insert into plain select g, 'new', 1 from generate_series(80001, 80100) g on conflict do nothing");
        pair.b.sql("checkpoint");
    }
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    served.rewind(&pair.a).args(LATEST).refuse(6, "no WAL in common");
    drop(served);
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

/// The segment that replay begins in, as a node has it, and where in it replay begins.
fn first_segment(node: &Node, ended: &Ended) -> (Vec<u8>, usize) {
    let start: pg_format::Lsn = ended.field("replay_from").parse().expect("a position");
    let size = pg_format::WalSegmentSize::new(16 << 20).expect("a size");
    let number = size.segment_of(start);
    let timeline = pg_format::TimelineId::new(2).expect("a timeline");
    let name = pg_format::wal::SegmentName { timeline, number }.file_name(size);
    let bytes = std::fs::read(node.data.join("pg_wal").join(name)).expect("a segment");
    (bytes, usize::try_from(size.offset_of(start.page_start())).expect("fits"))
}

/// A fork whose source's checkpoint lies far behind its segment's beginning.
fn checkpoint_inside_a_segment(settings: &str) -> Pair {
    let pair = Pair::with(15, Shape::default(), settings);
    part(&pair);
    pair.b.sql("select pg_switch_wal()");
    pair.b.sql("update plain set n = 5 where id % 3 = 0");
    pair.b.sql("checkpoint");
    pair.b.sql("update plain set n = 6 where id = 7");
    pair.a.stop("fast");
    pair
}

/// A node that is promoted before it ever streamed hands this segment on.
#[test]
fn the_first_segment_comes_whole() {
    let pair = checkpoint_inside_a_segment("");
    let ended = rewind(&pair, &pair.a, &pair.b, &LATEST);
    let (ours, start) = first_segment(&pair.a, &ended);
    let (theirs, _) = first_segment(&pair.b, &ended);
    assert!(start > 100 * 8192, "the scenario needs much WAL before {start}");
    assert!(ours[..start] == theirs[..start], "there is a hole in the first segment");
    oracle::verify(&pair.a, &pair.b);
}

/// The source dies before the rewound node ever streamed: that one is promoted, and a healthy standby follows it.
#[test]
fn a_third_node_follows_a_rewound_one_that_never_streamed() {
    for segment_mb in [1, 16] {
        let pair = Pair::new(15, Shape { segment_mb, ..Shape::default() });
        let c = pair.b.copy_running(&pair.a, &pair.home.path().join("c"));
        c.stop("fast");
        part(&pair);
        pair.b.sql("update plain set n = 5 where id % 3 = 0");
        pair.b.sql("checkpoint");
        pair.b.sql("update plain set n = 6 where id = 7");
        follow_instead(&c, &pair.b);
        c.start();
        let lsn = pair.b.lsn();
        c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
        c.stop("fast");
        pair.a.stop("fast");
        rewind(&pair, &pair.a, &pair.b, &LATEST);
        pair.b.stop("immediate");
        pair.a.start();
        pair.a.promote();
        pair.a.sql("insert into plain values (90001, 'after', 1)");
        follow_instead(&c, &pair.a);
        c.start();
        let lsn = pair.a.lsn();
        c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
        c.kill();
        c.start();
        c.wait("postgres", "exists(select from plain where id = 90001)");
        oracle::verify(&c, &pair.a);
    }
}

/// Zeros where WAL was, as an older release left them: what lies there is not known to be common.
#[test]
fn a_hole_in_the_sources_wal_proves_no_fork() {
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("checkpoint");
    let common = pair.a.lsn().parse::<pg_format::Lsn>().expect("a position");
    pair.a.sql("insert into grow select g, repeat('x', 200) from generate_series(1, 600) g");
    pair.catch_up();
    part(&pair);
    pair.a.stop("fast");
    pair.b.sql("update plain set n = 5 where id % 3 = 0");
    pair.b.sql("select pg_switch_wal()");
    pair.b.sql("checkpoint");
    let fork = pair.b.sql("select pg_walfile_name(redo_lsn) from pg_control_checkpoint()");
    let first = {
        let mut names: Vec<String> = std::fs::read_dir(pair.b.data.join("pg_wal"))
            .expect("pg_wal")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.len() == 24 && name.starts_with("00000002"))
            .collect();
        names.sort();
        names.remove(0)
    };
    assert_ne!(first, fork, "the scenario needs a checkpoint in a later segment");
    // Behind a common checkpoint, and yet before the fork.
    let path = pair.b.data.join("pg_wal").join(&first);
    let mut bytes = std::fs::read(&path).expect("a segment");
    let from = usize::try_from(common.as_u64() % (1 << 20)).expect("fits").next_multiple_of(8192);
    bytes[from..].fill(0);
    integration_tests::cluster::write(&path, &bytes);
    let served = Served::start(pair.home.path(), &pair.b);
    served.rewind(&pair.a).args(["--strategy", "fork"]).refuse(6, "not known to be common");
    drop(served);
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    let why = ended.field("strategy_reason");
    assert!(why.contains("cannot be read from"), "{why}");
    oracle::verify(&pair.a, &pair.b);
}

/// Where most of the price is WAL, a newer checkpoint is waited for if that was asked for.
#[test]
fn the_next_checkpoint_is_waited_for_where_it_pays() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("checkpoint");
    let message = "pg_logical_emit_message(false, 'x', repeat('y', 100000))";
    pair.b.sql(&format!("select count({message}) from generate_series(1, 200)"));
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let mut running =
        served.rewind(&pair.a).following(&pair.b).args(["--wait-checkpoint", "60s"]).spawn();
    running.wait_for("list");
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(!running.has_begun("fetch"), "it did not wait");
    pair.b.sql("checkpoint");
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    assert!(ended.text.contains("waiting up to 60 seconds"), "{}", ended.text);
    let wal: u64 = ended.field("bytes_wal").parse().expect("a number");
    // What replay needs, and what lies before it in its segment.
    assert!(wal < 10 << 20, "{wal} bytes of WAL came all the same");
    oracle::verify(&pair.a, &pair.b);
}

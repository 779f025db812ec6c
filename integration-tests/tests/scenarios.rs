//! Ways in which two nodes part, and what must come of each.

use std::fs;

use integration_tests::client::{Ended, Rewind};
use integration_tests::cluster::{Node, Pair, Shape};
use integration_tests::oracle;
use integration_tests::server::{Pki, Server};

/// Rewinds `target` onto `source` with its own certificates and server.
fn rewind(pair: &Pair, target: &Node, source: &Node, args: &[&str]) -> Ended {
    let pki_home = pair.home.path().join(format!(
        "pki-{}",
        source.socket.file_name().expect("name").to_string_lossy()
    ));
    drop(fs::remove_dir_all(&pki_home));
    fs::create_dir_all(&pki_home).expect("directory");
    let pki = Pki::new(&pki_home);
    let server = Server::start(source, &pki);
    Rewind::new(target, &server, &pki)
        .following(source)
        .args(args.iter().copied())
        .succeed()
}

/// Rewinds `a` onto `b` and verifies.
fn rewound(pair: &Pair, args: &[&str]) -> Ended {
    let ended = rewind(pair, &pair.a, &pair.b, args);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
    ended
}

/// Makes the nodes part: different rows on both sides.
fn part(pair: &Pair) {
    pair.b.promote();
    pair.a
        .sql("insert into plain select g, 'lost', 1 from generate_series(70001, 71000) g");
    pair.b.sql("update plain set body = 'new' where id < 500");
}

/// Makes a stopped node a standby without a primary.
fn write_signal(node: &Node) {
    let path = node.data.join("standby.signal");
    fs::File::create(&path).expect("signal");
    node.user.own(&path);
}

fn truncations(major: u32) {
    let pair = Pair::new(major, Shape::default());
    pair.b.promote();
    pair.a.script(
        "postgres",
        "delete from shrink where id > 1000; vacuum shrink; insert into grow select g, repeat('o', 300) from generate_series(1, 3000) g;
         drop table dropme; truncate toasted; insert into shrink select g, repeat('z', 400) from generate_series(9000, 9500) g;",
    );
    pair.b.script(
        "postgres",
        "delete from shrink where id > 2500; vacuum shrink; insert into grow select g, repeat('n', 300) from generate_series(1, 6000) g;
         delete from plain where id > 15000; vacuum plain; drop table parted_high; truncate child;",
    );
    pair.a.stop("fast");
    rewound(&pair, &[]);
}

fn just_promoted(major: u32) {
    let pair = Pair::new(major, Shape::default());
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 3");
    pair.catch_up();
    // Its restartpoint is old, and no checkpoint follows the promotion before the rewind.
    part(&pair);
    pair.a.stop("fast");
    rewound(&pair, &[]);
}

fn no_wal_kept(major: u32) {
    let pair = Pair::with(major, Shape::default(), "wal_keep_size = 0");
    part(&pair);
    pair.b.sql("select pg_switch_wal()");
    pair.b.sql("checkpoint");
    pair.b.sql("insert into plain values (80001, 'new', 1)");
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert!(!ended.field("strategy_reason").is_empty());
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn tails_truncations_and_drops_on_both_sides() { super::truncations($major); }
        #[test]
        fn source_was_just_promoted_and_has_no_checkpoint_yet() { super::just_promoted($major); }
        #[test]
        fn no_wal_is_kept_on_either_side() { super::no_wal_kept($major); }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

#[test]
fn databases_created_and_dropped_on_either_side() {
    let pair = Pair::new(15, Shape::default());
    pair.b.promote();
    for (node, side) in [(&pair.a, "old"), (&pair.b, "new")] {
        node.sql(&format!("create database made_{side}"));
        node.sql_in(
            &format!("made_{side}"),
            "create table t as select generate_series(1, 500) g",
        );
        node.sql("create database on_both");
        node.sql_in(
            "on_both",
            &format!("create table t as select g, '{side}' s from generate_series(1, 700) g"),
        );
    }
    pair.a.sql("drop database second");
    pair.b.sql("drop database doomed");
    pair.a.stop("fast");
    rewound(&pair, &[]);
}

#[test]
fn one_relfilenumber_was_created_on_both_sides() {
    let pair = Pair::new(15, Shape::default());
    pair.b.promote();
    pair.a
        .sql("create table twin as select g, 'old' s from generate_series(1, 9000) g");
    pair.b
        .sql("create table other_twin as select g, 'new' s from generate_series(1, 4000) g");
    let path =
        |node: &Node, table: &str| node.sql(&format!("select pg_relation_filepath('{table}')"));
    assert_eq!(
        path(&pair.a, "twin"),
        path(&pair.b, "other_twin"),
        "the scenario needs one path"
    );
    pair.a.stop("fast");
    rewound(&pair, &[]);
}

#[test]
fn extra_files_are_kept_or_mirrored() {
    for mirrored in [false, true] {
        let pair = Pair::new(15, Shape::default());
        part(&pair);
        pair.a.stop("fast");
        let put = |node: &Node, name: &str, text: &str| {
            let path = node.data.join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            integration_tests::cluster::write(&path, text);
            node.user.own(path.parent().expect("parent"));
            node.user.own(&path);
        };
        for (node, side) in [(&pair.a, "old"), (&pair.b, "new")] {
            put(node, &format!("mine/only_{side}"), side);
            put(node, "mine/both", side);
            put(
                node,
                "mine/secret.pem",
                "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n",
            );
        }
        let before = fs::read(pair.a.data.join("postgresql.conf")).expect("conf");
        rewind(
            &pair,
            &pair.a,
            &pair.b,
            if mirrored {
                &["--extra-files", "mirror"]
            } else {
                &[]
            },
        );
        let text = |name: &str| fs::read_to_string(pair.a.data.join(name)).unwrap_or_default();
        if mirrored {
            assert_eq!(
                (
                    text("mine/only_old"),
                    text("mine/only_new"),
                    text("mine/both")
                ),
                (String::new(), "new".into(), "new".into())
            );
        } else {
            assert_eq!(
                (
                    text("mine/only_old"),
                    text("mine/only_new"),
                    text("mine/both")
                ),
                ("old".into(), String::new(), "old".into())
            );
        }
        assert_eq!(
            before,
            fs::read(pair.a.data.join("postgresql.conf")).expect("conf")
        );
        oracle::verify(&pair.a, &pair.b);
    }
}

#[test]
fn pg_wal_is_a_symlink_to_another_file_system() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    let elsewhere = tempfile::Builder::new()
        .prefix("pgrwal")
        .tempdir_in("/dev/shm")
        .expect("directory");
    pair.a.user.own(elsewhere.path());
    let wal = pair.a.data.join("pg_wal");
    let moved = elsewhere.path().join("wal");
    integration_tests::user::run(pair.a.user.command("/bin/mv").arg(&wal).arg(&moved));
    std::os::unix::fs::symlink(&moved, &wal).expect("link");
    rewound(&pair, &[]);
    assert_eq!(fs::read_link(&wal).expect("still a link"), moved);
    assert!(moved.join(".pgrejoin/diverged").is_dir());
}

#[test]
fn on_the_same_timeline_there_is_nothing_to_do() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    pair.a.sql("insert into plain values (70001, 'later', 1)");
    let before = integration_tests::snapshot::Snapshot::of(&pair.b.data);
    let pki = Pki::new(pair.home.path());
    let server = Server::start(&pair.a, &pki);
    let ended = Rewind::new(&pair.b, &server, &pki).succeed();
    assert_eq!(
        ended.field("result"),
        "no_rewind_required",
        "{}",
        ended.text
    );
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
    pair.b
        .wait("postgres", "exists(select from plain where id = 70001)");
    pair.b.promote();
    pair.b.sql("insert into plain values (70002, 'new', 1)");
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    assert_eq!(
        ended.field("result"),
        "no_rewind_required",
        "{}",
        ended.text
    );
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_target_ahead_on_the_same_timeline_is_taken_back() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    pair.a
        .sql("insert into plain select g, 'lost', 1 from generate_series(70001, 75000) g");
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
    pair.a
        .sql("insert into plain select g, 'lost', 1 from generate_series(70001, 72000) g");
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
    integration_tests::cluster::append(
        &c.data.join("postgresql.auto.conf"),
        &format!("primary_conninfo = '{}'\n", pair.b.conninfo()),
    );
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
    pair.a
        .wait("postgres", "to_regclass('marker_before') is not null");
    c.stop("fast");
    pair.a.stop("fast");
    integration_tests::cluster::append(
        &pair.a.data.join("postgresql.auto.conf"),
        &format!("primary_conninfo = '{}'\n", pair.b.conninfo()),
    );
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_stopped_source_serves_too_and_replay_rebuilds_what_differs_after() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.stop("fast");
    pair.a.stop("fast");
    let ended = rewind(&pair, &pair.a, &pair.b, &["--strategy", "fork"]);
    assert_eq!(ended.field("result"), "rewound");
    pair.b.start();
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_standby_that_ran_ahead_and_stopped_without_a_checkpoint() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    // b gets what c does not; then c is promoted and b must go back.
    pair.a
        .sql("insert into plain select g, 'lost', 1 from generate_series(70001, 74000) g");
    pair.catch_up();
    pair.a.stop("immediate");
    pair.b.stop("immediate");
    integration_tests::cluster::append(
        &c.data.join("postgresql.auto.conf"),
        "primary_conninfo = ''\n",
    );
    c.start();
    c.promote();
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
    pair.a
        .sql("insert into plain select g, 'lost', 1 from generate_series(70001, 74000) g");
    pair.catch_up();
    pair.b.kill();
    pair.a.kill();
    integration_tests::cluster::append(
        &c.data.join("postgresql.auto.conf"),
        "primary_conninfo = ''\n",
    );
    c.start();
    c.promote();
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
    pair.a
        .sql("update plain set n = 9 where id between 100 and 5000");
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
    assert!(
        ended.field("fork_lsn").ends_with("000000"),
        "{}",
        ended.field("fork_lsn")
    );
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
        pair.a
            .sql("insert into grow select g, 'lost' from generate_series(1, 500) g");
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

#[test]
fn other_segment_sizes() {
    for segment_mb in [1, 64] {
        let pair = Pair::new(
            15,
            Shape {
                segment_mb,
                ..Shape::default()
            },
        );
        pair.a.sql("update plain set n = 2");
        pair.a.sql("checkpoint");
        pair.a.sql("update plain set n = 3 where id % 2 = 0");
        pair.catch_up();
        part(&pair);
        pair.a.sql("update plain set n = 8");
        pair.b.sql("update plain set n = 9");
        pair.a.kill();
        rewound(&pair, &[]);
    }
}

#[test]
fn tablespaces_keep_the_targets_own_places() {
    let pair = Pair::new(15, Shape::default());
    let place = |name: &str| {
        let path = pair.home.path().join(name);
        fs::create_dir_all(&path).expect("directory");
        pair.a.user.own(&path);
        path
    };
    let shared = place("space");
    // Made with both servers on one machine: the standby gets its own copy afterwards.
    pair.b.stop("fast");
    pair.a.sql(&format!(
        "create tablespace away location '{}'",
        shared.display()
    ));
    pair.a.sql("create table far(id int) tablespace away");
    pair.a
        .sql("insert into far select generate_series(1, 5000)");
    pair.a.stop("fast");
    fs::remove_dir_all(&pair.b.data).expect("removed");
    let b = pair.a.copy(&pair.b.socket);
    let own = place("space-b");
    integration_tests::user::run(
        b.user
            .command("/bin/cp")
            .arg("-a")
            .arg(format!("{}/.", shared.display()))
            .arg(&own),
    );
    let link = fs::read_dir(b.data.join("pg_tblspc"))
        .expect("dir")
        .flatten()
        .next()
        .expect("a tablespace")
        .path();
    fs::remove_file(&link).expect("unlinked");
    std::os::unix::fs::symlink(&own, &link).expect("linked");
    b.follow(&pair.a);
    pair.a.start();
    b.start();
    pair.catch_up();
    part(&pair);
    pair.a.sql("insert into far select generate_series(1, 700)");
    b.sql("delete from far where id % 3 = 0");
    b.sql("create table far_new tablespace away as select * from far");
    pair.a.stop("fast");
    rewound(&pair, &[]);
    let link = pair
        .a
        .data
        .join("pg_tblspc")
        .join(link.file_name().expect("name"));
    assert_eq!(fs::read_link(link).expect("link"), shared);
}

#[test]
fn without_hint_logging_hints_of_lost_transactions_are_gone() {
    let shape = Shape {
        checksums: false,
        ..Shape::default()
    };
    let pair = Pair::new(15, shape);
    pair.a.sql("checkpoint");
    pair.b.promote();
    // A lost transaction's commit is remembered in hint bits on the old node alone.
    pair.a
        .sql("begin; update plain set n = -1 where id <= 2000; commit");
    pair.a.sql("select count(*) from plain");
    pair.b
        .sql("update plain set n = -2 where id between 1000 and 3000");
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
}

#[test]
fn a_target_without_any_wal_is_rewound_by_comparing() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    for entry in fs::read_dir(pair.a.data.join("pg_wal"))
        .expect("dir")
        .flatten()
    {
        if entry.path().is_file() {
            fs::remove_file(entry.path()).expect("removed");
        }
    }
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare");
}

#[test]
fn permissions_follow_the_data_directory() {
    use std::os::unix::fs::MetadataExt as _;
    for group_access in [false, true] {
        let pair = Pair::new(
            15,
            Shape {
                group_access,
                ..Shape::default()
            },
        );
        part(&pair);
        pair.b.sql("create database another");
        pair.a.stop("fast");
        rewind(&pair, &pair.a, &pair.b, &[]);
        let (file, directory) = if group_access {
            (0o640, 0o750)
        } else {
            (0o600, 0o700)
        };
        let mut visit = vec![
            pair.a.data.join("base"),
            pair.a.data.join("global"),
            pair.a.data.join("pg_wal"),
        ];
        while let Some(path) = visit.pop() {
            let mode = path.metadata().expect("metadata").mode() & 0o777;
            if path.is_dir() {
                assert_eq!(mode, directory, "{}", path.display());
                visit.extend(
                    fs::read_dir(&path)
                        .expect("dir")
                        .flatten()
                        .map(|entry| entry.path()),
                );
            } else {
                assert_eq!(mode, file, "{}", path.display());
            }
        }
        oracle::verify(&pair.a, &pair.b);
    }
}

#[test]
fn slots_go_and_unarchived_common_wal_stays_marked() {
    let pair = Pair::new(15, Shape::default());
    pair.a
        .sql("select pg_create_physical_replication_slot('old_slot', true)");
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("update plain set n = 1 where id < 10");
    pair.catch_up();
    part(&pair);
    pair.a.stop("fast");
    let status = pair.a.data.join("pg_wal/archive_status");
    let first = fs::read_dir(pair.a.data.join("pg_wal"))
        .expect("dir")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.len() == 24)
        .min()
        .expect("a segment");
    let mark = status.join(format!("{first}.ready"));
    integration_tests::cluster::write(&mark, "");
    pair.a.user.own(&mark);
    let ended = rewound(&pair, &[]);
    assert!(ended.text.contains("old_slot"), "{}", ended.text);
    assert!(mark.exists());
    assert!(!pair.a.data.join("pg_replslot/old_slot").exists());
}

#[test]
fn a_common_segment_is_found_in_the_archive_or_on_the_source() {
    for place in ["archive", "restore_command", "source"] {
        let pair = Pair::new(15, Shape::default());
        pair.a.sql("checkpoint");
        pair.a.sql("update plain set n = 2 where id < 3000");
        pair.a.sql("select pg_switch_wal()");
        pair.a.sql("update plain set n = 3 where id < 3000");
        pair.catch_up();
        part(&pair);
        pair.a.stop("immediate");
        let archive = pair.home.path().join("archive");
        fs::create_dir_all(&archive).expect("directory");
        pair.a.user.own(&archive);
        // The oldest segment the window needs is gone from the target.
        let control = std::fs::read(pair.a.data.join("global/pg_control")).expect("control");
        let control = pg_format::ControlFile::parse(&control).expect("parses");
        let number = control
            .wal_segment_size
            .segment_of(control.checkpoint_copy.redo);
        let name = pg_format::wal::SegmentName {
            timeline: control.timeline(),
            number,
        }
        .file_name(control.wal_segment_size);
        let segment = pair.a.data.join("pg_wal").join(&name);
        if place == "source" {
            fs::remove_file(&segment).expect("removed");
        } else {
            integration_tests::user::run(
                pair.a.user.command("/bin/mv").arg(&segment).arg(&archive),
            );
            // Nobody else has it; the source itself no longer needs it.
            pair.b.sql("checkpoint");
            drop(fs::remove_file(pair.b.data.join("pg_wal").join(&name)));
        }
        let archive = archive.display().to_string();
        let command = format!("cp {archive}/%f \"%p\"");
        let args: Vec<&str> = match place {
            "archive" => vec!["--wal-archive", &archive],
            "restore_command" => vec!["--restore-command", &command],
            _ => vec![],
        };
        let ended = rewound(&pair, &args);
        assert_eq!(ended.field("strategy"), "fork", "{place}: {}", ended.text);
    }
}

#[test]
fn damage_in_the_middle_of_the_targets_wal_is_told_from_its_end() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.sql("update plain set n = 12");
    pair.a.stop("fast");
    let control = std::fs::read(pair.a.data.join("global/pg_control")).expect("control");
    let control = pg_format::ControlFile::parse(&control).expect("parses");
    let size = control.wal_segment_size;
    let number = size.segment_of(control.checkpoint);
    let name = pg_format::wal::SegmentName {
        timeline: control.timeline(),
        number,
    }
    .file_name(size);
    let path = pair.a.data.join("pg_wal").join(name);
    let mut bytes = fs::read(&path).expect("segment");
    // The shutdown checkpoint itself: what the window starts from.
    let at = usize::try_from(size.offset_of(control.checkpoint)).expect("fits");
    bytes[at + 30] ^= 0xFF;
    integration_tests::cluster::write(&path, &bytes);
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
}

#[test]
fn a_node_is_started_and_streams() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    // Its socket must not clash with the other node's.
    pair.a.configure(&format!(
        "unix_socket_directories = '{}'",
        pair.a.socket.display()
    ));
    let ended = rewind(&pair, &pair.a, &pair.b, &["--start"]);
    assert_eq!(ended.field("result"), "rewound");
    assert_eq!(
        pair.a.sql("select status from pg_stat_wal_receiver"),
        "streaming"
    );
    oracle::verify(&pair.a, &pair.b);
}

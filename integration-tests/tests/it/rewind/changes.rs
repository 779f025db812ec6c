//! What the two nodes hold when they part, and what must come of it.

use std::fs;

use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::steps::{part, rewind, rewound};

/// The strategies that go by what WAL says was changed.
const WINDOWED: [&str; 2] = ["fork", "latest"];

fn truncations(major: u32, strategy: &str) {
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
    rewound(&pair, &["--strategy", strategy]);
}

fn just_promoted(major: u32, strategy: &str) {
    let pair = Pair::new(major, Shape::default());
    pair.a.sql("checkpoint");
    pair.a.sql("update plain set n = 3");
    pair.catch_up();
    // Its restartpoint is old, and no checkpoint follows the promotion before the rewind.
    part(&pair);
    pair.a.stop("fast");
    rewound(&pair, &["--strategy", strategy]);
}

fn no_wal_kept(major: u32) {
    let pair = Pair::with(major, Shape::default(), "wal_keep_size = 0");
    part(&pair);
    pair.b.sql("select pg_switch_wal()");
    pair.b.sql("checkpoint");
    pair.b.sql("insert into plain values (80001, 'new', 1)");
    pair.a.stop("fast");
    // Nobody has the last common checkpoint any more; pg_rewind ends here.
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(ended.field("strategy_reason").contains("no WAL"), "{}", ended.text);
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn tails_truncations_and_drops_on_both_sides() { super::truncations($major, "fork"); }
        #[test]
        fn tails_truncations_and_drops_by_latest() { super::truncations($major, "latest"); }
        #[test]
        fn source_was_just_promoted_and_has_no_checkpoint_yet() {
            super::just_promoted($major, "fork");
        }
        #[test]
        fn no_wal_is_kept_on_either_side() { super::no_wal_kept($major); }
    })* };
}
on_major!(pg14 14, pg15 15, pg16 16, pg17 17, pg18 18);

#[test]
fn databases_created_and_dropped_on_either_side() {
    for strategy in WINDOWED {
        databases_made_and_dropped(strategy);
    }
}

fn databases_made_and_dropped(strategy: &str) {
    let pair = Pair::new(15, Shape::default());
    pair.b.promote();
    for (node, side) in [(&pair.a, "old"), (&pair.b, "new")] {
        node.sql(&format!("create database made_{side}"));
        node.sql_in(&format!("made_{side}"), "create table t as select generate_series(1, 500) g");
        node.sql("create database on_both");
        node.sql_in(
            "on_both",
            &format!("create table t as select g, '{side}' s from generate_series(1, 700) g"),
        );
    }
    pair.a.sql("drop database second");
    pair.b.sql("drop database doomed");
    pair.a.stop("fast");
    rewound(&pair, &["--strategy", strategy]);
}

#[test]
fn one_relfilenumber_was_created_on_both_sides() {
    for strategy in WINDOWED {
        one_relfilenumber(strategy);
    }
}

fn one_relfilenumber(strategy: &str) {
    let pair = Pair::new(15, Shape::default());
    pair.b.promote();
    pair.a.sql("create table twin as select g, 'old' s from generate_series(1, 9000) g");
    pair.b.sql("create table other_twin as select g, 'new' s from generate_series(1, 4000) g");
    let path =
        |node: &Node, table: &str| node.sql(&format!("select pg_relation_filepath('{table}')"));
    assert_eq!(path(&pair.a, "twin"), path(&pair.b, "other_twin"), "the scenario needs one path");
    pair.a.stop("fast");
    rewound(&pair, &["--strategy", strategy]);
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
        rewind(&pair, &pair.a, &pair.b, if mirrored { &["--extra-files", "mirror"] } else { &[] });
        let text = |name: &str| fs::read_to_string(pair.a.data.join(name)).unwrap_or_default();
        if mirrored {
            assert_eq!(
                (text("mine/only_old"), text("mine/only_new"), text("mine/both")),
                (String::new(), "new".into(), "new".into())
            );
        } else {
            assert_eq!(
                (text("mine/only_old"), text("mine/only_new"), text("mine/both")),
                ("old".into(), String::new(), "old".into())
            );
        }
        assert_eq!(before, fs::read(pair.a.data.join("postgresql.conf")).expect("conf"));
        oracle::verify(&pair.a, &pair.b);
    }
}

#[test]
fn pg_wal_is_a_symlink_to_another_file_system() {
    for strategy in WINDOWED {
        linked_pg_wal(strategy);
    }
}

fn linked_pg_wal(strategy: &str) {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    let elsewhere =
        tempfile::Builder::new().prefix("pgrwal").tempdir_in("/dev/shm").expect("directory");
    pair.a.user.own(elsewhere.path());
    let wal = pair.a.data.join("pg_wal");
    let moved = elsewhere.path().join("wal");
    integration_tests::command::run(pair.a.user.command("/bin/mv").arg(&wal).arg(&moved));
    std::os::unix::fs::symlink(&moved, &wal).expect("link");
    rewound(&pair, &["--strategy", strategy]);
    assert_eq!(fs::read_link(&wal).expect("still a link"), moved);
    assert!(moved.join(".pgrejoin/diverged").is_dir());
}

#[test]
fn other_segment_sizes() {
    for strategy in WINDOWED {
        segment_sizes(strategy);
    }
}

fn segment_sizes(strategy: &str) {
    for segment_mb in [1, 64] {
        let pair = Pair::new(15, Shape { segment_mb, ..Shape::default() });
        pair.a.sql("update plain set n = 2");
        pair.a.sql("checkpoint");
        pair.a.sql("update plain set n = 3 where id % 2 = 0");
        pair.catch_up();
        part(&pair);
        pair.a.sql("update plain set n = 8");
        pair.b.sql("update plain set n = 9");
        pair.a.kill();
        rewound(&pair, &["--strategy", strategy]);
    }
}

#[test]
fn tablespaces_keep_the_targets_own_places() {
    for strategy in WINDOWED {
        own_tablespaces(strategy);
    }
}

fn own_tablespaces(strategy: &str) {
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
    pair.a.sql(&format!("create tablespace away location '{}'", shared.display()));
    pair.a.sql("create table far(id int) tablespace away");
    pair.a.sql("insert into far select generate_series(1, 5000)");
    pair.a.stop("fast");
    fs::remove_dir_all(&pair.b.data).expect("removed");
    let b = pair.a.copy(&pair.b.socket);
    let own = place("space-b");
    integration_tests::command::run(
        b.user.command("/bin/cp").arg("-a").arg(format!("{}/.", shared.display())).arg(&own),
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
    rewound(&pair, &["--strategy", strategy]);
    let link = pair.a.data.join("pg_tblspc").join(link.file_name().expect("name"));
    assert_eq!(fs::read_link(link).expect("link"), shared);
}

#[test]
fn without_hint_logging_hints_of_lost_transactions_are_gone() {
    let shape = Shape { checksums: false, ..Shape::default() };
    let pair = Pair::new(15, shape);
    pair.a.sql("checkpoint");
    pair.b.promote();
    // A lost transaction's commit is remembered in hint bits on the old node alone.
    pair.a.sql("begin; update plain set n = -1 where id <= 2000; commit");
    pair.a.sql("select count(*) from plain");
    pair.b.sql("update plain set n = -2 where id between 1000 and 3000");
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
}

#[test]
fn a_target_without_any_wal_is_rewound_by_comparing() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    for entry in fs::read_dir(pair.a.data.join("pg_wal")).expect("dir").flatten() {
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
        let pair = Pair::new(15, Shape { group_access, ..Shape::default() });
        part(&pair);
        pair.b.sql("create database another");
        pair.a.stop("fast");
        rewind(&pair, &pair.a, &pair.b, &[]);
        let (file, directory) = if group_access { (0o640, 0o750) } else { (0o600, 0o700) };
        let mut visit =
            vec![pair.a.data.join("base"), pair.a.data.join("global"), pair.a.data.join("pg_wal")];
        while let Some(path) = visit.pop() {
            let mode = path.metadata().expect("metadata").mode() & 0o777;
            if path.is_dir() {
                assert_eq!(mode, directory, "{}", path.display());
                visit.extend(fs::read_dir(&path).expect("dir").flatten().map(|entry| entry.path()));
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
    pair.a.sql("select pg_create_physical_replication_slot('old_slot', true)");
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
        let number = control.wal_segment_size.segment_of(control.checkpoint_copy.redo);
        let name = pg_format::wal::SegmentName { timeline: control.timeline(), number }
            .file_name(control.wal_segment_size);
        let segment = pair.a.data.join("pg_wal").join(&name);
        if place == "source" {
            fs::remove_file(&segment).expect("removed");
        } else {
            integration_tests::command::run(
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
        let ended = rewound(&pair, &[&args[..], &["--strategy", "fork"]].concat());
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
    let name = pg_format::wal::SegmentName { timeline: control.timeline(), number }.file_name(size);
    let path = pair.a.data.join("pg_wal").join(name);
    let mut bytes = fs::read(&path).expect("segment");
    // The shutdown checkpoint itself: what the window starts from.
    let at = usize::try_from(size.offset_of(control.checkpoint)).expect("fits");
    bytes[at + 30] ^= 0xFF;
    integration_tests::cluster::write(&path, &bytes);
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
}

/// What cannot be read names no pages, but the nodes can still be compared.
#[test]
fn a_target_whose_wal_cannot_be_read_is_compared() {
    use std::os::unix::fs::PermissionsExt as _;
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    let unreadable = fs::Permissions::from_mode(0o000);
    for entry in fs::read_dir(pair.a.data.join("pg_wal")).expect("pg_wal").flatten() {
        if entry.file_type().expect("a type").is_file() {
            fs::set_permissions(entry.path(), unreadable.clone()).expect("mode");
        }
    }
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(ended.text.contains("not usable"), "{}", ended.text);
}

#[test]
fn a_node_is_started_and_streams() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    // Its socket must not clash with the other node's.
    pair.a.configure(&format!("unix_socket_directories = '{}'", pair.a.socket.display()));
    let ended = rewind(&pair, &pair.a, &pair.b, &["--start"]);
    assert_eq!(ended.field("result"), "rewound");
    assert_eq!(pair.a.sql("select status from pg_stat_wal_receiver"), "streaming");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_new_tablespace_is_mapped() {
    let pair = Pair::new(15, Shape::default());
    let place = |name: &str| {
        let path = pair.home.path().join(name);
        fs::create_dir_all(&path).expect("directory");
        pair.a.user.own(&path);
        path.display().to_string()
    };
    let (theirs, ours) = (place("their-space"), place("our-space"));
    part(&pair);
    pair.b.sql(&format!("create tablespace fresh location '{theirs}'"));
    pair.b.sql("create table in_it tablespace fresh as select g from generate_series(1, 5000) g");
    // Moved file by file: replay from the fork would lose it, and so does pg_rewind.
    pair.b.sql("alter database second set tablespace fresh");
    pair.b.sql("insert into plain values (81000, 'new', 1)");
    pair.a.stop("fast");
    let mapping = format!("{theirs}={ours}");
    let ended = rewound(&pair, &["--tablespace-mapping", &mapping]);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    let link = fs::read_dir(pair.a.data.join("pg_tblspc")).expect("dir").flatten().next();
    let link = fs::read_link(link.expect("a tablespace").path()).expect("a link");
    assert_eq!(link.display().to_string(), ours);
}

#[test]
fn a_database_copied_file_by_file_on_the_source_is_whole() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("create database copied template second strategy file_copy");
    pair.b.sql_in("second", "delete from other where id % 2 = 0");
    pair.b.sql_in("copied", "delete from other where id % 3 = 0");
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
}

fn control(node: &Node) -> pg_format::ControlFile {
    let bytes = fs::read(node.data.join("global/pg_control")).expect("control");
    pg_format::ControlFile::parse(&bytes).expect("parses")
}

/// Segments of a node from a number on.
fn segments_from(node: &Node, first: u64) -> Vec<std::path::PathBuf> {
    let size = control(node).wal_segment_size;
    let files = fs::read_dir(node.data.join("pg_wal")).expect("dir").flatten();
    let number = |path: &std::path::Path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some(pg_format::wal::SegmentName::parse(&name, size)?.number)
    };
    files.map(|file| file.path()).filter(|path| number(path).is_some_and(|n| n >= first)).collect()
}

/// What the target did since is recorded nowhere: its pages must not pass for common ones.
#[test]
fn a_target_whose_newest_wal_is_gone_has_not_lost_nothing() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("checkpoint");
    pair.catch_up();
    part(&pair);
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("update plain set n = 3 where id < 5000");
    pair.a.sql("checkpoint");
    pair.a.kill();
    let control = control(&pair.a);
    let redo = control.wal_segment_size.segment_of(control.checkpoint_copy.redo);
    for path in segments_from(&pair.a, redo) {
        fs::remove_file(path).expect("removed");
    }
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
}

#[test]
fn damage_in_a_segments_first_page_is_told_from_the_end() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("update plain set n = 12 where id < 9000");
    let last = pair.a.sql("select pg_walfile_name(pg_current_wal_lsn())");
    pair.a.kill();
    let path = pair.a.data.join("pg_wal").join(last);
    let mut bytes = fs::read(&path).expect("segment");
    bytes[..8192].fill(0);
    integration_tests::cluster::write(&path, &bytes);
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(ended.text.contains("intact records follow"), "{}", ended.text);
}

/// R10: hints may have gone unlogged in between, whatever is configured now.
#[test]
fn hint_logging_that_was_off_in_between_means_comparing() {
    let shape = Shape { checksums: false, wal_log_hints: true, ..Shape::default() };
    let pair = Pair::new(15, shape);
    part(&pair);
    for on in ["off", "on"] {
        pair.a.configure(&format!("wal_log_hints = {on}"));
        pair.a.stop("fast");
        pair.a.start();
        pair.a.sql("update plain set n = n + 1 where id < 300; select count(*) from plain");
    }
    pair.a.stop("fast");
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    assert!(ended.field("strategy_reason").contains("wal_log_hints"), "{}", ended.text);
}

/// R6: nothing that PostgreSQL could replay on the old branch, and nothing behind the end.
#[test]
fn pg_wal_holds_the_new_history_alone() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("update plain set n = 2");
    let wal = pair.a.data.join("pg_wal");
    pair.a.stop("fast");
    integration_tests::cluster::write(&wal.join("000000010000000000000002.partial"), "x");
    pair.a.user.own(&wal.join("000000010000000000000002.partial"));
    let ended = rewind(&pair, &pair.a, &pair.b, &[]);
    let control = control(&pair.a);
    let size = control.wal_segment_size;
    let position = |name: &str| ended.field(name).parse::<pg_format::Lsn>().expect("an LSN");
    let (fork, end) = (position("fork_lsn"), position("replay_to"));
    let (fork_segment, end_segment) = (size.segment_of(fork), size.segment_of(end));
    let names = |path: &std::path::Path| -> Vec<String> {
        let entries = fs::read_dir(path).expect("directory").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let status = names(&wal.join("archive_status"));
    for name in names(&wal) {
        assert!(!name.ends_with(".partial"), "{name} is left");
        let Some(segment) = pg_format::wal::SegmentName::parse(&name, size) else { continue };
        if segment.number == fork_segment && segment.timeline.get() == 1 {
            // As on a node that went through the switch: nothing behind the fork.
            let bytes = fs::read(wal.join(&name)).expect("a segment");
            let offset = usize::try_from(size.offset_of(fork)).expect("fits");
            assert!(bytes[offset..].iter().all(|byte| *byte == 0), "bytes behind the fork");
            assert!(status.contains(&format!("{name}.done")), "{name} {status:?}");
            continue;
        }
        let expected = if segment.number >= fork_segment { 2 } else { 1 };
        assert_eq!(segment.timeline.get(), expected, "{name}");
        assert!(segment.number <= end_segment, "{name} lies behind the end");
        // What is complete need not be archived by us; what is not will be.
        let placed = segment.number >= fork_segment && segment.number < end_segment;
        assert_eq!(status.contains(&format!("{name}.done")), placed, "{name} {status:?}");
    }
    let last = pg_format::wal::SegmentName { timeline: control.timeline(), number: end_segment };
    let bytes = fs::read(wal.join(last.file_name(size))).expect("the last segment");
    let offset = usize::try_from(size.offset_of(end)).expect("fits");
    assert!(bytes[offset..].iter().all(|byte| *byte == 0), "bytes behind the end");
    assert!(wal.join("00000002.history").exists());
    let kept = pair.a.data.join(format!(".pgrejoin/diverged/1-{:X}", fork.as_u64()));
    let kept = names(&kept);
    assert!(kept.len() >= 2 && kept.iter().all(|name| name.starts_with("00000001")), "{kept:?}");
    oracle::verify(&pair.a, &pair.b);
}

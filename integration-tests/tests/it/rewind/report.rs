//! What the operator sees and gets besides the data: settings, a started node, a report.

use std::fs;

use integration_tests::client::state_directory;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::snapshot::Snapshot;
use integration_tests::steps::{Served, part, rewind};

/// A parted pair with a stopped target whose socket does not clash, and everything to rewind it.
fn parted() -> (Pair, Served) {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    pair.a.configure(&format!("unix_socket_directories = '{}'", pair.a.socket.display()));
    let served = Served::start(pair.home.path(), &pair.b);
    (pair, served)
}

#[test]
fn a_node_that_does_not_start_is_told_about() {
    let (pair, served) = parted();
    pair.a.configure("shared_preload_libraries = 'no_such_library'");
    let rewind = served.rewind(&pair.a).following(&pair.b).args(["--start"]);
    // The reason is in the server's log, and the node is rewound all the same.
    let ended = rewind.refuse(9, "no_such_library");
    assert!(ended.text.contains("is rewound and may be started"), "{}", ended.text);
    assert!(!state_directory(&pair.a.data).join("sealed").exists());
    pair.a.configure("shared_preload_libraries = ''");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_node_that_does_not_stream_is_left_running() {
    let (pair, served) = parted();
    let nowhere = format!("host={} port=5432 user=postgres", pair.home.path().display());
    let rewind = served
        .rewind(&pair.a)
        .args(["-R", "--primary-conninfo", &nowhere, "--start"])
        .timeout("4s");
    let ended = rewind.refuse(9, "does not stream");
    assert!(ended.text.contains("is left running"), "{}", ended.text);
    assert!(ended.text.contains("which does not answer"), "{}", ended.text);
    assert!(pair.a.is_running());
    pair.a.stop("fast");
}

#[test]
fn without_hot_standby_consistency_is_read_from_pg_control() {
    let (pair, served) = parted();
    pair.a.configure("hot_standby = off");
    served.rewind(&pair.a).following(&pair.b).args(["--start"]).succeed();
    let control = fs::read(pair.a.data.join("global/pg_control")).expect("control");
    let control = pg_format::ControlFile::parse(&control).expect("parses");
    assert!(!control.backup_start_point.is_valid());
    assert_eq!(pair.b.sql("select state from pg_stat_replication"), "streaming");
    pair.a.stop("fast");
    pair.a.configure("hot_standby = on");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_node_that_lost_nothing_is_started_too() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("insert into plain values (70001, 'shared', 1)");
    pair.a.stop("fast");
    pair.b.wait("postgres", "exists(select from plain where id = 70001)");
    pair.b.promote();
    pair.b.sql("insert into plain values (70002, 'new', 1)");
    pair.a.configure(&format!("unix_socket_directories = '{}'", pair.a.socket.display()));
    // Without being asked for more it is only warned about: as it is, it would take writes.
    let served = Served::start(pair.home.path(), &pair.b);
    let before = Snapshot::of(&pair.a.data);
    let warned = served.rewind(&pair.a).succeed();
    assert!(warned.text.contains("no standby.signal"), "{}", warned.text);
    before.assert_same(&Snapshot::of(&pair.a.data));
    let ended = rewind(&pair, &pair.a, &pair.b, &["--start"]);
    assert_eq!(ended.field("result"), "no_rewind_required", "{}", ended.text);
    assert!(!state_directory(&pair.a.data).exists());
    assert_eq!(pair.a.sql("select status from pg_stat_wal_receiver"), "streaming");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn settings_are_written_as_postgres_reads_them() {
    use std::os::unix::fs::PermissionsExt as _;
    let (pair, served) = parted();
    let auto = pair.a.data.join("postgresql.auto.conf");
    integration_tests::cluster::append(
        &auto,
        "# kept\nprimary_conninfo = 'old'\nwork_mem = '5MB'\n",
    );
    // Read-only keeps ALTER SYSTEM out, not us.
    fs::set_permissions(&auto, fs::Permissions::from_mode(0o440)).expect("chmod");
    let odd = format!("{} application_name='o\\\\n\\'e two'", pair.b.conninfo());
    let file = pair.home.path().join("conninfo");
    integration_tests::cluster::write(&file, format!("{odd}\n"));
    pair.a.user.own(&file);
    let at_file = format!("@{}", file.display());
    served.rewind(&pair.a).args(["-R", "--primary-conninfo", &at_file]).succeed();
    let text = fs::read_to_string(&auto).expect("settings");
    assert!(text.contains("# kept\nwork_mem = '5MB'\n"), "{text}");
    assert_eq!(text.matches("primary_conninfo").count(), 1, "{text}");
    let mode = fs::metadata(&auto).expect("metadata").permissions().mode() & 0o777;
    assert_eq!(mode, 0o440, "the mode was not kept");
    pair.a.start();
    assert_eq!(pair.a.sql("show primary_conninfo"), odd);
    pair.a.wait("postgres", "exists(select from pg_stat_wal_receiver where status = 'streaming')");
    assert_eq!(pair.b.sql("select application_name from pg_stat_replication"), "o\\n'e two");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn settings_that_cannot_be_written_are_refused_before_anything_changes() {
    let (pair, served) = parted();
    let auto = pair.a.data.join("postgresql.auto.conf");
    let elsewhere = pair.home.path().join("managed.conf");
    fs::copy(&auto, &elsewhere).expect("copied");
    pair.a.user.own(&elsewhere);
    fs::remove_file(&auto).expect("removed");
    std::os::unix::fs::symlink(&elsewhere, &auto).expect("linked");
    let before = Snapshot::of(&pair.a.data);
    let rewind = || served.rewind(&pair.a);
    rewind().following(&pair.b).refuse(7, "is a symbolic link");
    let two_lines = ["-R", "--primary-conninfo", "host=a\nport=1"];
    rewind().args(two_lines).refuse(2, "must be one line");
    before.assert_same(&Snapshot::of(&pair.a.data));
    // Without -R the link is none of our business, and stays.
    rewind().succeed();
    assert_eq!(fs::read_link(&auto).expect("still a link"), elsewhere);
}

#[test]
fn the_sources_configuration_is_taken_where_asked_for() {
    let (pair, served) = parted();
    pair.b.sql("alter system set work_mem = '7MB'");
    let own = pair.a.data.join("pg_hba.conf");
    integration_tests::cluster::append(&own, "# the target's own\n");
    // The source's configuration lies elsewhere, as on Debian: the target's stays.
    let ident = pair.b.data.join("pg_ident.conf");
    let moved = pair.home.path().join("pg_ident.conf");
    integration_tests::command::run(pair.b.user.command("/bin/mv").arg(&ident).arg(&moved));
    std::os::unix::fs::symlink(&moved, &ident).expect("linked");
    served.rewind(&pair.a).following(&pair.b).args(["--config-files", "source"]).succeed();
    let text = |path| fs::read_to_string(path).expect("configuration");
    assert_eq!(text(own), text(pair.b.data.join("pg_hba.conf")));
    assert!(pair.a.data.join("pg_ident.conf").exists(), "the target's own file is gone");
    let auto = text(pair.a.data.join("postgresql.auto.conf"));
    assert!(auto.contains("work_mem = '7MB'") && auto.contains("primary_conninfo"), "{auto}");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_dry_run_moves_metadata_only() {
    let (pair, served) = parted();
    let before = Snapshot::of(&pair.a.data);
    for strategy in ["auto", "compare"] {
        let ended = served.rewind(&pair.a).args(["-n", "--strategy", strategy]).succeed();
        assert_eq!(ended.field("result"), "would_rewind");
        assert!(!ended.events("planned").is_empty(), "{}", ended.text);
    }
    before.assert_same(&Snapshot::of(&pair.a.data));
    drop(served.rewind(&pair.a).succeed());
    // The sessions of the dry runs came first; only the last run was given data.
    let log = served.server.log_text();
    let given: Vec<&str> = log.lines().filter(|line| line.contains("session ended")).collect();
    let data = |line: &&str| ["pages=", "files=", "wal="].iter().any(|kind| line.contains(kind));
    let first = given.iter().position(data).expect("the real run was given data");
    let hashes = given.iter().take(first).filter(|line| line.contains("hashes=")).count();
    assert!(hashes > 0, "{log}");
    assert!(given.iter().skip(first).all(|line| line.contains("client")), "{log}");
}

#[test]
fn the_report_for_people_says_what_happened() {
    let (pair, served) = parted();
    let ended =
        served.rewind(&pair.a).following(&pair.b).for_people().args(["--progress"]).succeed();
    for words in [
        "the target is rewound and follows timeline 2",
        "fork point",
        "strategy    fork: ",
        "pages in",
        "replay      from ",
        "source WAL",
        "bytes of data",
        "of page hashes",
        "times       inspect ",
        "kept in .pgrejoin/diverged/1-",
        "pgrejoin: fetch\n",
        "(100%)",
    ] {
        assert!(ended.text.contains(words), "\"{words}\" is not in: {}", ended.text);
    }
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_reader_that_went_away_does_not_stop_a_rewind() {
    let (pair, served) = parted();
    let rewind = served.rewind(&pair.a).following(&pair.b).args(["--progress"]);
    let mut child = rewind.into_command().spawn().expect("pgrejoin starts");
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().expect("pgrejoin ends").success());
    assert!(pair.a.waits_for_its_first_start());
    oracle::verify(&pair.a, &pair.b);
}

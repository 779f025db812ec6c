//! What the next call, the next server and the next day find after a rewind.

use std::fs;

use integration_tests::client::{Rewind, state_command, state_directory};
use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::snapshot::Content;
use integration_tests::steps::{Served, follow_instead, part, rewind, rewound};

/// A manager calls again when it does not know how the last call ended.
#[test]
fn a_second_call_before_the_first_start_is_told_that_it_is_done() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    pair.a.configure(&format!("unix_socket_directories = '{}'", pair.a.socket.display()));
    let served = Served::start(pair.home.path(), &pair.b);
    let rewind = || served.rewind(&pair.a).following(&pair.b);
    assert_eq!(rewind().succeed().field("result"), "rewound");
    let done = Content::of(&pair.a.data);
    let again = rewind().succeed();
    assert_eq!(again.field("result"), "already_rewound", "{}", again.text);
    let dry = rewind().args(["-n"]).succeed();
    assert_eq!(dry.field("result"), "already_rewound", "{}", dry.text);
    for (what, code) in [("status", 16), ("resume", 0)] {
        let said = state_command(what, &pair.a);
        assert_eq!(said.code, code, "{}", said.text);
        assert!(said.text.contains("has not been started on it yet"), "{}", said.text);
    }
    done.assert_same(&Content::of(&pair.a.data));
    let started = rewind().args(["--start"]).succeed();
    assert_eq!(started.field("result"), "already_rewound", "{}", started.text);
    assert_eq!(pair.a.sql("select status from pg_stat_wal_receiver"), "streaming");
    // Once it has run it is a node like any other.
    pair.a.stop("fast");
    assert_eq!(rewind().succeed().field("result"), "no_rewind_required");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_target_that_was_never_started_is_rewound_again_to_another_timeline() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    part(&pair);
    follow_instead(&c, &pair.b);
    c.start();
    let lsn = pair.b.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    c.stop("fast");
    pair.b.sql("update plain set n = 4 where id < 900");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    assert_eq!(rewind(&pair, &pair.a, &pair.b, &[]).field("result"), "rewound");
    // The new primary dies, and another one is elected that does not have all of it.
    pair.b.kill();
    c.elect();
    c.sql("update plain set n = 8 where id between 500 and 1500");
    c.sql("checkpoint");
    let ended = rewind(&pair, &pair.a, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

/// Two nodes that were promoted without knowing of each other have one timeline number and two histories.
#[test]
fn a_target_that_was_never_started_does_not_follow_another_history_of_the_same_number() {
    let pair = Pair::new(15, Shape::default());
    let c = pair.b.copy_running(&pair.a, &pair.home.path().join("c"));
    pair.a.sql("update plain set n = 3 where id % 70 = 0");
    let lsn = pair.a.lsn();
    for node in [&pair.b, &c] {
        node.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    }
    pair.a.stop("fast");
    let end = pair.b.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{end}'"));
    for (node, words) in [(&pair.b, "of b"), (&c, "of c")] {
        node.promote();
        node.sql(&format!(
            "insert into plain select g, '{words}', 1 from generate_series(70001, 70300) g"
        ));
    }
    pair.a.start();
    pair.a.sql("insert into plain select g, 'lost', 1 from generate_series(70001, 71000) g");
    pair.a.stop("fast");
    assert_eq!(rewind(&pair, &pair.a, &pair.b, &[]).field("result"), "rewound");
    pair.b.kill();
    let ended = rewind(&pair, &pair.a, &c, &[]);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

/// What was saved for the way back is not saved again, and the way back does not get lost.
#[test]
fn undo_images_outlive_a_run_that_died() {
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    part(&pair);
    pair.a.sql("update plain set n = n + 1");
    pair.b.sql("update plain set n = n + 2");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let pki = Pki::new(pair.home.path());
    let before = Content::of(&pair.a.data);
    let slow = Server::with(&pair.b, &pki, 0, &["--max-rate", "500k"]);
    let mut running = Rewind::new(&pair.a, &slow, &pki).following(&pair.b).spawn();
    running.wait_for("fetch");
    let undo = state_directory(&pair.a.data).join("undo");
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&undo).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    running.wait_until("images", |_| !names().is_empty());
    std::thread::sleep(std::time::Duration::from_millis(1500));
    running.signal(rustix::process::Signal::KILL);
    running.wait();
    drop(slow);
    let server = Server::start(&pair.b, &pki);
    let saved = names();
    // Killed when it has begun to change the target.
    let mut running = Rewind::new(&pair.a, &server, &pki).following(&pair.b).spawn();
    let hidden = state_directory(&pair.a.data).join("hidden");
    while !hidden.exists() && running.child.try_wait().expect("status").is_none() {}
    running.signal(rustix::process::Signal::KILL);
    running.wait();
    assert!(state_command("status", &pair.a).text.contains("has not finished"));
    let kept = names().into_iter().filter(|name| name.contains("planned")).collect::<Vec<_>>();
    assert_eq!(kept, saved, "other images were saved, or none is left");
    let back = state_command("rollback", &pair.a);
    assert_eq!(back.code, 0, "{}", back.text);
    before.assert_same(&Content::of(&pair.a.data));
    rewound(&pair, &[]);
}

/// Somebody else's base backup is not ours to begin with.
#[test]
fn a_base_backup_that_was_never_started_is_refused() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    assert_eq!(rewind(&pair, &pair.a, &pair.b, &[]).field("result"), "rewound");
    let label = pair.a.data.join("backup_label");
    let text = fs::read_to_string(&label).expect("a label");
    let others: String = text.lines().filter(|line| !line.starts_with("LABEL")).fold(
        String::new(),
        |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        },
    );
    integration_tests::cluster::write(&label, others);
    let pki_home = pair.home.path().join("again");
    fs::create_dir(&pki_home).expect("directory");
    let served = Served::start(&pki_home, &pair.b);
    served.rewind(&pair.a).refuse(3, "base backup whose recovery has not finished");
}

fn segments(node: &Node) -> usize {
    let count = "select count(*) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'";
    node.sql(count).parse().expect("a number")
}

/// A node that summarizes WAL must find no gap: it would keep WAL for ever.
fn wal_is_recycled_afterwards(major: u32, strategy: &str) {
    let settings = "summarize_wal = on\nmin_wal_size = 2MB\nmax_wal_size = 4MB";
    let pair = Pair::with(major, Shape { segment_mb: 1, ..Shape::default() }, settings);
    let switch = |node: &Node, from: u32| {
        node.sql(&format!(
            "insert into grow select g, repeat('x', 30) from generate_series({from}, {from} + 50) g; select pg_switch_wal()"
        ));
    };
    (0..3).for_each(|round| switch(&pair.a, round));
    pair.catch_up();
    pair.a.sql("checkpoint");
    // By *fork* replay begins in a segment before the one in which the timeline changes.
    if strategy == "fork" {
        switch(&pair.a, 50);
    }
    pair.catch_up();
    pair.b.promote();
    pair.a.sql("update plain set n = 5 where id % 9 = 0");
    (0..2).for_each(|round| switch(&pair.b, 100 + round));
    pair.b.sql("checkpoint");
    pair.b.sql("insert into plain values (70001, 'new', 1)");
    pair.a.stop("fast");
    let ended = rewind(&pair, &pair.a, &pair.b, &["--strategy", strategy]);
    assert_eq!(ended.field("strategy"), strategy, "{}", ended.text);
    let kept = fs::read_dir(pair.a.data.join("pg_wal/summaries")).map_or(0, Iterator::count);
    assert_eq!(kept, 0, "summaries are left that do not reach to the start of replay");
    pair.a.configure("wal_keep_size = 0");
    pair.a.start();
    for round in 0..10 {
        for part in 0..3 {
            switch(&pair.b, 1000 * round + 100 * part);
        }
        pair.b.sql("checkpoint");
        let lsn = pair.b.lsn();
        pair.a.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
        pair.a.sql("checkpoint");
    }
    pair.a.wait(
        "postgres",
        "(select pg_last_wal_replay_lsn() - summarized_lsn < 3 * 1024 * 1024 from pg_get_wal_summarizer_state())",
    );
    pair.a.sql("checkpoint");
    assert!(segments(&pair.a) < 15, "{} segments are kept", segments(&pair.a));
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_node_that_summarizes_wal_recycles_it_afterwards() {
    for major in [17, 18] {
        wal_is_recycled_afterwards(major, "latest");
        wal_is_recycled_afterwards(major, "fork");
    }
}

/// WAL that ends with a segment has no next one, and nobody needs it.
#[test]
fn wal_that_ends_with_a_segment_is_not_missing() {
    for strategy in ["auto", "compare"] {
        for stopped in [false, true] {
            let pair = Pair::with(15, Shape::default(), "autovacuum = off");
            pair.a.sql("update plain set n = 4 where id < 100");
            pair.a.sql("select pg_switch_wal()");
            let end = pair.a.sql("select pg_current_wal_lsn()");
            pair.b.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{end}'"));
            pair.a.kill();
            pair.b.stop("fast");
            // Segments that PostgreSQL made ready for later are not there on every node.
            let number = end.parse::<pg_format::Lsn>().expect("a position").as_u64() / (16 << 20);
            for node in [&pair.a, &pair.b] {
                for entry in fs::read_dir(node.data.join("pg_wal")).expect("pg_wal").flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let later = name.len() == 24
                        && u64::from_str_radix(&name[16..], 16).is_ok_and(|found| found >= number);
                    if later {
                        fs::remove_file(entry.path()).expect("removed");
                    }
                }
            }
            if !stopped {
                pair.b.start();
            }
            let ended = rewind(&pair, &pair.a, &pair.b, &["--strategy", strategy]);
            let expected = if strategy == "auto" { "no_rewind_required" } else { "rewound" };
            assert_eq!(ended.field("result"), expected, "{strategy}: {}", ended.text);
            if stopped {
                pair.b.start();
            }
            pair.b.promote();
            pair.a.start();
            oracle::verify(&pair.a, &pair.b);
        }
    }
}

/// Advice that is followed must help.
#[test]
fn whoever_insists_on_the_fork_is_told_what_helps() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("create database copied template second strategy file_copy");
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let insist = || served.rewind(&pair.a).args(["--strategy", "fork"]);
    insist().refuse(7, "use --strategy latest or auto");
    // The start of replay by fork stays, whatever the source does.
    pair.b.sql("checkpoint");
    insist().refuse(7, "use --strategy latest or auto");
    drop(served);
    let ended = rewound(&pair, &["--strategy", "latest"]);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
}

/// A standby has replayed the copy of a database, but has no restartpoint behind it yet.
#[test]
fn whoever_insists_on_the_fork_of_a_standby_is_told_to_checkpoint_it_first() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    part(&pair);
    follow_instead(&c, &pair.b);
    c.start();
    pair.b.sql("create database copied template second strategy file_copy");
    let lsn = pair.b.lsn();
    c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &c);
    let insist = || served.rewind(&pair.a).args(["--strategy", "fork"]);
    insist().refuse(7, "run CHECKPOINT on the source, then use --strategy latest or auto");
    c.sql("checkpoint");
    drop(served);
    let ended = rewind(&pair, &pair.a, &c, &["--strategy", "latest"]);
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    oracle::verify(&pair.a, &c);
}

#[test]
fn the_report_says_how_long_the_source_keeps_what_is_needed_next() {
    let pair = Pair::with(15, Shape { segment_mb: 1, ..Shape::default() }, "wal_keep_size = 0");
    part(&pair);
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let ended = served.rewind(&pair.a).following(&pair.b).for_people().succeed();
    for words in ["this node needs next for about", "start the node now", "a replication slot"] {
        assert!(ended.text.contains(words), "\"{words}\" is not in: {}", ended.text);
    }
    oracle::verify(&pair.a, &pair.b);
}

/// Old WAL that nobody has archived yet stays, although replay does not need it.
#[test]
fn old_wal_that_waits_to_be_archived_stays() {
    let pair = Pair::with(15, Shape { segment_mb: 1, ..Shape::default() }, "");
    let oldest = pair.a.sql("select min(name) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'");
    for _ in 0..3 {
        pair.a.sql(
            "insert into grow select g, 'x' from generate_series(1, 50) g; select pg_switch_wal()",
        );
    }
    pair.a.sql("checkpoint");
    pair.catch_up();
    part(&pair);
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let mark = pair.a.data.join("pg_wal/archive_status").join(format!("{oldest}.ready"));
    integration_tests::cluster::write(&mark, "");
    pair.a.user.own(&mark);
    let before = fs::read_dir(pair.a.data.join("pg_wal")).expect("pg_wal").count();
    let ended = rewound(&pair, &["--strategy", "latest"]);
    assert!(ended.text.contains("waits to be archived"), "{}", ended.text);
    assert!(mark.exists() && pair.a.data.join("pg_wal").join(&oldest).exists());
    assert!(before > 3, "the scenario needs more WAL");
    assert!(!state_directory(&pair.a.data).join("sealed").exists());
}

//! Runs that end in the middle of changing the target: PostgreSQL must not start, and a second run or
//! `resume` finishes.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use integration_tests::client::{Rewind, state_command};
use integration_tests::cluster::Node;
use integration_tests::kills::traced;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::snapshot::Content;
use integration_tests::steps::Served;
use rustix::process::Signal;

/// Rounds tried to meet the fraction of a second in which the target is being changed.
const ROUNDS_MAX: u64 = 60;

fn fork_with_much_to_change() -> Pair {
    let pair = Pair::new(15, Shape::default());
    pair.b.promote();
    pair.a.sql("update plain set n = 5");
    pair.b.sql("create table bulk as select g id, md5(g::text) a, md5((g * 3)::text) b from generate_series(1, 150000) g");
    // Many files, each of which is waited for.
    let many: String =
        (0..400).map(|i| format!("create table many_{i} as select {i} g;")).collect();
    pair.b.script("postgres", &many);
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    pair
}

/// Sends `signal` while a fresh copy of the target is being changed, as often as it takes to find it
/// unfinished; the copy and the exit code.
fn interrupted(pair: &Pair, server: &Server, pki: &Pki, signal: Signal) -> (Node, i32) {
    for round in 0..ROUNDS_MAX {
        let copy = pair.a.copy(&pair.home.path().join(format!("round-{round}")));
        let mut running = Rewind::new(&copy, server, pki).following(&pair.b).spawn();
        running.wait_for("apply");
        sleep(Duration::from_millis((round * 37 + 20) % 300));
        running.signal(signal);
        let ended = running.wait();
        let marked = copy.data.join(".pgrejoin/hidden").exists();
        if marked && state_command("status", &copy).text.contains("has not finished") {
            return (copy, ended.code);
        }
        fs::remove_dir_all(&copy.socket).expect("removed");
    }
    unreachable!("the target was never found unfinished in {ROUNDS_MAX} rounds");
}

fn assert_does_not_start(node: &Node) {
    assert!(!node.data.join("global/pg_control").exists());
    assert!(!node.try_start(), "PostgreSQL started in the middle of a rewind");
}

#[test]
fn a_run_killed_while_it_changes_the_target_is_finished_without_the_source() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    let (target, _) = interrupted(&pair, &served.server, &served.pki, Signal::KILL);
    assert_does_not_start(&target);
    drop(served);
    let resumed = state_command("resume", &target);
    assert_eq!(resumed.code, 0, "{}", resumed.text);
    assert!(!target.data.join(".pgrejoin/sealed").exists());
    oracle::verify(&target, &pair.b);
}

#[test]
fn a_run_killed_while_it_changes_the_target_is_taken_back_without_the_source() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    let before = Content::of(&pair.a.data);
    let (target, _) = interrupted(&pair, &served.server, &served.pki, Signal::KILL);
    assert_does_not_start(&target);
    let Served { pki, server } = served;
    drop(server);
    let back = state_command("rollback", &target);
    assert_eq!(back.code, 0, "{}", back.text);
    before.assert_same(&Content::of(&target.data));
    // It is what it was: a primary on its old timeline that knows what it had.
    target.start();
    assert_eq!(target.sql("select count(*) from plain where n = 5"), "20000");
    target.stop("fast");
    let server = Server::start(&pair.b, &pki);
    Rewind::new(&target, &server, &pki).following(&pair.b).succeed();
    oracle::verify(&target, &pair.b);
}

/// Half changed a node cannot be started, and the end is near: the run goes on to it.
#[test]
fn a_run_terminated_while_it_changes_the_target_goes_on_to_its_end() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    let mut running = served.rewind(&pair.a).following(&pair.b).spawn();
    running.wait_for("apply");
    let hidden = pair.a.data.join(".pgrejoin/hidden");
    running.wait_until("the hide", |_| hidden.exists());
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

/// A second signal is an order, and the state it leaves is one that can be finished.
#[test]
fn a_second_signal_ends_a_run_that_changes_the_target() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    for round in 0..ROUNDS_MAX {
        let target = pair.a.copy(&pair.home.path().join(format!("round-{round}")));
        let mut running = served.rewind(&target).following(&pair.b).spawn();
        running.wait_for("apply");
        let hidden = target.data.join(".pgrejoin/hidden");
        running.wait_until("the hide", |_| hidden.exists());
        running.signal(Signal::TERM);
        // Two that come at one time are one.
        sleep(Duration::from_millis(5));
        running.signal(Signal::TERM);
        let ended = running.wait();
        if ended.code == 8 {
            assert!(ended.text.contains("stopped by a second signal"), "{}", ended.text);
            assert_does_not_start(&target);
            let ended = served.rewind(&target).following(&pair.b).succeed();
            assert_eq!(ended.field("result"), "resumed", "{}", ended.text);
            return oracle::verify(&target, &pair.b);
        }
        assert_eq!(ended.code, 0, "{}", ended.text);
        fs::remove_dir_all(&target.socket).expect("removed");
    }
    unreachable!("no run was ended by a second signal in {ROUNDS_MAX} rounds");
}

/// An unfinished target into which somebody has put the old `pg_control` back.
fn interrupted_with_control(pair: &Pair, server: &Server, pki: &Pki) -> Node {
    let (target, _) = interrupted(pair, server, pki, Signal::KILL);
    let control = target.data.join("global/pg_control");
    fs::copy(pair.a.data.join("global/pg_control"), &control).expect("copied");
    target.user.own(&control);
    target
}

/// A manager's helping hand: PostgreSQL must not start from a mixture, with or without the pid file we hold, and
/// the rewind is finished or taken back all the same.
#[test]
fn a_control_file_put_back_does_not_let_postgres_start() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    // A server that is refused leaves the options it was started with.
    let content = |node: &Node| Content::without(&node.data, &["postmaster.opts"]);
    let before = content(&pair.a);
    for ending in ["rewind", "resume", "rollback"] {
        let target = interrupted_with_control(&pair, &served.server, &served.pki);
        let status = state_command("status", &target);
        assert!(status.text.contains("has not finished"), "{}", status.text);
        let pid_file = target.data.join("postmaster.pid");
        assert!(!target.try_start(), "PostgreSQL started from a mixture");
        drop(fs::remove_file(&pid_file));
        assert!(!target.try_start(), "PostgreSQL started from a mixture");
        assert!(target.log_tail().contains("backup_label"), "{}", target.log_tail());
        let mut single = target.user.command(target.install.program("postgres"));
        let single = single.arg("--single").arg("-D").arg(&target.data).arg("postgres").output();
        assert!(!single.expect("it runs").status.success(), "a single user started from a mixture");
        match ending {
            "rewind" => {
                let ended = served.rewind(&target).following(&pair.b).succeed();
                assert_eq!(ended.field("result"), "resumed", "{}", ended.text);
            }
            ending => {
                let ended = state_command(ending, &target);
                assert_eq!(ended.code, 0, "{}", ended.text);
            }
        }
        match ending {
            "rollback" => before.assert_same(&content(&target)),
            _ => oracle::verify_running(&target, &pair.b),
        }
        if target.is_running() {
            target.stop("fast");
        }
        fs::remove_dir_all(&target.socket).expect("removed");
    }
}

/// Where a copy of the target was killed after it had removed the tablespace `oid`.
fn killed_without_tablespace(
    pair: &Pair,
    (server, pki): (&Server, &Pki),
    place: &Path,
    first: &mut u64,
) -> Node {
    let saved = pair.home.path().join("saved");
    let copy = |from: &Path, to: &Path| {
        let mut copy = pair.a.user.command("/bin/cp");
        integration_tests::command::run(copy.arg("-a").arg(from).arg(to));
    };
    if !saved.exists() {
        copy(place, &saved);
    }
    let links = |node: &Node| fs::read_dir(node.data.join("pg_tblspc")).expect("read").count();
    for number in *first..=ROUNDS_MAX {
        *first = number;
        fs::remove_dir_all(place).expect("removed");
        copy(&saved, place);
        let target = pair.a.copy(&pair.home.path().join(format!("killed-{number}")));
        let rewind = Rewind::new(&target, server, pki).following(&pair.b);
        let number = usize::try_from(number).expect("small");
        drop(traced(&rewind.into_command(), "renameat", number).output().expect("strace runs"));
        if links(&target) == 0 && target.data.join(".pgrejoin/hidden").exists() {
            return target;
        }
        fs::remove_dir_all(&target.socket).expect("removed");
    }
    unreachable!("no rename comes after that of the tablespace");
}

/// What lies in a removed tablespace is found by the next program too, although its link is gone.
#[test]
fn a_tablespace_of_the_target_alone_comes_back_or_goes_whole() {
    let pair = Pair::new(15, Shape::default());
    let place = pair.home.path().join("only-here");
    fs::create_dir(&place).expect("made");
    pair.a.user.own(&place);
    pair.b.promote();
    pair.a.sql(&format!("create tablespace only_here location '{}'", place.display()));
    pair.a.sql("create table there tablespace only_here as select generate_series(1, 5000) g");
    pair.b.sql("update plain set n = 3");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let (before, there) = (Content::of(&pair.a.data), Content::of(&place));
    // The call that is found serves both ways.
    let mut first = 1;
    let target =
        killed_without_tablespace(&pair, (&served.server, &served.pki), &place, &mut first);
    let back = state_command("rollback", &target);
    assert_eq!(back.code, 0, "{}", back.text);
    before.assert_same(&Content::of(&target.data));
    there.assert_same(&Content::of(&place));
    target.start();
    assert_eq!(target.sql("select count(*) from there"), "5000");
    target.stop("fast");
    fs::remove_dir_all(&target.socket).expect("removed");
    let target =
        killed_without_tablespace(&pair, (&served.server, &served.pki), &place, &mut first);
    drop(served);
    let resumed = state_command("resume", &target);
    assert_eq!(resumed.code, 0, "{}", resumed.text);
    assert_eq!(fs::read_dir(&place).expect("readable").count(), 0, "files are left in it");
    oracle::verify(&target, &pair.b);
}

/// A server that ran on a half-changed directory wrote to it: neither way leads to a right node then.
#[test]
fn a_server_that_ran_on_a_mixture_is_told_and_nothing_is_promised() {
    let pair = fork_with_much_to_change();
    let served = Served::start(pair.home.path(), &pair.b);
    let target = interrupted_with_control(&pair, &served.server, &served.pki);
    drop(fs::remove_file(target.data.join("postmaster.pid")));
    drop(fs::remove_file(target.data.join("backup_label")));
    assert!(target.try_start(), "{}", target.log_tail());
    target.stop("fast");
    let words = "PostgreSQL has run on the partly changed data directory";
    let status = state_command("status", &target);
    assert!(status.text.contains(words), "{}", status.text);
    served.rewind(&target).refuse(8, words);
    for what in ["resume", "rollback"] {
        let ended = state_command(what, &target);
        assert_eq!(ended.code, 8, "{}", ended.text);
        assert!(ended.text.contains(words), "{}", ended.text);
    }
}

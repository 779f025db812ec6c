//! Peers and neighbours that are not believed.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use integration_tests::client::{Rewind, state_command};
use integration_tests::cluster::{Node, write};
use integration_tests::command::run;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::snapshot::Snapshot;
use integration_tests::steps::{Served, part};
use rustix::process::Signal;

/// A fork with a stopped target, and a stopped copy of the source's data to do harm to.
fn with_a_stopped_source() -> (Pair, Node, Pki) {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    pair.b.stop("fast");
    let pki = Pki::new(pair.home.path());
    let liar = pair.b.copy(&pair.home.path().join("liar"));
    (pair, liar, pki)
}

fn refused(pair: &Pair, liar: &Node, pki: &Pki, (code, words): (i32, &str)) {
    let server = Server::start(liar, pki);
    let before = Snapshot::of(&pair.a.data);
    for strategy in ["auto", "compare"] {
        let rewind = Rewind::new(&pair.a, &server, pki).following(&pair.b);
        rewind.args(["--strategy", strategy]).refuse(code, words);
        before.assert_same(&Snapshot::of(&pair.a.data));
    }
}

fn database(node: &Node) -> PathBuf {
    node.data.join("base/5")
}

#[test]
fn a_source_without_the_map_of_shared_relations_is_refused() {
    let (pair, liar, pki) = with_a_stopped_source();
    fs::remove_file(liar.data.join("global/pg_filenode.map")).expect("removed");
    refused(&pair, &liar, &pki, (1, "its file list lacks global/pg_filenode.map"));
}

#[test]
fn a_source_without_a_database_is_refused() {
    let (pair, liar, pki) = with_a_stopped_source();
    fs::remove_dir_all(liar.data.join("base")).expect("removed");
    fs::create_dir(liar.data.join("base")).expect("made");
    liar.user.own(&liar.data.join("base"));
    refused(&pair, &liar, &pki, (1, "its file list has no database"));
}

#[test]
fn a_database_without_its_map_is_refused() {
    let (pair, liar, pki) = with_a_stopped_source();
    fs::remove_file(database(&liar).join("pg_filenode.map")).expect("removed");
    refused(&pair, &liar, &pki, (5, "but no PG_VERSION or no pg_filenode.map"));
}

#[test]
fn a_map_that_names_a_file_that_is_not_there_is_refused() {
    let (pair, liar, pki) = with_a_stopped_source();
    let map = fs::read(database(&liar).join("pg_filenode.map")).expect("a map");
    let major = pg_format::Major::new(15).expect("a major");
    let first = pg_format::relation_map::parse(&map, major).expect("sound")[0];
    fs::remove_file(database(&liar).join(first.file.to_string())).expect("removed");
    refused(&pair, &liar, &pki, (5, "which is not listed"));
}

#[test]
fn a_version_of_another_major_is_refused() {
    let (pair, liar, pki) = with_a_stopped_source();
    write(&database(&liar).join("PG_VERSION"), "14\n");
    refused(&pair, &liar, &pki, (1, "is not that of PostgreSQL 15"));
}

/// VACUUM FULL, a restore, or the wrong source: the operator knows which.
#[test]
fn a_database_that_would_nearly_vanish_needs_a_word_of_the_operator() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("create database large");
    pair.a.sql_in(
        "large",
        "create table bulk as select g, repeat('x', 900) t from generate_series(1, 110000) g",
    );
    pair.catch_up();
    part(&pair);
    pair.b.sql_in("large", "truncate bulk");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let rewind = || served.rewind(&pair.a).following(&pair.b);
    let before = Snapshot::of(&pair.a.data);
    let ended = rewind().refuse(7, "give --accept-shrink");
    assert!(ended.text.contains("would shrink from"), "{}", ended.text);
    before.assert_same(&Snapshot::of(&pair.a.data));
    rewind().args(["--accept-shrink"]).succeed();
    oracle::verify(&pair.a, &pair.b);
}

/// A virtual address that still points home.
#[test]
fn a_source_that_is_the_target_itself_is_refused() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.a);
    let before = Snapshot::of(&pair.a.data);
    for strategy in ["auto", "compare"] {
        let rewind = served.rewind(&pair.a).following(&pair.b);
        rewind.args(["--strategy", strategy]).refuse(3, "is this data directory itself");
        before.assert_same(&Snapshot::of(&pair.a.data));
    }
}

/// A fork whose source has enough for a run to be killed while it fetches.
fn much_to_fetch() -> Pair {
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    part(&pair);
    pair.b.sql("create table bulk as select g, md5(g::text) t from generate_series(1, 60000) g");
    pair.b.sql("select pg_switch_wal()");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    pair
}

/// A place where everybody may write, as /tmp is without its sticky bit.
fn open_place(pair: &Pair) -> PathBuf {
    let place = pair.home.path().join("open");
    fs::create_dir(&place).expect("made");
    fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).expect("mode");
    place
}

/// The only directory in a place.
fn only(place: &Path) -> PathBuf {
    let mut entries = fs::read_dir(place).expect("readable").flatten();
    let first = entries.next().expect("a directory").path();
    assert!(entries.next().is_none(), "more than one directory is there");
    first
}

/// A rewind that died while it fetched, with what it had fetched where others can write.
fn killed_while_it_fetches(pair: &Pair, pki: &Pki, place: &Path) -> Server {
    let server = Server::with(&pair.b, pki, 0, &["--max-rate", "1M"]);
    let staging = place.display().to_string();
    let rewind = Rewind::new(&pair.a, &server, pki).following(&pair.b);
    let mut running = rewind.args(["--staging-dir", &staging]).spawn();
    running.wait_for("fetch");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    running.signal(Signal::KILL);
    running.wait();
    server
}

#[test]
fn what_others_put_where_an_earlier_run_staged_is_not_used() {
    let pair = much_to_fetch();
    let pki = Pki::new(pair.home.path());
    let place = open_place(&pair);
    let server = killed_while_it_fetches(&pair, &pki, &place);
    let own = only(&place);
    assert_eq!(fs::metadata(&own).expect("metadata").mode() & 0o777, 0o700);
    // Another user moves it away and puts one of the same name in its place.
    let mut mv = std::process::Command::new("/bin/mv");
    run(mv.arg(&own).arg(pair.home.path().join("stolen")));
    let mut copy = std::process::Command::new("cp");
    run(copy.arg("-r").arg(pair.home.path().join("stolen")).arg(&own));
    let staging = place.display().to_string();
    let before = Snapshot::of(&pair.a.data.join("base"));
    let rewind =
        || Rewind::new(&pair.a, &server, &pki).following(&pair.b).args(["--staging-dir", &staging]);
    rewind().refuse(7, "is not the staging directory that this rewind created");
    before.assert_same(&Snapshot::of(&pair.a.data.join("base")));
    // What the message says helps.
    fs::remove_dir_all(&own).expect("removed");
    let back = state_command("rollback", &pair.a);
    assert_eq!(back.code, 0, "{}", back.text);
    rewind().succeed();
    oracle::verify(&pair.a, &pair.b);
}

/// Records that somebody else signed are as if they had not come.
#[test]
fn a_record_that_was_not_signed_by_this_rewind_is_fetched_again() {
    let pair = much_to_fetch();
    let pki = Pki::new(pair.home.path());
    let place = open_place(&pair);
    let server = killed_while_it_fetches(&pair, &pki, &place);
    let packs = only(&place).join("packs");
    let mut changed = 0;
    for entry in fs::read_dir(&packs).expect("packs").flatten() {
        let mut bytes = fs::read(entry.path()).expect("a pack");
        // The last byte of the first record's signature: 32 bytes of header, 20 of the record's own.
        let length =
            bytes.get(44..48).map(|word| u32::from_le_bytes(word.try_into().expect("four")));
        let Some(at) = length.map(|length| 32 + 20 + length as usize + 15) else { continue };
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1;
            changed += 1;
            write(&entry.path(), &bytes);
        }
    }
    assert!(changed > 0, "no pack had a record");
    drop(server);
    let server = Server::start(&pair.b, &pki);
    let staging = place.display().to_string();
    let rewind = Rewind::new(&pair.a, &server, &pki).following(&pair.b);
    let ended = rewind.args(["--staging-dir", &staging]).succeed();
    assert_eq!(ended.field("pages_recovered"), "0", "{}", ended.text);
    assert_eq!(fs::read_dir(&place).expect("readable").count(), 0, "staged data is left");
    oracle::verify(&pair.a, &pair.b);
}

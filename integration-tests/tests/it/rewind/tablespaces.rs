//! Tablespaces and mounts: what lies where on either node.

use std::fs;
use std::path::Path;

use integration_tests::cluster::Node;
use integration_tests::command::run;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::snapshot::Snapshot;
use integration_tests::steps::{Served, part, rewound};
use integration_tests::user::Mounted;

fn place(pair: &Pair, name: &str) -> String {
    let path = pair.home.path().join(name);
    fs::create_dir_all(&path).expect("directory");
    pair.a.user.own(&path);
    path.display().to_string()
}

fn new_tablespace(source: &Node, location: &str) {
    source.sql(&format!("create tablespace fresh location '{location}'"));
    source.sql("create table in_it tablespace fresh as select g from generate_series(1, 5000) g");
    source.sql("checkpoint");
}

#[test]
fn tablespaces_in_place_stay_in_place() {
    let pair = Pair::with(15, Shape::default(), "allow_in_place_tablespaces = on");
    pair.a.sql("create tablespace here location ''");
    pair.a.sql("create table inside tablespace here as select g from generate_series(1, 3000) g");
    pair.catch_up();
    part(&pair);
    pair.a.sql("delete from inside where g % 2 = 0");
    pair.b.sql("delete from inside where g % 3 = 0");
    pair.b.sql("create tablespace later location ''");
    pair.b.sql("create table in_later tablespace later as select g from generate_series(1, 900) g");
    pair.a.kill();
    let ended = rewound(&pair, &[]);
    assert_eq!(ended.field("strategy"), "fork", "{}", ended.text);
    for entry in fs::read_dir(pair.a.data.join("pg_tblspc")).expect("dir").flatten() {
        assert!(entry.file_type().expect("type").is_dir(), "{}", entry.path().display());
    }
}

#[test]
fn a_new_tablespace_without_a_place_is_refused() {
    let pair = Pair::new(15, Shape::default());
    let (theirs, ours) = (place(&pair, "their-space"), place(&pair, "our-space"));
    part(&pair);
    new_tablespace(&pair.b, &theirs);
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &pair.b);
    let before = Snapshot::of(&pair.a.data);
    let rewind = || served.rewind(&pair.a);
    // On this machine the source's own files are there.
    rewind().args(["--strategy", "fork"]).refuse(7, "which is not empty on the target");
    rewind().refuse(7, "--tablespace-mapping");
    let mapping = format!("{theirs}={ours}");
    let mapped = ["--strategy", "fork", "--tablespace-mapping", &mapping];
    rewind().args(mapped).refuse(7, "strategy fork is not possible");
    before.assert_same(&Snapshot::of(&pair.a.data));
    let args = ["--strategy", "compare", "--tablespace-mapping", &mapping];
    rewind().following(&pair.b).args(args).succeed();
    oracle::verify(&pair.a, &pair.b);
}

/// Parts the nodes; the source runs where one path is another directory than here: as on two machines.
fn part_with_other_paths(pair: &Pair, literal: &str, theirs: &str) -> (Mounted, Node) {
    pair.b.stop("fast");
    let mounted = Mounted::new(Path::new(theirs), Path::new(literal));
    let b = Node { user: pair.b.user.with_mounts_of(mounted.process()), ..pair.b.clone() };
    b.start();
    pair.catch_up();
    part(pair);
    (mounted, b)
}

#[test]
fn a_new_tablespace_with_its_own_empty_place_is_replayed() {
    let pair = Pair::new(15, Shape::default());
    let (literal, theirs) = (place(&pair, "space"), place(&pair, "their-machine"));
    let (_mounted, b) = part_with_other_paths(&pair, &literal, &theirs);
    new_tablespace(&b, &literal);
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &b);
    let ended = served.rewind(&pair.a).following(&b).args(["--strategy", "fork"]).succeed();
    assert_eq!(ended.field("strategy"), "fork", "{}", ended.text);
    oracle::verify_running(&pair.a, &b);
    assert!(fs::read_dir(&literal).expect("place").next().is_some(), "nothing is in its place");
    assert_eq!(pair.a.sql("select count(*) from in_it"), "5000");
    b.stop("fast");
    pair.a.stop("fast");
    oracle::checksums(&pair.a);
}

/// Replay makes a tablespace where the source has it, whatever it was mapped to.
#[test]
fn a_mapped_tablespace_is_not_left_to_replay() {
    let pair = Pair::new(15, Shape::default());
    let (literal, theirs) = (place(&pair, "space"), place(&pair, "their-machine"));
    let ours = place(&pair, "our-space");
    let (_mounted, b) = part_with_other_paths(&pair, &literal, &theirs);
    b.sql("checkpoint");
    b.sql(&format!("create tablespace fresh location '{literal}'"));
    b.sql("create table in_it tablespace fresh as select g from generate_series(1, 5000) g");
    pair.a.stop("fast");
    let served = Served::start(pair.home.path(), &b);
    let before = Snapshot::of(&pair.a.data);
    let mapping = format!("{literal}={ours}");
    let rewind = || {
        let rewind = served.rewind(&pair.a).following(&b);
        rewind.args(["--strategy", "latest", "--tablespace-mapping", &mapping])
    };
    rewind().refuse(7, "run CHECKPOINT on the source");
    before.assert_same(&Snapshot::of(&pair.a.data));
    b.sql("checkpoint");
    rewind().succeed();
    oracle::verify_running(&pair.a, &b);
    assert!(fs::read_dir(&ours).expect("place").next().is_some(), "nothing is in its place");
    assert!(fs::read_dir(&literal).expect("place").next().is_none(), "it lies where it must not");
    b.stop("fast");
    pair.a.stop("fast");
    oracle::checksums(&pair.a);
}

#[test]
fn pg_wal_is_a_mount_of_its_own() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.a.stop("fast");
    let volume = place(&pair, "volume");
    let wal = pair.a.data.join("pg_wal");
    run(pair.a.user.command("/bin/cp").arg("-a").arg(wal.join(".")).arg(&volume));
    let mounted = Mounted::new(Path::new(&volume), &wal);
    // What is hidden below the mount must not be used.
    for entry in fs::read_dir(&wal).expect("dir").flatten() {
        let path = entry.path();
        if path.is_file() {
            fs::remove_file(path).expect("removed");
        }
    }
    let a = Node { user: pair.a.user.with_mounts_of(mounted.process()), ..pair.a.clone() };
    let served = Served::start(pair.home.path(), &pair.b);
    let ended = served.rewind(&a).following(&pair.b).succeed();
    assert_eq!(ended.field("result"), "rewound", "{}", ended.text);
    oracle::verify_running(&a, &pair.b);
    assert!(Path::new(&volume).join(".pgrejoin/diverged").is_dir(), "{}", ended.text);
    a.stop("fast");
}

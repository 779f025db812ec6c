//! The oracle of every rewind: is the result, started as a standby, the same cluster?

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use client::target::wal_context;
use data_dir::DataDir;
use data_dir::wal::{LocalWal, scan};
use pg_format::page::Page;
use pg_format::wal::Start;
use pg_format::{BLOCK_SIZE, DataPath, FileClass, Fork, Lsn, RelationSegment};
use serde_json::Value;

use crate::client::Rewind;
use crate::cluster::{Install, Node};
use crate::command::run;
use crate::server::{Pki, Server};
use crate::{health, hints};

/// Digest of every row of every permanent table, order-independent: one query a line, each for some
/// tables, since a query cannot name thousands.
const DIGEST: &str = "
select string_agg(format('select %L, count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) from %s t', name, name), ' union all ' order by n)
from (select oid::regclass as name, row_number() over (order by oid) as n
      from pg_class where relkind in ('r', 'm') and relpersistence = 'p') c group by n / 200";

/// Row-level checks of heaps, all permanent tables with storage.
const VERIFY_HEAP: &str = "
select count(*) from pg_class c, lateral verify_heapam(c.oid, check_toast := true) v
where relkind in ('r', 'm', 't') and relpersistence = 'p'";

/// B-tree checks; every index entry must lead to a row and every row to an entry.
const VERIFY_BTREE: &str = "
select count(bt_index_check(c.oid, true)) from pg_class c join pg_am a on a.oid = c.relam
join pg_index i on i.indexrelid = c.oid
where a.amname = 'btree' and c.relkind = 'i' and c.relpersistence = 'p' and i.indisvalid";

/// Starts `result` as a standby of `source` (which runs) and compares everything. Both are stopped
/// at the end; then `result` is promoted, written to, and must be healthy.
pub fn verify(result: &Node, source: &Node) {
    verify_running(result, source);
    // A standby shows no prepared transactions; the promoted result must have the source's.
    let prepared = prepared_transactions(source);
    compare_stopped(result, source);
    promote_and_write(result, &prepared);
}

/// The part of [`verify`] that leaves both nodes running.
pub fn verify_running(result: &Node, source: &Node) {
    let primary = source.sql("select not pg_is_in_recovery()") == "t";
    if primary {
        source.sql("create table if not exists marker(id serial, at timestamptz default now())");
        source.sql("insert into marker default values");
    }
    if !result.is_running() {
        result.start();
    }
    let lsn = source.lsn();
    result.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    assert_eq!(result.sql("select pg_is_in_recovery()"), "t", "the result is no standby");
    // The result first: looking at the source may make it log what mends the result.
    let ours = rows(result);
    check_indexes(result);
    assert_same_rows(&ours, &rows(source), "as a standby");
}

fn databases(node: &Node) -> Vec<String> {
    let names = node.sql("select datname from pg_database where datallowconn order by 1");
    names.lines().map(str::to_owned).collect()
}

/// What rows the tables of each database have, and their large objects.
pub type Rows = BTreeMap<String, BTreeSet<String>>;

/// The rows of a running node.
pub fn rows(node: &Node) -> Rows {
    let objects = "select count(*), coalesce(sum(hashtextextended(encode(lo_get(oid), 'hex'), 0)::numeric), 0) from pg_largeobject_metadata";
    let of = |database: &String| {
        let queries = node.sql_in(database, DIGEST);
        // A parallel plan answers in any order.
        let mut rows =
            BTreeSet::from([format!("large objects: {}", node.sql_in(database, objects))]);
        for query in queries.lines() {
            rows.extend(node.sql_in(database, query).lines().map(str::to_owned));
        }
        rows
    };
    databases(node).into_iter().map(|database| (database.clone(), of(&database))).collect()
}

/// Two nodes must have the same rows.
pub fn assert_same_rows(ours: &Rows, theirs: &Rows, when: &str) {
    let names = |rows: &Rows| rows.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs), "{when}: databases differ");
    for (database, rows) in ours {
        let differing: Vec<_> = rows.symmetric_difference(&theirs[database]).collect();
        assert!(differing.is_empty(), "{when}: rows differ in {database}: {differing:?}");
    }
}

/// Every index leads to the rows, and tables and B-trees are sound.
pub fn check_indexes(node: &Node) {
    health::same_by_heap_and_by_index(node);
    for database in databases(node) {
        if node.sql_in(&database, "select count(*) from pg_extension where extname = 'amcheck'")
            == "0"
        {
            continue;
        }
        assert_eq!(node.sql_in(&database, VERIFY_HEAP), "0", "heap of {database}");
        node.sql_in(&database, VERIFY_BTREE);
    }
}

/// Stops both, the source first so that the result has all of its WAL, and compares what is on
/// disk: every main-fork page of every permanent relation must have the same LSN, or one that a hint
/// gave it ([`hints::logged_twice`]). Returns how many of the latter there are.
pub fn compare_stopped(result: &Node, source: &Node) -> usize {
    let gist = sorted_builds(source);
    source.stop("fast");
    let end = checkpoint_lsn(source);
    result.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{end}'"));
    result.stop("fast");
    let logged_twice = compare_pages(result, source, &gist);
    for node in [result, source] {
        if node.control().has_checksums() {
            checksums(node);
        }
    }
    logged_twice
}

/// Right after a rewind by *fork* from a stopped source, before the result is started: a dry run by
/// *compare* may name only pages that replay of the WAL now in the result's `pg_wal` rebuilds, and
/// whole files only if they are equal. A page the WAL does not name has the same LSN, and may differ
/// in what replay never makes equal: hints that the source set without logging them (a promoted one
/// logs those of pages changed since its last restartpoint only from its next checkpoint on), command
/// ids, unused space.
pub fn only_replay_rebuilds_differences(result: &Node, server: &Server, pki: &Pki) {
    let copy = result.copy(&result.socket.with_file_name("compared"));
    let label = fs::read_to_string(copy.data.join("backup_label")).expect("backup_label");
    // The copy is only looked at; with the file it would pass for a base backup.
    fs::remove_file(copy.data.join("backup_label")).expect("removed");
    let dry = Rewind::new(&copy, server, pki).args(["-n", "--strategy", "compare"]).succeed();
    assert_eq!(dry.field("result"), "would_rewind", "{}", dry.text);
    let start = label.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: "));
    let start = start.and_then(|rest| rest.split(' ').next()?.parse::<Lsn>().ok());
    let start = start.expect("a start of replay");
    let rebuilt = first_references(&copy, start);
    for change in dry.events("planned") {
        let path = DataPath::new(change["path"].as_str().expect("a path")).expect("plain");
        let action = change["action"].as_str().expect("an action");
        match (FileClass::of(&path), action) {
            // Fetched whole whether they differ or not.
            (FileClass::State, "replace") => assert_equal_files(&copy, server, &path),
            // Made anew by PostgreSQL when it starts.
            (FileClass::Discarded, "remove") => {}
            (FileClass::Relation(segment), "patch") if segment.fork == Fork::Main => {
                for block in blocks_of(&change) {
                    match rebuilt.get(&(segment, block)) {
                        Some(rebuilds) => assert!(rebuilds, "block {block} of {path} stays wrong"),
                        None => {
                            let nodes = (&*copy.data, &*server.data);
                            hints::assert_differ_in_hints(nodes, (&path, block), start);
                        }
                    }
                }
            }
            // Created by the source after the fork.
            (FileClass::Relation(segment), "replace") if segment.fork == Fork::Main => {}
            _ => panic!("{action} {path} is left after a rewind"),
        }
    }
    fs::remove_dir_all(&copy.socket).expect("removed");
}

fn blocks_of(change: &Value) -> Vec<u32> {
    let ranges = change["blocks"].as_array().expect("ranges").iter();
    let number = |value: &Value| u32::try_from(value.as_u64().expect("a number")).expect("fits");
    ranges.flat_map(|range| (number(&range[0])..).take(number(&range[1]) as usize)).collect()
}

fn assert_equal_files(result: &Node, server: &Server, path: &DataPath) {
    let read = |data: &Path| fs::read(data.join(path.as_str())).expect("file");
    assert!(read(&result.data) == read(&server.data), "{path} differs");
}

/// Whether the first record that names a block, from `start` on, rebuilds it.
fn first_references(node: &Node, start: Lsn) -> BTreeMap<(RelationSegment, u32), bool> {
    let directory = DataDir::open(&node.data).expect("data directory");
    let control = node.control();
    let history = directory.history(control.timeline()).expect("history");
    let context = wal_context(&control);
    let wal = LocalWal { directory: &directory, history: &history, context };
    let mut first = BTreeMap::new();
    let scanned = scan(&wal, context, Start::Record(start), &mut |_, body| {
        for reference in body.blocks.iter().filter(|reference| reference.fork == Fork::Main) {
            let block = RelationSegment::of_block(reference.relation, Fork::Main, reference.block);
            first.entry(block).or_insert(reference.rebuilds());
        }
        ControlFlow::Continue(())
    });
    assert!(scanned.expect("scanned").end >= control.min_recovery_point, "WAL is not complete");
    first
}

/// Whether a stopped node was shut down in order.
pub fn is_shut_down(node: &Node) -> bool {
    use pg_format::ClusterState;
    matches!(node.control().state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
}

/// Whether a node has checksums.
pub fn has_checksums(node: &Node) -> bool {
    node.control().has_checksums()
}

/// Where the last checkpoint of a stopped node begins.
pub fn checkpoint_lsn(node: &Node) -> String {
    node.control().checkpoint.to_string()
}

/// Verifies every page's checksum; the node is stopped. `pg_checksums` of 15 serves the majors with
/// its `pg_control` layout; 17 has another and its package brings none, so there our own check is
/// the only one (on all others it must agree).
pub fn checksums(node: &Node) {
    for (name, path) in relations(&node.data) {
        let segment = RelationSegment::parse(&DataPath::new(name.as_str()).expect("plain"));
        let first = segment.expect("a relation").first_block();
        for (block, page) in (first..).zip(fs::read(path).expect("file").chunks(BLOCK_SIZE)) {
            let fits = Page::new(page).is_some_and(|page| page.checksum_fits(block));
            assert!(fits, "block {block} of {name} has a wrong checksum");
        }
    }
    let program = match node.install.major {
        17 => return,
        18 => node.install.program("pg_checksums"),
        _ => Install::of(15).program("pg_checksums"),
    };
    run(node.user.command(program).arg("--check").arg("-D").arg(&node.data));
}

/// Files of `GiST` indexes: sorted builds write pages with a constant LSN that replay does not keep.
fn sorted_builds(node: &Node) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for database in databases(node) {
        let paths = node.sql_in(
            &database,
            "select pg_relation_filepath(c.oid) from pg_class c join pg_am a on a.oid = c.relam where amname = 'gist' and relkind = 'i'",
        );
        files.extend(paths.lines().map(str::to_owned));
    }
    files
}

type Relations = BTreeMap<String, PathBuf>;

/// Main-fork segment files of permanent relations below a data directory.
fn relations(data: &Path) -> Relations {
    let mut all = BTreeMap::new();
    let mut unlogged = BTreeSet::new();
    let mut visit = vec![data.join("base"), data.join("global"), data.join("pg_tblspc")];
    while let Some(directory) = visit.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                visit.push(path);
                continue;
            }
            let relative = path.strip_prefix(data).expect("below").to_string_lossy().into_owned();
            let Ok(parsed) = DataPath::new(relative.clone()) else {
                continue;
            };
            let Some(segment) = RelationSegment::parse(&parsed) else {
                continue;
            };
            match segment.fork {
                Fork::Init => drop(unlogged.insert(segment.relation)),
                Fork::Main => drop(all.insert(relative, path)),
                Fork::FreeSpaceMap | Fork::VisibilityMap => {}
            }
        }
    }
    all.retain(|name, _| {
        let segment = RelationSegment::parse(&DataPath::new(name.as_str()).expect("plain"));
        !unlogged.contains(&segment.expect("a relation").relation)
    });
    all
}

fn compare_pages(result: &Node, source: &Node, gist: &BTreeSet<String>) -> usize {
    let (our_files, their_files) = (relations(&result.data), relations(&source.data));
    let (mut wrong, mut logged_twice) = (Vec::new(), 0);
    for name in our_files.keys().chain(their_files.keys()).collect::<BTreeSet<_>>() {
        let read = |files: &Relations| files.get(name).map(|path| fs::read(path).expect("file"));
        let (a, b) = (read(&our_files).unwrap_or_default(), read(&their_files).unwrap_or_default());
        if a.len() != b.len() && !hints::is_unlogged_tail(b.get(a.len()..)) {
            wrong.push(format!("{name}: {} bytes, {} on the source", a.len(), b.len()));
            continue;
        }
        let first = name.split('.').next().unwrap_or_default();
        if gist.contains(first) {
            continue;
        }
        let segment = RelationSegment::parse(&DataPath::new(name.as_str()).expect("plain"));
        let segment = segment.expect("a relation");
        for (block, (a, b)) in (0_u32..).zip(a.chunks(BLOCK_SIZE).zip(b.chunks(BLOCK_SIZE))) {
            let lsn = |page: &[u8]| Page::new(page).map(Page::lsn);
            if lsn(a) == lsn(b) {
                continue;
            }
            if hints::logged_twice(result, (segment, block), (a, b)) {
                logged_twice += 1;
            } else {
                wrong.push(format!(
                    "{name} block {block}: {:?}, {:?} on the source",
                    lsn(a),
                    lsn(b)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} pages differ: {:?}", wrong.len(), &wrong[..wrong.len().min(10)]);
    logged_twice
}

/// The prepared transactions of a primary.
pub fn prepared_transactions(node: &Node) -> String {
    node.sql(
        "select coalesce(string_agg(format('%s in %s by %s', gid, database, transaction), ', ' \
         order by gid), '') from pg_prepared_xacts",
    )
}

/// The result must be a primary that works.
fn promote_and_write(result: &Node, prepared: &str) {
    result.start();
    result.promote();
    assert_eq!(prepared_transactions(result), prepared, "prepared transactions differ");
    result.sql("create table after_promotion as select generate_series(1, 1000) g");
    if result.try_sql("postgres", "select 1 from plain limit 1").is_some() {
        result.sql("update plain set n = n + 1 where id % 50 = 0");
    }
    health::check(result);
    result.sql("checkpoint");
    check_indexes(result);
    result.stop("fast");
    if result.control().has_checksums() {
        checksums(result);
    }
}

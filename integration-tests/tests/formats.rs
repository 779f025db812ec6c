//! Our readers of PostgreSQL's formats against PostgreSQL's own tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::process::Command;

use client::target::wal_context;
use data_dir::DataDir;
use data_dir::wal::parallel_scan::Runs;
use data_dir::wal::summarize::scan_summary_in;
use data_dir::wal::{LocalWal, Scanned, scan};
use integration_tests::cluster::{Install, Node, write};
use integration_tests::command::run;
use integration_tests::pair::{Pair, Shape};
use pg_format::wal::effect::effect;
use pg_format::wal::{Decoder, Effect, Progress, SegmentName, Start};
use pg_format::{ControlFile, Fork, Lsn, TimelineHistory};

/// A program of a major that must be its own: WAL is read by no other.
fn own_tool(major: u32, name: &str) -> std::path::PathBuf {
    let home = Install::of(15).program("psql");
    let postgres = home.ancestors().nth(3).expect("home of all majors");
    let tree = if major == 16 { "16-tools".to_owned() } else { major.to_string() };
    let tool = postgres.join(tree).join("bin").join(name);
    assert!(tool.exists(), "{} is missing: run scripts/get-postgres.sh", tool.display());
    tool
}

/// Everything that makes unusual WAL, over at least 20 segments of 1 MB.
fn workload(node: &Node) {
    node.script(
        "postgres",
        "update plain set n = n + 1;
         create index again_hash on plain using hash(n); create index again_brin on plain using brin(n);
         create index again_gin on words using gin(tags); create index again_gist on words using gist(place);
         create index again_spgist on words using spgist(label);
         insert into toasted select g, repeat(md5(g::text), 2000) from generate_series(1000, 1040) g;
         begin; insert into parent values (5001); prepare transaction 'p1'; commit prepared 'p1';
         begin; insert into parent values (5002); prepare transaction 'p2'; rollback prepared 'p2';
         begin; insert into parent values (5003); savepoint a; insert into parent values (5004); rollback to a; commit;
         begin; select * from parent where id < 50 for share; update parent set id = id where id = 3; commit;
         delete from shrink where id > 500; vacuum shrink; vacuum full words; cluster plain using plain_pkey;
         truncate grow; drop table dropme; create table later as select * from plain; alter table later add z int default 3;
         create database more; drop database more;
         create unlogged table fast(id int); insert into fast values (1);
         select pg_switch_wal(); select pg_logical_emit_message(true, 'a', repeat('b', 30000));
         checkpoint; update plain set body = 'x' || body where id % 3 = 0; vacuum freeze;
         alter system set full_page_writes = off; select pg_reload_conf(); select pg_sleep(0.3);
         update plain set n = 1 where id < 2000;
         alter system set full_page_writes = on; select pg_reload_conf(); select pg_sleep(0.3);
         alter system set wal_compression = on; select pg_reload_conf(); select pg_sleep(0.3);
         checkpoint; update plain set n = n + 1; update words set label = label || 'y';
         insert into plain select g, md5(g::text), 1 from generate_series(100000, 160000) g;
         select nextval('counter'); notify x; select lo_from_bytea(0, 'abc');
         refresh materialized view summary; reindex table plain; checkpoint;",
    );
}

/// Crashes tried to have a record cut off by one; every other one does it.
const CRASHES_MAX: u32 = 15;

/// Page images in every compression this server was built with.
fn every_compression(node: &Node) {
    let values = "select v from (select unnest(enumvals) v from pg_settings where name = 'wal_compression') x \
                  where v not in ('off', 'on', 'true', 'false', 'yes', 'no', '1', '0')";
    for value in node.sql(values).lines() {
        node.sql(&format!("alter system set wal_compression = '{value}'"));
        node.sql("select pg_reload_conf()");
        node.wait("postgres", &format!("current_setting('wal_compression') = '{value}'"));
        node.sql("checkpoint");
        node.sql("update plain set n = n + 1 where id < 4000");
    }
}

fn control(node: &Node) -> ControlFile {
    let bytes = fs::read(node.data.join("global/pg_control")).expect("read");
    ControlFile::parse(&bytes).expect("parsed")
}

/// What our decoder made of a node's WAL.
struct Read {
    /// A line for each record: position, then every block reference as `pg_waldump` shows them.
    lines: Vec<String>,
    end: Lsn,
    /// Records that gave up one a crash had cut off.
    overwritten: u32,
}

fn ours(node: &Node, control: &ControlFile, from: Lsn) -> Read {
    let directory = DataDir::open(&node.data).expect("data directory");
    let history = TimelineHistory::first(control.timeline());
    let context = wal_context(control);
    let wal = LocalWal { directory: &directory, history: &history, context };
    let (mut lines, mut overwritten) = (Vec::new(), 0);
    let scanned = scan(&wal, context, Start::Record(from), &mut |record, body| {
        let mut line = format!("{:X}", record.lsn.as_u64());
        for reference in &body.blocks {
            let fork = match reference.fork {
                Fork::Main => "",
                Fork::FreeSpaceMap => "fsm",
                Fork::VisibilityMap => "vm",
                Fork::Init => "init",
            };
            let image = if reference.restores_image { " FPW" } else { "" };
            write!(line, "; {} {fork} {}{image}", reference.relation, reference.block)
                .expect("fits");
        }
        match effect(record, body, context.format).expect("known") {
            Effect::Checkpoint { checkpoint, .. } => {
                write!(line, " redo {:X}", checkpoint.redo.as_u64())
            }
            Effect::Truncate { relation, blocks, .. } => {
                write!(line, " truncate {relation} to {blocks}")
            }
            Effect::OverwriteContrecord => {
                overwritten += 1;
                Ok(())
            }
            _ => Ok(()),
        }
        .expect("fits");
        lines.push(line);
        ControlFlow::Continue(())
    })
    .expect("scanned");
    Read { lines, end: scanned.end, overwritten }
}

fn hex(text: &str) -> u64 {
    text.parse::<Lsn>().expect("an LSN").as_u64()
}

/// The same lines out of `pg_waldump`'s text, with its own end.
fn theirs(node: &Node, major: u32, from: Lsn) -> (Vec<String>, u64) {
    let mut command = node.user.command(own_tool(major, "pg_waldump"));
    command.arg("-p").arg(node.data.join("pg_wal")).arg("-s").arg(from.to_string());
    let output = command.output().expect("pg_waldump runs");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut lines = Vec::new();
    for text in String::from_utf8_lossy(&output.stdout).lines() {
        let Some((_, rest)) = text.split_once("lsn: ") else { continue };
        let (lsn, rest) = rest.split_once(',').expect("fields");
        let mut line = format!("{:X}", hex(lsn));
        let (description, blocks) =
            rest.split_once(", blkref #").map_or((rest, ""), |(a, b)| (a, b));
        for reference in blocks.split(", blkref #").filter(|part| !part.is_empty()) {
            let reference = reference.trim_end_matches(';').trim();
            let words: Vec<&str> = reference.split_whitespace().collect();
            let at = |name: &str| words.iter().position(|word| *word == name).map(|i| words[i + 1]);
            let fork = at("fork").unwrap_or("");
            let image = if reference.contains(" FPW") { " FPW" } else { "" };
            write!(line, "; {} {fork} {}{image}", at("rel").expect("rel"), at("blk").expect("blk"))
                .expect("fits");
        }
        if let Some(redo) = description.split("redo ").nth(1).filter(|_| {
            description.contains("CHECKPOINT_") && !description.contains("CHECKPOINT_REDO")
        }) {
            let redo = redo.split([';', ' ']).next().expect("a position");
            write!(line, " redo {:X}", hex(redo)).expect("fits");
        }
        if let Some(cut) = description
            .split("desc: TRUNCATE ")
            .nth(1)
            .filter(|_| description.contains(" to ") && description.contains("blocks"))
        {
            let words: Vec<&str> = cut.split_whitespace().collect();
            let path = words[0];
            let parts: Vec<&str> = path.split('/').collect();
            if parts[0] == "base" {
                write!(line, " truncate 1663/{}/{} to {}", parts[1], parts[2], words[2])
                    .expect("fits");
            }
        }
        lines.push(line);
    }
    // "error in WAL record at X: invalid record length at Y: expected at least 24": Y is the end.
    let positions =
        error.split(" at ").filter_map(|rest| rest.split([':', ' ']).next()?.parse().ok());
    let end = positions.last().map(Lsn::as_u64);
    assert!(end.is_some(), "pg_waldump said: {error}");
    (lines, end.unwrap_or_default())
}

fn wal_is_read_like_pg_waldump(major: u32) {
    let shape = Shape { segment_mb: 1, ..Shape::default() };
    let pair = Pair::stopped(major, shape, "");
    pair.a.start();
    let start: Lsn =
        pair.a.sql("select redo_lsn from pg_control_checkpoint()").parse().expect("LSN");
    workload(&pair.a);
    every_compression(&pair.a);
    // A record that a crash cut off is given up at the next start, where one was cut off.
    let mut overwritten = 0;
    for _ in 0..CRASHES_MAX {
        let mut busy = pair.a.background(
            "insert into grow select g, repeat('q', 900) from generate_series(1, 400000) g",
        );
        std::thread::sleep(std::time::Duration::from_millis(400));
        pair.a.kill();
        drop(busy.wait());
        pair.a.start();
        pair.a.stop("fast");
        overwritten = ours(&pair.a, &control(&pair.a), start).overwritten;
        if overwritten > 0 {
            break;
        }
        pair.a.start();
    }
    assert!(overwritten > 0, "no record was cut off in {CRASHES_MAX} crashes");
    let control = control(&pair.a);
    let Read { lines: our_lines, end: our_end, .. } = ours(&pair.a, &control, start);
    let (their_lines, their_end) = theirs(&pair.a, major, start);
    let segments =
        control.wal_segment_size.segment_of(our_end) - control.wal_segment_size.segment_of(start);
    assert!(segments >= 20, "only {segments} segments");
    for (a, b) in our_lines.iter().zip(&their_lines) {
        assert_eq!(a, b);
    }
    assert_eq!(our_lines.len(), their_lines.len());
    assert_eq!(our_end.as_u64(), their_end);
    several_read_like_one(&pair.a, &control, (start, our_end));
}

/// The window of the WAL as one thread reads it and as several do, whole and with a byte damaged.
fn several_read_like_one(node: &Node, control: &ControlFile, (start, end): (Lsn, Lsn)) {
    let size = control.wal_segment_size;
    let (first, last) = (size.segment_of(start), size.segment_of(end));
    let middle = size.start_of(first + (last - first) / 2).plus(size.bytes() / 3);
    for damaged in [None, Some(middle), Some(size.start_of(last - 1).plus(3)), Some(end)] {
        let copy = node.copy(&node.socket.with_file_name("read-by-several"));
        if let Some(at) = damaged {
            let name = SegmentName { timeline: control.timeline(), number: size.segment_of(at) };
            let path = copy.data.join("pg_wal").join(name.file_name(size));
            let mut bytes = fs::read(&path).expect("a segment");
            bytes[usize::try_from(size.offset_of(at)).expect("small")] ^= 0x55;
            write(&path, bytes);
        }
        let window = |segments: u64, last: u64| {
            let directory = DataDir::open(&copy.data).expect("data directory");
            let history = TimelineHistory::first(control.timeline());
            let context = wal_context(control);
            let wal = LocalWal { directory: &directory, history: &history, context };
            let runs = Runs { start: Start::Record(start), last, segments, end: Lsn::MAX };
            scan_summary_in(&wal, context, runs, middle).expect("scanned")
        };
        let (alone, alone_scanned) = window(1, first);
        for (segments, last) in [(1, last), (2, last), (3, last + 5), (7, last - 2)] {
            let (several, scanned) = window(segments, last);
            assert!(several == alone, "runs of {segments}, damaged at {damaged:?}");
            let position = |scanned: &Scanned| (scanned.end, scanned.last_record);
            assert_eq!(position(&scanned), position(&alone_scanned), "damaged at {damaged:?}");
            assert!(scanned.stopped_by.is_some());
        }
        fs::remove_dir_all(&copy.socket).expect("removed");
    }
}

/// Seconds since 1970 as PostgreSQL's tools print them.
fn date(seconds: i64) -> String {
    let mut command = Command::new("date");
    command.args(["-u", "-d", &format!("@{seconds}"), "+%a %b %e %H:%M:%S %Y"]).env("LC_ALL", "C");
    run(&mut command).trim().to_owned()
}

/// Every field, under the name `pg_controldata` gives it.
fn named_fields(control: &ControlFile) -> Vec<(&'static str, String)> {
    let checkpoint = &control.checkpoint_copy;
    let settings = control.required_settings;
    let lsn = |lsn: Lsn| format!("{:X}", lsn.as_u64());
    let number = |value: u64| value.to_string();
    let yes = |on: bool| if on { "on" } else { "off" }.to_owned();
    let xid = format!("{}:{}", checkpoint.next_xid >> 32, checkpoint.next_xid & 0xFFFF_FFFF);
    vec![
        ("pg_control version number", number(u64::from(control.control_version))),
        ("Catalog version number", number(u64::from(control.catalog_version))),
        ("Database system identifier", number(control.system_identifier)),
        ("Database cluster state", control.state.to_string()),
        ("Latest checkpoint location", lsn(control.checkpoint)),
        ("Latest checkpoint's REDO location", lsn(checkpoint.redo)),
        ("Latest checkpoint's TimeLineID", number(u64::from(checkpoint.timeline.get()))),
        ("Latest checkpoint's PrevTimeLineID", number(u64::from(checkpoint.previous_timeline))),
        ("Latest checkpoint's full_page_writes", yes(checkpoint.full_page_writes)),
        ("Latest checkpoint's NextXID", xid),
        ("Latest checkpoint's NextOID", number(u64::from(checkpoint.next_oid))),
        ("Latest checkpoint's NextMultiXactId", number(u64::from(checkpoint.next_multi))),
        ("Latest checkpoint's NextMultiOffset", number(checkpoint.next_multi_offset)),
        ("Time of latest checkpoint", date(checkpoint.time)),
        ("pg_control last modified", date(control.time)),
        ("Latest checkpoint's oldestXID", number(u64::from(checkpoint.oldest_xid))),
        ("Latest checkpoint's oldestActiveXID", number(u64::from(checkpoint.oldest_active_xid))),
        ("Latest checkpoint's oldestMultiXid", number(u64::from(checkpoint.oldest_multi))),
        (
            "Latest checkpoint's oldestCommitTsXid",
            number(u64::from(checkpoint.oldest_commit_ts_xid)),
        ),
        (
            "Latest checkpoint's newestCommitTsXid",
            number(u64::from(checkpoint.newest_commit_ts_xid)),
        ),
        ("Fake LSN counter for unlogged rels", lsn(control.unlogged_lsn)),
        ("Minimum recovery ending location", lsn(control.min_recovery_point)),
        ("Min recovery ending loc's timeline", number(u64::from(control.min_recovery_timeline))),
        ("Backup start location", lsn(control.backup_start_point)),
        ("Backup end location", lsn(control.backup_end_point)),
        (
            "End-of-backup record required",
            if control.backup_end_required { "yes" } else { "no" }.to_owned(),
        ),
        ("wal_level setting", format!("{:?}", control.wal_level).to_lowercase()),
        ("wal_log_hints setting", yes(control.wal_log_hints)),
        ("max_connections setting", settings.max_connections.to_string()),
        ("max_worker_processes setting", settings.max_worker_processes.to_string()),
        ("max_wal_senders setting", settings.max_wal_senders.to_string()),
        ("max_prepared_xacts setting", settings.max_prepared_transactions.to_string()),
        ("max_locks_per_xact setting", settings.max_locks_per_transaction.to_string()),
        ("track_commit_timestamp setting", yes(control.track_commit_timestamp)),
        ("Bytes per WAL segment", number(control.wal_segment_size.bytes())),
        ("Data page checksum version", number(u64::from(control.data_checksum_version))),
    ]
}

fn control_is_read_like_pg_controldata(major: u32) {
    let pair = Pair::stopped(major, Shape::default(), "");
    let mut command = pair.a.user.command(own_tool(major, "pg_controldata"));
    let text = run(command.arg("-D").arg(&pair.a.data).env("LC_ALL", "C").env("TZ", "UTC"));
    let said: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(k, v)| (k.trim(), v.trim()))
        .collect();
    let control =
        ControlFile::parse(&fs::read(pair.a.data.join("global/pg_control")).expect("read"))
            .expect("parsed");
    for (name, value) in named_fields(&control) {
        assert!(said.contains_key(name), "{name} is not in: {text}");
        let expected = said[name];
        let expected = if expected.contains('/') {
            format!("{:X}", hex(expected))
        } else {
            expected.to_owned()
        };
        assert_eq!(value, expected, "{name}");
    }
}

macro_rules! on_major {
    ($($name:ident $major:literal),*) => { $(mod $name {
        #[test]
        fn wal_is_read_like_pg_waldump() { super::wal_is_read_like_pg_waldump($major); }
        #[test]
        fn control_is_read_like_pg_controldata() { super::control_is_read_like_pg_controldata($major); }
    })* };
}
on_major!(pg15 15, pg16 16, pg18 18);

/// Flips one bit in every byte of a real segment: never a panic, never a record with a wrong CRC.
#[test]
fn no_flipped_bit_is_taken_for_a_record() {
    let shape = Shape { segment_mb: 1, ..Shape::default() };
    let pair = Pair::stopped(15, shape, "");
    pair.a.start();
    pair.a.sql("select pg_switch_wal()");
    pair.a.sql("update plain set n = 2 where id < 5000");
    let name = pair.a.sql("select pg_walfile_name(pg_current_wal_lsn() - 1048576)");
    pair.a.stop("fast");
    let control =
        ControlFile::parse(&fs::read(pair.a.data.join("global/pg_control")).expect("read"))
            .expect("parsed");
    let context = wal_context(&control);
    let number =
        pg_format::wal::SegmentName::parse(&name, context.segment_size).expect("a name").number;
    let start = context.segment_size.start_of(number);
    let mut bytes = fs::read(pair.a.data.join("pg_wal").join(&name)).expect("segment");
    let mut good = BTreeMap::new();
    let mut decoder = Decoder::new(context, Start::FirstAfter(start));
    let progress = decoder.feed(&bytes, &mut |record, _| {
        good.insert(record.lsn, record.bytes.to_vec());
        ControlFlow::Continue(())
    });
    assert!(matches!(progress, Ok(Progress::Wants(_))), "{progress:?}");
    assert!(good.len() > 1000, "{} records", good.len());
    let mut seed = 7_u32;
    for at in 0..bytes.len() {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let bit = 1_u8 << (seed >> 29);
        bytes[at] ^= bit;
        // The page of the flip and the next: what one flip can reach.
        let first = at / 8192 * 8192;
        let pages = &bytes[first..(first + 16384).min(bytes.len())];
        let mut decoder = Decoder::new(context, Start::FirstAfter(start.plus(first as u64)));
        let result = decoder.feed(pages, &mut |record, _| {
            let known = good.get(&record.lsn).map(Vec::as_slice);
            assert_eq!(known, Some(record.bytes), "byte {at}: record {} is not one", record.lsn);
            ControlFlow::Continue(())
        });
        // An end or an error is right; a panic or a false record is not.
        drop(result);
        bytes[at] ^= bit;
    }
}

#[test]
fn the_tools_are_those_of_the_major() {
    for major in [15, 16, 18] {
        let text = run(Command::new(own_tool(major, "pg_waldump")).arg("--version"));
        assert!(text.contains(&format!(" {major}.")), "{text}");
    }
}

//! A WAL scan beside `pg_waldump`.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use client::target::wal_context;
use data_dir::DataDir;
use data_dir::wal::summarize::scan_summary;
use data_dir::wal::{LocalWal, scan};
use integration_tests::cluster::Install;
use integration_tests::command::run;
use integration_tests::pair::{Pair, Shape};
use pg_format::wal::Start;

/// Times each scans.
const ROUNDS: usize = 5;

/// Decodes the same WAL with our decoder and with `pg_waldump --quiet`, in turns.
pub(crate) fn compare(major: u32) {
    let pair = Pair::stopped(major, Shape::default(), "");
    pair.a.start();
    let start = pair.a.lsn();
    pair.a.pgbench_init(30);
    pair.a.pgbench_transactions(5000);
    let end = pair.a.lsn();
    pair.a.stop("fast");
    let (mut own, mut many, mut stock) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        own.push(our_scan(&pair.a.data, &start));
        many.push(window_scan(&pair.a.data, &start));
        let since = Instant::now();
        let mut command = pair.a.user.command(Install::of(major).program("pg_waldump"));
        command.arg("--quiet").arg("-p").arg(pair.a.data.join("pg_wal"));
        run(command.args(["-s", &start, "-e", &end]));
        stock.push(since.elapsed().as_secs_f64());
    }
    own.sort_by(f64::total_cmp);
    many.sort_by(f64::total_cmp);
    stock.sort_by(f64::total_cmp);
    let position = |text: &str| text.parse::<pg_format::Lsn>().expect("LSN").as_u64();
    let megabytes = (position(&end) - position(&start)) as f64 / 1e6;
    let (own, many, stock) = (own[ROUNDS / 2], many[ROUNDS / 2], stock[ROUNDS / 2]);
    println!("| WAL scan of {megabytes:.0} MB | s | MB/s | ratio |");
    println!("|---|---|---|---|");
    println!("| pg_waldump --quiet | {stock:.2} | {:.0} | 1.00 |", megabytes / stock);
    println!("| pgrejoin, one thread | {own:.2} | {:.0} | {:.2} |", megabytes / own, own / stock);
    println!(
        "| pgrejoin, the whole window on all processors | {many:.2} | {:.0} | {:.2} |",
        megabytes / many,
        many / stock
    );
}

/// Seconds it takes to read a node's WAL in some way.
fn seconds(data: &Path, read: impl FnOnce(&DataDir, &LocalWal<'_>)) -> f64 {
    let directory = DataDir::open(data).expect("data directory");
    let control = directory.control().expect("pg_control").file;
    let history = directory.history(control.timeline()).expect("history");
    let context = wal_context(&control);
    let wal = LocalWal { directory: &directory, history: &history, context };
    let since = Instant::now();
    read(&directory, &wal);
    since.elapsed().as_secs_f64()
}

fn our_scan(data: &Path, start: &str) -> f64 {
    let start = Start::Record(start.parse().expect("LSN"));
    seconds(data, |_, wal| {
        let mut blocks = 0;
        let scanned = scan(wal, wal.context, start, &mut |_, body| {
            blocks += body.blocks.len();
            ControlFlow::Continue(())
        });
        scanned.expect("scanned");
        assert!(blocks > 0);
    })
}

/// As a rewind reads it: everything the plan needs, on all processors.
fn window_scan(data: &Path, start: &str) -> f64 {
    let start = start.parse().expect("LSN");
    seconds(data, |directory, wal| {
        let names = directory.wal_segments(wal.context.segment_size).expect("segments");
        let last = names.iter().map(|name| name.number).max().expect("a segment");
        let (window, _) = scan_summary(wal, wal.context, start, start, last).expect("scanned");
        assert!(!window.pages.is_empty());
    })
}

//! `make bench`: a rewind beside `pg_rewind` over TLS, and a WAL scan beside `pg_waldump`, in one run.
//!
//! Over the loopback. Every tool gets a fresh copy of the same stopped target; the tools take turns
//! and the medians are shown. Bytes on the wire are counted by a proxy in a run of their own, so that
//! it slows nobody in the timed ones. The machine is noisy: read the ratios.

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use client::inspect::wal_context;
use data_dir::DataDir;
use data_dir::wal::{LocalWal, scan};
use integration_tests::client::Rewind;
use integration_tests::cluster::{Install, Node, Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::user::run;
use pg_format::wal::Start;

const MAJOR: u32 = 15;
/// Timed runs of each tool on each fork.
const ROUNDS: usize = 3;
const PORT: u16 = 54_329;

/// One measured run.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    seconds: f64,
    client_kb: u64,
    server_kb: u64,
    /// Bytes the client made the disk write, and the most that lay in `.pgrejoin` at a time.
    written: u64,
    extra: u64,
}

/// What is measured, and how it is run.
const TOOLS: [(&str, &[&str]); 4] = [
    ("pg_rewind", &[]),
    ("pgrejoin fork", &["--strategy", "fork"]),
    ("pgrejoin fork --no-undo", &["--strategy", "fork", "--no-undo"]),
    ("pgrejoin compare", &["--strategy", "compare"]),
];

fn main() {
    println!(
        "PostgreSQL {MAJOR}, loopback, medians of {ROUNDS} runs in turns; ratios to pg_rewind\n"
    );
    println!(
        "| fork | tool | wall s | ratio | wire MB | ratio | written MB | ratio | extra MB | client MB | server MB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    measure("pgbench scale 20, 8 k / 12 k transactions", &|pair| pgbench_fork(pair));
    measure("400 k semi-random rows, 15 k random updates a side", &|pair| semi_random_fork(pair));
    println!();
    wal_scan();
}

fn pgbench_fork(pair: &Pair) {
    pair.a.pgbench_init(20);
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    transactions(&pair.a, 2000);
    transactions(&pair.b, 3000);
}

/// So many transactions of `pgbench` on each of four connections.
fn transactions(node: &Node, count: u32) {
    let mut command = node.user.command(Install::of(MAJOR).program("pgbench"));
    command.args(["-n", "-c", "4", "-t", &count.to_string(), "-U", "postgres", "-p", "5432", "-h"]);
    run(command.arg(&node.socket).arg("postgres"));
}

fn semi_random_fork(pair: &Pair) {
    pair.a.sql("create table filler as select g id, md5(g::text) || md5((g * 7)::text) || md5((g * 13)::text) body from generate_series(1, 400000) g");
    pair.a.sql("alter table filler add primary key (id)");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    for (node, seed) in [(&pair.a, 0.1), (&pair.b, 0.2)] {
        node.sql(&format!(
            "select setseed({seed}); update filler set body = md5(random()::text) || body where id in (select (random() * 400000)::int from generate_series(1, 15000))"
        ));
    }
}

/// Makes the fork once and rewinds copies of its target with each tool.
fn measure(name: &str, part: &dyn Fn(&Pair)) {
    let pair = Pair::new(MAJOR, Shape::default());
    part(&pair);
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let pki = Pki::new(pair.home.path());
    listen_with_tls(&pair.b, &pki);
    let tools = TOOLS.map(|(tool, _)| tool);
    let mut runs: BTreeMap<&str, Vec<Run>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for tool in tools {
            runs.entry(tool).or_default().push(rewind(&pair, &pki, tool, &Wire::Direct).0);
        }
    }
    let wire: BTreeMap<&str, u64> =
        tools.map(|tool| (tool, rewind(&pair, &pki, tool, &Wire::Counted).1)).into();
    let median = |tool: &str, value: fn(&Run) -> f64| {
        let mut values: Vec<f64> = runs[tool].iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let seconds = |tool: &str| median(tool, |run| run.seconds);
    let megabytes = |bytes: f64| bytes / 1e6;
    for tool in tools {
        let written = |tool: &str| median(tool, |run| run.written as f64);
        println!(
            "| {name} | {tool} | {:.2} | {:.2} | {:.1} | {:.2} | {:.1} | {:.2} | {:.1} | {:.0} | {:.0} |",
            seconds(tool),
            seconds(tool) / seconds("pg_rewind"),
            megabytes(wire[tool] as f64),
            wire[tool] as f64 / wire["pg_rewind"] as f64,
            megabytes(written(tool)),
            written(tool) / written("pg_rewind"),
            megabytes(median(tool, |run| run.extra as f64)),
            median(tool, |run| run.client_kb as f64) / 1024.0,
            median(tool, |run| run.server_kb as f64) / 1024.0,
        );
    }
}

/// The source also listens on TCP with TLS, for `pg_rewind`.
fn listen_with_tls(source: &Node, pki: &Pki) {
    source.configure(&format!(
        "listen_addresses = '127.0.0.1'\nport = {PORT}\nssl = on\nssl_cert_file = '{}'\nssl_key_file = '{}'",
        pki.file("server.crt").display(),
        pki.file("server.key").display()
    ));
    source.stop("fast");
    let mut command = source.user.command(source.install.program("pg_ctl"));
    command.args(["start", "-w", "-s", "-D"]).arg(&source.data).arg("-l");
    command.arg(source.socket.join("server.log")).arg("-o");
    command.arg(format!("-k {}", source.socket.display()));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.status().expect("pg_ctl runs").success());
}

enum Wire {
    Direct,
    /// Through a proxy that counts.
    Counted,
}

/// Rewinds a fresh copy of the target; what it took, and the bytes on the wire if they were counted.
fn rewind(pair: &Pair, pki: &Pki, tool: &str, wire: &Wire) -> (Run, u64) {
    let target = pair.a.copy(&pair.home.path().join("copy"));
    sync(&target);
    let result = match tool {
        "pg_rewind" => stock(&target, &pair.b, wire),
        _ => ours(&target, pair, pki, tool, wire),
    };
    fs::remove_dir_all(&target.socket).expect("removed");
    result
}

/// Earlier work of the disk must not be paid for by the next tool.
fn sync(node: &Node) {
    run(node.user.command("/bin/sync").arg("-f").arg(&node.data));
}

fn stock(target: &Node, source: &Node, wire: &Wire) -> (Run, u64) {
    let proxy = Proxy::new(PORT);
    let port = match wire {
        Wire::Direct => PORT,
        Wire::Counted => proxy.port,
    };
    let mut command = target.user.command(Install::of(MAJOR).program("pg_rewind"));
    command
        .arg("-D")
        .arg(&target.data)
        .arg("--source-server")
        .arg(format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=require"));
    // libpq looks for certificates at home, which may be root's.
    command.env("HOME", &target.socket);
    let postmaster = fs::read_to_string(source.data.join("postmaster.pid")).expect("running");
    let postmaster = postmaster.lines().next().and_then(|line| line.parse().ok()).expect("pid");
    let measured = timed(command, &target.data, &|| backend_peak(postmaster));
    (measured, proxy.carried.load(Ordering::Relaxed))
}

fn ours(target: &Node, pair: &Pair, pki: &Pki, tool: &str, wire: &Wire) -> (Run, u64) {
    let server = Server::start(&pair.b, pki);
    let proxy = Proxy::new(server.port);
    let port = match wire {
        Wire::Direct => server.port,
        Wire::Counted => proxy.port,
    };
    let rewind = Rewind::to(target, &format!("https://127.0.0.1:{port}"), pki);
    let (_, options) = TOOLS.iter().find(|(name, _)| *name == tool).expect("a tool");
    let rewind = rewind.args(options.iter().copied()).args(["--keep-diverged", "no"]);
    let pid = server.pid();
    let mut measured = timed(rewind.into_command(), &target.data, &|| peak_kb(pid));
    measured.server_kb = measured.server_kb.max(peak_kb(pid));
    (measured, proxy.carried.load(Ordering::Relaxed))
}

/// Runs a command to its end and watches how much memory it and its other end had at most.
fn timed(mut command: Command, target: &Path, server_peak: &dyn Fn() -> u64) -> Run {
    let since = Instant::now();
    let mut child: Child =
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the tool starts");
    let mut measured = Run::default();
    loop {
        measured.client_kb = measured.client_kb.max(peak_kb(child.id()));
        measured.server_kb = measured.server_kb.max(server_peak());
        measured.written = measured.written.max(written(child.id()));
        measured.extra = measured.extra.max(bytes_below(&target.join(".pgrejoin")));
        if let Some(status) = child.try_wait().expect("status") {
            measured.seconds = since.elapsed().as_secs_f64();
            let mut said = String::new();
            child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
            assert!(status.success(), "the tool failed with {status}: {said}");
            return measured;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes a process made its disks write.
fn written(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Room that files take below a directory.
fn bytes_below(directory: &Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes += bytes_below(&entry.path()),
            Ok(metadata) => bytes += metadata.blocks() * 512,
            Err(_) => {}
        }
    }
    bytes
}

/// `VmHWM` of a process, in kB; 0 once it is gone.
fn peak_kb(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The largest `VmHWM` of the backends that serve clients.
fn backend_peak(postmaster: u32) -> u64 {
    let children = format!("/proc/{postmaster}/task/{postmaster}/children");
    let children = fs::read_to_string(children).unwrap_or_default();
    let is_backend = |pid: &u32| {
        let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        title.contains("127.0.0.1")
    };
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is_backend);
    pids.map(peak_kb).max().unwrap_or(0)
}

/// Counts what it carries, both ways.
struct Proxy {
    port: u16,
    carried: Arc<AtomicU64>,
}

impl Proxy {
    fn new(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("address").port();
        let carried = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&carried);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let ends = |stream: &TcpStream| stream.try_clone().expect("clone");
                for (from, to) in [(ends(&client), ends(&server)), (server, client)] {
                    let counter = Arc::clone(&counter);
                    std::thread::spawn(move || carry(from, to, &counter));
                }
            }
        });
        Self { port, carried }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

/// Decodes the same WAL with our decoder and with `pg_waldump --quiet`, in turns.
fn wal_scan() {
    let pair = Pair::stopped(MAJOR, Shape::default(), "");
    pair.a.start();
    let start = pair.a.lsn();
    pair.a.pgbench_init(30);
    transactions(&pair.a, 5000);
    let end = pair.a.lsn();
    pair.a.stop("fast");
    let (mut own, mut stock) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        own.push(our_scan(&pair.a.data, &start));
        let since = Instant::now();
        let mut command = pair.a.user.command(Install::of(MAJOR).program("pg_waldump"));
        command.arg("--quiet").arg("-p").arg(pair.a.data.join("pg_wal"));
        run(command.args(["-s", &start, "-e", &end]));
        stock.push(since.elapsed().as_secs_f64());
    }
    own.sort_by(f64::total_cmp);
    stock.sort_by(f64::total_cmp);
    let position = |text: &str| text.parse::<pg_format::Lsn>().expect("LSN").as_u64();
    let megabytes = (position(&end) - position(&start)) as f64 / 1e6;
    let (own, stock) = (own[ROUNDS / 2], stock[ROUNDS / 2]);
    println!("| WAL scan of {megabytes:.0} MB | s | MB/s | ratio |");
    println!("|---|---|---|---|");
    println!("| pg_waldump --quiet | {stock:.2} | {:.0} | 1.00 |", megabytes / stock);
    println!("| pgrejoin's decoder | {own:.2} | {:.0} | {:.2} |", megabytes / own, own / stock);
}

fn our_scan(data: &Path, start: &str) -> f64 {
    let directory = DataDir::open(data).expect("data directory");
    let control = directory.control().expect("pg_control").file;
    let history = directory.history(control.timeline()).expect("history");
    let context = wal_context(&control);
    let wal = LocalWal { directory: &directory, history: &history, context };
    let start = Start::Record(start.parse().expect("LSN"));
    let since = Instant::now();
    let mut blocks = 0;
    scan(&wal, context, start, &mut |_, body| {
        blocks += body.blocks.len();
        ControlFlow::Continue(())
    })
    .expect("scanned");
    assert!(blocks > 0);
    since.elapsed().as_secs_f64()
}

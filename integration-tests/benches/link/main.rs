//! `make bench`: the ways to bring a node back, beside each other, over emulated long links and the
//! loopback.
//!
//! Every tool gets a fresh copy of the same frozen fork and a live source; the tools take turns; each
//! result is started, catches up and is compared with the source: one that does not verify ends the
//! run. The machine is noisy: read the ratios.

#![expect(clippy::print_stdout, reason = "the tables are what it is for")]
#![expect(clippy::panic, reason = "a benchmark that cannot go on ends here")]

mod burden;
mod extremes;
mod measure;
mod pages;
mod scan;
mod settings;
mod tools;
mod validate;
mod workload;

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Instant;

use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::server::Pki;
use integration_tests::wan::{SOURCE_ADDRESS, Shape, Wan};

use measure::Measured;
use settings::{Link, Settings};
use tools::{Place, Tool};
use workload::{Frozen, SourceState, Workload};

/// One run of a tool, verified.
#[derive(Debug, Clone, Default)]
struct Run {
    measured: Measured,
    /// Until the node accepts connections as a consistent standby.
    consistent: f64,
    /// Bytes on the link, up to the tool's end.
    down: u64,
    up: u64,
    /// Bytes down that were lost, at random or for want of room in the queue, and sent again.
    again: u64,
}

fn main() {
    let settings = Settings::from_environment();
    settings.print();
    if settings.validate > 0 && !settings.wans().is_empty() {
        validate::head();
        for shape in settings.wans() {
            validate::validate(shape, settings.validate);
        }
        println!();
    }
    if settings.scan {
        scan::compare(settings.major);
        println!();
    }
    if settings.burden {
        burden::print(settings.major, workload::WORKLOADS[0]);
    }
    if settings.extremes {
        extremes::print(settings.major);
    }
    for workload in settings.workloads.iter().take(settings.pages) {
        println!("\n{}:\n", workload.name);
        pages::print(&freeze(&settings, *workload));
    }
    head();
    for workload in &settings.workloads {
        let frozen = freeze(&settings, *workload);
        let pki = Pki::new(frozen.home());
        for (state_name, state) in &settings.states {
            for link in &settings.links {
                let cell = Cell { frozen: &frozen, pki: &pki, settings: &settings, link: *link };
                let label = format!("{} | {state_name} | {}", workload.name, link.name());
                cell.measure(&label, *state);
            }
        }
    }
}

fn freeze(settings: &Settings, workload: Workload) -> Frozen {
    let tls = match settings.tls() {
        // Certificates come later, at the same place for every copy.
        true => {
            "ssl = on\nssl_cert_file = '../../pki/server.crt'\nssl_key_file = '../../pki/server.key'\n"
        }
        false => "",
    };
    let frozen = Frozen::new(settings.major, workload, settings.scale);
    frozen.configure(tls);
    frozen
}

/// `100ms-200M-1%-cubic`
fn name_of(shape: Shape) -> String {
    let loss = if shape.loss > 0.0 { format!("-{}%", shape.loss * 100.0) } else { String::new() };
    let control = shape.congestion_control;
    format!("{}ms-{}M{loss}-{control}", shape.rtt.as_millis(), shape.rate / 1_000_000)
}

fn head() {
    println!(
        "| fork | source | link | tool | seal s | commit s | range | consistent s | commit ratio | consistent ratio | down MB | up MB | of it lost MB | WAL MB | pages and files MB | bytes ratio | fetch s | 1.2 B/R + 8 RTT | round trips | connections | client cpu s | source cpu s | client MB | source MB | written MB | extra MB |"
    );
    println!("{}", "|---".repeat(26) + "|");
}

/// A fork on a link.
struct Cell<'a> {
    frozen: &'a Frozen,
    pki: &'a Pki,
    settings: &'a Settings,
    link: Link,
}

impl Cell<'_> {
    /// Runs all tools in turns and prints a line for each.
    fn measure(&self, label: &str, state: SourceState) {
        let tools = &self.settings.tools;
        let mut runs: Vec<Vec<Run>> = tools.iter().map(|_| Vec::new()).collect();
        for _ in 0..self.settings.rounds {
            for ((_, tool), runs) in tools.iter().zip(&mut runs) {
                runs.push(self.run(*tool, state));
            }
        }
        let first = runs.first().map(|runs| Medians::of(runs)).unwrap_or_default();
        for ((name, _), runs) in tools.iter().zip(&runs) {
            let medians = Medians::of(runs);
            let link = match self.link {
                Link::Loopback => "-".to_owned(),
                // What is allowed for the bytes down: a full link and some round trips.
                Link::Wan(shape) => {
                    let full = shape.time_of(medians.down).as_secs_f64();
                    format!("{:.2}", full * 1.2 + shape.rtt.as_secs_f64() * 8.0)
                }
            };
            println!("| {label} | {name} | {} |", medians.line(&first, &link));
        }
    }

    /// One run: copies, a live source, the tool, a start, the oracle.
    fn run(&self, tool: Tool, state: SourceState) -> Run {
        let wan = match self.link {
            Link::Loopback => None,
            Link::Wan(shape) => Some(Wan::new(shape)),
        };
        let (source, load) = self.frozen.source(state, &|node| {
            let address = if wan.is_some() { SOURCE_ADDRESS } else { "127.0.0.1" };
            node.configure(&format!("listen_addresses = '{address}'"));
            if let Some(wan) = &wan {
                node.user = node.user.in_network(wan.source);
            }
        });
        let mut target = self.frozen.target();
        if let Some(wan) = &wan {
            target.user = target.user.in_network(wan.target);
        }
        // Earlier work of the disk must not be paid for by the next tool.
        integration_tests::command::run(&mut std::process::Command::new("sync"));
        let address = if wan.is_some() { SOURCE_ADDRESS } else { "127.0.0.1" };
        let (pki, tls) = (self.pki, self.settings.tls());
        let place = Place { target: &target, source: &source, address, pki, tls };
        let before = carried(wan.as_ref());
        let lost = || wan.as_ref().map_or(0, |wan| wan.down.lost_bytes.load(Ordering::Relaxed));
        let measured = tool.run(&place);
        let (after, again) = (carried(wan.as_ref()), lost());
        let since = Instant::now();
        start_quietly(&target);
        let consistent = measured.commit + since.elapsed().as_secs_f64();
        drop(load);
        // What is left to catch up with is no part of it, and may be much for a lossy link.
        if let Some(wan) = &wan {
            wan.lift();
        }
        oracle::verify_running(&target, &source);
        target.stop("fast");
        oracle::checksums(&target);
        source.stop("immediate");
        for node in [&target, &source] {
            fs::remove_dir_all(&node.socket).expect("removed");
        }
        let (down, up) = (after.0 - before.0, after.1 - before.1);
        Run { measured, consistent, down, up, again }
    }
}

/// Starts a result that may have the source's settings: it must not listen where the source does.
fn start_quietly(node: &Node) {
    let mut command = node.user.command(node.install.program("pg_ctl"));
    command.args(["start", "-w", "-s", "-t", "600", "-D"]).arg(&node.data);
    command.arg("-l").arg(node.socket.join("server.log"));
    command.arg("-o").arg(format!("-k {} -p 5432 -c listen_addresses=", node.socket.display()));
    // libpq looks for certificates at home, which may be root's.
    command.env("HOME", &node.socket);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let started = command.status().expect("pg_ctl runs").success();
    assert!(started, "the result did not start:\n{}", node.log_tail());
}

/// Bytes the link has carried down and up; on the loopback both are one.
fn carried(wan: Option<&Wan>) -> (u64, u64) {
    match wan {
        Some(wan) => (wan.down.bytes.load(Ordering::Relaxed), wan.up.bytes.load(Ordering::Relaxed)),
        None => {
            let devices = fs::read_to_string("/proc/net/dev").expect("readable");
            let line = devices.lines().find_map(|line| line.trim().strip_prefix("lo:"));
            let bytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            (bytes.expect("the loopback's counters"), 0)
        }
    }
}

/// Medians of a tool's runs.
#[derive(Debug, Clone, Default)]
struct Medians {
    seal: Option<f64>,
    fetch: Option<f64>,
    round_trips: Option<f64>,
    connections: Option<f64>,
    /// Payload of WAL, and of pages and files.
    wal: Option<f64>,
    data: Option<f64>,
    commit: f64,
    range: (f64, f64),
    consistent: f64,
    down: f64,
    up: f64,
    again: f64,
    client_cpu: f64,
    source_cpu: f64,
    client_peak: f64,
    source_peak: f64,
    written: f64,
    extra: f64,
}

impl Medians {
    fn of(runs: &[Run]) -> Self {
        let sorted = |value: &dyn Fn(&Run) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let median = |value: &dyn Fn(&Run) -> f64| sorted(value)[runs.len() / 2];
        let steps = |run: &Run| {
            let seconds = |step: &str| run.measured.report["seconds"][step].as_f64();
            Some(seconds("fetch")? + seconds("compare").unwrap_or(0.0))
        };
        let reported = |name: &str| {
            let value = |run: &Run| run.measured.report[name].as_f64();
            (runs.iter().all(|run| value(run).is_some()))
                .then(|| median(&|run| value(run).unwrap_or(0.0)))
        };
        let commits = sorted(&|run| run.measured.commit);
        let sealed = runs.iter().all(|run| run.measured.seal.is_some());
        Self {
            seal: sealed.then(|| median(&|run| run.measured.seal.unwrap_or(0.0))),
            fetch: (runs.iter().all(|run| steps(run).is_some()))
                .then(|| median(&|run| steps(run).unwrap_or(0.0))),
            round_trips: reported("round_trips"),
            connections: reported("connections"),
            wal: reported("bytes_wal_payload"),
            data: reported("bytes_data"),
            commit: median(&|run| run.measured.commit),
            range: (commits[0], commits[commits.len() - 1]),
            consistent: median(&|run| run.consistent),
            down: median(&|run| run.down as f64),
            up: median(&|run| run.up as f64),
            again: median(&|run| run.again as f64),
            client_cpu: median(&|run| run.measured.client_cpu),
            source_cpu: median(&|run| run.measured.source_cpu),
            client_peak: median(&|run| run.measured.client_peak as f64),
            source_peak: median(&|run| run.measured.source_peak as f64),
            written: median(&|run| run.measured.written as f64),
            extra: median(&|run| run.measured.extra as f64),
        }
    }

    /// Everything but the names, beside the first tool.
    fn line(&self, first: &Self, link: &str) -> String {
        let shown = |time: Option<f64>| time.map_or("-".to_owned(), |time| format!("{time:.2}"));
        let (seal, fetch) = (shown(self.seal), shown(self.fetch));
        let whole =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
        let megabytes =
            |bytes: Option<f64>| bytes.map_or("-".to_owned(), |b| format!("{:.1}", b / 1e6));
        let (wal, data) = (megabytes(self.wal), megabytes(self.data));
        let (trips, connections) = (whole(self.round_trips), whole(self.connections));
        let bytes = (self.down + self.up) / (first.down + first.up);
        format!(
            "{seal} | {:.2} | {:.2}-{:.2} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} | {:.1} | {wal} | {data} | {bytes:.3} | {fetch} | {link} | {trips} | {connections} | {:.2} | {:.2} | {:.0} | {:.0} | {:.1} | {:.1}",
            self.commit,
            self.range.0,
            self.range.1,
            self.consistent,
            self.commit / first.commit,
            self.consistent / first.consistent,
            self.down / 1e6,
            self.up / 1e6,
            self.again / 1e6,
            self.client_cpu,
            self.source_cpu,
            self.client_peak / 1e6,
            self.source_peak / 1e6,
            self.written / 1e6,
            self.extra / 1e6,
        )
    }
}

//! What a rewind takes from the source's own work: `pgbench` there, alone and while its files are served
//! at a quarter of a link of 200 Mbit/s. `pgbench` and the programs of the rewind have a processor each.

use std::process::{Command, Stdio};

use integration_tests::client::Rewind;
use integration_tests::cluster::{Install, Node};
use integration_tests::server::{Pki, command};

use crate::workload::{Frozen, SourceState, Workload};

/// A quarter of 200 Mbit/s, in bytes.
const RATE: &str = "6250k";
/// Seconds of one run of `pgbench`.
const SECONDS: &str = "15";
/// Pairs of runs.
const ROUNDS: usize = 3;

/// Prints transactions a second without and with a rewind beside them.
pub(crate) fn print(major: u32, workload: Workload) {
    let frozen = Frozen::new(major, workload, 1);
    let pki = Pki::new(frozen.home());
    let (source, _) = frozen.source(SourceState::Checkpointed, &|_| {});
    let target = frozen.target();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push(pgbench(&source));
        let options = ["--allow", "client", "--max-rate", RATE];
        let mut server = source.user.command("/usr/bin/taskset");
        let plain = command(&source.data, source.user, &pki, "127.0.0.1:17432");
        server.args(["-c", "0"]).arg(plain.get_program()).args(plain.get_args()).args(options);
        server.stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = server.spawn().expect("the server starts");
        std::thread::sleep(std::time::Duration::from_millis(500));
        let address = "https://127.0.0.1:17432";
        // A dry run of compare reads every page of both; it is begun again until pgbench ends.
        let stop = std::sync::atomic::AtomicBool::new(false);
        beside.push(std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let rewind = Rewind::to(&target, address, &pki).timeout("60s");
                    let plain = rewind.args(["-n", "--strategy", "compare"]).into_command();
                    let mut pinned = target.user.command("/usr/bin/taskset");
                    pinned.args(["-c", "0"]).arg(plain.get_program()).args(plain.get_args());
                    drop(pinned.stdout(Stdio::null()).stderr(Stdio::null()).status());
                }
            });
            let rate = pgbench(&source);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            rate
        }));
        drop(server.kill());
        drop(server.wait());
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (alone, beside) = (median(&mut alone), median(&mut beside));
    println!("| pgbench on the source | transactions a second | ratio |");
    println!("|---|---|---|");
    println!("| alone | {alone:.0} | 1.00 |");
    println!("| beside a rewind with --max-rate {RATE} | {beside:.0} | {:.2} |", beside / alone);
    println!();
    source.stop("immediate");
}

/// Transactions a second of `pgbench` with two clients, on the second processor.
fn pgbench(node: &Node) -> f64 {
    let mut pgbench: Command = node.user.command("/usr/bin/taskset");
    pgbench.args(["-c", "1"]).arg(Install::of(15).program("pgbench"));
    pgbench.args(["-n", "-c", "2", "-T", SECONDS, "-U", "postgres", "-p", "5432", "-h"]);
    let output = integration_tests::command::run(pgbench.arg(&node.socket).arg("postgres"));
    let line = output.lines().find_map(|line| line.strip_prefix("tps = "));
    let rate = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    rate.expect("a rate")
}

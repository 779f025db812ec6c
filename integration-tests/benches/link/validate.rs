//! Is the emulated link what it says? Measured with `ping` and `iperf3`, beside the models.

use std::process::{Child, Stdio};
use std::time::Duration;

use integration_tests::command::run;
use integration_tests::user::User;
use integration_tests::wan::{Network, SOURCE_ADDRESS, Shape, TARGET_ADDRESS, Wan};
use serde_json::Value;

/// Payload of a full packet.
const SEGMENT_BYTES: f64 = 1448.0;
/// Payload in what the link carries.
const PAYLOAD: f64 = 1448.0 / 1500.0;

/// Prints one line for a shape, measured for so many seconds with one and eight connections.
pub(crate) fn validate(shape: Shape, seconds: u64) {
    let wan = Wan::new(shape);
    let rtt = ping(wan.target);
    let one = iperf(&wan, 1, seconds);
    let eight = iperf(&wan, 8, seconds);
    println!(
        "| {} | {rtt:.1} | {:.1} | {one:.1} | {:.1} | {eight:.1} |",
        crate::name_of(shape),
        model(shape, 1.0),
        model(shape, 8.0),
    );
}

/// Head of the table.
pub(crate) fn head() {
    println!(
        "| link | ping ms | model, 1 connection Mbit/s | iperf3 | model, 8 connections | iperf3 |"
    );
    println!("|---|---|---|---|---|---|");
}

fn command(network: Network, program: &str) -> std::process::Command {
    // ping opens a raw socket: as root, unlike everything else.
    let mut command = std::process::Command::new("nsenter");
    command.arg(network.argument()).arg("--").arg(program);
    command
}

fn ping(from: Network) -> f64 {
    let output = run(command(from, "ping").args(["-q", "-c", "10", "-i", "0.2", SOURCE_ADDRESS]));
    let times = output.split("= ").nth(1).unwrap_or_default();
    times.split('/').nth(1).and_then(|mean| mean.parse().ok()).unwrap_or(f64::NAN)
}

/// Mbit/s of payload from the source to the target.
fn iperf(wan: &Wan, connections: u32, seconds: u64) -> f64 {
    let user = User::unprivileged();
    let mut server = user.in_network(wan.target).command("/usr/bin/iperf3");
    let server = server.args(["-s", "-1", "-B", TARGET_ADDRESS]).stdout(Stdio::null());
    let mut server: Child = server.spawn().expect("iperf3 runs");
    std::thread::sleep(Duration::from_millis(500));
    let mut client = user.in_network(wan.source).command("/usr/bin/iperf3");
    client.args(["-c", TARGET_ADDRESS, "-J", "-O", "2", "-t", &seconds.to_string()]);
    let output = run(client.args(["-P", &connections.to_string()]));
    drop(server.wait());
    let report: Value = serde_json::from_str(&output).expect("JSON");
    report["end"]["sum_received"]["bits_per_second"].as_f64().expect("a rate") / 1e6
}

/// What so many connections should carry: the link, or the rate loss leaves them (Reno's
/// 1.22 / sqrt(p) or CUBIC's 1.054 R^0.75 / p^0.75 packets in flight, whichever is more). BBR takes
/// no notice of such loss.
fn model(shape: Shape, connections: f64) -> f64 {
    let link = shape.rate as f64 / 1e6 * PAYLOAD;
    if shape.loss == 0.0 || shape.congestion_control == "bbr" {
        return link * (1.0 - shape.loss);
    }
    let rtt = shape.rtt.as_secs_f64();
    let reno = 1.22 / shape.loss.sqrt();
    let cubic = 1.054 * rtt.powf(0.75) / shape.loss.powf(0.75);
    let rate = reno.max(cubic) * SEGMENT_BYTES * 8.0 / rtt / 1e6;
    (rate * connections).min(link)
}

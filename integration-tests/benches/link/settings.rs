//! What is measured: everything, or what the environment asks for.

use std::fs;
use std::time::Duration;

use integration_tests::wan::Shape;

use crate::tools::{TOOLS, Tool, compression, has_everything};
use crate::workload::{SourceState, WORKLOADS, Workload};

/// What is between the nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Link {
    /// The loopback of this machine.
    Loopback,
    /// An emulated long link.
    Wan(Shape),
}

impl Link {
    /// As it is asked for: `loopback`, `100ms-200M`, `100ms-200M-1%`, `100ms-200M-1%-cubic`.
    fn parse(text: &str) -> Self {
        if text == "loopback" {
            return Self::Loopback;
        }
        let mut shape =
            Shape { rtt: Duration::ZERO, rate: 0, loss: 0.0, congestion_control: "bbr" };
        for part in text.split('-') {
            let number = |suffix: &str| part.strip_suffix(suffix)?.parse::<f64>().ok();
            if let Some(milliseconds) = number("ms") {
                shape.rtt = Duration::from_secs_f64(milliseconds / 1000.0);
            } else if let Some(megabits) =
                part.strip_suffix('M').and_then(|m| m.parse::<u64>().ok())
            {
                shape.rate = megabits * 1_000_000;
            } else if let Some(percent) = number("%") {
                shape.loss = percent / 100.0;
            } else {
                let known = ["bbr", "cubic", "reno"].into_iter().find(|name| *name == part);
                shape.congestion_control = known.unwrap_or_else(|| panic!("what link is {text}?"));
            }
        }
        assert!(shape.rate > 0, "{text} has no rate");
        Self::Wan(shape)
    }

    /// How it is called in tables.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Loopback => "loopback".to_owned(),
            Self::Wan(shape) => crate::name_of(shape),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Settings {
    /// PostgreSQL of both nodes.
    pub(crate) major: u32,
    /// Timed runs of each tool in a cell.
    pub(crate) rounds: usize,
    /// Makes every workload so many times as large.
    pub(crate) scale: u32,
    /// Seconds each link is checked with `iperf3`; 0 is not at all.
    pub(crate) validate: u64,
    /// Whether the WAL scan is measured too.
    pub(crate) scan: bool,
    /// Forks of which it is measured what their pages take, from the first; 0 is none.
    pub(crate) pages: usize,
    /// Whether it is measured what a rewind takes from the source.
    pub(crate) burden: bool,
    /// Whether clusters that are extreme in one way are measured too.
    pub(crate) extremes: bool,
    /// The forks.
    pub(crate) workloads: Vec<Workload>,
    /// What the source does.
    pub(crate) states: Vec<(&'static str, SourceState)>,
    /// The links.
    pub(crate) links: Vec<Link>,
    /// The tools; ratios are to the first.
    pub(crate) tools: Vec<(&'static str, Tool)>,
}

/// What is measured unless something else is asked for: full, and in less than ten minutes.
const FULL_LINKS: &str = "loopback 20ms-50M 20ms-200M 20ms-1000M 100ms-50M 100ms-200M 100ms-1000M \
                          200ms-50M 200ms-200M 200ms-1000M 100ms-200M-0.1%-cubic 100ms-200M-1%-cubic \
                          100ms-200M-0.1%-bbr 100ms-200M-1%-bbr";
const QUICK_LINKS: &str = "loopback 50ms-200M";

impl Settings {
    /// From `PGREJOIN_BENCH_*`; unknown names end the run.
    pub(crate) fn from_environment() -> Self {
        let quick = variable("QUICK").is_some();
        let or = |name: &str, full: &str, short: &str| {
            let default = if quick { short } else { full };
            variable(name).unwrap_or_else(|| default.to_owned())
        };
        let number = |name: &str, full: &str, short: &str| {
            let text = or(name, full, short);
            text.parse::<u64>().unwrap_or_else(|_| panic!("{name}={text} is no number"))
        };
        let small = |name: &str, full: &str, short: &str| {
            u32::try_from(number(name, full, short)).expect("a small number")
        };
        let names =
            |text: String| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
        let links = names(or("LINKS", FULL_LINKS, QUICK_LINKS));
        let all = "pgbench rows bulk relations wal huge";
        let workloads = names(or("FORKS", all, "pgbench rows"));
        let states = names(or("SOURCES", "promoted checkpointed loaded", "checkpointed"));
        let tools = names(or(
            "TOOLS",
            "pg_rewind pg_basebackup rsync pgrejoin pgrejoin-compare pgrejoin-no-undo",
            "pg_rewind pg_basebackup rsync pgrejoin",
        ));
        Self {
            major: small("MAJOR", "15", "15"),
            rounds: small("ROUNDS", "3", "1") as usize,
            scale: small("SCALE", "1", "1"),
            validate: number("VALIDATE", "10", "4"),
            scan: number("SCAN", "1", "1") > 0,
            pages: small("PAGES", "6", "0") as usize,
            burden: number("BURDEN", "1", "0") > 0,
            extremes: number("EXTREMES", "1", "0") > 0,
            workloads: pick(&workloads, &WORKLOADS.map(|workload| (workload.name, workload))),
            states: named(&states, &SourceState::ALL),
            links: links
                .iter()
                .map(|link| Link::parse(link))
                .filter(|link| can_be_made(*link))
                .collect(),
            tools: named(&tools, &TOOLS),
        }
    }

    /// The emulated links.
    pub(crate) fn wans(&self) -> Vec<Shape> {
        let shape = |link: &Link| match link {
            Link::Loopback => None,
            Link::Wan(shape) => Some(*shape),
        };
        self.links.iter().filter_map(shape).collect()
    }

    /// Whether the servers speak TLS.
    pub(crate) fn tls(&self) -> bool {
        has_everything(self.major)
    }

    /// What the figures depend on.
    pub(crate) fn print(&self) {
        if !rustix::process::geteuid().is_root() {
            println!("Emulated links take root: only the loopback is measured as this user.");
        }
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let tls = if self.tls() { "over TLS" } else { "without TLS, which its build has not" };
        println!(
            "PostgreSQL {}, pg_rewind {tls}, pg_basebackup with {}; pgrejoin over TLS.",
            self.major,
            compression(self.major)
        );
        println!(
            "Kernel {}, {} processors, tcp_rmem {}, tcp_wmem {}; on the loopback {}.",
            read("/proc/sys/kernel/osrelease"),
            std::thread::available_parallelism().map_or(0, usize::from),
            read("/proc/sys/net/ipv4/tcp_rmem"),
            read("/proc/sys/net/ipv4/tcp_wmem"),
            read("/proc/sys/net/ipv4/tcp_congestion_control"),
        );
        println!(
            "Medians of {} runs in turns, workloads {} times the size they name; ratios to {}.",
            self.rounds,
            self.scale,
            self.tools.first().map_or("nothing", |(name, _)| name)
        );
        for workload in &self.workloads {
            println!("- {}: {}", workload.name, workload.about);
        }
        println!();
    }
}

/// Namespaces and TUN devices take root.
fn can_be_made(link: Link) -> bool {
    matches!(link, Link::Loopback) || rustix::process::geteuid().is_root()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(format!("PGREJOIN_BENCH_{name}")).ok().filter(|text| !text.is_empty())
}

fn named<T: Copy>(wanted: &[String], known: &[(&'static str, T)]) -> Vec<(&'static str, T)> {
    let find = |name: &String| {
        let found = known.iter().find(|(known, _)| known == name);
        *found.unwrap_or_else(|| {
            panic!("{name} is none of {:?}", known.iter().map(|(name, _)| name).collect::<Vec<_>>())
        })
    };
    wanted.iter().map(find).collect()
}

fn pick<T: Copy>(wanted: &[String], known: &[(&'static str, T)]) -> Vec<T> {
    named(wanted, known).into_iter().map(|(_, thing)| thing).collect()
}

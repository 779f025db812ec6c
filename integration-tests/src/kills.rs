//! Kills of the programs at any system call that changes a disk, or at any moment, and what is left.
//!
//! The kernel delivers the kill at the entry of the n-th call of one kind (`strace` injects it), so
//! the programs are those that are shipped.

#![expect(clippy::print_stdout, reason = "a seed must be seen to be repeated")]

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::client::{Rewind, state_command_line};
use crate::cluster::Node;
use crate::faults::judge::Choices;
use crate::oracle;
use crate::pair::{Pair, Shape};
use crate::server::{Pki, Server};
use crate::snapshot::Content;

/// Calls that change a disk or make a change durable.
const CALLS: [&str; 9] = [
    "renameat",
    "linkat",
    "unlinkat",
    "mkdirat",
    "fchmod",
    "pwrite64",
    "ftruncate",
    "fsync",
    "syncfs",
];
/// Exit code of `strace` when its child was killed.
const KILLED: i32 = 137;

/// A fork that stays as it is, so that every rewind of it must end in the same bytes.
#[derive(Debug)]
pub struct Frozen {
    pair: Pair,
    pki: Pki,
    before: Content,
    rewound: Content,
    golden: Node,
    /// Copies lie in memory: a kill asks nothing of the disk.
    memory: TempDir,
    /// How often a thread of an undisturbed rewind makes each call, at most.
    counts: Vec<(&'static str, usize)>,
}

/// Names whose content has the time in it, or that are not part of the result.
const NOT_COMPARED: [&str; 3] = ["backup_label", ".pgrejoin", "postmaster.pid"];

fn content(node: &Node) -> Content {
    Content::without(&node.data, &NOT_COMPARED)
}

impl Default for Frozen {
    fn default() -> Self {
        Self::new()
    }
}

impl Frozen {
    /// Makes the fork and rewinds a copy of its target without a fault.
    pub fn new() -> Self {
        let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
        pair.b.promote();
        pair.a.sql("update plain set n = n + 5 where id % 7 = 0");
        pair.a.sql("create table lost as select g, md5(g::text) t from generate_series(1, 3000) g");
        pair.b.sql("update plain set n = n + 3 where id % 5 = 0");
        let many: String =
            (0..12).map(|i| format!("create table many_{i} as select {i} g;")).collect();
        pair.b.script("postgres", &many);
        pair.b.sql("truncate shrink");
        pair.b.sql("drop database doomed");
        pair.b.sql("checkpoint");
        pair.a.stop("fast");
        pair.b.stop("fast");
        let pki = Pki::new(pair.home.path());
        let golden = pair.a.copy(&pair.home.path().join("golden"));
        let server = Server::start(&pair.b, &pki);
        let rewind = Rewind::new(&golden, &server, &pki).following(&pair.b);
        let counts = counted(&rewind.into_command(), pair.home.path());
        drop(server);
        let (before, rewound) = (content(&pair.a), content(&golden));
        let memory = tempfile::Builder::new().prefix("pgr").tempdir_in("/dev/shm");
        let memory = memory.expect("memory");
        pair.a.user.own(memory.path());
        Self { pair, pki, before, rewound, golden, memory, counts }
    }

    fn choose(&self, choices: &mut Choices) -> (&'static str, usize) {
        let (call, count) = self.counts[choices.below(self.counts.len())];
        (call, 1 + choices.below(count))
    }

    /// Kills rewinds until `kills` of them died, and ends each of them in one way or another.
    pub fn kill(&self, seed: u64, kills: usize) {
        let server = Server::start(&self.pair.b, &self.pki);
        let mut choices = Choices::new(seed);
        let (mut died, mut tries) = (0, 0);
        let mut met = std::collections::BTreeMap::<String, usize>::new();
        while died < kills {
            tries += 1;
            assert!(tries < kills * 6 + 20, "only {died} of {tries} runs were killed");
            let place = self.memory.path().join(format!("t{tries}"));
            let target = self.pair.a.copy(&place);
            let command = Rewind::new(&target, &server, &self.pki).following(&self.pair.b);
            let (was_killed, how) = self.kill_somewhere(command, &mut choices);
            if was_killed {
                died += 1;
                let state = self.judge(&target, &server, (seed, &how), &mut choices);
                *met.entry(state).or_default() += 1;
            }
            println!("seed {seed}: {how}: {}", if was_killed { "died" } else { "ran to its end" });
            let same = content(&target) == self.rewound;
            let differing = content(&target).differences(&self.rewound);
            assert!(same, "seed {seed}, {how}: the result is not as it should be: {differing:?}");
            assert!(!target.is_running(), "seed {seed}, {how}: postmaster.pid is left");
            std::fs::remove_dir_all(&place).expect("removed");
        }
        println!("seed {seed}: {died} kills in {tries} runs; found {met:?}");
    }

    /// Looks at what a kill left and brings it to its end; returns what it was.
    fn judge(
        &self,
        target: &Node,
        server: &Server,
        (seed, how): (u64, &str),
        choices: &mut Choices,
    ) -> String {
        let status = command(target, "status");
        let said = output(status);
        let unfinished = said.contains("has not finished");
        // Either lock alone holds PostgreSQL back.
        let locked = !target.data.join("global/pg_control").exists()
            || (target.data.join("backup_label").exists() && !target.waits_for_its_first_start());
        assert!(!locked || unfinished, "seed {seed}, {how}: {said}");
        let state = if unfinished {
            assert!(!target.try_start(), "seed {seed}, {how}: PostgreSQL started unfinished");
            "unfinished"
        } else if said.contains("rewound") || content(target) == self.rewound {
            self.rewound.assert_same(&content(target));
            "rewound"
        } else {
            self.before.assert_same(&content(target));
            "unchanged"
        };
        let rewind = || {
            Rewind::new(target, server, &self.pki).following(&self.pair.b).succeed();
        };
        match choices.below(3) {
            0 => self.end(target, "resume", choices),
            1 => {
                self.end(target, "rollback", choices);
                if state != "rewound" {
                    self.before.assert_same(&content(target));
                }
            }
            _ => {}
        }
        if content(target) != self.rewound || target.data.join(".pgrejoin/sealed").exists() {
            rewind();
        }
        state.to_owned()
    }

    /// Runs `resume` or `rollback`, now and then killed itself.
    fn end(&self, target: &Node, what: &str, choices: &mut Choices) {
        if choices.below(2) == 0 {
            let (call, number) = self.choose(choices);
            let traced = traced(&command(target, what), call, number);
            drop(output(traced));
        }
        let ended = command(target, what).output().expect("it runs");
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        // After the commit there is nothing to take back.
        let refused = what == "rollback" && text.contains("cannot be rolled back");
        assert!(ended.status.success() || refused, "{what}: {text}");
    }

    /// Runs a rewind and kills it at a call or at a moment; whether it died, and how it was tried.
    fn kill_somewhere(&self, rewind: Rewind, choices: &mut Choices) -> (bool, String) {
        if choices.below(4) == 0 {
            let steps = ["fetch", "seal", "apply"];
            let (step, delay) = (steps[choices.below(3)], choices.below(120) as u64);
            let mut running = rewind.spawn();
            running.wait_for(step);
            sleep(Duration::from_millis(delay));
            running.signal(Signal::KILL);
            let died = running.wait().code == -1;
            return (died, format!("killed {delay} ms after {step}"));
        }
        let (call, number) = self.choose(choices);
        let ended = traced(&rewind.into_command(), call, number).output().expect("strace runs");
        let code = ended.status.code().unwrap_or(KILLED);
        let text = String::from_utf8_lossy(&ended.stderr);
        assert!(code == KILLED || code == 0, "{call} {number}: exit code {code}: {text}");
        (code == KILLED, format!("killed at {call} number {number}"))
    }

    /// A copy of the target whose rewind was killed where `status` says `words` and there is this file
    /// in `.pgrejoin`: tried at one call after the other until it is so.
    pub fn killed_where(&self, call: &str, (words, file): (&str, &str)) -> Node {
        let server = Server::start(&self.pair.b, &self.pki);
        let count = self.counts.iter().find(|(name, _)| *name == call).map_or(0, |(_, n)| *n);
        for number in 1..=count {
            let place = self.memory.path().join(format!("w{number}"));
            let target = self.pair.a.copy(&place);
            let rewind = Rewind::new(&target, &server, &self.pki).following(&self.pair.b);
            drop(output(traced(&rewind.into_command(), call, number)));
            let there = target.data.join(".pgrejoin").join(file).exists();
            if there && output(command(&target, "status")).contains(words) {
                return target;
            }
            std::fs::remove_dir_all(&place).expect("removed");
        }
        panic!("no {call} leaves a target of which status says: {words}");
    }

    /// Rewinds a target that may have been worked on, with the source there.
    pub fn rewind(&self, target: &Node) -> crate::client::Ended {
        let server = Server::start(&self.pair.b, &self.pki);
        Rewind::new(target, &server, &self.pki).following(&self.pair.b).run()
    }

    /// The same while the source cannot be reached.
    pub fn rewind_without_source(&self, target: &Node) -> crate::client::Ended {
        Rewind::to(target, "https://127.0.0.1:1", &self.pki).following(&self.pair.b).run()
    }

    /// Whether a target is what it was before the rewind.
    pub fn is_unchanged(&self, target: &Node) -> bool {
        content(target) == self.before
    }

    /// Whether it is rewound, byte for byte.
    pub fn is_rewound(&self, target: &Node) -> bool {
        content(target) == self.rewound
    }

    /// The result that all others are equal to is right.
    pub fn verify(&self) {
        self.pair.b.start();
        oracle::verify(&self.golden, &self.pair.b);
    }
}

/// Runs a command that must succeed and counts its calls, in the thread that makes most of each.
fn counted(command: &Command, home: &Path) -> Vec<(&'static str, usize)> {
    let trace = home.join("trace");
    crate::cluster::write(&trace, "");
    crate::user::User::unprivileged().own(&trace);
    let mut traced = strace(&trace);
    traced.arg(format!("--trace={}", CALLS.join(",")));
    crate::command::run(traced.arg("--").arg(command.get_program()).args(command.get_args()));
    let text = std::fs::read_to_string(&trace).expect("a trace");
    let mut counts = std::collections::BTreeMap::<(&str, &str), usize>::new();
    for line in text.lines().filter(|line| !line.contains("resumed>")) {
        if let Some((thread, rest)) = line.split_once(' ')
            && let Some((call, _)) = rest.trim_start().split_once('(')
        {
            *counts.entry((call, thread)).or_default() += 1;
        }
    }
    let most = |wanted: &str| {
        counts.iter().filter(|((call, _), _)| *call == wanted).map(|(_, count)| *count).max()
    };
    let counts: Vec<_> = CALLS.iter().filter_map(|call| Some((*call, most(call)?))).collect();
    assert!(counts.len() >= 7, "a rewind makes other calls than it did: {counts:?}");
    counts
}

fn strace(trace: &Path) -> Command {
    let mut strace = crate::user::User::unprivileged().command("strace");
    strace.args(["-f", "-qq", "-o"]).arg(trace);
    strace
}

/// The same command, killed at the entry of its n-th call of one kind.
pub fn traced(command: &Command, call: &str, number: usize) -> Command {
    let program = Path::new(command.get_program());
    let mut traced = strace(Path::new("/dev/null"));
    traced.arg(format!("--trace={call}"));
    traced.arg(format!("--inject={call}:signal=KILL:when={number}"));
    traced.arg("--").arg(program).args(command.get_args());
    traced.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    traced
}

fn command(node: &Node, what: &str) -> Command {
    state_command_line(what, node)
}

fn output(mut command: Command) -> String {
    let output = command.output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

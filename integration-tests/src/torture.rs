//! Random forks: work on both sides, a kill at a moment the seed chooses, and the way back.

#![expect(clippy::print_stdout, reason = "a seed must be seen to be repeated")]

use std::thread::sleep;
use std::time::{Duration, SystemTime};

use crate::client::{Rewind, state_command};
use crate::cluster::{Pair, Shape};
use crate::oracle;
use crate::server::{Pki, Server};

/// Work of every kind, over and over; `side` keeps the rows of the two nodes apart.
pub fn work(side: &str, seed: u32) -> String {
    format!(
        "update plain set n = n + 1, body = md5(body) where id % 997 = (random() * 996)::int;
         insert into grow select (random() * 1e6)::int, repeat('{side}', 20 + {seed} % 7) from generate_series(1, 60);
         delete from shrink where id % 401 = (random() * 400)::int;
         insert into words select g, array[g % 10], point(g % 100, {seed} % 50), '{side}' || random() from generate_series(1, 20) g;
         create table churn_{side}(id int, t text); insert into churn_{side} select g, md5(g::text) from generate_series(1, 300) g;
         create index on churn_{side}(t); truncate churn_{side}; insert into churn_{side} values (1, 'x'); drop table churn_{side};
         vacuum shrink;"
    )
}

/// One fork: the target is killed under `pgbench` and other work, with or without a checkpoint after
/// the fork; the way back is by *fork* or by *latest*.
pub fn killed(major: u32, seed: u32) {
    let pair = Pair::new(major, Shape::default());
    pair.a.pgbench_init(1);
    let early = (pair.a.pgbench(), pair.a.load(&work("c", seed)));
    sleep(Duration::from_millis(300 + u64::from(seed % 5) * 150));
    pair.b.promote();
    let old = pair.a.load(&work("o", seed));
    let new = (pair.b.pgbench(), pair.b.load(&work("n", seed)));
    sleep(Duration::from_millis(500 + u64::from(seed % 7) * 100));
    if seed.is_multiple_of(2) {
        pair.a.sql("checkpoint");
        sleep(Duration::from_millis(200));
    }
    pair.a.kill();
    drop((early, old));
    if seed.is_multiple_of(3) {
        pair.b.sql("checkpoint");
    }
    let pki = Pki::new(pair.home.path());
    let server = Server::start(&pair.b, &pki);
    let strategy = ["fork", "latest"][seed.count_ones() as usize % 2];
    let ended = Rewind::new(&pair.a, &server, &pki)
        .following(&pair.b)
        .args(["--strategy", strategy])
        .succeed();
    assert_eq!(ended.field("result"), "rewound", "seed {seed}: {}", ended.text);
    assert_eq!(ended.field("strategy"), strategy, "seed {seed}: {}", ended.text);
    pair.a.start();
    sleep(Duration::from_millis(300));
    drop(new);
    oracle::verify(&pair.a, &pair.b);
}

/// Runs `count` forks of [`killed`] with seeds taken from the clock; each is printed before it runs.
pub fn killed_at_random(major: u32, count: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    for round in 0..count {
        let seed = now.subsec_nanos() % 1_000_000 + round;
        println!("seed {seed}");
        killed(major, seed);
    }
}

/// What a seed chooses.
#[derive(Debug)]
struct Choices(u64);

impl Choices {
    /// A number below `limit` (splitmix64).
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        let index = self.below(values.len() as u64);
        values[usize::try_from(index).unwrap_or(0)]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn pause(&mut self, milliseconds_max: u64) {
        sleep(Duration::from_millis(self.below(milliseconds_max)));
    }
}

/// One random fork: another major, shape, kind of work, way to stop, state of the source, options;
/// and the rewind itself is killed at random moments until it comes through.
pub fn random_fork(seed: u32) {
    let mut choices = Choices(u64::from(seed));
    let major = choices.one_of(&[14, 15, 16, 17, 18]);
    let shape = Shape {
        checksums: choices.below(3) > 0,
        wal_log_hints: choices.chance(2),
        segment_mb: choices.one_of(&[1, 16]),
        group_access: choices.chance(4),
    };
    let keep = choices.one_of(&["0", "1GB"]);
    let compression = choices.one_of(&["on", "off"]);
    println!("PGREJOIN_SEED={seed} on PostgreSQL {major}, {shape:?}, wal_keep_size {keep}");
    let settings = format!("wal_keep_size = {keep}\nwal_compression = {compression}");
    let pair = Pair::with(major, shape, &settings);
    part_at_random(&pair, seed, &mut choices);
    let live = (choices.below(3) > 0).then(|| pair.b.load(&work("n", seed)));
    if live.is_none() && choices.chance(2) {
        pair.b.stop("fast");
    }
    let pki = Pki::new(pair.home.path());
    let server = Server::start(&pair.b, &pki);
    rewind_with_kills(&pair, &pki, &server, &mut choices);
    if !pair.b.is_running() {
        oracle::only_replay_rebuilds_differences(&pair.a, &server, &pki);
        pair.b.start();
    }
    pair.a.start();
    choices.pause(300);
    drop(live);
    oracle::verify(&pair.a, &pair.b);
}

/// Work on both sides around a promotion, checkpoints now and then, and an end of the target.
fn part_at_random(pair: &Pair, seed: u32, choices: &mut Choices) {
    if choices.chance(2) {
        pair.a.pgbench_init(1);
    }
    let mut common = vec![pair.a.load(&work("c", seed))];
    choices.pause(800);
    if choices.chance(2) {
        pair.a.sql("checkpoint");
    }
    choices.pause(400);
    pair.b.promote();
    common.push(pair.a.load(&work("o", seed)));
    let new = pair.b.load(&work("n", seed));
    choices.pause(900);
    for node in [&pair.a, &pair.b] {
        if choices.chance(2) {
            node.sql("select pg_switch_wal()");
        }
        if choices.chance(2) {
            node.sql("checkpoint");
        }
    }
    choices.pause(500);
    match choices.below(3) {
        0 => pair.a.stop("fast"),
        1 => pair.a.stop("immediate"),
        _ => pair.a.kill(),
    }
    drop((common, new));
}

/// Rewinds with random options; up to five runs are killed at random moments before one is left
/// alone, and in between PostgreSQL must not start from a target that is being changed.
fn rewind_with_kills(pair: &Pair, pki: &Pki, server: &Server, choices: &mut Choices) {
    let connections = (1 + choices.below(8)).to_string();
    let strategy = choices.one_of(&["auto", "auto", "compare"]);
    let keep_diverged = choices.one_of(&["yes", "no"]);
    let args =
        ["--strategy", strategy, "--connections", &connections, "--keep-diverged", keep_diverged];
    println!("options {args:?}");
    let rewind = || Rewind::new(&pair.a, server, pki).following(&pair.b).args(args);
    for _ in 0..choices.below(6) {
        let running = rewind().spawn();
        choices.pause(1500);
        running.signal(rustix::process::Signal::KILL);
        running.wait();
        if pair.a.data.join("backup_label").exists()
            && pair.a.data.join("global/pg_control").exists()
        {
            // The last kill came after the commit: a rewound node that was not started yet.
            let cleaned = state_command("resume", &pair.a);
            assert_eq!(cleaned.code, 0, "{}", cleaned.text);
            return;
        }
        let status = state_command("status", &pair.a);
        assert_eq!(status.code, 0, "{}", status.text);
        if status.text.contains("has not finished") {
            assert!(!pair.a.try_start(), "started in the middle of a rewind");
        }
    }
    let ended = rewind().succeed();
    let result = ended.field("result");
    assert!(["rewound", "resumed"].contains(&result.as_str()), "{}", ended.text);
}

//! The forks that are measured: what was there before, and what each side did after. All of it comes
//! from seeds, so that every run meets the same fork.

use std::time::Duration;

use integration_tests::cluster::{Load, Node};
use integration_tests::pair::{Pair, Shape};

/// A kind of fork.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    /// How it is asked for.
    pub(crate) name: &'static str,
    /// What it is.
    pub(crate) about: &'static str,
    before: fn(&Node, u32),
    lost: fn(&Node, u32),
    new: fn(&Node, u32),
}

/// All there are.
pub(crate) const WORKLOADS: [Workload; 6] = [
    Workload {
        name: "pgbench",
        about: "pgbench scale 20, 8 k lost and 12 k new transactions",
        before: |node, scale| node.pgbench_init(20 * scale),
        lost: |node, scale| node.pgbench_transactions(2000 * scale),
        new: |node, scale| node.pgbench_transactions(3000 * scale),
    },
    Workload {
        name: "rows",
        about: "500 k semi-random rows with two indexes, 15 k random updates a side",
        before: |node, scale| filler(node, 500_000 * scale),
        lost: |node, scale| random_updates(node, 0.1, 500_000 * scale),
        new: |node, scale| random_updates(node, 0.2, 500_000 * scale),
    },
    Workload {
        name: "bulk",
        about: "a bulk load on either side after the fork: 400 k rows lost, 800 k new",
        before: |node, scale| filler(node, 100_000 * scale),
        lost: |node, scale| bulk(node, 400_000 * scale),
        new: |node, scale| bulk(node, 800_000 * scale),
    },
    Workload {
        name: "relations",
        about: "20,000 small tables, 200 of them changed a side",
        before: |node, scale| {
            for part in 0..10 * scale {
                let first = part * 2000;
                node.sql(&format!(
                    "do $$ begin for i in {first}..{} loop execute format('create table small_%s as select %s as n', i, i); end loop; end $$",
                    first + 1999
                ));
            }
        },
        lost: |node, _| small_updates(node, 7),
        new: |node, _| small_updates(node, 11),
    },
    Workload {
        name: "wal",
        about: "a pg_wal of 1 GB before the fork, 100 rows changed a side",
        before: |node, scale| {
            filler(node, 100_000 * scale);
            for round in 0..8 {
                node.sql(&format!("update filler set k = k + {round}"));
                node.sql("vacuum filler");
            }
        },
        lost: |node, _| drop(node.sql("update filler set k = 1 where id <= 100")),
        new: |node, _| drop(node.sql("update filler set k = 2 where id <= 100")),
    },
    Workload {
        name: "huge",
        about: "500 k semi-random rows, four pages in five changed on both sides",
        before: |node, scale| filler(node, 500_000 * scale),
        lost: |node, _| drop(node.sql("update filler set k = k + 1 where id % 25 = 3")),
        new: |node, _| drop(node.sql("update filler set k = k + 2 where id % 25 = 11")),
    },
];

fn filler(node: &Node, rows: u32) {
    node.sql(&format!(
        "select setseed(0.5); create table filler as select g id, (random() * 1e9)::int k, md5(g::text) || md5((g * 7)::text) || md5((g * 13)::text) body from generate_series(1, {rows}) g"
    ));
    node.sql("alter table filler add primary key (id)");
    node.sql("create index on filler (k)");
}

fn random_updates(node: &Node, seed: f64, rows: u32) {
    node.sql(&format!(
        "select setseed({seed}); update filler set k = (random() * 1e9)::int, body = md5(random()::text) || substr(body, 33) where id in (select (random() * {rows})::int from generate_series(1, 15000))"
    ));
}

fn bulk(node: &Node, rows: u32) {
    node.sql(&format!(
        "create table bulk as select g id, md5(g::text) || md5((g * 3)::text) body from generate_series(1, {rows}) g"
    ));
    node.sql("alter table bulk add primary key (id)");
}

fn small_updates(node: &Node, factor: u32) {
    node.sql(&format!(
        "do $$ begin for i in 1..200 loop execute format('update small_%s set n = n + 1', i * {factor}); end loop; end $$"
    ));
}

/// What the source is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceState {
    /// Promoted, changed, and its first checkpoint not complete.
    Promoted,
    /// Idle, a checkpoint after its last change.
    Checkpointed,
    /// Under load, its last checkpoint a minute old.
    Loaded,
}

impl SourceState {
    /// All, with their names.
    pub(crate) const ALL: [(&'static str, Self); 3] = [
        ("promoted", Self::Promoted),
        ("checkpointed", Self::Checkpointed),
        ("loaded", Self::Loaded),
    ];
}

/// How old the last checkpoint of a loaded source is.
const LOADED_FOR: Duration = Duration::from_secs(60);

/// A fork that was made once; every run works on copies of it.
#[derive(Debug)]
pub(crate) struct Frozen {
    pair: Pair,
    checkpointed: Node,
    workload: Workload,
    scale: u32,
}

impl Frozen {
    /// Makes it: a stopped target, the standby before its promotion, and the source after it.
    pub(crate) fn new(major: u32, workload: Workload, scale: u32) -> Self {
        let pair = Pair::with(major, Shape::default(), "wal_keep_size = '4GB'");
        (workload.before)(&pair.a, scale);
        pair.a.sql("checkpoint");
        pair.catch_up();
        pair.b.sql("checkpoint");
        pair.b.stop("fast");
        (workload.lost)(&pair.a, scale);
        pair.a.stop("fast");
        for node in [&pair.a, &pair.b] {
            node.configure("fsync = on");
            integration_tests::cluster::append(
                &node.data.join("pg_hba.conf"),
                "host all all 0.0.0.0/0 trust\nhost replication all 0.0.0.0/0 trust\n",
            );
        }
        let checkpointed = pair.b.copy(&pair.home.path().join("checkpointed"));
        let frozen = Self { pair, checkpointed, workload, scale };
        let source = &frozen.checkpointed;
        source.start();
        frozen.promote_and_change(source);
        source.sql("checkpoint");
        source.stop("fast");
        frozen
    }

    /// Appends settings to every copy made from now on.
    pub(crate) fn configure(&self, settings: &str) {
        for node in [&self.pair.a, &self.pair.b, &self.checkpointed] {
            node.configure(settings);
        }
    }

    fn promote_and_change(&self, source: &Node) {
        source.promote();
        (self.workload.new)(source, self.scale);
    }

    /// Where certificates and the like can lie.
    pub(crate) fn home(&self) -> &std::path::Path {
        self.pair.home.path()
    }

    /// The data directories of the target and of a source that is checkpointed, both stopped.
    pub(crate) fn stopped(&self) -> (&std::path::Path, &std::path::Path) {
        (&self.pair.a.data, &self.checkpointed.data)
    }

    /// A fresh copy of the stopped target.
    pub(crate) fn target(&self) -> Node {
        self.pair.a.copy(&self.home().join("target"))
    }

    /// A source that runs, as `adapt` wants it to, and its load.
    pub(crate) fn source(
        &self,
        state: SourceState,
        adapt: &dyn Fn(&mut Node),
    ) -> (Node, Option<Load>) {
        let frozen = match state {
            SourceState::Promoted => &self.pair.b,
            SourceState::Checkpointed | SourceState::Loaded => &self.checkpointed,
        };
        let mut source = frozen.copy(&self.home().join("source"));
        adapt(&mut source);
        source.start();
        match state {
            SourceState::Promoted => self.promote_and_change(&source),
            SourceState::Checkpointed => {}
            SourceState::Loaded => {
                let load =
                    source.load("update plain set n = n + 1 where id = (random() * 4000)::int;");
                source.sql("checkpoint");
                std::thread::sleep(LOADED_FOR);
                return (source, Some(load));
            }
        }
        (source, None)
    }
}

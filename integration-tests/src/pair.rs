//! Template clusters, each made once, and pairs of a primary and its standby made from them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::FlockOperation;
use tempfile::TempDir;

use crate::cluster::{Install, Node, append};
use crate::command::run;
use crate::user::User;

/// What a template cluster is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Data checksums.
    pub checksums: bool,
    /// `wal_log_hints`
    pub wal_log_hints: bool,
    /// WAL segment size in MB.
    pub segment_mb: u32,
    /// Group may read.
    pub group_access: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self { checksums: true, wal_log_hints: false, segment_mb: 16, group_access: false }
    }
}

impl Shape {
    fn name(self, major: u32) -> String {
        let Self { checksums, wal_log_hints, segment_mb, group_access } = self;
        format!(
            "{major}-c{}h{}s{segment_mb}g{}",
            u8::from(checksums),
            u8::from(wal_log_hints),
            u8::from(group_access)
        )
    }
}

/// Changes with the content of templates, so that old ones are not used.
const TEMPLATE_VERSION: u32 = 4;

/// A stopped primary with the base workload, made once.
fn template(install: &Install, shape: Shape) -> PathBuf {
    let user = User::unprivileged();
    let home = PathBuf::from("/var/tmp/pgrejoin-templates");
    fs::create_dir_all(&home).expect("a directory for templates");
    user.own(&home);
    let name = shape.name(install.major);
    let path = home.join(format!("{name}-v{TEMPLATE_VERSION}"));
    let lock = File::create(home.join(format!("{name}.lock"))).expect("lock file");
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).expect("lock");
    if path.join("ready").exists() {
        return path;
    }
    drop(fs::remove_dir_all(&path));
    fs::create_dir_all(&path).expect("template directory");
    user.own(&path);
    let data = path.join("data");
    let mut initdb = user.command(install.program("initdb"));
    initdb.arg("-D").arg(&data).args([
        "-A",
        "trust",
        "-U",
        "postgres",
        "-E",
        "UTF8",
        "--locale=C",
        "-N",
    ]);
    initdb.arg(format!("--wal-segsize={}", shape.segment_mb));
    if shape.checksums {
        initdb.arg("-k");
    } else if install.major >= 18 {
        initdb.arg("--no-data-checksums");
    }
    if shape.group_access {
        initdb.arg("-g");
    }
    run(&mut initdb);
    // A cluster that was made long before its first checkpoint, as in life: its files are older.
    let mut age = user.command("/usr/bin/find");
    age.arg(data.join("base")).args(["-type", "f", "-exec", "touch", "-d", "1 day ago", "{}", "+"]);
    run(&mut age);
    append(
        &data.join("postgresql.conf"),
        &format!(
            "listen_addresses = ''\nfsync = off\nshared_buffers = 16MB\nmax_prepared_transactions = 20\n\
             wal_keep_size = 1GB\ntrack_commit_timestamp = on\nwal_log_hints = {}\njit = off\n\
             max_wal_size = 4GB\ncheckpoint_timeout = 1h\nmax_connections = 30\nlog_checkpoints = on\n\
             autovacuum = off\nhot_standby_feedback = off\nwal_receiver_status_interval = 1s\n\
             wal_retrieve_retry_interval = 200ms\nbgwriter_delay = 10s\n",
            if shape.wal_log_hints { "on" } else { "off" }
        ),
    );
    let node = Node { install: install.clone(), data, socket: path.clone(), user };
    node.start();
    node.sql_file("postgres", &Path::new(env!("CARGO_MANIFEST_DIR")).join("sql/base.sql"));
    for statement in ["create database second", "create database doomed"] {
        node.sql(statement);
    }
    node.sql_in("second", "create extension amcheck; create table other as select g id, md5(g::text) v from generate_series(1, 3000) g");
    node.sql_in("doomed", "create table gone as select generate_series(1, 1000) g");
    node.stop("fast");
    File::create(path.join("ready")).expect("mark");
    path
}

/// The data directory of the ordinary template of a major: a real one, stopped, not to be changed.
pub fn template_of(major: u32) -> PathBuf {
    template(&Install::of(major), Shape::default()).join("data")
}

/// A test's world: a temporary home and two nodes of one cluster.
#[derive(Debug)]
pub struct Pair {
    /// The old primary, to be rewound.
    pub a: Node,
    /// The standby that is promoted.
    pub b: Node,
    /// Everything lies in it; gone when the test ends.
    pub home: TempDir,
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A home the unprivileged user can work in.
pub fn home() -> TempDir {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    // Socket paths must be short.
    let home = tempfile::Builder::new()
        .prefix(&format!("pgr{serial}"))
        .rand_bytes(5)
        .tempdir_in("/tmp")
        .expect("temporary directory");
    User::unprivileged().own(home.path());
    home
}

impl Pair {
    /// A primary `a` and a standby `b` that has caught up, both running.
    pub fn new(major: u32, shape: Shape) -> Self {
        Self::with(major, shape, "")
    }

    /// The same with more settings on both.
    pub fn with(major: u32, shape: Shape, settings: &str) -> Self {
        let pair = Self::stopped(major, shape, settings);
        pair.a.start();
        pair.b.start();
        pair.catch_up();
        pair
    }

    /// The same, not started.
    pub fn stopped(major: u32, shape: Shape, settings: &str) -> Self {
        let install = Install::of(major);
        let template = template(&install, shape);
        let home = home();
        let user = User::unprivileged();
        let made = Node { install, data: template.join("data"), socket: template, user };
        let a = made.copy(&home.path().join("a"));
        let b = made.copy(&home.path().join("b"));
        a.configure(settings);
        b.configure(settings);
        b.follow(&a);
        Self { a, b, home }
    }

    /// Waits until `b` has replayed all that `a` has written.
    pub fn catch_up(&self) {
        let lsn = self.a.lsn();
        self.b.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.home.path()).into_iter().flatten().flatten() {
            let data = entry.path().join("data");
            if data.join("postmaster.pid").exists() {
                let node = Node { data, socket: entry.path(), ..self.a.clone() };
                let mut command = node.user.command(node.install.program("pg_ctl"));
                command.args(["stop", "-s", "-m", "immediate", "-D"]).arg(&node.data);
                drop(command.output());
            }
        }
    }
}

//! The tools that bring a node back, each as its users run it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration_tests::client::Rewind;
use integration_tests::cluster::{Install, Node, append, write};
use integration_tests::server::{Pki, Server};

use crate::measure::{Measured, watch};

/// Where `rsync` serves.
const RSYNC_PORT: u16 = 8730;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tool {
    /// PostgreSQL's own.
    PgRewind,
    /// A new base backup, compressed by the server.
    Basebackup,
    /// `rsync -z` between `pg_backup_start` and `pg_backup_stop`.
    Rsync,
    /// This project's, with these options.
    Pgrejoin(&'static [&'static str]),
}

/// All, with their names.
pub(crate) const TOOLS: [(&str, Tool); 8] = [
    ("pg_rewind", Tool::PgRewind),
    ("pg_basebackup", Tool::Basebackup),
    ("rsync", Tool::Rsync),
    ("pgrejoin", Tool::Pgrejoin(&[])),
    ("pgrejoin-compare", Tool::Pgrejoin(&["--strategy", "compare"])),
    ("pgrejoin-no-undo", Tool::Pgrejoin(&["--no-undo"])),
    ("pgrejoin-1", Tool::Pgrejoin(&["--connections", "1"])),
    ("pgrejoin-16", Tool::Pgrejoin(&["--connections", "16"])),
];

/// What a tool works with.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// The node to be brought back.
    pub(crate) target: &'a Node,
    /// The running source.
    pub(crate) source: &'a Node,
    /// The source's address as the target sees it.
    pub(crate) address: &'a str,
    /// Certificates.
    pub(crate) pki: &'a Pki,
    /// Whether the servers of this major speak TLS.
    pub(crate) tls: bool,
}

impl Place<'_> {
    fn conninfo(&self) -> String {
        let mode = if self.tls { "require" } else { "disable" };
        format!("host={} port=5432 user=postgres dbname=postgres sslmode={mode}", self.address)
    }

    fn postmaster(&self) -> u32 {
        let pid = fs::read_to_string(self.source.data.join("postmaster.pid")).expect("running");
        pid.lines().next().and_then(|line| line.parse().ok()).expect("a process")
    }

    /// A command on the target, as its user.
    fn command(&self, program: &Path) -> Command {
        let mut command = self.target.user.command(program);
        // libpq looks for certificates at home, which may be root's.
        command.env("HOME", &self.target.socket);
        command
    }

    /// Makes the result a standby of the source, for tools that do not.
    fn follow(&self) {
        let user = self.target.user;
        for name in ["standby.signal", "postgresql.auto.conf"] {
            append(&self.target.data.join(name), "");
            user.own(&self.target.data.join(name));
        }
        let setting = format!("primary_conninfo = '{}'\n", self.conninfo());
        append(&self.target.data.join("postgresql.auto.conf"), &setting);
    }
}

impl Tool {
    /// Brings the target back, up to a node that can be started as a standby.
    pub(crate) fn run(self, place: &Place<'_>) -> Measured {
        match self {
            Self::PgRewind => pg_rewind(place),
            Self::Basebackup => basebackup(place),
            Self::Rsync => rsync(place),
            Self::Pgrejoin(options) => pgrejoin(place, options),
        }
    }
}

fn pg_rewind(place: &Place<'_>) -> Measured {
    let mut command = place.command(&place.target.install.program("pg_rewind"));
    command.arg("-D").arg(&place.target.data).arg("--source-server").arg(place.conninfo());
    let measured = watch(command, &[place.postmaster()], &nowhere());
    place.follow();
    measured
}

fn basebackup(place: &Place<'_>) -> Measured {
    let old = place.target.data.with_file_name("old");
    #[expect(clippy::disallowed_methods, reason = "a benchmark's own directory")]
    fs::rename(&place.target.data, &old).expect("renamed");
    fs::remove_dir_all(&old).expect("removed");
    let mut command = place.command(&place.target.install.program("pg_basebackup"));
    command.arg("-D").arg(&place.target.data).args(["-X", "stream", "-c", "fast", "-d"]);
    command
        .arg(place.conninfo())
        .arg(format!("--compress={}", compression(place.target.install.major)));
    let measured = watch(command, &[place.postmaster()], &place.target.data);
    place.follow();
    measured
}

/// The best compression by the server that a build has.
pub(crate) fn compression(major: u32) -> &'static str {
    if has_everything(major) { "server-zstd:3" } else { "server-gzip:1" }
}

/// Whether a major's build has TLS and zstd: Debian's has, those from other packages have not.
pub(crate) fn has_everything(major: u32) -> bool {
    Install::of(major)
        .program("postgres")
        .canonicalize()
        .is_ok_and(|path| path.starts_with("/usr/lib"))
}

/// What `rsync` must leave alone, by the documentation of low-level base backups.
const EXCLUDED: &str = "postmaster.pid postmaster.opts pg_replslot/* pg_dynshmem/* pg_notify/* \
                        pg_serial/* pg_snapshots/* pg_stat_tmp/* pg_subtrans/* pgsql_tmp*";

fn rsync(place: &Place<'_>) -> Measured {
    let home = &place.source.socket;
    let configuration = home.join("rsyncd.conf");
    write(
        &configuration,
        format!(
            "use chroot = no\nreverse lookup = no\n[data]\npath = {}\nread only = yes\n",
            place.source.data.display()
        ),
    );
    let mut daemon = place.source.user.command("/usr/bin/rsync");
    daemon.args(["--daemon", "--no-detach", "--port", &RSYNC_PORT.to_string()]);
    daemon.arg(format!("--address={}", place.address));
    let mut daemon = daemon.arg("--config").arg(&configuration).spawn().expect("rsync serves");
    let script = place.target.socket.join("rsync.sh");
    write(&script, include_str!("rsync.sh"));
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = place.command(Path::new("/bin/bash"));
    command.arg(&script).arg(Install::of(15).program("psql")).arg(place.conninfo());
    command.arg(format!("rsync://{}:{RSYNC_PORT}/data", place.address));
    command.arg(&place.target.data).arg(EXCLUDED);
    // The daemon may need a moment.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let measured = watch(command, &[place.postmaster(), daemon.id()], &nowhere());
    drop(daemon.kill());
    drop(daemon.wait());
    place.follow();
    measured
}

fn pgrejoin(place: &Place<'_>, options: &[&str]) -> Measured {
    let source = place.source;
    let address = format!("{}:0", place.address);
    let server = Server::at(&source.data, source.user, place.pki, &address, &["--allow", "client"]);
    let url = format!("https://{}:{}", place.address, server.port);
    let rewind = Rewind::to(place.target, &url, place.pki).timeout("120s");
    let rewind = rewind.args(["-R", "--primary-conninfo", &place.conninfo()]);
    let command = rewind.args(options.iter().copied()).into_command();
    watch(command, &[server.pid()], &place.target.data.join(".pgrejoin"))
}

/// The extra room of a tool that writes in place.
fn nowhere() -> PathBuf {
    PathBuf::from("/nonexistent")
}

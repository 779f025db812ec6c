//! Starts the rewound node and waits until it streams, without a connection to it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use data_dir::DataDir;
use data_dir::settings::{self, ConfigFile};
use pg_format::postmaster_pid::PostmasterPid;
use pg_format::{ClusterState, Major, postmaster_opts};

use crate::config::Config;
use crate::error::{Class, RewindError, TargetState};
use crate::task::Signals;

/// How often the node is checked.
const PAUSE: Duration = Duration::from_millis(200);
/// Time a server has to write its pid file.
const GRACE: Duration = Duration::from_secs(10);
/// Lines of the server log shown when it does not start.
const LOG_LINES: usize = 10;

/// Starts the node and waits until it streams.
///
/// # Errors
/// Whatever goes wrong, the target stays rewound.
pub fn start(
    config: &Config,
    directory: &DataDir,
    pg_ctl: &Path,
    signals: &Signals,
) -> Result<(), RewindError> {
    let log = log_file(&config.target);
    let mut command = std::process::Command::new(pg_ctl);
    command.arg("start").arg("-W").arg("-s").arg("-D").arg(&config.target).arg("-l").arg(&log);
    let major = directory.control().map(|control| control.file.major);
    let settings = major
        .ok()
        .and_then(|major| settings::read(directory, major, config.config_file.as_deref()).ok());
    let config_file = settings.map(|settings| settings.config_file);
    // One inside the data directory is found by PostgreSQL itself.
    let outside = config_file.filter(|file| !matches!(file, ConfigFile::Inside(_)));
    if let Some(file) = outside.as_ref().and_then(ConfigFile::path) {
        // pg_ctl hands this to a shell.
        let quoted = file.display().to_string().replace('\'', r"'\''");
        command.arg("-o").arg(format!("-c config_file='{quoted}'"));
    }
    command.env_remove("PGREJOIN_PRIMARY_CONNINFO").stdin(Stdio::null()).stdout(Stdio::null());
    let started = command.output().map_err(|error| {
        let message = format!("the target is rewound, but {} did not run", pg_ctl.display());
        RewindError::because(Class::Other, message, error).leaving(TargetState::Rewound)
    })?;
    let waiting = Waiting { config, directory, log: &log, signals };
    if !started.status.success() {
        let said = String::from_utf8_lossy(&started.stderr).trim().replace('\n', " | ");
        return Err(waiting.not_started(&format!("pg_ctl ended with {}: {said}", started.status)));
    }
    waiting.until_it_streams()
}

/// A node that was started.
struct Waiting<'a> {
    config: &'a Config,
    directory: &'a DataDir,
    log: &'a Path,
    signals: &'a Signals,
}

impl Waiting<'_> {
    /// Waits as long as the node makes progress, and no longer than the time-out without any.
    fn until_it_streams(&self) -> Result<(), RewindError> {
        let began = Instant::now();
        let (mut reached, mut since) = (StartProgress::default(), Instant::now());
        loop {
            std::thread::sleep(PAUSE);
            let Some(pid) = self.directory.postmaster_pid().ok().flatten() else {
                if began.elapsed() < GRACE {
                    continue;
                }
                return Err(self.not_started("the server stopped"));
            };
            let children = children(pid.pid);
            let consistent = self.is_consistent(&pid);
            if consistent && children.iter().any(Child::streams) {
                return Ok(());
            }
            let state = match consistent {
                true => "it is consistent but does not stream",
                false => "it is not consistent yet",
            };
            if self.signals.stop() {
                return Err(self.left_running(
                    &pid,
                    state,
                    "when the wait was stopped by a signal",
                ));
            }
            if reached.advance(self.directory, &children) {
                since = Instant::now();
            }
            if since.elapsed() > self.config.timeout {
                let limit = format!("after {:?} without progress", self.config.timeout);
                return Err(self.left_running(&pid, state, &limit));
            }
        }
    }

    /// Whether replay has reached consistency: the server then clears the start of the backup in
    /// `pg_control`. With hot standby the pid file says so too; without it only `pg_control` does.
    fn is_consistent(&self, pid: &PostmasterPid) -> bool {
        let Ok(control) = self.directory.control() else {
            return false;
        };
        let replayed = control.file.state == ClusterState::InArchiveRecovery
            && !control.file.backup_start_point.is_valid()
            && !self.directory.has("backup_label");
        replayed && pid.is_up()
    }

    fn left_running(&self, pid: &PostmasterPid, state: &str, when: &str) -> RewindError {
        self.not_started(&format!("{state} {when}; the server is left running (pid {})", pid.pid))
    }

    fn not_started(&self, why: &str) -> RewindError {
        let shown = self.logs().into_iter().map(|log| {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
            format!("the end of {}: {}", log.display(), last.join(" | "))
        });
        RewindError::new(
            Class::Other,
            format!(
                "the target is rewound and may be started again, but it does not stream: {why}; {}",
                shown.collect::<Vec<_>>().join("; ")
            ),
        )
        .leaving(TargetState::Rewound)
    }

    /// What the server writes to: the file it was started with and, if it collects its own logs,
    /// the one it names.
    fn logs(&self) -> Vec<PathBuf> {
        let mut logs = vec![self.log.to_owned()];
        let named = self.directory.read_if_exists("current_logfiles", 64 << 10).ok().flatten();
        let named = String::from_utf8_lossy(&named.unwrap_or_default()).into_owned();
        let files = named.lines().filter_map(|line| line.split_once(' '));
        // A relative name is below the data directory, and joining keeps an absolute one.
        logs.extend(files.map(|(_, file)| self.config.target.join(file)));
        logs
    }
}

/// How far replay has come, in values that only grow: processes also come and go without any progress.
#[derive(Default)]
struct StartProgress {
    recovery_point: u64,
    /// Name of the segment being replayed, without its timeline.
    segment: String,
}

impl StartProgress {
    /// Reads how far replay has come. Returns whether that is farther than before.
    fn advance(&mut self, directory: &DataDir, children: &[Child]) -> bool {
        let point = directory.control().map_or(0, |c| c.file.min_recovery_point.as_u64());
        let replayed = children.iter().filter_map(|child| child.title.split_once("recovering "));
        let segment = replayed.filter_map(|(_, name)| name.trim().get(8..24)).max();
        let segment = segment.unwrap_or_default();
        let farther = point > self.recovery_point || segment > self.segment.as_str();
        self.recovery_point = self.recovery_point.max(point);
        if segment > self.segment.as_str() {
            segment.clone_into(&mut self.segment);
        }
        farther
    }
}

/// A process of the server.
struct Child {
    /// Its directory below `/proc`.
    process: PathBuf,
    title: String,
}

impl Child {
    /// Whether it is a WAL receiver that streams. Its title says so once new WAL came, or never
    /// where titles are not updated; but what the source sends first is the segment so far, which
    /// it writes to a file it keeps open.
    fn streams(&self) -> bool {
        if !self.title.contains("walreceiver") {
            return false;
        }
        let files = std::fs::read_dir(self.process.join("fd")).into_iter().flatten().flatten();
        let mut open = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        let is_segment = |path: PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit())
        };
        self.title.contains("streaming") || open.any(is_segment)
    }
}

/// A process's children, always in the same order.
fn children(parent: i64) -> Vec<Child> {
    let mut children: Vec<Child> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let process = entry.path();
            let stat = std::fs::read_to_string(process.join("stat")).ok()?;
            let (_, rest) = stat.rsplit_once(')')?;
            let of = rest.split_whitespace().nth(1)?.parse::<i64>().ok()?;
            let title = std::fs::read(process.join("cmdline")).ok()?;
            let title = String::from_utf8_lossy(&title).replace('\0', " ");
            (of == parent).then_some(Child { process, title })
        })
        .collect();
    children.sort_by(|a, b| a.process.cmp(&b.process));
    children
}

/// Path of a log for the server that outlives this program: in the directory of the server's own logs if
/// there is one, else in the data directory.
fn log_file(pgdata: &Path) -> PathBuf {
    let log = pgdata.join("log");
    let directory = if log.is_dir() { log } else { pgdata.to_owned() };
    directory.join("pgrejoin-start.log")
}

/// The `pg_ctl` that the operator named, or that of the last start, or one of the right major in the usual
/// directories.
pub fn find_pg_ctl(
    config: &Config,
    directory: &DataDir,
    major: Major,
) -> Result<PathBuf, RewindError> {
    if let Some(path) = &config.pg_ctl {
        return match is_program(path) {
            true => Ok(path.clone()),
            false => {
                let message =
                    format!("--pg-ctl {} is not a file that can be executed", path.display());
                Err(RewindError::new(Class::Preflight, message))
            }
        };
    }
    let options = directory.read_if_exists("postmaster.opts", 64 << 10).ok().flatten();
    let server = options.and_then(|text| {
        postmaster_opts::program(&String::from_utf8_lossy(&text)).map(PathBuf::from)
    });
    let beside = server.and_then(|server| server.parent().map(|bin| bin.join("pg_ctl")));
    let usual = [
        format!("/usr/lib/postgresql/{major}/bin/pg_ctl"),
        format!("/usr/pgsql-{major}/bin/pg_ctl"),
    ];
    let found = beside.into_iter().chain(usual.map(PathBuf::from)).find(|path| is_program(path));
    found.ok_or_else(|| {
        RewindError::new(
            Class::Preflight,
            format!("no pg_ctl of PostgreSQL {major} was found: give --pg-ctl PATH"),
        )
    })
}

fn is_program(path: &Path) -> bool {
    let access = rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(io::Error::from);
    access.is_ok() && path.is_file()
}

//! Starts the rewound node and waits until it streams, without a connection to it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use data_dir::DataDir;
use pg_format::Major;

use crate::config::Config;
use crate::error::{Class, RewindError};

/// How often the node is looked at.
const PAUSE: Duration = Duration::from_millis(200);
/// Time a server has to write its pid file.
const GRACE: Duration = Duration::from_secs(10);
/// Lines of the server log shown when it does not start.
const LOG_LINES: usize = 10;

/// Starts it. The target is rewound already: whatever goes wrong here, it stays so.
pub fn start(config: &Config, directory: &DataDir, pg_ctl: &Path) -> Result<(), RewindError> {
    let log = log_file(&config.target);
    let mut command = std::process::Command::new(pg_ctl);
    command.arg("start").arg("-W").arg("-s").arg("-D").arg(&config.target).arg("-l").arg(&log);
    if let Some(file) = &config.config_file {
        command.arg("-o").arg(format!("-c config_file={}", file.display()));
    }
    let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let started = started.map_err(|error| {
        let message = format!("the target is rewound, but {} did not run", pg_ctl.display());
        RewindError::because(Class::Rewound, message, error)
    })?;
    if !started.success() {
        return Err(not_started(&log, &format!("pg_ctl ended with {started}")));
    }
    wait(config, directory, &log)
}

fn wait(config: &Config, directory: &DataDir, log: &Path) -> Result<(), RewindError> {
    let since = Instant::now();
    loop {
        std::thread::sleep(PAUSE);
        let pid = directory.postmaster_pid().ok().flatten();
        let Some(pid) = pid else {
            if since.elapsed() < GRACE {
                continue;
            }
            return Err(not_started(log, "the server stopped"));
        };
        let ready = matches!(pid.status.as_deref(), Some("ready" | "standby"));
        if ready && streams(pid.pid) {
            return Ok(());
        }
        if since.elapsed() > config.timeout {
            let state = if ready {
                "it is consistent but does not stream"
            } else {
                "it is not consistent yet"
            };
            return Err(not_started(log, &format!("{state} after {:?}", config.timeout)));
        }
    }
}

/// Whether a child of the postmaster is a WAL receiver that streams, by its process title.
fn streams(postmaster: i64) -> bool {
    let children = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    children.into_iter().any(|entry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let parent = rest.split_whitespace().nth(1).and_then(|p| p.parse::<i64>().ok());
        if parent != Some(postmaster) {
            return false;
        }
        let title = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let title = String::from_utf8_lossy(&title).into_owned();
        title.contains("walreceiver") && title.contains("streaming")
    })
}

fn not_started(log: &Path, why: &str) -> RewindError {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default().join(" | ");
    RewindError::new(
        Class::Rewound,
        format!(
            "the target is rewound and may be started, but it does not stream: {why}; the end of \
             {}: {last}",
            log.display()
        ),
    )
}

/// A log beside the server's own, outside the data directory's root.
fn log_file(pgdata: &Path) -> PathBuf {
    let log = pgdata.join("log");
    let directory = if log.is_dir() { log } else { std::env::temp_dir() };
    directory.join(format!("pgrejoin-start-{}.log", std::process::id()))
}

/// The program given, or that of the last start, or one of the right major in the usual places.
pub fn find_pg_ctl(
    config: &Config,
    directory: &DataDir,
    major: Major,
) -> Result<PathBuf, RewindError> {
    if let Some(path) = &config.pg_ctl {
        return Ok(path.clone());
    }
    let options = directory.read_if_exists("postmaster.opts", 64 << 10).ok().flatten();
    let server = options.and_then(|text| {
        let text = String::from_utf8_lossy(&text).into_owned();
        text.split_whitespace().next().map(PathBuf::from)
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
    access.is_ok()
}

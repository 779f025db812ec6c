//! Checks whether anything still works in the target's data directory.
//!
//! A process id in a file proves nothing: it may be stale and its number taken by another program, and after
//! a kill of the postmaster a backend may live on without any file. So the check looks for processes whose
//! working directory is this one, and for processes attached to the server's shared memory.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use data_dir::DataDir;
use pg_format::postmaster_pid::SharedMemory;

use crate::error::{Class, RewindError};

/// How long a server may take to end after its pid file is gone.
const ENDING: Duration = Duration::from_secs(2);
/// Pause between two checks in that time.
const PAUSE: Duration = Duration::from_millis(20);
/// Ancestor processes that are examined to recognize the operator's own shell.
const ANCESTORS_MAX: usize = 64;

/// Refuses a data directory in which a server, a backend or another rewind is at work.
///
/// # Errors
/// There is one; the message says which.
pub fn refuse_running(directory: &DataDir) -> Result<(), RewindError> {
    refuse(directory, Duration::ZERO)
}

/// [`refuse_running`] for a directory whose server may have been stopped a moment ago. `pg_ctl` reports that
/// a server is down as soon as its pid file is gone, but its process may take a little longer: it is given
/// two seconds.
///
/// # Errors
/// See [`refuse_running`].
pub fn refuse_running_unless_ending(directory: &DataDir) -> Result<(), RewindError> {
    refuse(directory, ENDING)
}

fn refuse(directory: &DataDir, patience: Duration) -> Result<(), RewindError> {
    let path = directory.path().display();
    let refused = |why: String| {
        Err(RewindError::new(Class::Target, format!("target {path} is in use: {why}")))
    };
    let pid_file = directory.postmaster_pid().map_err(|error| {
        RewindError::because(Class::Target, "could not read the target's postmaster.pid", error)
    })?;
    if let Some(shared) = pid_file.as_ref().and_then(|pid| pid.shared_memory) {
        let attached = attached_to(shared);
        if attached > 0 {
            let id = shared.id;
            return refused(format!(
                "{attached} processes are attached to its shared memory (id {id}): stop the \
                 server, or end its backends if the postmaster is dead"
            ));
        }
    }
    let patience = if pid_file.is_none() { patience } else { Duration::ZERO };
    if let Some((pid, name)) = lasting_process(directory, patience) {
        return refused(format!(
            "process {pid} ({name}) is running in it: stop the server, or end that process"
        ));
    }
    Ok(())
}

/// A process that works in the directory and does not end within `patience`.
fn lasting_process(directory: &DataDir, patience: Duration) -> Option<(i32, String)> {
    let since = Instant::now();
    loop {
        let found = processes_in(directory).into_iter().next()?;
        if since.elapsed() >= patience {
            return Some(found);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Number of processes attached to a System V shared memory segment. Ids begin anew at every boot, so
/// the key, which PostgreSQL makes from the directory's inode, must be the same too.
fn attached_to(shared: SharedMemory) -> u64 {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let row = table.lines().skip(1).find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let found = SharedMemory::parse(columns.first()?, columns.get(1)?)? == shared;
        found.then(|| columns.get(6)?.parse().ok()).flatten()
    });
    row.unwrap_or(0)
}

/// Processes whose working directory is the data directory, except this one and those that started it: the
/// operator's shell may be in that directory.
fn processes_in(directory: &DataDir) -> Vec<(i32, String)> {
    let Ok(ours) = rustix::fs::fstat(directory.root()) else {
        return Vec::new();
    };
    let lineage = lineage();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let there = std::fs::metadata(format!("/proc/{pid}/cwd"))
            .is_ok_and(|cwd| cwd.dev() == ours.st_dev && cwd.ino() == ours.st_ino);
        if there && !lineage.contains(&pid) {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push((pid, name.trim().to_owned()));
        }
    }
    found
}

/// This process and its ancestors.
fn lineage() -> Vec<i32> {
    let mut pids = Vec::new();
    let mut pid = rustix::process::getpid().as_raw_nonzero().get();
    while pids.len() < ANCESTORS_MAX && pid > 1 {
        pids.push(pid);
        match parent(pid) {
            Ok(parent) => pid = parent,
            Err(_) => break,
        }
    }
    pids
}

fn parent(pid: i32) -> io::Result<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; what follows the last one is regular.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().nth(1).and_then(|p| p.parse().ok()).ok_or_else(|| io::Error::other("?"))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::test_values::EmptyTarget;

    /// A process that works in a directory for so many seconds.
    fn at_work(target: &EmptyTarget, seconds: &str) -> Child {
        Command::new("sleep").arg(seconds).current_dir(target.home.path()).spawn().expect("sleep")
    }

    #[test]
    fn a_server_that_is_just_ending_is_waited_for() {
        let target = EmptyTarget::new();
        let mut ending = at_work(&target, "0.3");
        let reaper = std::thread::spawn(move || ending.wait());
        assert!(refuse_running(&target.target.directory).is_err(), "it has not ended yet");
        assert!(refuse_running_unless_ending(&target.target.directory).is_ok());
        reaper.join().expect("reaped").expect("ended");
    }

    #[test]
    fn a_process_that_goes_on_is_named() {
        let target = EmptyTarget::new();
        let mut lasting = at_work(&target, "60");
        let refused =
            refuse_running_unless_ending(&target.target.directory).expect_err("it is in use");
        lasting.kill().expect("killed");
        lasting.wait().expect("reaped");
        assert_eq!(refused.class(), Class::Target);
        assert!(refused.to_string().contains("(sleep) is running in it"), "{refused}");
    }
}

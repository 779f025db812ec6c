//! What the node is, from its files alone.
//!
//! A role is given only where the files prove it; anything between two roles is refused with what
//! was seen, and the client tries again.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use data_dir::DataDir;
use data_dir::control::ControlError;
use pg_format::postmaster_pid::{PostmasterPid, ServerStatus};
use pg_format::wal::WalContext;
use pg_format::{ClusterState, ControlFile, FormatError};
use proto::model::{Node, Role};
use proto::{Reason, Refusal};

/// Opens the data directory as it is now: tablespaces may have come and gone.
pub(crate) fn open(pgdata: &Path) -> Result<DataDir, Refusal> {
    DataDir::open(pgdata).map_err(|error| {
        Refusal::new(
            Reason::NotReady,
            format!("the source has no usable data directory: {}", chain(&error)),
        )
    })
}

/// Inspects the node as it is now.
pub(crate) fn inspect(directory: &DataDir) -> Result<Node, Refusal> {
    let control = directory.control().map_err(control_refusal)?;
    let pid = directory.postmaster_pid().map_err(|error| internal("postmaster.pid", &error))?;
    let held = directory.has("postmaster.pid");
    let live = pid.filter(|pid| is_live(directory, pid));
    let role = role(directory, &control.file, live.as_ref(), held)?;
    let histories = directory.history_files().map_err(control_refusal)?;
    let timeline = control.file.timeline();
    let newest = histories.last().map_or(1, |(timeline, _)| timeline.get());
    if role == Role::Primary && newest > timeline.get() {
        return Err(not_ready(&format!(
            "pg_wal has the history of timeline {newest} but pg_control is still on {timeline}: \
             a promotion has not finished"
        )));
    }
    let identity = directory.identity().map_err(|error| internal("its data directory", &error))?;
    Ok(Node {
        role,
        directory: identity,
        timeline,
        control: control.file,
        control_bytes: control.bytes,
        histories,
        postmaster: live.map(|pid| (pid.pid, pid.start_time.unwrap_or_default())),
    })
}

/// How the node's WAL is read.
pub(crate) fn wal_context(control: &ControlFile) -> WalContext {
    WalContext {
        format: control.major.wal_format(),
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
    }
}

fn role(
    directory: &DataDir,
    control: &ControlFile,
    live: Option<&PostmasterPid>,
    held: bool,
) -> Result<Role, Refusal> {
    if directory.has("backup_label") || control.backup_start_point.is_valid() {
        return Err(not_ready("it is still recovering from a base backup"));
    }
    let standby_signal = directory.has("standby.signal");
    let status = live.and_then(|pid| pid.status);
    let state = control.state;
    match (state, live.is_some()) {
        // A server that has just been started after a crash says so in its pid file, not yet in
        // pg_control.
        (ClusterState::InProduction, true)
            if !standby_signal
                && !directory.has("recovery.signal")
                && status == Some(ServerStatus::Ready) =>
        {
            Ok(Role::Primary)
        }
        (ClusterState::InArchiveRecovery, true)
            if standby_signal && live.is_some_and(PostmasterPid::is_up) =>
        {
            if control.min_recovery_point.is_valid() {
                Ok(Role::Standby)
            } else {
                Err(not_ready("it is in recovery and has no minimum recovery point"))
            }
        }
        // A server that stops removes its pid file. If there is one, a server is just starting and its
        // process cannot be seen, or another program is using the directory.
        (ClusterState::ShutDown | ClusterState::ShutDownInRecovery, false) if !held => {
            Ok(Role::Stopped)
        }
        (_, runs) => {
            let server = match (runs, held) {
                (true, _) => "a postmaster runs",
                (false, true) => "postmaster.pid is there but no postmaster is seen",
                (false, false) => "no postmaster runs",
            };
            let signal = if standby_signal { "present" } else { "absent" };
            let status = status.map_or("unknown", ServerStatus::name);
            Err(not_ready(&format!(
                "pg_control says \"{state}\", {server} (status {status}), standby.signal is {signal}"
            )))
        }
    }
}

/// Whether the process in `postmaster.pid` is this directory's postmaster. Its number alone proves
/// nothing, so its working directory must be the data directory. Where that cannot be seen (another
/// user, another container), a socket that answers proves it.
fn is_live(directory: &DataDir, pid: &PostmasterPid) -> bool {
    let ourselves = i64::from(std::process::id()) == pid.pid;
    if !ourselves && working_directory_is(directory, pid.pid).unwrap_or(false) {
        return true;
    }
    pid.is_up() && socket_answers(pid)
}

fn working_directory_is(directory: &DataDir, pid: i64) -> io::Result<bool> {
    let theirs = std::fs::metadata(format!("/proc/{pid}/cwd"))?;
    let ours = rustix::fs::fstat(directory.root())?;
    Ok(theirs.dev() == ours.st_dev && theirs.ino() == ours.st_ino)
}

fn socket_answers(pid: &PostmasterPid) -> bool {
    let (Some(directory), Some(port)) = (&pid.socket_directory, pid.port) else {
        return false;
    };
    let socket = Path::new(directory).join(format!(".s.PGSQL.{port}"));
    // Another server may have taken the place of a dead one.
    let lock = std::fs::read_to_string(socket.with_extension(format!("{port}.lock")));
    let owner = lock.unwrap_or_default().lines().next().and_then(|line| line.parse().ok());
    owner == Some(pid.pid) && UnixStream::connect(socket).is_ok()
}

fn not_ready(seen: &str) -> Refusal {
    Refusal::new(
        Reason::NotReady,
        format!("the source is neither primary, standby nor cleanly stopped: {seen}"),
    )
}

/// A refusal for a file of the node that cannot be read or understood.
#[expect(clippy::needless_pass_by_value, reason = "used as map_err(control_refusal)")]
pub(crate) fn control_refusal(error: ControlError) -> Refusal {
    let reason = match &error {
        ControlError::Io { .. } => Reason::NotReady,
        ControlError::Format { source: FormatError::UnknownVersion { .. }, .. }
        | ControlError::Format { .. } => Reason::Damaged,
    };
    Refusal::new(reason, format!("a file of the source is not usable: {}", chain(&error)))
}

/// A refusal because the operating system reported an error.
pub(crate) fn internal(what: &str, error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::new(Reason::Internal, format!("the source could not read {what}: {}", chain(error)))
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

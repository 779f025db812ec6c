//! What a tool took: time, processor, memory, room on the disk, on both ends.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde_json::Value;

/// How often a running tool is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Clock ticks a second in `/proc/PID/stat` (`USER_HZ`, the same on every Linux of this processor).
const TICKS: f64 = 100.0;

/// One measured run of a tool, up to its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    /// Until it ended.
    pub(crate) commit: f64,
    /// Until the staged set was complete, for tools that have one.
    pub(crate) seal: Option<f64>,
    /// Processor seconds of the tool.
    pub(crate) client_cpu: f64,
    /// Processor seconds of what served it.
    pub(crate) source_cpu: f64,
    /// Most memory the tool had, bytes.
    pub(crate) client_peak: u64,
    /// Most memory what served it had, bytes.
    pub(crate) source_peak: u64,
    /// Bytes the tool made its disks write.
    pub(crate) written: u64,
    /// Most room taken beside the data directory's own files, bytes.
    pub(crate) extra: u64,
    /// The last line of a tool that reports in JSON.
    pub(crate) report: Value,
}

/// Runs a command that must succeed. `servers` are the processes that serve it, whose children count
/// too; `extra` is a directory whose size counts as extra room.
pub(crate) fn watch(mut command: Command, servers: &[u32], extra: &Path) -> Measured {
    let before: f64 = servers.iter().map(|pid| cpu(*pid)).sum();
    let since = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let output = child.stdout.take().expect("piped");
    let lines = std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        lines.map(|line| (since.elapsed().as_secs_f64(), line)).collect::<Vec<_>>()
    });
    let mut errors = child.stderr.take().expect("piped");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        drop(errors.read_to_string(&mut text));
        text
    });
    let mut measured = Measured::default();
    let id = child.id();
    loop {
        let processes = tree(id);
        let of = |value: fn(u32) -> u64| processes.iter().map(|pid| value(*pid)).sum::<u64>();
        measured.client_peak = measured.client_peak.max(of(peak));
        measured.written = measured.written.max(of(written));
        let serving = servers.iter().flat_map(|pid| tree(*pid)).map(peak).max();
        measured.source_peak = measured.source_peak.max(serving.unwrap_or(0));
        measured.extra = measured.extra.max(bytes_below(extra));
        if has_ended(id) {
            break;
        }
        std::thread::sleep(LOOK);
    }
    measured.commit = since.elapsed().as_secs_f64();
    measured.client_cpu = cpu(id);
    measured.source_cpu = servers.iter().map(|pid| cpu(*pid)).sum::<f64>() - before;
    let status = child.wait().expect("status");
    let (lines, errors) = (lines.join().expect("read"), errors.join().expect("read"));
    assert!(status.success(), "{command:?} ended with {status}: {errors}\n{lines:?}");
    let events: Vec<(f64, Value)> = lines
        .into_iter()
        .filter_map(|(at, line)| Some((at, serde_json::from_str(&line).ok()?)))
        .collect();
    let applies = |event: &Value| event["event"] == "step" && event["step"] == "apply";
    measured.seal = events.iter().find(|(_, event)| applies(event)).map(|(at, _)| *at);
    measured.report = events.into_iter().next_back().map_or(Value::Null, |(_, event)| event);
    measured
}

/// Whether a child has ended; it is not reaped, so that what it used can still be read.
fn has_ended(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(pid), options).is_ok_and(|status| status.is_some())
}

/// A process and all its descendants.
fn tree(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for thread in threads {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        next += 1;
    }
    found
}

/// Processor seconds of a process, its living descendants, and those it has reaped.
fn cpu(pid: u32) -> f64 {
    let of = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).to_owned();
        let fields = fields.split_whitespace().skip(11).take(4).map(str::to_owned);
        fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
    };
    tree(pid).into_iter().map(of).sum()
}

/// `VmHWM` of a process in bytes; 0 once it is gone.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    kilobytes.unwrap_or(0) << 10
}

/// Bytes a process made its disks write.
fn written(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Room that files take below a directory.
fn bytes_below(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes += bytes_below(&entry.path()),
            Ok(metadata) => bytes += metadata.blocks() * 512,
            Err(_) => {}
        }
    }
    bytes
}

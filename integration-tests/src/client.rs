//! `pgrejoin` as a process.

use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binaries::program;
use crate::cluster::Node;
use crate::server::{Pki, Server};

/// A rewind to be run.
#[derive(Debug)]
pub struct Rewind {
    command: Command,
    output: &'static str,
    timeout: &'static str,
}

/// How one ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// Its last line of output: the result or the error.
    pub result: Value,
    /// Everything it said.
    pub text: String,
}

impl Rewind {
    /// Rewinds `target` onto what `server` serves.
    pub fn new(target: &Node, server: &Server, pki: &Pki) -> Self {
        Self::to(target, &format!("https://127.0.0.1:{}", server.port), pki)
    }

    /// Rewinds from any address.
    pub fn to(target: &Node, source: &str, pki: &Pki) -> Self {
        let mut command = target.user.command(program("pgrejoin"));
        command.args(["rewind", "--source", source]);
        command.arg("-D").arg(&target.data);
        command.arg("--cert").arg(pki.file("client.crt")).arg("--key").arg(pki.file("client.key"));
        command.arg("--ca").arg(pki.file("ca.crt"));
        Self { command, output: "json", timeout: "20s" }
    }

    /// Prints for people.
    #[must_use]
    pub fn for_people(self) -> Self {
        Self { output: "text", ..self }
    }

    /// Gives up after so long.
    #[must_use]
    pub fn timeout(self, timeout: &'static str) -> Self {
        Self { timeout, ..self }
    }

    /// The command, for tests that run it in their own way.
    pub fn into_command(mut self) -> Command {
        self.command.args(["--output", self.output, "--timeout", self.timeout]);
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command
    }

    /// Writes the connection to `primary` into the target's settings.
    #[must_use]
    pub fn following(self, primary: &Node) -> Self {
        self.args(["-R", "--primary-conninfo", &primary.conninfo()])
    }

    /// More options.
    #[must_use]
    pub fn args<'s>(mut self, args: impl IntoIterator<Item = &'s str>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it.
    pub fn spawn(self) -> Running {
        let mut child = self.into_command().spawn().expect("pgrejoin starts");
        let stdout = Captured::new(child.stdout.take().expect("piped"));
        let stderr = Captured::new(child.stderr.take().expect("piped"));
        Running { child, stdout, stderr }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ended {
        self.spawn().wait()
    }

    /// Runs it; it must succeed.
    pub fn succeed(self) -> Ended {
        let ended = self.run();
        assert_eq!(ended.code, 0, "{}", ended.text);
        ended
    }

    /// Runs it; it must refuse with this code and these words.
    pub fn refuse(self, code: i32, words: &str) -> Ended {
        let ended = self.run();
        assert_eq!(ended.code, code, "{}", ended.text);
        let message = ended.text.to_lowercase();
        assert!(message.contains(&words.to_lowercase()), "\"{words}\" is not in: {}", ended.text);
        let lines = ended.text.lines().filter(|line| line.starts_with("pgrejoin: error: "));
        assert_eq!(lines.count(), 1, "not one clear line: {}", ended.text);
        ended
    }
}

/// Longest wait for a rewind to come to a step.
const PATIENCE: Duration = Duration::from_secs(60);

/// Output of a running program, line by line as it comes.
#[derive(Debug)]
struct Captured {
    text: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Captured {
    fn new(pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let mut text = collected.lock().unwrap_or_else(PoisonError::into_inner);
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self { text, reader }
    }

    fn so_far(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn all(self) -> String {
        self.reader.join().expect("output is read");
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A rewind under way.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
    stdout: Captured,
    stderr: Captured,
}

impl Running {
    /// Whether a step has begun.
    pub fn has_begun(&self, step: &str) -> bool {
        self.stdout.so_far().contains(&format!("\"step\":\"{step}\""))
    }

    /// Waits until a step begins.
    pub fn wait_for(&mut self, step: &str) {
        self.wait_until(&format!("step {step}"), |running| running.has_begun(step));
    }

    /// Waits until something is so; fails if it is not before the run ends.
    pub fn wait_until(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let since = Instant::now();
        while !is_so(self) {
            let ended = self.child.try_wait().expect("status");
            let said = || format!("{}{}", self.stdout.so_far(), self.stderr.so_far());
            assert!(ended.is_none(), "it ended before {what}: {}", said());
            assert!(since.elapsed() < PATIENCE, "it did not come to {what}: {}", said());
            sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let status = self.child.wait().expect("pgrejoin ends");
        Ended::of(status, &self.stdout.all(), &self.stderr.all())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        // It may have ended.
        rustix::process::kill_process(pid.expect("pid"), signal).ok();
    }
}

impl Ended {
    fn of(status: ExitStatus, stdout: &str, stderr: &str) -> Self {
        let result = stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
        let text = format!("{stdout}{stderr}");
        Self { code: status.code().unwrap_or(-1), result: result.unwrap_or_default(), text }
    }

    /// The objects of one kind of event, in order.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let objects = self.text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        objects.filter(|object| object["event"] == kind).collect()
    }

    /// The result.
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// A field of the result, as text.
    pub fn field(&self, name: &str) -> String {
        match &self.result[name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

/// The command for `pgrejoin resume`, `rollback` or `status`.
pub fn state_command_line(what: &str, node: &Node) -> Command {
    let mut command = node.user.command(program("pgrejoin"));
    command.arg(what).arg("-D").arg(&node.data);
    command
}

/// Runs `pgrejoin resume`, `rollback` or `status`.
pub fn state_command(what: &str, node: &Node) -> Ended {
    let output = state_command_line(what, node).output().expect("pgrejoin runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended::of(output.status, &text(&output.stdout), &text(&output.stderr))
}

/// Path of a target's state directory.
pub fn state_directory(data: &Path) -> std::path::PathBuf {
    data.join(".pgrejoin")
}

//! `pgrejoin` as a process.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::binaries::program;
use crate::cluster::Node;
use crate::server::{Pki, Server};

/// A rewind to be run.
#[derive(Debug)]
pub struct Rewind {
    command: Command,
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
        command.args(["rewind", "--output", "json", "--timeout", "20s", "--source", source]);
        command.arg("-D").arg(&target.data);
        command.arg("--cert").arg(pki.file("client.crt")).arg("--key").arg(pki.file("client.key"));
        command.arg("--ca").arg(pki.file("ca.crt"));
        Self { command }
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
    pub fn spawn(mut self) -> Running {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { child: self.command.spawn().expect("pgrejoin starts") }
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

/// A rewind under way.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
}

impl Running {
    /// Waits for its end.
    pub fn wait(self) -> Ended {
        Ended::of(&self.child.wait_with_output().expect("pgrejoin ends"))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        // It may have ended.
        rustix::process::kill_process(pid.expect("pid"), signal).ok();
    }
}

impl Ended {
    fn of(output: &Output) -> Self {
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let result = stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
        let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
        Self { code: output.status.code().unwrap_or(-1), result: result.unwrap_or_default(), text }
    }

    /// A field of the result, as text.
    pub fn field(&self, name: &str) -> String {
        match &self.result[name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

/// Runs `pgrejoin resume` or `status`.
pub fn state_command(what: &str, node: &Node) -> Ended {
    let mut command = node.user.command(program("pgrejoin"));
    command.arg(what).arg("-D").arg(&node.data);
    Ended::of(&command.output().expect("pgrejoin runs"))
}

/// Path of a target's state directory.
pub fn state_directory(data: &Path) -> std::path::PathBuf {
    data.join(".pgrejoin")
}

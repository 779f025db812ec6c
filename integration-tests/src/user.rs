//! The user everything runs as.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// User and group ids.
#[derive(Debug, Clone, Copy)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    switch: bool,
}

impl User {
    /// The current user, or `postgres` (else `nobody`) if that is root.
    pub fn unprivileged() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        if uid != 0 {
            return Self { uid, gid: rustix::process::getegid().as_raw(), switch: false };
        }
        let users = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
        let find = |name: &str| {
            let line = users.lines().find(|line| line.starts_with(&format!("{name}:")))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        let (uid, gid) = find("postgres").or_else(|| find("nobody")).expect("a user to run as");
        Self { uid, gid, switch: true }
    }

    /// A command that runs as this user.
    pub fn command(self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        if self.switch {
            command.uid(self.uid).gid(self.gid);
        }
        command.current_dir("/").env("LC_ALL", "C.UTF-8").stdin(std::process::Stdio::null());
        command
    }

    /// Gives a path to this user.
    pub fn own(self, path: &Path) {
        if self.switch {
            std::os::unix::fs::chown(path, Some(self.uid), Some(self.gid)).expect("chown");
        }
    }
}

/// Runs a command that must succeed; its output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut shown = format!("{command:?}");
    shown.truncate(shown.floor_char_boundary(600));
    assert!(
        output.status.success(),
        "{shown} ended with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

//! The user everything runs as.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::wan::Network;

/// User and group ids.
#[derive(Debug, Clone, Copy)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    switch: bool,
    /// A process whose mounts the commands see instead of ours.
    mounts_of: Option<u32>,
    /// The network the commands are in instead of ours.
    network: Option<Network>,
}

impl User {
    /// The current user, or `postgres` (else `nobody`) if that is root.
    pub fn unprivileged() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        if uid != 0 {
            return Self {
                uid,
                gid: rustix::process::getegid().as_raw(),
                switch: false,
                mounts_of: None,
                network: None,
            };
        }
        let users = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
        let find = |name: &str| {
            let line = users.lines().find(|line| line.starts_with(&format!("{name}:")))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        let (uid, gid) = find("postgres").or_else(|| find("nobody")).expect("a user to run as");
        Self { uid, gid, switch: true, mounts_of: None, network: None }
    }

    /// The same user, who sees the mounts of another process.
    #[must_use]
    pub fn with_mounts_of(self, process: u32) -> Self {
        Self { mounts_of: Some(process), ..self }
    }

    /// The same user at one end of an emulated link.
    #[must_use]
    pub fn in_network(self, network: Network) -> Self {
        Self { network: Some(network), ..self }
    }

    /// A command that runs as this user.
    pub fn command(self, program: impl AsRef<Path>) -> Command {
        let elsewhere: Vec<String> = (self.mounts_of.into_iter())
            .flat_map(|process| ["-m".to_owned(), "-t".to_owned(), process.to_string()])
            .chain(self.network.map(Network::argument))
            .collect();
        let here = elsewhere.is_empty();
        let mut command = match here {
            false => {
                let mut command = Command::new("nsenter");
                command.args(elsewhere).args(["--wdns=/", "--", "setpriv"]);
                command.args(["--reuid", &self.uid.to_string(), "--regid", &self.gid.to_string()]);
                command.arg("--clear-groups").arg("--").arg(program.as_ref());
                command
            }
            true => Command::new(program.as_ref()),
        };
        if self.switch && here {
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

/// A mount namespace with one directory mounted over another, as long as this value lives. Only root
/// can make one.
#[derive(Debug)]
pub struct Mounted {
    holder: std::process::Child,
}

impl Mounted {
    /// Mounts `what` over `over`, for those who enter alone.
    pub fn new(what: &Path, over: &Path) -> Self {
        let script = "mount --bind \"$1\" \"$2\" && echo mounted && exec sleep 600";
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "private", "sh", "-c", script, "sh"]);
        command.arg(what).arg(over).stdout(std::process::Stdio::piped());
        let mut holder = command.spawn().expect("unshare runs");
        let mut said = [0; 8];
        let mut output = holder.stdout.take().expect("piped");
        std::io::Read::read_exact(&mut output, &mut said).expect("mounted (this takes root)");
        Self { holder }
    }

    /// Whose mounts they are.
    pub fn process(&self) -> u32 {
        self.holder.id()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}

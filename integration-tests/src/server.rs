//! `pgrejoin-server` as a process, and the certificates for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::binaries::program;
use crate::cluster::Node;
use crate::user::User;
use crate::wan::SOURCE_ADDRESS;

/// A throw-away authority with one certificate for the server and one for the client.
#[derive(Debug)]
pub struct Pki {
    /// Where the files are.
    pub directory: PathBuf,
}

impl Pki {
    /// Makes `server` and `client` below `home`.
    pub fn new(home: &Path) -> Self {
        let directory = home.join("pki");
        certs::init(&directory).expect("authority");
        let pki = Self { directory };
        pki.issue("server", &["127.0.0.1".to_owned(), SOURCE_ADDRESS.to_owned()], 30);
        pki.issue("client", &[], 30);
        let user = User::unprivileged();
        user.own(&pki.directory);
        pki
    }

    /// Makes one more certificate.
    pub fn issue(&self, name: &str, san: &[String], days: u32) {
        certs::issue(&self.directory, name, san, days, &self.directory).expect("certificate");
        let user = User::unprivileged();
        for entry in fs::read_dir(&self.directory).expect("readable").flatten() {
            user.own(&entry.path());
        }
    }

    /// Revokes certificates by name; the list is valid for so many days.
    pub fn revoke(&self, names: &[&str], days: u32) -> PathBuf {
        let certificates: Vec<PathBuf> =
            names.iter().map(|name| self.file(&format!("{name}.crt"))).collect();
        let list = certs::revoke(&self.directory, &certificates, days).expect("a list");
        User::unprivileged().own(&list);
        list
    }

    /// Path of a file.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Its port.
    pub port: u16,
    /// Where it logs.
    pub log: PathBuf,
    /// The directory it serves.
    pub data: PathBuf,
}

impl Server {
    /// Serves a node to the client `client`.
    pub fn start(node: &Node, pki: &Pki) -> Self {
        Self::with(node, pki, 0, &[])
    }

    /// Serves with more options, on a given port.
    pub fn with(node: &Node, pki: &Pki, port: u16, options: &[&str]) -> Self {
        Self::spawn(&node.data, node.user, pki, port, &[&["--allow", "client"], options].concat())
    }

    /// Serves with exactly these options.
    pub fn spawn(data: &Path, user: User, pki: &Pki, port: u16, options: &[&str]) -> Self {
        Self::at(data, user, pki, &format!("127.0.0.1:{port}"), options)
    }

    /// Serves at an address.
    pub fn at(data: &Path, user: User, pki: &Pki, address: &str, options: &[&str]) -> Self {
        let log = data.with_file_name(format!("pgrejoin-server-{}.log", std::process::id()));
        drop(fs::remove_file(&log));
        let mut command = command(data, user, pki, address);
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let output = File::create(&log).expect("server log");
        command.args(options).stderr(output).stdout(std::process::Stdio::null());
        let child = command.spawn().expect("server starts");
        let mut server = Self { child, port: 0, log, data: data.to_owned() };
        let since = Instant::now();
        while server.port == 0 {
            let text = server.log_text();
            let port = text.split(&format!("{host}:")).nth(1).unwrap_or_default();
            let digits: String = port.chars().take_while(char::is_ascii_digit).collect();
            server.port = digits.parse().unwrap_or(0);
            assert!(since.elapsed() < Duration::from_secs(20), "server does not listen: {text}");
            sleep(Duration::from_millis(20));
        }
        server
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        // Colours make searching hard.
        let mut plain = String::new();
        let mut escape = false;
        for c in text.chars() {
            match c {
                '\u{1b}' => escape = true,
                'm' if escape => escape = false,
                _ if escape => {}
                c => plain.push(c),
            }
        }
        plain
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("pid"), signal).expect("signalled");
    }

    /// Waits until it ends by itself; whether with success.
    pub fn wait(&mut self) -> bool {
        self.child.wait().expect("server ends").success()
    }
}

/// The command that serves a directory.
pub fn command(data: &Path, user: User, pki: &Pki, address: &str) -> Command {
    let mut command = user.command(program("pgrejoin-server"));
    command.arg("--pgdata").arg(data).arg("--listen").arg(address);
    command.arg("--cert").arg(pki.file("server.crt")).arg("--key").arg(pki.file("server.key"));
    command.arg("--client-ca").arg(pki.file("ca.crt"));
    command
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

//! PostgreSQL installations, nodes, and what talks to them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::command::run;
use crate::user::User;

/// Longest wait for a server to do something.
const PATIENCE: Duration = Duration::from_secs(60);

/// One PostgreSQL major.
#[derive(Debug, Clone)]
pub struct Install {
    /// The major.
    pub major: u32,
    home: PathBuf,
}

impl Install {
    /// The installation `scripts/get-postgres.sh` made.
    pub fn of(major: u32) -> Self {
        let home = std::env::var("PGREJOIN_POSTGRES")
            .unwrap_or_else(|_| "/var/tmp/pgrejoin-postgres".to_owned());
        let home = PathBuf::from(home).join(major.to_string());
        assert!(home.exists(), "{} is missing: run scripts/get-postgres.sh", home.display());
        Self { major, home }
    }

    /// A program of this major; those a package lacks come from 15, which understands every server.
    pub fn program(&self, name: &str) -> PathBuf {
        let own = self.home.join("bin").join(name);
        if own.exists() { own } else { Self::of(15).home.join("bin").join(name) }
    }
}

/// Appends text to a file, leaving its owner.
pub fn append(path: &Path, text: &str) {
    use std::io::Write as _;
    let mut file = File::options().append(true).create(true).open(path).expect("open for append");
    file.write_all(text.as_bytes()).expect("append");
}

/// Writes a file of a test.
#[expect(clippy::disallowed_methods, reason = "a test's own file")]
pub fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).expect("written");
}

/// A data directory and the server in it.
#[derive(Debug, Clone)]
pub struct Node {
    /// What runs it.
    pub install: Install,
    /// Its data directory.
    pub data: PathBuf,
    /// Where its socket is.
    pub socket: PathBuf,
    /// Who runs it.
    pub user: User,
}

impl Node {
    /// Its `pg_control`.
    pub fn control(&self) -> pg_format::ControlFile {
        let bytes = fs::read(self.data.join("global/pg_control")).expect("pg_control");
        pg_format::ControlFile::parse(&bytes).expect("pg_control parses")
    }

    /// The connection string others use.
    pub fn conninfo(&self) -> String {
        format!("host={} port=5432 user=postgres", self.socket.display())
    }

    fn log(&self) -> PathBuf {
        self.socket.join("server.log")
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&self) {
        let started = self.try_start();
        assert!(started, "{} did not start:\n{}", self.data.display(), self.log_tail());
    }

    /// Starts the server; whether it came up.
    pub fn try_start(&self) -> bool {
        self.forget_zombie();
        let mut command = self.user.command(self.install.program("pg_ctl"));
        command
            .args(["start", "-w", "-s", "-t", "60", "-D"])
            .arg(&self.data)
            .arg("-l")
            .arg(self.log());
        command.arg("-o").arg(format!("-k {} -p 5432", self.socket.display()));
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.status().expect("pg_ctl runs").success()
    }

    /// Removes a `postmaster.pid` whose process was killed and waits to be reaped: the next server
    /// would take it for alive.
    fn forget_zombie(&self) {
        let file = self.data.join("postmaster.pid");
        let text = fs::read_to_string(&file).unwrap_or_default();
        let pid = text.lines().next().and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid| state_of(pid) == Some('Z')) {
            fs::remove_file(file).expect("removed");
        }
    }

    /// Stops the server.
    pub fn stop(&self, mode: &str) {
        let mut command = self.user.command(self.install.program("pg_ctl"));
        command.args(["stop", "-w", "-s", "-m", mode, "-D"]).arg(&self.data);
        run(&mut command);
    }

    /// Whether a postmaster is recorded.
    pub fn is_running(&self) -> bool {
        self.data.join("postmaster.pid").exists()
    }

    /// Whether it was rewound and not started since: it has a `backup_label` that PostgreSQL accepts, not the
    /// warning of a rewind under way.
    pub fn waits_for_its_first_start(&self) -> bool {
        fs::read_to_string(self.data.join("backup_label"))
            .is_ok_and(|label| label.starts_with("START WAL LOCATION"))
    }

    /// Kills every process of the server at once, as a machine that loses power would.
    pub fn kill(&self) {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).expect("running");
        let postmaster: i32 = text.lines().next().and_then(|l| l.parse().ok()).expect("pid");
        let mut pids = vec![postmaster];
        pids.extend(children(postmaster));
        for pid in &pids {
            let pid = rustix::process::Pid::from_raw(*pid).expect("pid");
            // A child may end by itself in between.
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        let since = Instant::now();
        while pids.iter().any(|pid| !matches!(state_of(*pid), None | Some('Z' | 'X'))) {
            assert!(since.elapsed() < PATIENCE, "killed processes live on");
            sleep(Duration::from_millis(20));
        }
        // A killed process may stay in the table until somebody reaps it, and the next server would
        // take it for alive.
        drop(fs::remove_file(self.socket.join(".s.PGSQL.5432.lock")));
    }

    /// Promotes a standby.
    pub fn promote(&self) {
        let mut command = self.user.command(self.install.program("pg_ctl"));
        command.args(["promote", "-w", "-s", "-D"]).arg(&self.data);
        run(&mut command);
    }

    fn psql(&self, database: &str) -> std::process::Command {
        let mut command = self.user.command(Install::of(15).program("psql"));
        command.args([
            "-X",
            "-A",
            "-t",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "postgres",
            "-p",
            "5432",
            "-d",
            database,
            "-h",
        ]);
        command.arg(&self.socket);
        command
    }

    /// Runs SQL in the database `postgres`; the answer.
    pub fn sql(&self, sql: &str) -> String {
        self.sql_in("postgres", sql)
    }

    /// Runs SQL in a database; the answer.
    pub fn sql_in(&self, database: &str, sql: &str) -> String {
        run(self.psql(database).arg("-c").arg(sql)).trim().to_owned()
    }

    /// Runs SQL that may fail; the answer if it did not.
    pub fn try_sql(&self, database: &str, sql: &str) -> Option<String> {
        let output = self.psql(database).arg("-c").arg(sql).output().expect("psql runs");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs a file of SQL.
    pub fn sql_file(&self, database: &str, file: &Path) {
        // Statements such as VACUUM need to be on their own, and the file may be out of reach.
        let text = fs::read_to_string(file).expect("SQL file");
        self.script(database, &text);
    }

    /// Runs many statements, each on its own.
    pub fn script(&self, database: &str, text: &str) {
        use std::io::Write as _;
        let mut command = self.psql(database);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("psql runs");
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("written");
        let output = child.wait_with_output().expect("psql ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Opens a connection that is kept.
    pub fn session(&self) -> Session {
        let mut command = self.psql("postgres");
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        let mut child = command.spawn().expect("psql runs");
        let input = child.stdin.take().expect("piped");
        let name = format!("session{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        Session { node: self.clone(), child, input, name }
    }

    /// The process id of one of the server's own processes.
    pub fn process(&self, kind: &str) -> rustix::process::Pid {
        let query = format!("select pid from pg_stat_activity where backend_type = '{kind}'");
        self.sql(&query).parse().ok().and_then(rustix::process::Pid::from_raw).expect("a pid")
    }

    /// Starts psql with a script in the background.
    pub fn background(&self, sql: &str) -> std::process::Child {
        let mut command = self.psql("postgres");
        command
            .arg("-c")
            .arg(sql)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        command.spawn().expect("psql runs")
    }

    /// A writer that runs `sql` again and again until it is stopped.
    pub fn load(&self, sql: &str) -> Load {
        self.load_every(Duration::from_millis(3), sql)
    }

    /// The same with a pause in between.
    pub fn load_every(&self, pause: Duration, sql: &str) -> Load {
        use std::io::Write as _;
        let mut command = self.psql("postgres");
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        let mut child = command.spawn().expect("psql runs");
        let mut input = child.stdin.take().expect("piped");
        let statement = format!("{sql}\n");
        let feeding = std::thread::spawn(move || {
            while input.write_all(statement.as_bytes()).is_ok() {
                sleep(pause);
            }
        });
        Load { child, feeding: Some(feeding) }
    }

    /// Makes the tables of `pgbench`.
    pub fn pgbench_init(&self, scale: u32) {
        let mut command = self.pgbench_command();
        run(command.args(["-i", "-q", "-s", &scale.to_string(), "postgres"]));
    }

    /// `pgbench` with four clients until it is stopped.
    pub fn pgbench(&self) -> Load {
        let mut command = self.pgbench_command();
        command.args(["-n", "-c", "4", "-T", "600", "postgres"]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        Load { child: command.spawn().expect("pgbench runs"), feeding: None }
    }

    /// So many transactions of `pgbench` on each of four connections.
    pub fn pgbench_transactions(&self, count: u32) {
        let mut command = self.pgbench_command();
        run(command.args(["-n", "-c", "4", "-t", &count.to_string(), "postgres"]));
    }

    fn pgbench_command(&self) -> std::process::Command {
        let mut command = self.user.command(Install::of(15).program("pgbench"));
        command.args(["-U", "postgres", "-p", "5432", "-h"]).arg(&self.socket);
        command
    }

    /// Current position of the WAL.
    pub fn lsn(&self) -> String {
        self.sql("select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end")
    }

    /// Waits until an SQL condition is true.
    pub fn wait(&self, database: &str, condition: &str) {
        let since = Instant::now();
        let mut pause = Duration::from_millis(30);
        while self.try_sql(database, &format!("select {condition}")).as_deref() != Some("t") {
            assert!(
                since.elapsed() < PATIENCE,
                "{condition} never became true on {}:\n{}",
                self.data.display(),
                self.log_tail()
            );
            sleep(pause);
            pause = (pause * 3 / 2).min(Duration::from_millis(300));
        }
    }

    /// Makes it a standby of `primary` at its next start.
    pub fn follow(&self, primary: &Self) {
        File::create(self.data.join("standby.signal")).expect("signal file");
        self.user.own(&self.data.join("standby.signal"));
        let auto = self.data.join("postgresql.auto.conf");
        append(&auto, &format!("primary_conninfo = '{}'\n", primary.conninfo()));
    }

    /// Starts a stopped standby without a primary and promotes it: it was elected.
    pub fn elect(&self) {
        append(&self.data.join("postgresql.auto.conf"), "primary_conninfo = ''\n");
        self.start();
        self.promote();
    }

    /// Appends settings.
    pub fn configure(&self, settings: &str) {
        append(&self.data.join("postgresql.conf"), &format!("{settings}\n"));
    }

    /// A running standby of `primary` that is like this one, which is stopped for a moment.
    pub fn copy_running(&self, primary: &Self, to: &Path) -> Self {
        self.stop("fast");
        let copy = self.copy(to);
        self.start();
        copy.follow(primary);
        copy.start();
        copy
    }

    /// Copies a stopped node's data directory to a new node.
    pub fn copy(&self, to: &Path) -> Self {
        fs::create_dir_all(to).expect("node directory");
        self.user.own(to);
        let node = Self { data: to.join("data"), socket: to.to_owned(), ..self.clone() };
        let mut copy = self.user.command("/bin/cp");
        run(copy.args(["-a", "--reflink=auto"]).arg(&self.data).arg(&node.data));
        node
    }
}

/// Makes the names of sessions unlike.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A connection that is kept open.
#[derive(Debug)]
pub struct Session {
    node: Node,
    child: std::process::Child,
    input: std::process::ChildStdin,
    name: String,
}

impl Session {
    /// Runs SQL and waits until it was done.
    pub fn run(&mut self, sql: &str) {
        use std::io::Write as _;
        let mark = format!("done-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        writeln!(self.input, "{sql}").expect("written");
        writeln!(self.input, "set application_name = '{}-{mark}';", self.name).expect("written");
        self.node.wait(
            "postgres",
            &format!("exists(select from pg_stat_activity where application_name = '{}-{mark}' and state like 'idle%')", self.name),
        );
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A running load; ends when dropped.
#[derive(Debug)]
pub struct Load {
    child: std::process::Child,
    feeding: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if let Some(feeding) = self.feeding.take() {
            drop(feeding.join());
        }
    }
}

/// What a process is doing, as the kernel writes it in one letter; `None` without one.
fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

fn children(parent: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        if rest.split_whitespace().nth(1).and_then(|p| p.parse::<i32>().ok()) == Some(parent) {
            found.push(pid);
        }
    }
    found
}

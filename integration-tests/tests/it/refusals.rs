//! Refusals: one clear line, the documented exit code, and a target that is exactly as it was.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use integration_tests::client::{Rewind, state_directory};
use integration_tests::cluster::{Node, append, write};
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::snapshot::Snapshot;
use integration_tests::steps::{Served, follow_instead};
use integration_tests::user::User;

/// A diverged pair with a stopped target, and everything to rewind it.
struct Refusal {
    pair: Pair,
    pki: Pki,
    server: Server,
}

impl Refusal {
    fn new() -> Self {
        Self::with("")
    }

    fn with(settings: &str) -> Self {
        let pair = Pair::with(15, Shape::default(), settings);
        pair.b.promote();
        pair.a.sql("insert into plain values (70001, 'lost', 1)");
        pair.b.sql("insert into plain values (70002, 'new', 1)");
        pair.b.sql("checkpoint");
        pair.a.stop("fast");
        let pki = Pki::new(pair.home.path());
        let server = Server::start(&pair.b, &pki);
        Self { pair, pki, server }
    }

    fn rewind(&self) -> Rewind {
        Rewind::new(&self.pair.a, &self.server, &self.pki)
    }

    /// Runs a rewind that must refuse and change nothing.
    fn refuse(&self, rewind: Rewind, code: i32, words: &str) {
        let before = Snapshot::of(&self.pair.a.data);
        rewind.refuse(code, words);
        before.assert_same(&Snapshot::of(&self.pair.a.data));
        assert!(!state_directory(&self.pair.a.data).exists());
    }

    /// The node can still be rewound when the reason is gone.
    fn succeed(&self) {
        self.rewind().following(&self.pair.b).succeed();
    }
}

#[test]
fn a_running_target_is_refused() {
    let refusal = Refusal::new();
    refusal.pair.a.start();
    refusal.rewind().refuse(3, "is in use");
    assert!(!state_directory(&refusal.pair.a.data).exists());
    assert_eq!(refusal.pair.a.sql("select 1"), "1");
}

#[test]
fn a_backend_that_outlived_its_postmaster_is_refused() {
    let refusal = Refusal::new();
    let a = &refusal.pair.a;
    a.start();
    let mut busy = a.background(
        "insert into grow select g, repeat('y', 200) from generate_series(1, 100000000) g",
    );
    a.wait("postgres", "exists(select from pg_stat_activity where query like 'insert into grow%' and state = 'active')");
    let pid = fs::read_to_string(a.data.join("postmaster.pid")).unwrap();
    let postmaster =
        pid.lines().next().unwrap().parse().ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(postmaster.unwrap(), rustix::process::Signal::KILL).unwrap();
    refusal.rewind().refuse(3, "attached to its shared memory");
    // Without the file the process itself is found.
    fs::remove_file(a.data.join("postmaster.pid")).unwrap();
    refusal.rewind().refuse(3, "is running in it");
    busy.kill().unwrap();
    busy.wait().unwrap();
}

#[test]
fn a_stale_pid_file_whose_number_is_taken_does_not_refuse() {
    let refusal = Refusal::new();
    let file = refusal.pair.a.data.join("postmaster.pid");
    // This very process has the number, and it is no server.
    let text = format!(
        "{}\n/elsewhere\n1700000000\n5432\n/tmp\n\n  1 99999999\nready\n",
        std::process::id()
    );
    write(&file, &text);
    User::unprivileged().own(&file);
    let before = Snapshot::of(&refusal.pair.a.data);
    refusal.rewind().args(["-n"]).succeed();
    before.assert_same(&Snapshot::of(&refusal.pair.a.data));
    refusal.succeed();
    assert!(!file.exists());
}

#[test]
fn root_is_refused() {
    // Another user is root in a user namespace of its own.
    let as_root = |program: std::path::PathBuf| match rustix::process::geteuid().is_root() {
        true => Command::new(program),
        false => {
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-root-user"]).arg(program);
            command
        }
    };
    let client = &["status", "-D", "/tmp"][..];
    let server =
        &["--pgdata", "/tmp", "--cert", "a", "--key", "b", "--client-ca", "c", "--allow", "d"][..];
    for (name, args) in [("pgrejoin", client), ("pgrejoin-server", server)] {
        let program = integration_tests::binaries::program(name);
        let output = as_root(program).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{name}: {said}");
        assert!(said.contains("cannot be run as root"), "{name}: {said}");
    }
}

#[test]
fn what_is_no_data_directory_or_not_ours_is_refused() {
    let refusal = Refusal::new();
    let empty = refusal.pair.home.path().join("empty");
    fs::create_dir(&empty).unwrap();
    User::unprivileged().own(&empty);
    let node = Node { data: empty.clone(), ..refusal.pair.a.clone() };
    Rewind::new(&node, &refusal.server, &refusal.pki).refuse(3, "not a PostgreSQL data directory");
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    if rustix::process::geteuid().is_root() {
        let foreign = refusal.pair.home.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        write(&foreign.join("PG_VERSION"), "15\n");
        let node = Node { data: foreign, ..refusal.pair.a.clone() };
        Rewind::new(&node, &refusal.server, &refusal.pki).refuse(3, "run it as the owner");
    }
}

#[test]
fn damaged_or_foreign_control_files_are_refused() {
    let refusal = Refusal::new();
    let file = refusal.pair.a.data.join("global/pg_control");
    let good = fs::read(&file).unwrap();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        let crc = pg_format_crc(&bytes[..288]);
        bytes[288..292].copy_from_slice(&crc.to_le_bytes());
        bytes
    };
    let cases: [(Vec<u8>, &str); 6] = [
        ([&good[..100], &[good[100] ^ 1], &good[101..]].concat(), "has CRC"),
        (good[..50].to_vec(), "bytes long"),
        (with(0, &1_u64.to_le_bytes()), "different clusters"),
        (with(12, &202_107_181_u32.to_le_bytes()), "different PostgreSQL versions"),
        (with(228, &(1_u32 << 20).to_le_bytes()), "different WAL segment sizes"),
        (with(252, &0_u32.to_le_bytes()), "different data checksum settings"),
    ];
    for (bytes, words) in cases {
        write(&file, &bytes);
        refusal.refuse(refusal.rewind(), 3, words);
    }
    write(&file, &good);
    refusal.succeed();
}

/// CRC-32C by its definition.
fn pg_format_crc(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x82F6_3B78 };
        }
    }
    !crc
}

#[test]
fn a_backup_label_or_recovery_target_is_refused() {
    let refusal = Refusal::new();
    let label = refusal.pair.a.data.join("backup_label");
    write(&label, "START WAL LOCATION: 0/2000028\n");
    refusal.refuse(refusal.rewind(), 3, "backup_label");
    fs::remove_file(&label).unwrap();
    let auto = refusal.pair.a.data.join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).unwrap();
    append(&auto, "recovery_target_lsn = '0/5000000'\n");
    refusal.refuse(refusal.rewind(), 3, "recovery_target_lsn");
    write(&auto, &text);
    refusal.succeed();
}

#[test]
fn full_page_writes_off_on_the_source_is_refused() {
    let refusal = Refusal::with("full_page_writes = off");
    refusal.refuse(refusal.rewind(), 7, "full_page_writes is off");
}

#[test]
fn a_source_without_a_proven_role_is_refused() {
    let refusal = Refusal::new();
    refusal.pair.b.kill();
    refusal.refuse(refusal.rewind(), 5, "neither primary, standby nor cleanly stopped");
}

#[test]
fn a_file_that_cannot_be_written_is_refused_before_anything_changes() {
    let refusal = Refusal::new();
    let path = refusal.pair.b.sql("select pg_relation_filepath('plain')");
    let file = refusal.pair.a.data.join(path);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    refusal.refuse(refusal.rewind(), 7, "cannot be written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    // One that is replaced and belongs to somebody else; only root can make it so.
    if rustix::process::geteuid().is_root() {
        let version = refusal.pair.a.data.join("PG_VERSION");
        std::os::unix::fs::chown(&version, Some(0), Some(0)).unwrap();
        fs::set_permissions(&version, fs::Permissions::from_mode(0o644)).unwrap();
        refusal.refuse(refusal.rewind(), 7, "PG_VERSION on the target cannot be written");
        fs::set_permissions(&version, fs::Permissions::from_mode(0o600)).unwrap();
        refusal.pair.a.user.own(&version);
    }
    refusal.succeed();
}

#[test]
fn settings_lower_than_the_sources_refuse_a_start() {
    let refusal = Refusal::new();
    refusal.pair.a.configure("max_connections = 20");
    refusal.refuse(
        refusal.rewind().args(["--start"]),
        7,
        "max_connections is 20 on the target and 30",
    );
    let ended = refusal.rewind().following(&refusal.pair.b).succeed();
    assert!(ended.text.contains("max_connections is 20"), "{}", ended.text);
}

#[test]
fn identities_that_do_not_fit_are_refused() {
    let refusal = Refusal::new();
    let home = refusal.pair.home.path();
    // A client of another authority.
    let stranger_home = home.join("stranger");
    fs::create_dir(&stranger_home).unwrap();
    let stranger = Pki::new(&stranger_home);
    let address = format!("https://127.0.0.1:{}", refusal.server.port);
    let a = &refusal.pair.a;
    refusal.refuse(Rewind::to(a, &address, &stranger), 4, "certificate is not acceptable");
    // Trusts the right server, but is not trusted.
    std::fs::copy(refusal.pki.file("ca.crt"), stranger.file("ca.crt")).unwrap();
    refusal.refuse(Rewind::to(a, &address, &stranger), 4, "did not accept this node's certificate");
    // A certificate of the authority whose name is not listed.
    refusal.pki.issue("other", &[], 10);
    for kind in ["crt", "key"] {
        let (from, to) =
            (refusal.pki.file(&format!("other.{kind}")), stranger.file(&format!("client.{kind}")));
        std::fs::copy(from, to).unwrap();
    }
    refusal.refuse(Rewind::to(a, &address, &stranger), 4, "is not on the server's allow list");
    // The wrong server.
    refusal.refuse(
        refusal.rewind().args(["--server-name", "elsewhere"]),
        4,
        "certificate is not acceptable",
    );
    // A key others can read.
    let key = refusal.pki.file("client.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refusal.refuse(refusal.rewind(), 2, "has mode 0644");
}

#[test]
fn an_expired_certificate_is_refused_with_this_nodes_clock() {
    let refusal = Refusal::new();
    let other = refusal.pair.home.path().join("expired");
    fs::create_dir(&other).unwrap();
    let pki = Pki::new(&other);
    for name in ["ca.crt", "ca.key"] {
        std::fs::copy(refusal.pki.file(name), pki.file(name)).unwrap();
    }
    for name in ["client.crt", "client.key"] {
        fs::remove_file(pki.file(name)).unwrap();
    }
    // Valid from a day ago for no time at all.
    pki.issue("client", &[], 0);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let address = format!("https://127.0.0.1:{}", refusal.server.port);
    refusal.refuse(Rewind::to(&refusal.pair.a, &address, &pki), 4, "this node's clock says");
}

#[test]
fn a_source_that_is_down_plain_or_stalled_is_an_error_to_try_again() {
    let refusal = Refusal::new();
    let a = &refusal.pair.a;
    // Nobody listens on a port just given back.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let down = format!("https://{}", free.local_addr().unwrap());
    drop(free);
    refusal.refuse(Rewind::to(a, &down, &refusal.pki), 5, "could not connect");
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", plain.local_addr().unwrap());
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = plain.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    refusal.refuse(Rewind::to(a, &address, &refusal.pki), 4, "does not speak TLS");
    answering.join().unwrap();
    // Accepts and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", silent.local_addr().unwrap());
    refusal.refuse(Rewind::to(a, &address, &refusal.pki), 5, "does not answer the TLS handshake");
}

#[test]
fn usage_errors_have_their_own_code() {
    let refusal = Refusal::new();
    refusal.refuse(
        Rewind::to(&refusal.pair.a, "http://127.0.0.1:1", &refusal.pki),
        2,
        "must begin with https://",
    );
    let no_program = ["--start", "--pg-ctl", "/nowhere/pg_ctl"];
    refusal.refuse(refusal.rewind().args(no_program), 7, "is not a file that can be executed");
    // The template has no primary_conninfo.
    refusal.refuse(refusal.rewind().args(["-R"]), 2, "give --primary-conninfo");
}

#[test]
fn a_corrupt_page_of_the_source_is_named_and_refused() {
    let refusal = Refusal::new();
    let b = &refusal.pair.b;
    let path = b.sql("select pg_relation_filepath('plain')");
    b.stop("fast");
    let file = b.data.join(&path);
    let mut bytes = fs::read(&file).unwrap();
    bytes[8192 * 3 + 5000] ^= 0xFF;
    write(&file, &bytes);
    refusal.refuse(
        refusal.rewind().args(["--strategy", "compare"]),
        1,
        &format!("block 3 of {path}"),
    );
}

#[test]
fn minimal_wal_on_the_source_is_refused_where_it_would_be_replayed() {
    let refusal = Refusal::new();
    let b = &refusal.pair.b;
    let restart_with = |settings: &str| {
        b.configure(settings);
        b.stop("fast");
        b.start();
    };
    restart_with("wal_level = minimal\nmax_wal_senders = 0");
    refusal.refuse(refusal.rewind(), 7, "wal_level is minimal on the source");
    restart_with("wal_level = replica\nmax_wal_senders = 10");
    let fork = refusal.rewind().args(["--strategy", "fork"]);
    refusal.refuse(fork, 7, "wal_level was minimal on the source at");
    let ended = refusal.rewind().following(b).succeed();
    assert_eq!(ended.field("strategy"), "compare", "{}", ended.text);
    integration_tests::oracle::verify(&refusal.pair.a, b);
}

/// A live standby whose restartpoint is older than the record: no start of replay avoids it.
#[test]
fn a_file_copy_that_must_be_replayed_is_refused() {
    let pair = Pair::new(15, Shape::default());
    pair.b.stop("fast");
    let c = pair.b.copy(&pair.home.path().join("c"));
    pair.b.start();
    pair.b.promote();
    pair.a.sql("insert into plain values (70001, 'lost', 1)");
    pair.a.stop("fast");
    follow_instead(&c, &pair.b);
    c.start();
    let caught_up = || {
        let lsn = pair.b.lsn();
        c.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    };
    pair.b.sql("checkpoint");
    caught_up();
    c.sql("checkpoint");
    pair.b.sql("create database copied template second strategy file_copy");
    caught_up();
    let served = Served::start(pair.home.path(), &c);
    let before = Snapshot::of(&pair.a.data);
    for strategy in ["fork", "compare", "latest", "auto"] {
        let rewind = served.rewind(&pair.a).args(["--strategy", strategy]);
        rewind.refuse(7, "file by file");
    }
    before.assert_same(&Snapshot::of(&pair.a.data));
    // What the message says helps.
    pair.b.sql("checkpoint");
    caught_up();
    c.sql("checkpoint");
    let ended = served.rewind(&pair.a).following(&pair.b).succeed();
    assert_eq!(ended.field("strategy"), "latest", "{}", ended.text);
    integration_tests::oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_source_in_the_middle_of_its_promotion_is_refused() {
    let pair = Pair::stopped(15, Shape::default(), "");
    // Between the end of recovery and the first write.
    pair.b.configure("recovery_end_command = 'sleep 12'");
    pair.a.start();
    pair.b.start();
    pair.catch_up();
    pair.b.sql("select pg_promote(false)");
    pair.a.sql("insert into plain values (70001, 'lost', 1)");
    pair.a.stop("fast");
    let signal = pair.b.data.join("standby.signal");
    while signal.exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let served = Served::start(pair.home.path(), &pair.b);
    let before = Snapshot::of(&pair.a.data);
    let rewind = || served.rewind(&pair.a);
    rewind().refuse(5, "neither primary, standby nor cleanly stopped");
    before.assert_same(&Snapshot::of(&pair.a.data));
    pair.b.wait("postgres", "not pg_is_in_recovery()");
    rewind().following(&pair.b).succeed();
}

#[test]
fn too_little_room_is_refused_with_numbers() {
    let refusal = Refusal::new();
    let (a, b) = (&refusal.pair.a, &refusal.pair.b);
    // Files as large as the disk, which take no room where they are.
    let stat = rustix::fs::statvfs(&a.data).unwrap();
    let free = stat.f_bavail * stat.f_frsize;
    let directory = b.data.join("base/1");
    for segment in 0..free / (1 << 30) + 2 {
        let name = match segment {
            0 => "4000000000".to_owned(),
            segment => format!("4000000000.{segment}"),
        };
        let file = fs::File::create(directory.join(&name)).unwrap();
        file.set_len(1 << 30).unwrap();
        b.user.own(&directory.join(&name));
    }
    let before = Snapshot::of(&a.data);
    let ended = refusal.rewind().refuse(7, "not enough space");
    before.assert_same(&Snapshot::of(&a.data));
    let message = ended.field("message");
    let numbers = message.split(|c: char| !c.is_ascii_digit());
    let large = numbers.filter_map(|n| n.parse::<u64>().ok()).filter(|n| *n > 1 << 20);
    assert!(large.count() >= 2, "no numbers: {message}");
}

#[test]
fn a_source_that_stalls_in_the_middle_ends_the_run() {
    let refusal = Refusal::new();
    let (pair, pki) = (&refusal.pair, &refusal.pki);
    pair.b.sql("create table bulk as select g, md5(g::text) from generate_series(1, 300000) g");
    let server = Server::with(&pair.b, pki, 0, &["--max-rate", "2M"]);
    let before = Snapshot::of(&pair.a.data);
    let mut running = Rewind::new(&pair.a, &server, pki).timeout("4s").spawn();
    running.wait_for("fetch");
    std::thread::sleep(std::time::Duration::from_millis(700));
    server.signal(rustix::process::Signal::STOP);
    let ended = running.wait();
    server.signal(rustix::process::Signal::CONT);
    assert_eq!(ended.code, 5, "{}", ended.text);
    // What came is kept for the next run, and nothing else is touched.
    assert!(ended.text.contains("the fetched data is kept"), "{}", ended.text);
    let aside = pair.home.path().join("aside");
    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    std::fs::rename(state_directory(&pair.a.data), &aside).expect("moved");
    before.assert_same(&Snapshot::of(&pair.a.data));
    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    std::fs::rename(&aside, state_directory(&pair.a.data)).expect("moved");
    let ended = Rewind::new(&pair.a, &server, pki).following(&pair.b).succeed();
    assert!(ended.text.contains("resuming the transfer of an earlier run"), "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

/// A server of another release: answers the first call with protocol version 99.
#[test]
fn another_protocol_version_is_refused() {
    let refusal = Refusal::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let tls = proto::tls::server_config(&proto::tls::TlsFiles {
        certificate: refusal.pki.file("server.crt"),
        key: root_key(&refusal.pki),
        authority: refusal.pki.file("ca.crt"),
        revocation: proto::tls::Revocation::default(),
    });
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    runtime.spawn(answer_as_another_version(listener, tls.unwrap().config));
    let rewind = Rewind::to(&refusal.pair.a, &address, &refusal.pki);
    refusal.refuse(rewind, 1, "it speaks protocol version 99");
}

/// The server's key in a file that belongs to whoever runs this test.
fn root_key(pki: &Pki) -> std::path::PathBuf {
    let own = pki.file("own.key");
    fs::copy(pki.file("server.key"), &own).expect("copied");
    fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).expect("chmod");
    own
}

async fn answer_as_another_version(
    listener: tokio::net::TcpListener,
    tls: std::sync::Arc<tokio_rustls::rustls::ServerConfig>,
) {
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    while let Ok((stream, _)) = listener.accept().await {
        let stream = acceptor.accept(stream).await.expect("a client");
        let answer = hyper::service::service_fn(|_request| async {
            // A gRPC message of two bytes: field 1 is 99.
            let message = bytes::Bytes::from_static(&[0, 0, 0, 0, 2, 0x08, 99]);
            let mut trailers = hyper::HeaderMap::new();
            trailers.insert("grpc-status", hyper::header::HeaderValue::from_static("0"));
            let frames = [Frame::data(message), Frame::trailers(trailers)];
            let body =
                StreamBody::new(tokio_stream::iter(frames.map(Ok::<_, std::convert::Infallible>)));
            let response = hyper::Response::builder().header("content-type", "application/grpc");
            response.body(body)
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        connection.serve_connection(TokioIo::new(stream), answer).await.ok();
    }
}

/// As `lost+found` of a file system whose root is the data directory.
#[test]
fn a_directory_that_nobody_may_read_and_is_not_postgres_stays() {
    let refusal = Refusal::new();
    let nodes = [&refusal.pair.a, &refusal.pair.b];
    for node in nodes {
        let directory = node.data.join("lost+found");
        fs::create_dir(&directory).unwrap();
        node.user.own(&directory);
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let mirrored = refusal.rewind().args(["--extra-files", "mirror"]);
    let before = Snapshot::of(&refusal.pair.a.data);
    mirrored.refuse(3, "lost+found on the target cannot be read");
    before.assert_same(&Snapshot::of(&refusal.pair.a.data));
    let ended = refusal.rewind().following(&refusal.pair.b).succeed();
    assert!(ended.text.contains("lost+found cannot be read and stays"), "{}", ended.text);
    // What is PostgreSQL's is another matter, and the path is named.
    for node in nodes {
        fs::remove_dir(node.data.join("lost+found")).unwrap();
    }
    oracle::verify(&refusal.pair.a, &refusal.pair.b);
}

#[test]
fn what_of_postgres_cannot_be_read_is_named() {
    let refusal = Refusal::new();
    let directory = refusal.pair.b.data.join("pg_multixact/members");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o000)).unwrap();
    refusal.refuse(refusal.rewind(), 1, "pg_multixact/members: Permission denied");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    refusal.succeed();
}

//! Clients that attack a server: before and after they have proven who they are. An honest client is served all the while.

use std::convert::Infallible;
use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use integration_tests::client::Rewind;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::steps::part;
use proto::limits::{
    CONNECTIONS_PER_IDENTITY_MAX, HANDSHAKES_MAX, REQUEST_BYTES_PER_IDENTITY_MAX,
    REQUEST_MESSAGE_BYTES_MAX, REQUEST_WINDOW_BYTES, STRANGERS_MAX, STREAMS_PER_CONNECTION_MAX,
    WORKERS_MAX,
};
use rustix::process::Signal;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;

/// A fork with a stopped target, whose source is served.
struct Attacked {
    pair: Pair,
    pki: Pki,
    server: Server,
}

impl Attacked {
    fn new(options: &[&str]) -> Self {
        let pair = Pair::new(15, Shape::default());
        part(&pair);
        pair.b.sql("checkpoint");
        pair.a.stop("fast");
        let pki = Pki::new(pair.home.path());
        for name in ["attacker", "accomplice", "stranger"] {
            pki.issue(name, &[], 30);
        }
        let server = Server::with(&pair.b, &pki, 0, options);
        Self { pair, pki, server }
    }

    /// A rewind by an honest client, and what it led to.
    fn rewind(&self) {
        Rewind::new(&self.pair.a, &self.server, &self.pki).following(&self.pair.b).succeed();
        oracle::verify(&self.pair.a, &self.pair.b);
    }

    /// A number in what the kernel says of the server.
    fn kernel(&self, name: &str) -> u64 {
        let status = format!("/proc/{}/status", self.server.pid());
        let status = fs::read_to_string(status).expect("the server runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a number");
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
    }

    fn memory(&self) -> u64 {
        self.kernel("VmRSS") << 10
    }

    fn descriptors(&self) -> usize {
        let open = format!("/proc/{}/fd", self.server.pid());
        fs::read_dir(open).expect("the server runs").count()
    }

    fn tcp(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.server.port)).expect("connected")
    }

    /// Lines that the server has logged with these words.
    fn lines(&self, words: &str) -> usize {
        self.server.log_text().lines().filter(|line| line.contains(words)).count()
    }

    /// Opens a connection with a certificate.
    async fn connect(&self, name: &str) -> Option<Connection> {
        let key = self.pki.file(&format!("{name}.own"));
        fs::copy(self.pki.file(&format!("{name}.key")), &key).expect("copied");
        set_private(&key);
        let tls = proto::tls::client_config(&proto::tls::TlsFiles {
            certificate: self.pki.file(&format!("{name}.crt")),
            key,
            authority: self.pki.file("ca.crt"),
            revocation: proto::tls::Revocation::default(),
        });
        let connector = tokio_rustls::TlsConnector::from(Arc::new(tls.expect("a configuration")));
        let tcp = tokio::net::TcpStream::connect(("127.0.0.1", self.server.port)).await.ok()?;
        let host = "127.0.0.1".try_into().expect("a name");
        let stream = TokioIo::new(connector.connect(host, tcp).await.ok()?);
        let made = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await;
        let (requests, connection) = made.ok()?;
        let ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ended);
        tokio::spawn(async move {
            drop(connection.await);
            told.store(true, Ordering::Relaxed);
        });
        Some(Connection { requests, ended })
    }
}

fn set_private(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
}

type Body = StreamBody<
    std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>,
>;

struct Connection {
    requests: SendRequest<Body>,
    ended: Arc<AtomicBool>,
}

impl Connection {
    /// Begins a call whose only message has `promised` bytes, of which `sent` are sent.
    fn begin(&mut self, path: &str, promised: usize, sent: usize) -> Answer {
        let mut message = vec![0];
        message.extend(u32::try_from(promised).expect("fits").to_be_bytes());
        let first = tokio_stream::once(Bytes::from(message));
        let pieces = (0..sent / 16384).map(|_| Bytes::from(vec![7; 16384]));
        let content = first.chain(tokio_stream::iter(pieces));
        let frames = content.map(|data| Ok(Frame::data(data))).chain(tokio_stream::pending());
        let request = hyper::Request::post(format!("https://127.0.0.1{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(StreamBody::new(Box::pin(frames) as _))
            .expect("a request");
        let answer = self.requests.send_request(request);
        Answer(tokio::spawn(async move {
            let answer = answer.await.ok()?;
            // A call whose answer has begun ends with its status behind it.
            let status = match answer.headers().get("grpc-status").cloned() {
                Some(status) => status,
                None => {
                    let collected = answer.into_body().collect().await.ok()?;
                    collected.trailers()?.get("grpc-status")?.clone()
                }
            };
            status.to_str().ok()?.parse().ok()
        }))
    }
}

/// The status that a call ended with at once.
struct Answer(tokio::task::JoinHandle<Option<u32>>);

impl Answer {
    async fn status(self) -> Option<u32> {
        tokio::time::timeout(Duration::from_secs(5), self.0).await.ok()?.ok()?
    }
}

const HEALTH: &str = "/grpc.health.v1.Health/Check";
const FETCH: &str = "/pgrejoin.v1.Rejoin/Fetch";
const SEAL: &str = "/pgrejoin.v1.Rejoin/Seal";
/// gRPC's `PERMISSION_DENIED`.
const DENIED: u32 = 7;
/// What the allocator and the runtime need besides, for this many connections.
const SLACK_BYTES: u64 = 48 << 20;

#[test]
fn silent_connections_do_not_keep_an_honest_client_out() {
    let attacked = Attacked::new(&[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut open = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                open.push(attacked.tcp());
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        std::thread::sleep(Duration::from_secs(2));
        assert!(attacked.descriptors() < HANDSHAKES_MAX + 60, "{}", attacked.descriptors());
        attacked.rewind();
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_flood_of_failing_handshakes_does_not_fill_the_log() {
    let attacked = Attacked::new(&[]);
    let since = Instant::now();
    let mut sent = 0;
    while since.elapsed() < Duration::from_secs(3) {
        drop(attacked.tcp().write_all(b"GET / HTTP/1.1\r\n\r\n"));
        sent += 1;
    }
    assert!(sent > 100, "only {sent}");
    std::thread::sleep(Duration::from_millis(500));
    let lines = attacked.lines("TLS handshake failed");
    assert!((1..=20).contains(&lines), "{lines} lines for {sent} connections");
    // The others are counted.
    let since = Instant::now();
    while attacked.lines("more connections in") == 0 {
        assert!(since.elapsed() < Duration::from_secs(15), "{}", attacked.server.log_text());
        std::thread::sleep(Duration::from_millis(100));
    }
    attacked.rewind();
}

#[test]
fn whoever_is_not_allowed_takes_no_memory() {
    let attacked = Attacked::new(&[]);
    let before = attacked.memory();
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut open = Vec::new();
        let mut denied = 0;
        for _ in 0..40 {
            let Some(mut connection) = attacked.connect("stranger").await else { continue };
            for path in [HEALTH, FETCH, SEAL] {
                let answer = connection.begin(path, 4 << 20, 512 << 10);
                denied += usize::from(answer.status().await == Some(DENIED));
            }
            open.push(connection);
        }
        assert!(denied >= 3, "{denied}");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let alive = open.iter().filter(|one| !one.ended.load(Ordering::Relaxed)).count();
        assert!(alive <= STRANGERS_MAX, "{alive}");
    });
    let grown = attacked.memory().saturating_sub(before);
    assert!(grown < SLACK_BYTES, "{grown}");
    attacked.rewind();
}

#[test]
fn requests_that_are_never_finished_take_a_bounded_memory() {
    let attacked = Attacked::new(&["--allow", "attacker"]);
    attacked.tcp();
    let before = attacked.memory();
    let runtime = Runtime::new().expect("a runtime");
    let open = runtime.block_on(async {
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS_PER_IDENTITY_MAX {
            let Some(mut connection) = attacked.connect("attacker").await else { continue };
            for _ in 0..STREAMS_PER_CONNECTION_MAX {
                let bytes = REQUEST_MESSAGE_BYTES_MAX - 16384;
                drop(connection.begin(FETCH, REQUEST_MESSAGE_BYTES_MAX, bytes));
            }
            open.push(connection);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        open
    });
    assert!(open.len() > CONNECTIONS_PER_IDENTITY_MAX / 2, "{}", open.len());
    let windows = CONNECTIONS_PER_IDENTITY_MAX as u64 * u64::from(REQUEST_WINDOW_BYTES);
    let bound = REQUEST_BYTES_PER_IDENTITY_MAX as u64 + windows + SLACK_BYTES;
    let grown = attacked.memory().saturating_sub(before);
    assert!(grown < bound, "{grown} of {bound}");
    assert!(attacked.kernel("Threads") < WORKERS_MAX as u64 + 32);
    attacked.rewind();
}

#[test]
fn messages_that_are_too_long_are_refused_before_they_come() {
    let attacked = Attacked::new(&["--allow", "attacker"]);
    Runtime::new().expect("a runtime").block_on(async {
        let mut connection = attacked.connect("attacker").await.expect("connected");
        // gRPC's INVALID_ARGUMENT, INTERNAL or OUT_OF_RANGE: never an answer.
        for (path, promised) in [(SEAL, 2 << 10), (HEALTH, 2 << 10), (FETCH, 2 << 20)] {
            let status = connection.begin(path, promised, 0).status().await;
            assert!(status.is_some_and(|status| status != 0), "{path}: {status:?}");
        }
    });
    attacked.rewind();
}

#[test]
fn two_clients_with_all_their_connections_do_not_lock_out_a_third() {
    let attacked = Attacked::new(&["--allow", "attacker", "--allow", "accomplice"]);
    let runtime = Runtime::new().expect("a runtime");
    let open = runtime.block_on(async {
        let mut open = Vec::new();
        for name in ["attacker", "accomplice"] {
            for _ in 0..CONNECTIONS_PER_IDENTITY_MAX + 10 {
                open.extend(attacked.connect(name).await);
            }
        }
        // A client learns only afterwards that its connection was one too many.
        tokio::time::sleep(Duration::from_secs(1)).await;
        open
    });
    let alive = open.iter().filter(|one| !one.ended.load(Ordering::Relaxed)).count();
    assert!(alive <= 2 * CONNECTIONS_PER_IDENTITY_MAX, "{alive}");
    attacked.rewind();
}

/// Whether a connection is closed within some seconds.
fn is_closed(connection: &Connection) -> bool {
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(10) {
        if connection.ended.load(Ordering::Relaxed) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

#[test]
fn an_open_connection_ends_when_its_client_is_not_allowed_any_more() {
    let list = tempfile::NamedTempFile::new().expect("a file");
    let path = list.path().to_owned();
    let write = |text: &str| {
        integration_tests::cluster::write(&path, text);
        integration_tests::user::User::unprivileged().own(&path);
    };
    write("attacker\n");
    let attacked = Attacked::new(&["--allow-file", path.to_str().expect("a path")]);
    let runtime = Runtime::new().expect("a runtime");
    let connection = runtime.block_on(attacked.connect("attacker")).expect("connected");
    attacked.server.signal(Signal::HUP);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!connection.ended.load(Ordering::Relaxed), "it is allowed");
    // A line that names nobody does not keep the others allowed.
    write("no*body\n");
    attacked.server.signal(Signal::HUP);
    assert!(is_closed(&connection), "{}", attacked.server.log_text());
    assert!(attacked.lines("names match exactly") > 0, "{}", attacked.server.log_text());
    attacked.rewind();
}

#[test]
fn a_revoked_certificate_counts_no_more() {
    let pair = Pair::new(15, Shape::default());
    part(&pair);
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    let pki = Pki::new(pair.home.path());
    pki.issue("attacker", &[], 30);
    let list = pki.revoke(&[], 30);
    let list = list.to_str().expect("a path").to_owned();
    let options = ["--allow", "attacker", "--client-crl", &list];
    let server = Server::with(&pair.b, &pki, 0, &options);
    let attacked = Attacked { pair, pki, server };
    let runtime = Runtime::new().expect("a runtime");
    let connection = runtime.block_on(attacked.connect("attacker")).expect("connected");
    attacked.pki.revoke(&["attacker"], 30);
    attacked.server.signal(Signal::HUP);
    assert!(is_closed(&connection), "{}", attacked.server.log_text());
    runtime.block_on(async {
        // TLS 1.3 tells a client only after its handshake.
        if let Some(mut again) = attacked.connect("attacker").await {
            let answer = again.begin(SEAL, 0, 0);
            assert_eq!(answer.status().await, None);
        }
    });
    // The client looks at a list, too.
    let server_list = attacked.pki.file("ca.crl");
    let server_list = server_list.to_str().expect("a path");
    Rewind::new(&attacked.pair.a, &attacked.server, &attacked.pki)
        .following(&attacked.pair.b)
        .args(["--crl", server_list])
        .succeed();
    oracle::verify(&attacked.pair.a, &attacked.pair.b);
    attacked.pki.revoke(&["server"], 30);
    let refused = Rewind::new(&attacked.pair.a, &attacked.server, &attacked.pki);
    refused.args(["--crl", server_list]).refuse(4, "its certificate is not acceptable");
}

#[test]
fn a_network_that_is_not_named_is_refused() {
    let attacked = Attacked::new(&["--allow-from", "10.1.2.0/24"]);
    let refused = Rewind::new(&attacked.pair.a, &attacked.server, &attacked.pki);
    refused.refuse(5, "127.0.0.1");
    assert!(attacked.lines("--allow-from does not name it") > 0, "{}", attacked.server.log_text());
    let served = Server::with(&attacked.pair.b, &attacked.pki, 0, &["--allow-from", "127.0.0.0/8"]);
    Rewind::new(&attacked.pair.a, &served, &attacked.pki).following(&attacked.pair.b).succeed();
}

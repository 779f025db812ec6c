//! The data path with the smallest buffers there can be: whoever waits for the other end while that
//! one waits for it would wait for ever.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use client::Config;
use client::cli::{Cli, Command};
use client::config::{Connections, SourceAddress};
use client::monitor::Monitor;
use client::plan::file_actions::Comparison;
use client::source::Session;
use client::source::compare::{Compared, compare};
use client::source::link::{Buffers, Link};
use data_dir::DataDir;
use integration_tests::faults::small::Silent;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::Pki;
use pg_format::DataPath;
use server::Queues;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Largest part of a window that HTTP/2 gives from the start.
const WINDOW_BYTES: u32 = 64 << 10;
/// Longest a comparison of some megabytes may take before it is taken for one that never ends.
const PATIENCE: Duration = Duration::from_secs(120);

/// The same certificates for this process, which may be another user's.
fn own(pki: &Pki, home: &Path) -> Pki {
    let directory = home.join("own");
    std::fs::create_dir(&directory).expect("made");
    for entry in std::fs::read_dir(&pki.directory).expect("readable").flatten() {
        std::fs::copy(entry.path(), directory.join(entry.file_name())).expect("copied");
    }
    Pki { directory }
}

/// A server in this process with queues of one.
async fn serve(pair: &Pair, pki: &Pki) -> u16 {
    let text = |path: PathBuf| path.display().to_string();
    let arguments = [
        "pgrejoin-server".to_owned(),
        "--pgdata".to_owned(),
        text(pair.b.data.clone()),
        "--listen=127.0.0.1:0".to_owned(),
        format!("--cert={}", text(pki.file("server.crt"))),
        format!("--key={}", text(pki.file("server.key"))),
        format!("--client-ca={}", text(pki.file("ca.crt"))),
        "--allow=client".to_owned(),
    ];
    let cli = server::cli::Cli::parse_from(arguments);
    let config = cli.into_config().expect("a configuration");
    let config = config.with_queues(Queues { frames: 1, units: 1 });
    let (_never, reloads) = mpsc::channel(1);
    let (bound, address) = tokio::sync::oneshot::channel();
    tokio::spawn(server::serve(config, CancellationToken::new(), reloads, |at| {
        bound.send(at).expect("awaited");
    }));
    address.await.expect("an address").port()
}

fn source(pair: &Pair, pki: &Pki, port: u16) -> SourceAddress {
    let arguments = [
        "pgrejoin".to_owned(),
        "rewind".to_owned(),
        format!("--target-pgdata={}", pair.a.data.display()),
        format!("--source=https://127.0.0.1:{port}"),
        format!("--cert={}", pki.file("client.crt").display()),
        format!("--key={}", pki.file("client.key").display()),
        format!("--ca={}", pki.file("ca.crt").display()),
    ];
    let Command::Rewind(rewind) = Cli::parse_from(arguments).command else {
        unreachable!("it is a rewind");
    };
    Config::new(*rewind).expect("a configuration").source
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_windows_and_queues_do_not_stop_a_transfer() {
    let pair = Pair::new(15, Shape::default());
    pair.a.sql("create table more as select g, md5(g::text) t from generate_series(1, 1600000) g");
    pair.catch_up();
    pair.b.promote();
    pair.b.sql("update more set g = g + 1");
    pair.a.stop("fast");
    pair.b.stop("fast");
    let pki = own(&Pki::new(pair.home.path()), pair.home.path());
    let port = serve(&pair, &pki).await;
    let buffers = Buffers { receive_bytes: 3 * WINDOW_BYTES, frames: 1, requests: 1 };
    let connections = Connections::Fixed(2);
    let link = Link { connections, patience: PATIENCE, max_rate: None, buffers };
    let (session, _) =
        Session::open(Arc::new(source(&pair, &pki, port)), link).await.expect("a session");
    let directory = Arc::new(DataDir::open(&pair.a.data).expect("data directory"));
    // Every file many times over: requests with hashes go up while hashes come down.
    let mut comparisons = Vec::new();
    for entry in std::fs::read_dir(pair.a.data.join("base/5")).expect("readable").flatten() {
        let blocks = u32::try_from(entry.metadata().expect("a file").len() / 8192).expect("small");
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = DataPath::new(format!("base/5/{name}")).expect("plain");
        let is_relation = name.starts_with(|first: char| first.is_ascii_digit());
        if blocks > 0 && is_relation && pair.b.data.join(path.as_str()).exists() {
            comparisons.extend((0..8).map(|_| Comparison { path: path.clone(), blocks }));
        }
    }
    let monitor: Arc<dyn Monitor> = Arc::new(Silent);
    let compared = compare(&session, directory, &comparisons, monitor);
    let Compared { differences, carried } =
        tokio::time::timeout(PATIENCE, compared).await.expect("it ends").expect("compared");
    assert!(differences.values().any(|blocks| !blocks.is_empty()), "nothing differs");
    assert!(carried.total() > u64::from(2 * WINDOW_BYTES), "it all fits in a window");
    assert_eq!(carried.reconnects, 0);
}

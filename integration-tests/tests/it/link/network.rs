//! Links that break, servers that restart, and what the connections carry.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use client::staging::pack;
use integration_tests::client::{Rewind, state_command, state_directory};
use integration_tests::cluster::Node;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::server::{Pki, Server};
use integration_tests::snapshot::Snapshot;
use integration_tests::steps::Served;
use proto::fetch::{Item, ItemBody};
use rustix::process::Signal;

/// A diverged pair whose rewind has some megabytes to fetch.
fn large_fork() -> Pair {
    // Short segments: a slowed source reads whole ones to prove the fork.
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    pair.b.promote();
    pair.a.sql("update plain set n = 5");
    pair.b.sql("create table bulk as select g id, md5(g::text) a, md5((g * 3)::text) b, md5((g * 7)::text) c from generate_series(1, 150000) g");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    pair
}

/// One of which the target alone changed many pages: replay rebuilds none of them, by any strategy.
fn fork_of_many_lost_changes() -> Pair {
    let pair = Pair::with(15, Shape::default(), "autovacuum = off");
    pair.a.sql("create table bulk as select g id, md5(g::text) a, md5((g * 3)::text) b from generate_series(1, 150000) g");
    pair.a.sql("vacuum freeze bulk");
    pair.a.sql("checkpoint");
    pair.catch_up();
    pair.b.promote();
    pair.a.sql("update bulk set b = 'lost' where id % 20 = 0");
    pair.b.sql("checkpoint");
    pair.a.stop("fast");
    pair
}

/// A TCP proxy that counts connections and can cut them all.
struct Proxy {
    port: u16,
    opened: Arc<AtomicU32>,
    carried: Arc<AtomicU64>,
    generation: Arc<AtomicU32>,
}

impl Proxy {
    fn new(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("address").port();
        let proxy = Self {
            port,
            opened: Arc::default(),
            carried: Arc::default(),
            generation: Arc::default(),
        };
        let (opened, carried, generation) =
            (Arc::clone(&proxy.opened), Arc::clone(&proxy.carried), Arc::clone(&proxy.generation));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else {
                    continue;
                };
                opened.fetch_add(1, Ordering::Relaxed);
                let born = generation.load(Ordering::Relaxed);
                for (mut from, mut to) in [
                    (client.try_clone().expect("clone"), server.try_clone().expect("clone")),
                    (server, client),
                ] {
                    let (carried, generation) = (Arc::clone(&carried), Arc::clone(&generation));
                    from.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout");
                    std::thread::spawn(move || {
                        let mut buffer = [0; 16 << 10];
                        while generation.load(Ordering::Relaxed) == born {
                            match from.read(&mut buffer) {
                                Ok(0) => break,
                                Ok(bytes) => {
                                    carried.fetch_add(bytes as u64, Ordering::Relaxed);
                                    if to.write_all(&buffer[..bytes]).is_err() {
                                        break;
                                    }
                                }
                                Err(error)
                                    if matches!(
                                        error.kind(),
                                        std::io::ErrorKind::WouldBlock
                                            | std::io::ErrorKind::TimedOut
                                    ) => {}
                                Err(_) => break,
                            }
                        }
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                    });
                }
            }
        });
        proxy
    }

    fn cut(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

/// Established connections to a local port, by the kernel's table.
fn established(port: u16) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").expect("table");
    let local = format!(":{port:04X}");
    table
        .lines()
        .filter(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            columns.get(1).is_some_and(|c| c.ends_with(&local)) && columns.get(3) == Some(&"01")
        })
        .count()
}

/// Bytes that were read for a session, by its line in the server's log.
fn bytes_read(line: &str) -> u64 {
    let amounts = line.split_whitespace().filter_map(|word| word.rsplit_once('='));
    let of_data = amounts.filter(|(kind, _)| {
        ["pages", "hashes", "files", "wal"].iter().any(|data| kind.ends_with(data))
    });
    of_data.map(|(_, bytes)| bytes.parse::<u64>().expect("a number")).sum()
}

#[test]
fn every_connection_carries_its_share() {
    let pair = large_fork();
    let pki = Pki::new(pair.home.path());
    // So slow that the rate divides the link, not which thread the machine has time for.
    let server = Server::with(&pair.b, &pki, 0, &["--max-rate", "2M"]);
    // By fork replay would rebuild most of the pages.
    let rewind = Rewind::new(&pair.a, &server, &pki).following(&pair.b);
    let running = rewind.args(["--connections", "5", "--strategy", "latest"]).spawn();
    let mut most = 0;
    let since = std::time::Instant::now();
    while most < 6 && since.elapsed() < Duration::from_secs(20) {
        most = most.max(established(server.port));
        sleep(Duration::from_millis(10));
    }
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    // Five for data and one that asks questions.
    assert!(most >= 6, "{most} connections");
    // What limits is the reading: of pages that come as differences few bytes travel.
    let log = server.log_text();
    let carrying = log.lines().filter(|line| line.contains("pages="));
    let read: Vec<u64> = carrying.map(bytes_read).collect();
    let total: u64 = read.iter().sum();
    assert_eq!(read.len(), 5, "{log}");
    assert!(read.iter().all(|bytes| bytes * 20 >= total), "{read:?}");
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_cut_link_goes_on_and_fetches_nothing_twice() {
    let pair = large_fork();
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "3M"]);
    // What it takes without a cut.
    let plain = served.rewind(&pair.a).args(["-n"]).succeed();
    let planned: u64 = plain.field("pages").parse().expect("a number");
    let proxy = Proxy::new(served.server.port);
    let rewind = Rewind::to(&pair.a, &proxy.address(), &served.pki).following(&pair.b);
    let mut running = rewind.args(["--connections", "4"]).spawn();
    running.wait_for("fetch");
    let since = std::time::Instant::now();
    let mut cuts = 0;
    while cuts < 3 {
        let seen = proxy.carried.load(Ordering::Relaxed);
        while proxy.carried.load(Ordering::Relaxed) < seen + 700_000 {
            assert!(since.elapsed() < Duration::from_secs(120), "the link carries nothing more");
            sleep(Duration::from_millis(10));
        }
        proxy.cut();
        cuts += 1;
    }
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    let reconnects: u64 = ended.field("reconnects").parse().expect("a number");
    assert!(reconnects >= 3, "{}", ended.text);
    let opened = proxy.opened.load(Ordering::Relaxed);
    assert!(opened > 5, "{opened} connections");
    // Pages asked for again are those that had not arrived: a page is staged once.
    let number = |name: &str| ended.field(name).parse::<u64>().expect("a number");
    assert_eq!(number("pages_received") + number("pages_covered"), planned, "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_restarted_server_is_found_again() {
    let pair = large_fork();
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "4M"]);
    let port = served.server.port;
    let running = served.rewind(&pair.a).following(&pair.b).spawn();
    sleep(Duration::from_millis(1500));
    let Served { pki, server } = served;
    drop(server);
    sleep(Duration::from_millis(700));
    let server = Server::with(&pair.b, &pki, port, &[]);
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    drop(server);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_transfer_spans_a_reload_and_a_removed_name_is_refused() {
    let pair = large_fork();
    let pki = Pki::new(pair.home.path());
    let list = pair.home.path().join("allowed");
    integration_tests::cluster::write(&list, "client\n");
    pair.a.user.own(&list);
    let server = Server::spawn(
        &pair.b.data,
        pair.b.user,
        &pki,
        0,
        &["--allow-file", &list.display().to_string(), "--max-rate", "4M"],
    );
    let running = Rewind::new(&pair.a, &server, &pki).following(&pair.b).spawn();
    sleep(Duration::from_millis(1500));
    server.signal(Signal::HUP);
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert!(server.log_text().contains("certificates reloaded"));
    integration_tests::cluster::write(&list, "somebody-else\n");
    server.signal(Signal::HUP);
    sleep(Duration::from_millis(500));
    oracle::verify(&pair.a, &pair.b);
    Rewind::new(&pair.a, &server, &pki).refuse(4, "allow list");
}

#[test]
fn the_server_drains_on_sigterm() {
    let pair = large_fork();
    let pki = Pki::new(pair.home.path());
    let mut server = Server::with(&pair.b, &pki, 0, &["--max-rate", "3M"]);
    let port = server.port;
    let mut running = Rewind::new(&pair.a, &server, &pki).following(&pair.b).spawn();
    running.wait_for("fetch");
    sleep(Duration::from_millis(500));
    server.signal(Signal::TERM);
    assert!(server.wait());
    let log = server.log_text();
    assert!(log.contains("drained"), "{log}");
    // What was being sent was sent, and every session has its line: who, what, how much.
    let session = log.lines().find(|line| line.contains("session ended") && line.contains("wal="));
    let session = session.unwrap_or_else(|| panic!("no session with data: {log}"));
    for words in [
        "client=client",
        "allowed_by=\"client\"",
        "fingerprint=",
        "address=127.0.0.1:",
        "sent_bytes=",
    ] {
        assert!(session.contains(words), "{words} is not in: {session}");
    }
    let server = Server::with(&pair.b, &pki, port, &[]);
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.text);
    drop(server);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn the_server_outlives_what_postgres_does() {
    let pair = Pair::new(15, Shape::default());
    let served = Served::start(pair.home.path(), &pair.b);
    let role = || {
        let ended = served.rewind(&pair.a).args(["-n"]).run();
        ended.text
    };
    pair.a.stop("fast");
    assert!(role().contains("no_rewind_required"));
    pair.b.stop("fast");
    assert!(role().contains("no_rewind_required"));
    let away = pair.home.path().join("away");
    integration_tests::command::run(pair.b.user.command("/bin/mv").arg(&pair.b.data).arg(&away));
    assert!(role().contains("no usable data directory"));
    integration_tests::command::run(pair.b.user.command("/bin/mv").arg(&away).arg(&pair.b.data));
    pair.b.start();
    pair.b.promote();
    pair.b.sql("insert into plain values (70002, 'new', 1)");
    pair.a.start();
    pair.a.sql("insert into plain values (70001, 'lost', 1)");
    pair.a.stop("fast");
    assert!(role().contains("would_rewind"), "{}", role());
}

#[test]
fn a_signal_before_the_seal_leaves_the_target_as_it_was() {
    let pair = large_fork();
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "1M"]);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let before = Snapshot::of(&pair.a.data);
        let mut running = served.rewind(&pair.a).spawn();
        let held = pair.a.data.join("postmaster.pid");
        running.wait_until("its hold of the target", |_| held.exists());
        // PostgreSQL must not start beside it.
        assert!(!pair.a.try_start());
        sleep(Duration::from_millis(300));
        running.signal(signal);
        let ended = running.wait();
        assert_eq!(ended.code, code, "{}", ended.text);
        // What came is kept, and is all that is new.
        assert!(ended.text.contains("the fetched data is kept"), "{}", ended.text);
        assert_eq!(state_command("status", &pair.a).code, 11);
        assert_eq!(state_command("rollback", &pair.a).code, 0);
        before.assert_same(&Snapshot::of(&pair.a.data));
    }
    let mut running = served.rewind(&pair.a).spawn();
    running.wait_for("fetch");
    sleep(Duration::from_secs(2));
    assert_eq!(state_command("status", &pair.a).code, 10, "its run is alive");
    running.signal(Signal::TERM);
    running.wait();
    let ended = served.rewind(&pair.a).following(&pair.b).succeed();
    assert!(ended.text.contains("resuming the transfer of an earlier run"), "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_killed_run_is_begun_again_or_finished() {
    let pair = large_fork();
    let served = Served::start(pair.home.path(), &pair.b);
    let mut hidden = 0;
    for round in 0..40_u64 {
        let running = served.rewind(&pair.a).following(&pair.b).spawn();
        sleep(Duration::from_millis(200 + round * 37 % 900));
        running.signal(Signal::KILL);
        running.wait();
        let status = state_command("status", &pair.a);
        if status.text.contains("has not finished") {
            hidden += 1;
            assert!(!pair.a.try_start(), "started in the middle of a rewind");
        }
        if status.text.contains("is rewound")
            || status.text.contains("no rewind is under way")
                && round > 5
                && pair.a.waits_for_its_first_start()
        {
            break;
        }
    }
    let ended = served.rewind(&pair.a).following(&pair.b).run();
    let resumed = state_command("resume", &pair.a);
    assert_eq!(resumed.code, 0, "{}", resumed.text);
    assert!(ended.code == 0 || pair.a.waits_for_its_first_start(), "{}", ended.text);
    println!("killed while hidden: {hidden}");
    oracle::verify(&pair.a, &pair.b);
}

/// Pages in the packs of a run that did not come to its seal.
fn pages_in_packs(node: &Node) -> u64 {
    let mut pages = 0;
    let packs = state_directory(&node.data).join("packs");
    for entry in std::fs::read_dir(packs).into_iter().flatten().flatten() {
        let file = std::fs::File::open(entry.path()).expect("a pack");
        let recovered = pack::recover(file, pack::Signer::none(), &mut |items| {
            let is_page = |item: &&Item| matches!(item.body, ItemBody::Page { .. });
            pages += items.iter().filter(is_page).count() as u64;
            Ok(())
        });
        recovered.expect("readable");
    }
    pages
}

fn killed_twice_while_it_fetches(strategy: &str) {
    let pair = fork_of_many_lost_changes();
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "3M"]);
    let rewind = || served.rewind(&pair.a).following(&pair.b).args(["--strategy", strategy]);
    let planned: u64 = rewind().args(["-n"]).succeed().field("pages").parse().expect("a number");
    let mut arrived = 0;
    for _ in 0..2 {
        let mut running = rewind().spawn();
        running.wait_for("fetch");
        let enough = arrived + planned / 5;
        running.wait_until("a fifth of the pages", |_| pages_in_packs(&pair.a) >= enough);
        running.signal(Signal::KILL);
        running.wait();
        arrived = pages_in_packs(&pair.a);
        // The source does not wait.
        pair.b.sql("create table if not exists later(id int)");
        pair.b.sql("insert into later select generate_series(1, 5000)");
        pair.b.sql("checkpoint");
    }
    let ended = rewind().succeed();
    let number = |name: &str| ended.field(name).parse::<u64>().expect("a number");
    assert_eq!(number("pages_recovered"), arrived, "{}", ended.text);
    let came = number("pages_received") + arrived;
    assert_eq!(came + number("pages_covered"), planned, "{}", ended.text);
    assert!(arrived >= planned * 2 / 5, "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

#[test]
fn a_killed_fetch_goes_on_and_fetches_nothing_twice() {
    killed_twice_while_it_fetches("fork");
}

#[test]
fn a_killed_fetch_by_latest_goes_on_and_fetches_nothing_twice() {
    killed_twice_while_it_fetches("latest");
}

#[test]
fn a_killed_comparison_goes_on_and_fetches_nothing_twice() {
    killed_twice_while_it_fetches("compare");
}

/// What was fetched from another life of the source is believed only where the hash is the same.
#[test]
fn a_plan_for_another_life_of_the_source_is_made_anew() {
    let pair = large_fork();
    // Whoever reads a new page sets hints in it: the update below is to change its own pages only.
    pair.b.sql("vacuum bulk");
    pair.b.sql("checkpoint");
    let served = Served::with(pair.home.path(), &pair.b, &["--max-rate", "3M"]);
    // By fork replay would rebuild most of the pages.
    let rewind = || served.rewind(&pair.a).following(&pair.b).args(["--strategy", "latest"]);
    let mut running = rewind().spawn();
    running.wait_for("fetch");
    running.wait_until("500 pages", |_| pages_in_packs(&pair.a) >= 500);
    running.signal(Signal::KILL);
    running.wait();
    pair.b.stop("fast");
    pair.b.start();
    let arrived = pages_in_packs(&pair.a);
    assert!(arrived > 100, "only {arrived} pages had arrived");
    pair.b.sql("update bulk set a = 'changed since' where id % 1000 = 0");
    pair.b.sql("checkpoint");
    let ended = rewind().succeed();
    assert!(ended.text.contains("the plan of an earlier run is no longer valid"), "{}", ended.text);
    // Only pages the source still has are used: those that were changed are fetched again.
    let number = |name: &str| ended.field(name).parse::<u64>().expect("a number");
    let recovered = number("pages_recovered");
    assert!(recovered > 0 && recovered < arrived, "{recovered} of {arrived}: {}", ended.text);
    let came = recovered + number("pages_received");
    assert_eq!(came + number("pages_covered"), number("pages"), "{}", ended.text);
    oracle::verify(&pair.a, &pair.b);
}

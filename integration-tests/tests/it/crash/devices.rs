//! Disks that lose power, are full or refuse writes, for real: a file system on a loop device.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use integration_tests::client::{Rewind, Running, state_command};
use integration_tests::cluster::Node;
use integration_tests::command::run;
use integration_tests::device::Device;
use integration_tests::faults::judge::Choices;
use integration_tests::oracle;
use integration_tests::pair::{Pair, Shape};
use integration_tests::snapshot::Content;
use integration_tests::steps::Served;
use rustix::process::Signal;

/// Room for a small cluster and a rewind of it.
const MEGABYTES: u64 = 400;

/// A fork, its target on a disk of its own, and a server beside the source.
struct Fork {
    pair: Pair,
    target: Node,
    device: Device,
    served: Served,
    before: Content,
}

impl Fork {
    fn rewind(&self, target: &Node) -> Rewind {
        self.served.rewind(target).following(&self.pair.b)
    }

    /// Rewinds the target if it is not, and holds the result to the source.
    fn verify(&self) {
        if !self.target.waits_for_its_first_start() {
            self.rewind(&self.target).succeed();
        }
        oracle::verify_running(&self.target, &self.pair.b);
        self.target.stop("fast");
        oracle::checksums(&self.target);
    }
}

/// A fork whose target was killed in the middle of its work on a disk of its own: what the server
/// wrote last is in the kernel's cache alone.
fn killed_fork() -> Fork {
    let mount = "disk";
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    let device = Device::new(&pair.home.path().join(mount), MEGABYTES);
    pair.a.stop("fast");
    let target = pair.a.copy(&pair.home.path().join(mount).join("n"));
    target.start();
    pair.b.promote();
    target.sql("update plain set n = n + 5, body = md5(body)");
    target.sql("checkpoint");
    target.sql("create table lost as select g, md5(g::text) t from generate_series(1, 20000) g");
    pair.b.sql("update plain set n = n + 3 where id % 5 = 0");
    pair.b.sql("create table bulk as select g id, md5(g::text) a from generate_series(1, 60000) g");
    // A file that is cut: the way back needs its blocks again.
    pair.b.sql("delete from shrink where id > 1000");
    pair.b.sql("vacuum shrink");
    pair.b.sql("checkpoint");
    target.kill();
    let served = Served::start(pair.home.path(), &pair.b);
    let before = content(&target);
    Fork { pair, target, device, served, before }
}

fn node_on(node: &Node, mount: &Path) -> Node {
    let place = mount.join("n");
    Node { data: place.join("data"), socket: place, ..node.clone() }
}

fn content(node: &Node) -> Content {
    Content::without(&node.data, &[".pgrejoin", "postmaster.pid"])
}

/// Holds a rewind up some time after a step has begun; with "hidden", after the target has no
/// `pg_control` any more.
fn pause(running: &mut Running, node: &Node, (step, delay): (&str, u64)) {
    if step == "hidden" {
        running.wait_for("apply");
        let mark = node.data.join(".pgrejoin/hidden");
        while !mark.exists() && running.child.try_wait().expect("status").is_none() {}
    } else {
        running.wait_for(step);
    }
    sleep(Duration::from_millis(delay));
    running.signal(Signal::STOP);
}

/// The device holds what was confirmed, and nothing that only waited in memory.
fn cut_the_power(strategy: &str) {
    let fork = killed_fork();
    let Fork { pair, target, before, .. } = &fork;
    let mut choices = Choices::new(7);
    let mut met = Vec::new();
    for (round, step) in
        ["fetch", "seal", "hidden", "hidden", "hidden", "commit"].iter().enumerate()
    {
        // Each round begins on a disk that is as the first one was.
        let mount = pair.home.path().join(format!("d{round}"));
        let fresh = Device::new(&mount, MEGABYTES);
        let begun = target.copy(&mount.join("n"));
        let delay = choices.below(20) as u64;
        let rewind = |target| fork.rewind(target).args(["--strategy", strategy]);
        let mut running = rewind(&begun).spawn();
        pause(&mut running, &begun, (step, delay));
        running.signal(Signal::KILL);
        running.wait();
        let cut = pair.home.path().join(format!("c{round}"));
        let survivor = fresh.after_a_power_cut(&cut);
        let node = node_on(target, &cut);
        let status = state_command("status", &node).text;
        if status.contains("has not finished") {
            met.push("unfinished");
            assert!(!node.try_start(), "PostgreSQL started unfinished");
            if round % 2 == 0 {
                let back = state_command("rollback", &node);
                assert_eq!(back.code, 0, "{}", back.text);
                before.assert_same(&content(&node));
            } else {
                let resumed = state_command("resume", &node);
                assert_eq!(resumed.code, 0, "{}", resumed.text);
            }
        } else if !node.waits_for_its_first_start() {
            met.push("unchanged");
            before.assert_same(&content(&node));
        }
        if !node.waits_for_its_first_start() {
            rewind(&node).succeed();
        }
        if node.is_running() {
            // Cut after the commit: the file that kept servers away is left.
            assert_eq!(state_command("resume", &node).code, 0);
        }
        oracle::verify_running(&node, &pair.b);
        node.stop("fast");
        oracle::checksums(&node);
        drop((survivor, fresh));
    }
    assert!(met.contains(&"unfinished"), "no cut met the target while it was changed: {met:?}");
}

#[test]
fn a_power_cut_on_a_real_disk_keeps_the_promise() {
    cut_the_power("fork");
}

/// Pages that nobody named, and those that replay rebuilds, are the target's own: they are durable, too.
#[test]
fn a_power_cut_by_latest_keeps_the_promise() {
    cut_the_power("latest");
}

#[test]
fn a_disk_that_fills_up_keeps_the_promise() {
    let fork = killed_fork();
    let Fork { target, device, before, .. } = &fork;
    // While it fetches: refused, and what came is kept.
    let mut running = fork.rewind(target).args(["--max-rate", "500k"]).spawn();
    running.wait_for("fetch");
    let filler = device.fill();
    let ended = running.wait();
    assert_eq!(ended.code, 7, "{}", ended.text);
    assert!(ended.text.contains("No space left on device"), "{}", ended.text);
    assert!(ended.text.contains("the fetched data is kept"), "{}", ended.text);
    before.assert_same(&content(target));
    fs::remove_file(filler).expect("removed");
    // While it changes the target: unfinished, and finished once there is room.
    let mut codes = Vec::new();
    for delay in [0, 2, 5, 10] {
        let mut running = fork.rewind(target).spawn();
        pause(&mut running, target, ("hidden", delay));
        let filler = device.fill();
        running.signal(Signal::CONT);
        let ended = running.wait();
        assert!([0, 7, 8, 9].contains(&ended.code), "{}", ended.text);
        codes.push(ended.code);
        fs::remove_file(filler).expect("removed");
        if ended.code == 8 {
            assert!(ended.text.contains("No space left on device"), "{}", ended.text);
            assert!(!target.try_start(), "PostgreSQL started unfinished");
            let back = state_command("rollback", target);
            assert_eq!(back.code, 0, "{}", back.text);
        } else if ended.code != 7 {
            break;
        }
        before.assert_same(&content(target));
    }
    assert!(codes.contains(&8), "no run met a full disk while it changed the target: {codes:?}");
    println!("exit codes with a disk that filled up while the target was changed: {codes:?}");
    fork.verify();
}

/// The disk stays full: the way back can begin and fits, also after the way on was tried and did not.
#[test]
fn a_disk_that_stays_full_leaves_a_way_out() {
    let fork = killed_fork();
    let Fork { pair, target, device, before, .. } = &fork;
    let pristine = target.copy(&pair.home.path().join("pristine"));
    let (mut met, mut ways) = (0, [false, false]);
    // A resume may fit after all, and is the end: first the way back alone. On a busy machine a run may be at its end
    // before the disk is full: it is begun anew then.
    let delays = [0, 1, 2, 4, 8, 15].map(|delay| (delay, false));
    let delays = delays.into_iter().chain([0, 2, 5].map(|delay| (delay, true)));
    for (delay, resumes) in delays.cycle().take(24) {
        if met > 2 && ways == [true, true] {
            break;
        }
        let mut running = fork.rewind(target).spawn();
        pause(&mut running, target, ("hidden", delay));
        let filler = device.fill();
        running.signal(Signal::CONT);
        let ended = running.wait();
        assert!([0, 7, 8, 9].contains(&ended.code), "{}", ended.text);
        if ended.code == 8 {
            met += 1;
            ways[usize::from(resumes)] = true;
            assert!(ended.text.contains("bytes: free some space"), "{}", ended.text);
            assert!(!target.try_start(), "PostgreSQL started unfinished");
            let resumed = resumes.then(|| state_command("resume", target));
            let done = resumed.as_ref().is_some_and(|resumed| resumed.code == 0);
            if let Some(resumed) = resumed.filter(|_| !done) {
                assert_eq!(resumed.code, 8, "{}", resumed.text);
                assert!(resumed.text.contains("bytes: free some space"), "{}", resumed.text);
            }
            if !done {
                let back = state_command("rollback", target);
                assert_eq!(back.code, 0, "{}", back.text);
            }
        }
        fs::remove_file(filler).expect("removed");
        if target.waits_for_its_first_start() {
            put_back(&pristine, target);
        }
        before.assert_same(&content(target));
    }
    assert!(
        met > 1 && ways == [true, true],
        "only {met} runs met a full disk while they changed the target"
    );
    fork.verify();
}

/// On a busy machine a run may be at its end before the disk refuses: it is begun anew then.
#[test]
fn a_disk_that_refuses_writes_keeps_the_promise() {
    let mut fork = killed_fork();
    let pristine = fork.target.copy(&fork.pair.home.path().join("pristine"));
    let mut unfinished = 0;
    let moments = [("fetch", 20), ("hidden", 0), ("hidden", 5), ("hidden", 10)];
    for (step, delay) in moments.into_iter().cycle().take(24) {
        let mut running = fork.rewind(&fork.target).spawn();
        pause(&mut running, &fork.target, (step, delay));
        fork.device.refuse_writes();
        running.signal(Signal::CONT);
        let ended = running.wait();
        fork.device = fork.device.take_writes();
        let status = state_command("status", &fork.target).text;
        println!("{delay} ms after {step}: exit code {}, {status}", ended.code);
        if ended.text.contains("Read-only file system") {
            assert!([7, 8, 9].contains(&ended.code), "{}", ended.text);
        }
        match ended.code {
            0 | 9 => put_back(&pristine, &fork.target),
            8 => {
                unfinished += 1;
                let way = if unfinished == 1 { "rollback" } else { "resume" };
                let ended = state_command(way, &fork.target);
                assert_eq!(ended.code, 0, "{}", ended.text);
                if unfinished == 2 {
                    break;
                }
            }
            _ => {}
        }
        fork.before.assert_same(&content(&fork.target));
    }
    assert_eq!(unfinished, 2, "too few runs met a disk that refuses while they changed the target");
    fork.verify();
}

/// Makes a node's data directory what it was.
fn put_back(pristine: &Node, node: &Node) {
    fs::remove_dir_all(&node.data).expect("removed");
    let mut copy = node.user.command("/bin/cp");
    run(copy.arg("-a").arg(&pristine.data).arg(&node.data));
}

/// A fork whose target has its data, its WAL and a tablespace in these places. The target is killed;
/// both nodes.
fn spread_out(pair: &Pair, [data, wal, space]: [&Path; 3]) -> (Node, Node) {
    let user = pair.a.user;
    let own = pair.home.path().join("space-b");
    pair.b.stop("fast");
    pair.a.sql(&format!("create tablespace away location '{}'", space.display()));
    pair.a.sql("create table far tablespace away as select generate_series(1, 5000) id");
    pair.a.stop("fast");
    fs::remove_dir_all(&pair.b.data).expect("removed");
    let b = pair.a.copy(&pair.b.socket);
    run(user.command("/bin/cp").arg("-a").arg(space).arg(&own));
    let links = fs::read_dir(b.data.join("pg_tblspc")).expect("links");
    let link = links.flatten().next().expect("a tablespace").path();
    fs::remove_file(&link).expect("unlinked");
    std::os::unix::fs::symlink(&own, &link).expect("linked");
    let target = pair.a.copy(data);
    run(user.command("/bin/mv").arg(target.data.join("pg_wal")).arg(wal));
    std::os::unix::fs::symlink(wal, target.data.join("pg_wal")).expect("linked");
    b.follow(&target);
    target.start();
    b.start();
    let lsn = target.lsn();
    b.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    b.promote();
    target.sql("insert into far select generate_series(1, 700)");
    target.sql("update plain set n = n + 5");
    b.sql("delete from far where id % 3 = 0");
    b.sql("create table far_new tablespace away as select * from far");
    b.sql("checkpoint");
    target.kill();
    (target, b)
}

/// Data directory, WAL, a tablespace and the staged data each on a file system of its own.
#[test]
fn everything_on_disks_of_its_own_goes_either_way() {
    let pair = Pair::new(15, Shape { segment_mb: 1, ..Shape::default() });
    let home = pair.home.path();
    let names = ["data", "wal", "space", "staging"];
    let disks = names.map(|name| Device::new(&home.join(name), 300));
    let [data, wal, space, staging] = names.map(|name| {
        let path = home.join(name).join("n");
        fs::create_dir_all(&path).expect("directory");
        pair.a.user.own(&path);
        path
    });
    let wal = wal.join("wal");
    let (target, b) = spread_out(&pair, [&data, &wal, &space]);
    let served = Served::start(home, &b);
    let staging = staging.display().to_string();
    let rewind = || served.rewind(&target).following(&b).args(["--staging-dir", &staging]);
    let all = || {
        [
            content(&target),
            Content::without(&wal, &[".pgrejoin"]),
            Content::without(&space, &[".pgrejoin"]),
        ]
    };
    let before = all();
    // What a run that died had fetched goes with it, wherever it lies.
    let mut running = rewind().spawn();
    pause(&mut running, &target, ("fetch", 10));
    running.signal(Signal::KILL);
    running.wait();
    assert_ne!(fs::read_dir(&staging).expect("staging").count(), 0, "nothing was staged");
    let ended = state_command("rollback", &target);
    assert_eq!(ended.code, 0, "{}", ended.text);
    assert_eq!(fs::read_dir(&staging).expect("staging").count(), 0, "staged data is left");
    for (ending, delay) in [("rollback", 3), ("rollback", 12), ("resume", 6)] {
        let mut running = rewind().spawn();
        pause(&mut running, &target, ("hidden", delay));
        running.signal(Signal::KILL);
        running.wait();
        assert!(!target.try_start(), "PostgreSQL started unfinished");
        let ended = state_command(ending, &target);
        assert_eq!(ended.code, 0, "{}", ended.text);
        if ending == "rollback" {
            before.iter().zip(all()).for_each(|(before, now)| before.assert_same(&now));
        }
        assert_eq!(fs::read_dir(&staging).expect("staging").count(), 0, "staged data is left");
    }
    assert!(wal.join(".pgrejoin/diverged").is_dir());
    oracle::verify_running(&target, &b);
    target.stop("fast");
    drop(disks);
}

/// Where there is room for the rewind but not for undo images, it is said, and the rewind goes on.
#[test]
fn undo_images_are_given_up_where_there_is_no_room_for_them() {
    let fork = killed_fork();
    let Fork { target, device, .. } = &fork;
    // A full disk tells how much is needed, beside what is always kept free.
    let filler = device.fill();
    let refused = fork.rewind(target).refuse(7, "not enough space");
    fs::remove_file(&filler).expect("removed");
    let needed = refused.text.split("about ").nth(1).and_then(|rest| rest.split(' ').next());
    let needed: u64 = needed.and_then(|bytes| bytes.parse().ok()).expect("a number");
    let wanted = needed + (16 << 20) + (1 << 20);
    let free = rustix::fs::statvfs(&target.data).expect("statvfs");
    let free = free.f_bavail * free.f_frsize;
    let taken = fs::File::create(&filler).expect("filler");
    rustix::fs::fallocate(&taken, rustix::fs::FallocateFlags::empty(), 0, free - wanted)
        .expect("allocated");
    let mut running = fork.rewind(target).spawn();
    pause(&mut running, target, ("hidden", 0));
    running.signal(Signal::KILL);
    let ended = running.wait();
    assert!(ended.text.contains("no undo images are saved"), "{}", ended.text);
    let status = state_command("status", target).text;
    assert!(status.contains("can be resumed, but not rolled back"), "{status}");
    let refused = state_command("rollback", target);
    assert_eq!(refused.code, 8, "{}", refused.text);
    assert!(refused.text.contains("run pgrejoin resume"), "{}", refused.text);
    let resumed = state_command("resume", target);
    assert_eq!(resumed.code, 0, "{}", resumed.text);
    fs::remove_file(&filler).expect("removed");
    fork.verify();
}

//! Every state in which a disk can be found after a fault, tried: the target is as it was, or
//! PostgreSQL finds no `pg_control` and both `resume` and `rollback` end in the right bytes, or it is
//! rewound.

#![expect(clippy::print_stdout, reason = "how many states were tried, and of which part")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use client::Class;
use client::commands::recover;
use client::monitor::Monitor;
use client::staging::disk::Disk;
use client::task::Signals;
use integration_tests::cluster::write;
use integration_tests::faults::judge::{Choices, Judge, as_if_untouched};
use integration_tests::faults::recorder::{Fault, Op, Recorder};
use integration_tests::faults::sample::Sample;
use integration_tests::faults::simulated::{Simulated, State};
use integration_tests::faults::small::{ACTIONS, Action, Control, Ending, Silent, Small};
use rustix::io::Errno;
use tempfile::TempDir;

/// Random mixtures of lost, torn and kept changes tried after each operation.
const MIXTURES: usize = 6;

/// A real directory with a state in it.
struct Real {
    home: TempDir,
}

impl Real {
    fn of(state: &State) -> Self {
        let home = tempfile::tempdir_in("/dev/shm").expect("memory");
        state.write(&home.path().join("data"));
        as_if_untouched(&home.path().join("data"));
        Self { home }
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("data")
    }
}

/// Runs `work` behind a recording door; what it did.
fn recorded<T>(
    recorder: impl Fn(Arc<dyn Disk>) -> Recorder,
    work: impl FnOnce(&dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>) -> T,
) -> (T, Recorder) {
    let used = Mutex::new(None);
    let result = work(&|disk| {
        let recorder = recorder(disk);
        *used.lock().expect("lock") = Some(recorder.clone());
        Arc::new(recorder)
    });
    (result, used.into_inner().expect("lock").expect("a door was made"))
}

/// What an uninterrupted rewind does.
fn rewind_ops(small: &Small) -> Vec<Op> {
    let real = Real::of(&small.disk().state(&std::collections::BTreeMap::new()));
    let (ended, recorder) = recorded(Recorder::new, |door| small.rewind(&real.root(), door));
    ended.expect("rewound");
    small.is_rewound(&State::read(&real.root())).expect("the right bytes");
    recorder.ops()
}

fn all(disk: &Simulated) -> State {
    disk.state(&std::collections::BTreeMap::new())
}

fn judge(small: &Small, seed: u64) {
    let ops = rewind_ops(small);
    let mut judge = Judge::new(small, seed, MIXTURES);
    judge.cut_everywhere(&mut small.disk(), &ops, false);
    assert!(
        judge.broken.is_empty(),
        "{} states: {:#?}",
        judge.broken.len(),
        &judge.broken[..judge.broken.len().min(5)]
    );
    println!("{}", judge.summary());
}

/// The simulation is true to the disk: without a fault both end in the same.
#[test]
fn the_simulated_disk_ends_like_the_real_one() {
    let small = Small::new(&ACTIONS);
    let real = Real::of(&all(&small.disk()));
    let (ended, recorder) = recorded(Recorder::new, |door| small.rewind(&real.root(), door));
    ended.expect("rewound");
    let mut disk = small.disk();
    recorder.ops().iter().for_each(|op| disk.apply(op));
    assert_eq!(all(&disk).differences(&State::read(&real.root())), Vec::<String>::new());
}

#[test]
fn a_power_cut_at_any_moment_of_a_small_rewind_keeps_the_promise() {
    for action in ACTIONS {
        judge(&Small::new(&[action]), 1);
    }
}

#[test]
fn a_power_cut_at_any_moment_of_a_larger_rewind_keeps_the_promise() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    judge(&Small::new(&ACTIONS), 1);
    let seed = u64::from(now.subsec_nanos());
    let mut choices = Choices::new(seed);
    let some: Vec<Action> = ACTIONS.into_iter().filter(|_| choices.below(2) == 0).collect();
    println!("seed {seed}: {some:?}");
    judge(&Small::new(&some), seed);
}

/// Disks as a rewind leaves them when it is killed, one after each of its operations, from the moment
/// the target is hidden on. What it had not made durable is not.
fn kills(small: &Small) -> Vec<Simulated> {
    let mut disk = small.disk();
    let mut killed = Vec::new();
    for op in rewind_ops(small) {
        disk.apply(&op);
        killed.push(disk.clone());
    }
    killed.retain(|disk| small.control_in(&all(disk)) == Control::None);
    killed
}

/// The ways out are interrupted themselves, at any moment, and the other way is taken then.
#[test]
fn a_power_cut_while_it_is_resumed_or_taken_back_keeps_the_promise() {
    let small = Small::new(&ACTIONS);
    let killed = kills(&small);
    let mut judge = Judge::new(&small, 2, 0);
    // One in so many moments is enough for the second fault; the first is that of the hide itself.
    for disk in killed.iter().step_by(60) {
        let state = &all(disk);
        for ending in [Ending::Resume, Ending::Rollback] {
            let real = Real::of(state);
            let work =
                |door: &dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>| ending.run(&real.root(), door);
            let (ended, recorder) = recorded(Recorder::new, work);
            ended.unwrap_or_else(|error| panic!("{ending:?}: {}", error.chain()));
            judge.cut_everywhere(&mut disk.clone(), &recorder.ops(), true);
        }
    }
    println!("{}", judge.summary());
    assert!(
        judge.broken.is_empty(),
        "{}: {:#?}",
        judge.broken.len(),
        &judge.broken[..judge.broken.len().min(5)]
    );
}

/// What a way out begins with is kept as long as there is nothing to get out of: also where the set was sealed by a
/// run that died.
#[test]
fn room_for_the_ways_out_is_kept_until_the_target_changes() {
    let small = Small::new(&ACTIONS);
    let mut disk = small.disk();
    let sealed = rewind_ops(&small).into_iter().find_map(|op| {
        disk.apply(&op);
        let is_seal = matches!(&op, Op::Rename(_, to) if to.as_str() == ".pgrejoin/sealed");
        is_seal.then(|| all(&disk))
    });
    let real = Real::of(&sealed.expect("a seal"));
    let room = real.root().join(".pgrejoin/reserve");
    assert!(room.exists(), "no room was taken");
    // Stopped by a signal right before it changes anything.
    let stopped = recover::resume(&real.root(), &Silent, &Signals::received(1));
    assert_eq!(stopped.expect_err("it was stopped").class(), Class::Interrupted);
    assert!(room.exists(), "the room was given back");
    recover::resume(&real.root(), &Silent, &Signals::default()).expect("resumed");
    small.is_rewound(&State::read(&real.root())).expect("the right bytes");
}

/// Without undo images the promise is the smaller one: it can be finished.
#[test]
fn a_power_cut_without_undo_images_leaves_what_can_be_finished() {
    let mut small = Small::new(&ACTIONS);
    small.undo = false;
    judge(&small, 3);
}

/// Whether an operation is of one kind.
type Kind = fn(&Op) -> bool;

/// The judge is worth something: without a barrier it finds what is broken.
#[test]
fn a_missing_barrier_is_found() {
    let small = Small::new(&[Action::Grow, Action::ReplacePages, Action::WalOfTheSameName]);
    let ops = rewind_ops(&small);
    let without: [(&str, Kind); 4] = [
        ("contents", |op| matches!(op, Op::SyncFile(_) | Op::SyncAll)),
        (
            "names in the state directory",
            |op| matches!(op, Op::SyncDirectory(Some(path)) if path.as_str() == ".pgrejoin"),
        ),
        (
            "names in global",
            |op| matches!(op, Op::SyncDirectory(Some(path)) if path.as_str() == "global"),
        ),
        ("names in the data directory", |op| matches!(op, Op::SyncDirectory(None))),
    ];
    for (what, is_missing) in without {
        // The first makes durable what the server left: with it missing nothing is judged.
        let first = ops.iter().position(|op| *op == Op::SyncAll).expect("R16");
        let left = ops.iter().enumerate().filter(|(at, op)| *at == first || !is_missing(op));
        let left: Vec<Op> = left.map(|(_, op)| op.clone()).collect();
        let mut judge = Judge::thorough(&small, 4, 4);
        judge.cut_everywhere(&mut small.disk(), &left, false);
        assert!(!judge.broken.is_empty(), "nobody misses the barriers for {what}");
    }
}

/// R16: a page that is kept because it was equal must be durable before anything else is.
#[test]
fn a_base_that_was_not_made_durable_is_found() {
    let small = Small::new(&[Action::Grow]);
    let ops = rewind_ops(&small);
    let first = ops.iter().position(|op| *op == Op::SyncAll).expect("R16");
    assert_eq!(first, 0, "something was done before the base was durable");
    let mut disk = small.disk();
    let mut judge = Judge::thorough(&small, 5, 0);
    for op in ops.iter().skip(1).filter(|op| **op != Op::SyncAll) {
        disk.apply(op);
        let lost = disk
            .pending()
            .into_iter()
            .map(|event| (event, *disk.fates(event).first().expect("one")));
        judge.try_state(&disk.state(&lost.collect()), "a cut");
    }
    assert!(!judge.broken.is_empty(), "nobody misses a durable base");
}

/// What may go wrong with an operation of a disk.
const FAULTS: [Fault; 8] = [
    Fault::Errno(Errno::IO),
    Fault::Errno(Errno::NOSPC),
    Fault::Errno(Errno::DQUOT),
    Fault::Errno(Errno::ROFS),
    Fault::Errno(Errno::MFILE),
    Fault::Errno(Errno::INTR),
    Fault::ShortWrite,
    Fault::FailedSync,
];

/// Every operation fails once, in every way: the error is one clear line of the right class, and what
/// is left keeps the promise, also if the power is cut then.
#[test]
fn an_error_of_the_disk_at_any_operation_keeps_the_promise() {
    let small = Small::new(&ACTIONS);
    let operations = rewind_ops(&small).len();
    // The operations are the sample here: whatever is left by them is tried.
    let (mut judge, sample) = (Judge::thorough(&small, 6, 0), Sample::chosen());
    let mut errors = 0;
    for at in (0..operations).filter(|at| sample.has(*at as u64)) {
        // Not each way at each place: over all places each comes many times.
        let fault = FAULTS[at % FAULTS.len()];
        for fault in [fault, Fault::FailedSync] {
            let real = Real::of(&all(&small.disk()));
            let (ended, recorder) = recorded(
                |disk| Recorder::failing(disk, at, fault),
                |door| small.rewind(&real.root(), door),
            );
            assert!(recorder.struck(), "operation {at} was never reached");
            let left = State::read(&real.root());
            if let Err(error) = &ended {
                errors += 1;
                let line = error.chain();
                assert!(
                    !line.contains('\n') && line.contains(&words(fault)),
                    "{fault:?} at {at}: {line}"
                );
                let expected: &[Class] = match small.control_in(&left) {
                    Control::None => &[Class::Unfinished],
                    Control::New => &[Class::Rewound],
                    Control::Old => &[Class::Preflight, Class::Other],
                    Control::Other => panic!("{fault:?} at {at}: a control file of neither kind"),
                };
                assert!(
                    expected.contains(&error.class()),
                    "{fault:?} at {at}: {:?}: {line}",
                    error.class()
                );
            }
            // As it is, and with everything lost that no barrier confirmed.
            let what = format!("{fault:?} at operation {at}");
            let mut disk = small.disk();
            recorder.ops().iter().for_each(|op| disk.apply(op));
            judge.try_state(&all(&disk), &what);
            if !recorder.ops().contains(&Op::SyncAll) {
                continue;
            }
            let lost = disk.pending().into_iter().map(|event| (event, disk.fates(event)[0]));
            judge.try_state(&disk.state(&lost.collect()), &what);
        }
    }
    println!("{errors} errors injected at {operations} operations, {sample}; {}", judge.summary());
    assert!(
        judge.broken.is_empty(),
        "{}: {:#?}",
        judge.broken.len(),
        &judge.broken[..judge.broken.len().min(5)]
    );
}

/// What the system says about a fault.
fn words(fault: Fault) -> String {
    let errno = match fault {
        Fault::Errno(errno) => errno,
        Fault::ShortWrite => Errno::NOSPC,
        Fault::FailedSync => Errno::IO,
    };
    std::io::Error::from(errno).to_string()
}

/// After a barrier failed the kernel may have dropped what it was for, and the next one succeeds all
/// the same: resuming writes all of it again.
#[test]
fn what_a_failed_barrier_lost_is_written_again() {
    let small = Small::new(&ACTIONS);
    let ops = rewind_ops(&small);
    let mut failed = 0;
    for (at, op) in ops.iter().enumerate() {
        if !matches!(op, Op::SyncFile(_) | Op::SyncAll) {
            continue;
        }
        let real = Real::of(&all(&small.disk()));
        let (ended, recorder) = recorded(
            |disk| Recorder::failing(disk, at, Fault::FailedSync),
            |door| small.rewind(&real.root(), door),
        );
        let mut disk = small.disk();
        recorder.ops().iter().for_each(|op| disk.apply(op));
        if ended.is_ok() || small.control_in(&all(&disk)) != Control::None {
            continue;
        }
        for ending in [Ending::Resume, Ending::Rollback] {
            failed += 1;
            let mut disk = disk.clone();
            let real = Real::of(&all(&disk));
            let work =
                |door: &dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>| ending.run(&real.root(), door);
            let (ended, recorder) = recorded(Recorder::new, work);
            ended.unwrap_or_else(|error| panic!("{ending:?} after {op:?}: {}", error.chain()));
            recorder.ops().iter().for_each(|op| disk.apply(op));
            let lost = disk.doomed().into_iter().map(|event| (event, disk.fates(event)[0]));
            let state = disk.state(&lost.collect());
            let right = match ending {
                Ending::Resume => small.is_rewound(&state),
                Ending::Rollback => small.is_unchanged(&state),
            };
            right.unwrap_or_else(|why| panic!("{ending:?} after {op:?}: {why}"));
        }
    }
    assert!(failed > 10, "only {failed} barriers failed while the target was being changed");
}

/// An operator who stops either way is told so, and either way is still there.
#[test]
fn a_signal_stops_either_way_in_a_promised_state() {
    let small = Small::new(&ACTIONS);
    let killed: Vec<State> = kills(&small).iter().map(all).collect();
    let state = &killed[killed.len() / 2];
    let stop = Signals::received(2);
    for (stopped, then) in [
        (Ending::Resume, Ending::Resume),
        (Ending::Resume, Ending::Rollback),
        (Ending::Rollback, Ending::Resume),
        (Ending::Rollback, Ending::Rollback),
    ] {
        let real = Real::of(state);
        let door = |disk| disk;
        let error = stopped.run_until(&real.root(), &door, &stop).expect_err("it was stopped");
        assert_eq!(error.class(), Class::Unfinished, "{}", error.chain());
        assert!(error.chain().contains("stopped by a second signal"), "{}", error.chain());
        assert_eq!(small.control_in(&State::read(&real.root())), Control::None);
        then.run(&real.root(), &door).unwrap_or_else(|error| panic!("{}", error.chain()));
        let found = State::read(&real.root());
        let right = match then {
            Ending::Resume => small.is_rewound(&found),
            Ending::Rollback => small.is_unchanged(&found),
        };
        right.expect("the right bytes");
    }
}

/// Any byte of the state directory may go bad: then either way ends in the right bytes, or in an error
/// with the target still unstartable, and never in a panic.
#[test]
fn a_bad_byte_in_the_state_directory_makes_no_wrong_node() {
    let small = Small::new(&ACTIONS);
    let killed: Vec<State> = kills(&small).iter().map(all).collect();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seed = u64::from(now.subsec_nanos());
    println!("seed {seed}");
    let mut choices = Choices::new(seed);
    let (mut right, mut refused) = (0, 0);
    for _ in 0..300 {
        let real = Real::of(&killed[choices.below(killed.len())]);
        let own = real.root().join(".pgrejoin");
        // Trash is the target's own, which nobody can check.
        let files: Vec<PathBuf> = files_below(&own)
            .into_iter()
            .filter(|path| !path.display().to_string().contains("trash"))
            .collect();
        let path = &files[choices.below(files.len())];
        let mut bytes = std::fs::read(path).expect("a file");
        if bytes.is_empty() {
            continue;
        }
        let at = choices.below(bytes.len());
        bytes[at] ^= 1 << choices.below(8);
        write(path, bytes);
        let ending: fn(&Path, &dyn Monitor, &Signals) -> _ =
            if choices.below(2) == 0 { recover::resume } else { recover::rollback };
        let ended = ending(&real.root(), &Silent, &Signals::default());
        let found = State::read(&real.root());
        match small.control_in(&found) {
            Control::None => {
                assert!(ended.is_err(), "it ended without a pg_control: {}", path.display());
                refused += 1;
            }
            Control::Old => small.is_unchanged(&found).expect("the right bytes"),
            Control::New => small.is_rewound(&found).expect("the right bytes"),
            Control::Other => panic!("a control file of neither kind: {}", path.display()),
        }
        right += usize::from(ended.is_ok());
    }
    println!("{right} ended right, {refused} were refused");
    assert!(right > 10 && refused > 10, "{right} ended right, {refused} were refused");
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// What only one of the two ways needs may be damaged: the other one is still there, and is named.
#[test]
fn damage_to_one_way_leaves_the_other() {
    let small = Small::new(&ACTIONS);
    let killed: Vec<State> = kills(&small).iter().map(all).collect();
    let state = &killed[killed.len() / 2];
    for (damaged, refuses, other) in
        [("undo", Ending::Rollback, Ending::Resume), ("packs", Ending::Resume, Ending::Rollback)]
    {
        let real = Real::of(state);
        let directory = real.root().join(".pgrejoin").join(damaged);
        for entry in std::fs::read_dir(directory).expect("directory").flatten() {
            let mut bytes = std::fs::read(entry.path()).expect("a file");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            write(&entry.path(), bytes);
        }
        let door = |disk| disk;
        let error = refuses.run(&real.root(), &door).expect_err("it is damaged").chain();
        let named =
            format!("run pgrejoin {}", if other == Ending::Resume { "resume" } else { "rollback" });
        assert!(error.contains("damaged") && error.contains(&named), "{error}");
        assert_eq!(small.control_in(&State::read(&real.root())), Control::None);
        other.run(&real.root(), &door).unwrap_or_else(|error| panic!("{}", error.chain()));
        let found = State::read(&real.root());
        let right = match other {
            Ending::Resume => small.is_rewound(&found),
            Ending::Rollback => small.is_unchanged(&found),
        };
        right.expect("the right bytes");
    }
}

//! Judges a disk as it may be found after a fault: whatever was interrupted, the promise holds.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use client::Class;
use client::commands::{recover, status};
use client::outcome::Result as Ended;
use client::staging::manifest::Manifest;
use client::task::Signals;
use tempfile::TempDir;

use super::recorder::Op;
use super::sample::Sample;
use super::simulated::{Fate, Simulated, State};
use super::small::{Control, Silent, Small};
use crate::cluster::write;

/// Below so many changes that may be lost, every subset of them is tried.
const ALL_SUBSETS_MAX: usize = 6;

/// A small generator: a seed gives the same choices everywhere.
#[derive(Debug, Clone)]
pub struct Choices(u64);

impl Choices {
    /// Choices of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % end.max(1)
    }
}

/// Tries states and counts them.
#[derive(Debug)]
pub struct Judge<'a> {
    small: &'a Small,
    scratch: TempDir,
    seen: HashSet<u64>,
    sample: Sample,
    tried: usize,
    /// Random mixtures of fates tried after each operation; with none, changes are lost or kept but
    /// not torn.
    mixtures: usize,
    choices: Choices,
    /// What does not keep the promise: why, and the operation after which it was found.
    pub broken: Vec<String>,
}

impl<'a> Judge<'a> {
    /// A judge of what becomes of `small`, in the part of all states that is wanted.
    pub fn new(small: &'a Small, seed: u64, mixtures: usize) -> Self {
        Self { sample: Sample::chosen(), ..Self::thorough(small, seed, mixtures) }
    }

    /// One that tries all states.
    pub fn thorough(small: &'a Small, seed: u64, mixtures: usize) -> Self {
        Self {
            small,
            scratch: tempfile::tempdir_in("/dev/shm").expect("memory"),
            seen: HashSet::new(),
            sample: Sample::ALL,
            tried: 0,
            mixtures,
            choices: Choices::new(seed),
            broken: Vec::new(),
        }
    }

    /// How many states were tried, of how many that were not the same.
    pub fn summary(&self) -> String {
        format!("{} of {} disk states tried: {}", self.tried, self.seen.len(), self.sample)
    }

    /// Cuts the power after each of `ops`, from the first barrier on that makes the target itself
    /// durable, or from the beginning where it is durable. Ends with the first state that does not keep the promise.
    pub fn cut_everywhere(&mut self, disk: &mut Simulated, ops: &[Op], durable: bool) {
        let mut begun = durable;
        if begun {
            self.cut(disk, "the start");
        }
        for (number, op) in ops.iter().enumerate() {
            if !self.broken.is_empty() {
                return;
            }
            disk.apply(op);
            begun |= *op == Op::SyncAll;
            if begun {
                let mut what = format!("operation {number} of {}: {op:?}", ops.len());
                what.truncate(what.floor_char_boundary(160));
                self.cut(disk, &what);
            }
        }
    }

    /// Cuts the power now: tries what may be found.
    fn cut(&mut self, disk: &Simulated, after: &str) {
        let pending = disk.pending();
        let all = |fate: Fate| -> BTreeMap<usize, Fate> {
            pending.iter().map(|event| (*event, fate)).collect()
        };
        let mut tries = vec![BTreeMap::new(), all(Fate::Lost)];
        if self.mixtures > 0 && pending.len() <= ALL_SUBSETS_MAX {
            for subset in 0_usize..1 << pending.len() {
                let lost = pending.iter().enumerate().filter(|(bit, _)| subset & (1 << bit) != 0);
                tries.push(lost.map(|(_, event)| (*event, Fate::Lost)).collect());
            }
        }
        for (position, event) in pending.iter().enumerate() {
            tries.push(BTreeMap::from([(*event, Fate::Lost)]));
            let mut alone = all(Fate::Lost);
            alone.remove(event);
            tries.push(alone);
            let after = pending.iter().skip(position).map(|event| (*event, Fate::Lost));
            tries.push(after.collect());
            if self.mixtures == 0 {
                continue;
            }
            for fate in disk.fates(*event) {
                tries.push(BTreeMap::from([(*event, *fate)]));
            }
        }
        for _ in 0..self.mixtures.min(pending.len() * 4) {
            let mut mixture = BTreeMap::new();
            for event in &pending {
                let fates = disk.fates(*event);
                // Half of all changes are kept.
                if let Some(fate) = fates.get(self.choices.below(fates.len() * 2)) {
                    mixture.insert(*event, *fate);
                }
            }
            tries.push(mixture);
        }
        for fates in tries {
            self.try_state(&disk.state(&fates), after);
        }
    }

    /// Judges one state, unless it was seen before.
    pub fn try_state(&mut self, state: &State, after: &str) {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        let case = hasher.finish();
        if !self.seen.insert(case) || !self.sample.has(case) {
            return;
        }
        self.tried += 1;
        if let Err(why) = self.verdict(state) {
            self.broken.push(format!("after {after}: {why}"));
        }
    }

    fn verdict(&self, state: &State) -> Result<(), String> {
        let control = self.small.control_in(state);
        match control {
            Control::None => {}
            Control::Old => self
                .small
                .is_unchanged(state)
                .map_err(|why| format!("PostgreSQL starts as before, but {why}"))?,
            Control::New => self
                .small
                .is_rewound(state)
                .map_err(|why| format!("PostgreSQL starts as rewound, but {why}"))?,
            Control::Other => return Err("a pg_control of neither kind".to_owned()),
        }
        self.resume(state, control).map_err(|why| format!("{control:?}, resume: {why}"))?;
        self.rollback(state, control).map_err(|why| format!("{control:?}, rollback: {why}"))
    }

    fn resume(&self, state: &State, control: Control) -> Result<(), String> {
        let root = self.make(state);
        let status = status::status(&root).map_err(|error| error.chain())?.text;
        let must_not_start = status.contains("Do not start PostgreSQL");
        if must_not_start != (control == Control::None) {
            return Err(format!("status says: {status}"));
        }
        let ended = recover::resume(&root, &Silent, &Signals::default());
        let found = State::read(&root);
        match (control, ended) {
            (Control::Old, Err(error)) if error.class() == Class::Target => {
                return self.small.is_unchanged(&found);
            }
            (_, Err(error)) => return Err(error.chain()),
            (Control::Old, Ok(_)) if self.small.control_in(&found) == Control::Old => {
                self.small.is_unchanged(&found)?;
            }
            (_, Ok(_)) => self.small.is_rewound(&found)?,
        }
        nothing_left(&found)
    }

    fn rollback(&self, state: &State, control: Control) -> Result<(), String> {
        let root = self.make(state);
        let ended = recover::rollback(&root, &Silent, &Signals::default());
        let found = State::read(&root);
        match (control, ended) {
            (Control::New, Ok(outcome)) if outcome.result == Ended::NothingToDo => {
                self.small.is_rewound(&found)
            }
            (Control::New, Ok(outcome)) => Err(format!("it took back a commit: {outcome:?}")),
            (Control::New, Err(error)) if error.class() == Class::Target => {
                self.small.is_rewound(&found)
            }
            (Control::None, Err(error)) if !self.small.undo => {
                if error.class() != Class::Unfinished {
                    return Err(error.chain());
                }
                // Refused, and it can be finished all the same.
                let ended = recover::resume(&root, &Silent, &Signals::default());
                ended.map_err(|error| error.chain())?;
                self.small.is_rewound(&State::read(&root))
            }
            (_, Err(error)) => Err(error.chain()),
            (_, Ok(_)) => {
                self.small.is_unchanged(&found)?;
                nothing_left(&found)
            }
        }
    }

    /// Makes real files of a state.
    fn make(&self, state: &State) -> std::path::PathBuf {
        let place = self.scratch.path().join("state");
        drop(fs::remove_dir_all(&place));
        let root = place.join("data");
        state.write(&root);
        as_if_untouched(&root);
        root
    }
}

/// The files of a state were just made: the manifest must not take them for others because of that.
pub fn as_if_untouched(root: &Path) {
    let sealed = root.join(".pgrejoin/sealed");
    let Ok(bytes) = fs::read(&sealed) else {
        return;
    };
    let Ok(mut manifest) = Manifest::decode(&bytes) else {
        return;
    };
    for (file, before) in manifest.files.iter().zip(&mut manifest.before) {
        if let (Some(before), Ok(now)) = (before, fs::metadata(root.join(file.path.as_str()))) {
            before.inode = now.ino();
            let nanoseconds = u32::try_from(now.mtime_nsec()).expect("less than a second");
            before.modified = (now.mtime(), nanoseconds);
        }
    }
    write(&sealed, manifest.encode().expect("encodes"));
}

/// Nothing of ours may be left but the WAL of lost transactions.
fn nothing_left(state: &State) -> Result<(), String> {
    let left = state.files().find(|name| {
        let ours = name.split('/').any(|part| part == ".pgrejoin");
        ours && !name.contains("/diverged/") || *name == "postmaster.pid"
    });
    left.map_or(Ok(()), |name| Err(format!("{name} is left")))
}

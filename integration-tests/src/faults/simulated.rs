//! A disk that can lose power: it knows which of the changes made to it are durable, and builds every
//! state in which the others may be found afterwards.
//!
//! Changes of names are atomic, and each may be lost until all directories it touches were synced.
//! Changes of content may be lost, torn or have changed the length alone until their file was synced.
//! Nothing orders two changes but a barrier between them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use pg_format::DataPath;

use super::recorder::Op;
use crate::cluster::write;

type Node = usize;
/// A directory and a name in it.
type Place = (Node, String);

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
    /// A directory reached through a symbolic link to another file system.
    Elsewhere,
    Link(String),
}

/// One change.
#[derive(Debug, Clone)]
enum Change {
    Names { edits: Vec<(Place, Option<Node>)>, unsynced: BTreeSet<Node> },
    Write { file: Node, offset: u64, bytes: Vec<u8> },
    Length { file: Node, bytes: u64 },
    Mode { node: Node, mode: u32 },
}

/// How much of a change that is not durable reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fate {
    /// All of it.
    Kept,
    /// Nothing.
    Lost,
    /// Of a write the length alone.
    LengthOnly,
    /// Of a write the sectors of this size up to the middle.
    TornFront(usize),
    /// Of a write the sectors of this size from the middle on.
    TornBack(usize),
}

#[derive(Debug, Clone)]
struct Event {
    change: Change,
    durable: bool,
    /// A barrier for it failed: no later one helps.
    doomed: bool,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Simulated {
    kinds: Vec<Kind>,
    events: Vec<Event>,
    /// Names as a running program sees them.
    live: BTreeMap<Place, Node>,
}

/// A file or directory of a state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Entry {
    File { bytes: Vec<u8>, mode: u32 },
    Directory { mode: u32 },
    Elsewhere { mode: u32 },
    Link(String),
}

/// A disk as it may be found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State(BTreeMap<String, Entry>);

const ROOT: Node = 0;

impl Default for Simulated {
    fn default() -> Self {
        Self { kinds: vec![Kind::Directory], events: Vec::new(), live: BTreeMap::new() }
    }
}

impl Simulated {
    /// A disk on which all of `state` is durable.
    pub fn holding(state: &State) -> Self {
        let mut new = Self::default();
        for (name, entry) in &state.0 {
            let path = DataPath::new(name.as_str()).expect("plain");
            let mode = match entry {
                Entry::File { bytes, mode } => {
                    new.apply(&Op::CreateFile(path.clone()));
                    let (path, bytes) = (path.clone(), bytes.clone());
                    new.apply(&Op::Write { path, offset: 0, bytes });
                    *mode
                }
                Entry::Directory { mode } => {
                    new.apply(&Op::CreateDirectory(path.clone()));
                    *mode
                }
                Entry::Elsewhere { mode } => {
                    new.create_elsewhere(&path);
                    *mode
                }
                Entry::Link(target) => {
                    new.apply(&Op::Symlink(target.clone(), path));
                    continue;
                }
            };
            new.apply(&Op::SetMode(path, mode));
        }
        new.apply(&Op::SyncAll);
        new
    }

    /// Makes the directory `path` one that a symbolic link leads to; before anything is in it.
    pub fn create_elsewhere(&mut self, path: &DataPath) {
        let node = self.create(path, Kind::Elsewhere);
        self.push(Change::Mode { node, mode: 0o700 });
    }

    /// Applies an operation that a program did.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::CreateDirectory(path) => {
                if self.find(path).is_none() {
                    self.create(path, Kind::Directory);
                }
            }
            Op::CreateFile(path) => {
                if self.find(path).is_some() {
                    let place = self.place(path);
                    self.names(vec![(place, None)]);
                }
                self.create(path, Kind::File);
            }
            Op::Write { path, offset, bytes } => {
                let (file, offset, bytes) = (self.node(path), *offset, bytes.clone());
                self.push(Change::Write { file, offset, bytes });
            }
            Op::SetLength(path, bytes) => {
                let (file, bytes) = (self.node(path), *bytes);
                self.push(Change::Length { file, bytes });
            }
            Op::SetMode(path, mode) => {
                let (node, mode) = (self.node(path), *mode);
                self.push(Change::Mode { node, mode });
            }
            Op::Link(from, to) => {
                let (node, to) = (self.node(from), self.place(to));
                self.names(vec![(to, Some(node))]);
            }
            Op::Rename(from, to) => {
                let node = self.node(from);
                let (from, to) = (self.place(from), self.place(to));
                self.names(vec![(from, None), (to, Some(node))]);
            }
            Op::Symlink(target, path) => drop(self.create(path, Kind::Link(target.clone()))),
            Op::RemoveFile(path) | Op::RemoveDirectory(path) => {
                let place = self.place(path);
                self.names(vec![(place, None)]);
            }
            Op::SyncFile(path) => {
                let node = self.node(path);
                self.settle(|file| file == node);
            }
            Op::SyncDirectory(path) => {
                let directory = path.as_ref().map_or(ROOT, |path| self.node(path));
                self.settle_names(directory);
            }
            Op::SyncAll => {
                self.settle(|_| true);
                for directory in 0..self.kinds.len() {
                    self.settle_names(directory);
                }
            }
            Op::FailedSync(path) => {
                let node = path.as_ref().map(|path| self.node(path));
                for event in self.events.iter_mut().filter(|event| !event.durable) {
                    let of = event.change.content_of();
                    event.doomed |= of.is_some() && (node.is_none() || of == node);
                }
            }
        }
    }

    fn push(&mut self, change: Change) {
        self.events.push(Event { change, durable: false, doomed: false });
    }

    fn names(&mut self, edits: Vec<(Place, Option<Node>)>) {
        for (place, node) in &edits {
            match node {
                Some(node) => drop(self.live.insert(place.clone(), *node)),
                None => drop(self.live.remove(place)),
            }
        }
        let unsynced = edits.iter().map(|((directory, _), _)| *directory).collect();
        self.push(Change::Names { edits, unsynced });
    }

    fn create(&mut self, path: &DataPath, kind: Kind) -> Node {
        let place = self.place(path);
        self.kinds.push(kind);
        let node = self.kinds.len() - 1;
        self.names(vec![(place, Some(node))]);
        node
    }

    fn find(&self, path: &DataPath) -> Option<Node> {
        path.components()
            .try_fold(ROOT, |directory, name| self.live.get(&(directory, name.to_owned())).copied())
    }

    fn node(&self, path: &DataPath) -> Node {
        self.find(path).unwrap_or_else(|| panic!("{path} is not on the simulated disk"))
    }

    fn place(&self, path: &DataPath) -> Place {
        let directory = path.parent().map_or(ROOT, |parent| self.node(&parent));
        (directory, path.file_name().to_owned())
    }

    fn settle(&mut self, of: impl Fn(Node) -> bool) {
        for event in &mut self.events {
            if event.change.content_of().is_some_and(&of) && !event.doomed {
                event.durable = true;
            }
        }
    }

    fn settle_names(&mut self, directory: Node) {
        for event in &mut self.events {
            if let Change::Names { unsynced, .. } = &mut event.change {
                unsynced.remove(&directory);
                event.durable |= unsynced.is_empty();
            }
        }
    }

    /// Changes that may be lost now.
    pub fn pending(&self) -> Vec<usize> {
        let events = self.events.iter().enumerate();
        events.filter(|(_, event)| !event.durable).map(|(index, _)| index).collect()
    }

    /// Changes a failed barrier has given up.
    pub fn doomed(&self) -> Vec<usize> {
        let events = self.events.iter().enumerate();
        events.filter(|(_, event)| event.doomed).map(|(index, _)| index).collect()
    }

    /// What can become of a change that is not durable.
    pub fn fates(&self, event: usize) -> &'static [Fate] {
        match self.events[event].change {
            Change::Write { .. } => &[
                Fate::Lost,
                Fate::LengthOnly,
                Fate::TornFront(512),
                Fate::TornBack(512),
                Fate::TornFront(4096),
                Fate::TornBack(4096),
            ],
            _ => &[Fate::Lost],
        }
    }

    /// The disk with these fates of changes that are not durable; all others are kept.
    pub fn state(&self, fates: &BTreeMap<usize, Fate>) -> State {
        let mut names: BTreeMap<Place, Node> = BTreeMap::new();
        let mut contents: BTreeMap<Node, (Vec<u8>, Option<u32>)> = BTreeMap::new();
        for (index, event) in self.events.iter().enumerate() {
            let fate = fates.get(&index).copied().unwrap_or(Fate::Kept);
            assert!(fate == Fate::Kept || !event.durable, "a durable change was lost");
            if fate == Fate::Lost {
                continue;
            }
            match &event.change {
                Change::Names { edits, .. } => {
                    for (place, node) in edits {
                        match node {
                            Some(node) => drop(names.insert(place.clone(), *node)),
                            None => drop(names.remove(place)),
                        }
                    }
                }
                Change::Write { file, offset, bytes } => {
                    let content = &mut contents.entry(*file).or_default().0;
                    put(content, usize::try_from(*offset).expect("small"), bytes, fate);
                }
                Change::Length { file, bytes } => {
                    let bytes = usize::try_from(*bytes).expect("small");
                    contents.entry(*file).or_default().0.resize(bytes, 0);
                }
                Change::Mode { node, mode } => {
                    contents.entry(*node).or_default().1 = Some(*mode);
                }
            }
        }
        let mut state = State(BTreeMap::new());
        self.collect((ROOT, ""), &names, &contents, &mut state);
        state
    }

    fn collect(
        &self,
        (directory, path): (Node, &str),
        names: &BTreeMap<Place, Node>,
        contents: &BTreeMap<Node, (Vec<u8>, Option<u32>)>,
        state: &mut State,
    ) {
        let inside = names.range((directory, String::new())..(directory + 1, String::new()));
        for ((_, name), node) in inside {
            let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            let (bytes, mode) = contents.get(node).cloned().unwrap_or_default();
            let entry = match &self.kinds[*node] {
                Kind::File => Entry::File { bytes, mode: mode.unwrap_or(0o600) },
                Kind::Directory => Entry::Directory { mode: mode.unwrap_or(0o700) },
                Kind::Elsewhere => Entry::Elsewhere { mode: mode.unwrap_or(0o700) },
                Kind::Link(target) => Entry::Link(target.clone()),
            };
            state.0.insert(path.clone(), entry);
            self.collect((*node, &path), names, contents, state);
        }
    }
}

impl Change {
    /// The file or directory whose content or mode changes.
    fn content_of(&self) -> Option<Node> {
        match self {
            Self::Write { file, .. } | Self::Length { file, .. } => Some(*file),
            Self::Mode { node, .. } => Some(*node),
            Self::Names { .. } => None,
        }
    }
}

/// Writes as much as the fate says.
fn put(content: &mut Vec<u8>, offset: usize, bytes: &[u8], fate: Fate) {
    let end = offset + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    // Sectors are those of the disk, wherever the write begins.
    let middle = |sector: usize| ((offset + bytes.len() / 2) / sector * sector).clamp(offset, end);
    let kept = match fate {
        Fate::Kept => offset..end,
        Fate::Lost | Fate::LengthOnly => return,
        Fate::TornFront(sector) => offset..middle(sector),
        Fate::TornBack(sector) => middle(sector)..end,
    };
    content[kept.clone()].copy_from_slice(&bytes[kept.start - offset..kept.end - offset]);
}

impl State {
    /// Makes real files of it below `root`, which must not exist. What lies elsewhere goes beside.
    pub fn write(&self, root: &Path) {
        fs::create_dir_all(root).expect("directory");
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).expect("mode");
        for (number, (name, entry)) in self.0.iter().enumerate() {
            let path = root.join(name);
            let mode = |mode: u32| {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
            };
            match entry {
                Entry::File { bytes, mode: bits } => {
                    write(&path, bytes);
                    mode(*bits);
                }
                Entry::Directory { mode: bits } => {
                    fs::create_dir(&path).expect("directory");
                    mode(*bits);
                }
                Entry::Elsewhere { mode: bits } => {
                    let real = root.with_extension(format!("elsewhere-{number}"));
                    fs::create_dir_all(&real).expect("directory");
                    std::os::unix::fs::symlink(&real, &path).expect("link");
                    mode(*bits);
                }
                Entry::Link(target) => {
                    std::os::unix::fs::symlink(target, &path).expect("link");
                }
            }
        }
    }

    /// Everything that is the server's: without our own files and the file we hold.
    pub fn of_the_server(&self) -> Self {
        let ours = |name: &str| {
            name.split('/').any(|part| part == ".pgrejoin") || name == "postmaster.pid"
        };
        let kept = self.0.iter().filter(|(name, _)| !ours(name));
        Self(kept.map(|(name, entry)| (name.clone(), entry.clone())).collect())
    }

    /// Reads real files.
    pub fn read(root: &Path) -> Self {
        let mut state = BTreeMap::new();
        let mut waiting = vec![(root.to_owned(), String::new())];
        while let Some((directory, prefix)) = waiting.pop() {
            for entry in fs::read_dir(directory).expect("directory").flatten() {
                let (path, name) = (entry.path(), entry.file_name().into_string().expect("UTF-8"));
                let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
                let metadata = fs::symlink_metadata(&path).expect("metadata");
                let bits = |path: &Path| {
                    fs::metadata(path).expect("metadata").permissions().mode() & 0o7777
                };
                let found = if metadata.is_symlink() && path.is_dir() {
                    waiting.push((path.clone(), name.clone()));
                    Entry::Elsewhere { mode: bits(&path) }
                } else if metadata.is_symlink() {
                    Entry::Link(fs::read_link(&path).expect("link").display().to_string())
                } else if metadata.is_dir() {
                    waiting.push((path.clone(), name.clone()));
                    Entry::Directory { mode: bits(&path) }
                } else {
                    let bytes = fs::read(&path).expect("file");
                    Entry::File { bytes, mode: bits(&path) }
                };
                state.insert(name, found);
            }
        }
        Self(state)
    }

    /// Whether there is such a name.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Names of everything that is no directory.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let kept =
            self.0.iter().filter(|(_, entry)| matches!(entry, Entry::File { .. } | Entry::Link(_)));
        kept.map(|(name, _)| name.as_str())
    }

    /// The content of a file.
    pub fn content(&self, name: &str) -> Option<&[u8]> {
        match self.0.get(name) {
            Some(Entry::File { bytes, .. }) => Some(bytes),
            _ => None,
        }
    }

    /// Paths that are not the same.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let names: BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let names = names.into_iter().filter(|name| self.0.get(*name) != other.0.get(*name));
        names.cloned().collect()
    }
}

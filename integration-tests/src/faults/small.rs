//! Small targets and what a rewind does to them, one action at a time or several together, with the
//! result known without running anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use client::RewindError;
use client::apply::before_images::save;
use client::apply::change::TargetChange as Work;
use client::apply::pg_wal::digest;
use client::monitor::{Monitor, Step};
use client::plan::before_images::{Image, cut_images, images};
use client::plan::file_actions::PagesWanted;
use client::plan::pg_wal::{SmallFile, WalChanges, WalFacts, WalNames, changes};
use client::plan::short_segments::{Read, final_lengths};
use client::plan::summary::PlannedChange;
use client::plan::{FileAction, Plan, PlannedFile, SourceFiles, TargetFiles};
use client::staging::disk::{Disk, FileStat, RealDisk};
use client::staging::manifest::{Manifest, OldFile, Undo};
use client::staging::pack::PackWriter;
use client::staging::{layout, marks, pid_file, reserve, state_directory};
use client::task::Gate;
use client::task::Signals;
use data_dir::DataDir;
use pg_format::control_file::control_file_for_recovery;
use pg_format::wal::SegmentName;
use pg_format::{
    BlockSet, DataPath, Lsn, RELATION_SEGMENT_BLOCKS, TimelineHistory, TimelineId, WalSegmentSize,
};
use proto::fetch::{Item, ItemBody, PageContent, VerifiedChunk, VerifiedPage};
use proto::frame::FrameEncoder;

use super::recorder::Op;
use super::simulated::{Simulated, State};
use crate::pair::template_of;

const PAGE: usize = 8192;
/// Where the histories part, in segment 3, and where replay ends, in segment 4.
const FORK: u64 = 0x300_0100;
const END: u64 = 0x400_2000;
const HISTORY: &[u8] = b"1\t0/3000100\tx\n";

/// One thing a rewind does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what its name says")]
pub enum Action {
    Grow,
    Shrink,
    CutToNothing,
    ReplacePages,
    ReplaceWhole,
    Create,
    Remove,
    RemoveTree,
    MakeTree,
    Vanish,
    EmptyBehind,
    InTablespace,
    Wal,
    WalOfTheSameName,
    WalBelowTheFork,
    WalBeforeReplay,
    Settings,
}

/// All of them.
pub const ACTIONS: [Action; 17] = [
    Action::Grow,
    Action::Shrink,
    Action::CutToNothing,
    Action::ReplacePages,
    Action::ReplaceWhole,
    Action::Create,
    Action::Remove,
    Action::RemoveTree,
    Action::MakeTree,
    Action::Vanish,
    Action::EmptyBehind,
    Action::InTablespace,
    Action::Wal,
    Action::WalOfTheSameName,
    Action::WalBelowTheFork,
    Action::WalBeforeReplay,
    Action::Settings,
];

/// A target and a plan for it.
#[derive(Debug, Default)]
pub struct Small {
    /// Content of the target's files; directories follow from their names.
    files: BTreeMap<String, Vec<u8>>,
    /// The same when it is rewound.
    rewound: BTreeMap<String, Vec<u8>>,
    plan: Plan,
    /// What the source listed, where that matters.
    listed: SourceFiles,
    items: Vec<Item>,
    shorter: BTreeMap<usize, u64>,
    vanished: BTreeSet<usize>,
    staged_wal: BTreeMap<String, Vec<u8>>,
    settings: Vec<SmallFile>,
    remove: Vec<DataPath>,
    /// Whether undo images are saved.
    pub undo: bool,
}

/// A path of these worlds.
pub fn path(name: &str) -> DataPath {
    DataPath::new(name).expect("plain")
}

fn pages(tags: &[u8]) -> Vec<u8> {
    tags.iter().flat_map(|tag| vec![*tag; PAGE]).collect()
}

/// The `pg_control` of a real cluster, and the one a rewind would make of it.
fn controls() -> (Vec<u8>, Vec<u8>) {
    let old = std::fs::read(template_of(15).join("global/pg_control")).expect("pg_control");
    let timeline = TimelineId::new(2).expect("a timeline");
    let new = control_file_for_recovery(&old, Lsn::new(END), timeline).expect("it parses");
    (old, new)
}

impl Small {
    /// A target on which `actions` are done.
    pub fn new(actions: &[Action]) -> Self {
        let mut new = Self { undo: true, ..Self::default() };
        let (old_control, new_control) = controls();
        for (name, bytes) in [
            ("PG_VERSION", b"15\n".to_vec()),
            ("global/pg_control", old_control),
            ("base/5/900", pages(&[90, 91])),
            ("pg_wal/archive_status/000000010000000000000001.done", Vec::new()),
            ("pg_wal/000000010000000000000001", pages(&[1])),
            ("pg_tblspc/16400/PG_15_202209061/5/90", pages(&[92])),
        ] {
            new.files.insert(name.to_owned(), bytes);
        }
        new.rewound = new.files.clone();
        new.rewound.insert("global/pg_control".to_owned(), new_control);
        new.rewound.insert("backup_label".to_owned(), b"START\n".to_vec());
        actions.iter().for_each(|action| new.add(*action));
        new
    }

    fn plan(&mut self, name: &str, action: FileAction) -> usize {
        self.plan.files.push(PlannedFile { path: path(name), action });
        self.plan.files.len() - 1
    }

    fn had(&mut self, name: &str, bytes: Vec<u8>) {
        self.rewound.insert(name.to_owned(), bytes.clone());
        self.files.insert(name.to_owned(), bytes);
    }

    fn gets(&mut self, name: &str, bytes: Vec<u8>) {
        self.rewound.insert(name.to_owned(), bytes);
    }

    fn goes(&mut self, name: &str) {
        self.rewound.remove(name);
    }

    fn page(&mut self, file: usize, block: u32, tag: u8) {
        let page = VerifiedPage::read(Bytes::from(pages(&[tag]))).expect("a page");
        let body = ItemBody::Page { block, content: PageContent::Present(page) };
        self.items.push(Item { unit: (file as u64) << 32, body });
    }

    fn want(&mut self, file: usize, blocks: &[u32], end: usize) {
        let mut wanted = BlockSet::default();
        blocks.iter().for_each(|block| wanted.insert(*block));
        let end = u32::try_from(end).expect("few");
        self.plan.pages.push(PagesWanted { file, blocks: wanted, end, known: 0 });
    }

    fn patch(&mut self, name: &str, (old, new): (&[u8], &[u8]), wanted: &[u32]) {
        self.had(name, pages(old));
        self.gets(name, pages(new));
        let file = self.plan(name, FileAction::Patch { bytes: (new.len() * PAGE) as u64 });
        wanted.iter().for_each(|block| self.page(file, *block, new[*block as usize]));
        self.want(file, wanted, new.len());
    }

    fn create(&mut self, name: &str, tags: &[u8]) {
        self.gets(name, pages(tags));
        let bytes = Some((tags.len() * PAGE) as u64);
        let file = self.plan(name, FileAction::Replace { bytes });
        let blocks: Vec<u32> = (0..).take(tags.len()).collect();
        blocks.iter().zip(tags).for_each(|(block, tag)| self.page(file, *block, *tag));
        self.want(file, &blocks, tags.len());
    }

    fn remove_file(&mut self, name: &str) {
        self.had(name, pages(&[50]));
        self.goes(name);
        self.plan(name, FileAction::Remove);
    }

    /// The source cut the first segment while it was read: the second, of which nothing was planned, must be empty.
    fn empty_behind(&mut self) {
        self.patch("base/5/80", (&[1, 2], &[81, 2]), &[0]);
        self.shorter.insert(self.plan.files.len() - 1, PAGE as u64);
        self.gets("base/5/80", pages(&[81]));
        self.had("base/5/80.1", pages(&[8, 9]));
        self.gets("base/5/80.1", Vec::new());
        let full = u64::from(RELATION_SEGMENT_BLOCKS) * PAGE as u64;
        self.listed.insert(path("base/5/80"), Some(full));
        self.listed.insert(path("base/5/80.1"), Some(2 * PAGE as u64));
    }

    fn add(&mut self, action: Action) {
        match action {
            Action::Grow => self.patch("base/5/10", (&[1, 2, 3], &[11, 2, 13, 14]), &[0, 2, 3]),
            Action::Shrink => self.patch("base/5/20", (&[1, 2, 3, 4], &[1, 22]), &[1]),
            Action::CutToNothing => {
                self.patch("base/5/21", (&[1, 2], &[1, 2]), &[]);
                self.gets("base/5/21", Vec::new());
                self.shorter.insert(self.plan.files.len() - 1, 0);
            }
            Action::EmptyBehind => self.empty_behind(),
            Action::ReplacePages => {
                self.had("base/5/30", pages(&[1]));
                self.create("base/5/30", &[31, 32]);
            }
            Action::ReplaceWhole => {
                self.had("base/5/pg_filenode.map", vec![7; 512]);
                self.gets("base/5/pg_filenode.map", vec![8; 512]);
                let file = self.plan("base/5/pg_filenode.map", FileAction::Replace { bytes: None });
                let chunk = VerifiedChunk::read(0, Bytes::from(vec![8; 512]));
                let body = ItemBody::Chunk(chunk);
                self.items.push(Item { unit: (file as u64) << 32, body });
            }
            Action::Create => self.create("base/5/40", &[41]),
            Action::Remove => self.remove_file("base/5/50"),
            Action::RemoveTree => {
                for name in ["base/6/1", "base/6/2"] {
                    self.had(name, pages(&[6]));
                    self.goes(name);
                }
                self.plan("base/6", FileAction::RemoveTree);
            }
            Action::MakeTree => {
                self.plan("base/7", FileAction::MakeDirectory { link: None });
                self.create("base/7/1", &[71]);
            }
            Action::Vanish => {
                self.patch("base/5/60", (&[1, 2], &[61, 2]), &[0]);
                self.vanished.insert(self.plan.files.len() - 1);
                self.goes("base/5/60");
            }
            Action::InTablespace => {
                let inside = |name: &str| format!("pg_tblspc/16400/PG_15_202209061/5/{name}");
                self.patch(&inside("70"), (&[1], &[71, 72]), &[0, 1]);
                self.remove_file(&inside("71"));
                self.create(&inside("72"), &[73]);
            }
            Action::Wal => self.add_wal(),
            // Preallocated by the target, under the name the source's will have.
            Action::WalOfTheSameName => {
                self.had("pg_wal/000000020000000000000004", pages(&[0]));
                self.stage_wal(2, 4, 44);
            }
            // Common, and fetched all the same because one before it is missing.
            Action::WalBelowTheFork => {
                self.had("pg_wal/000000010000000000000002", pages(&[2]));
                self.stage_wal(1, 2, 22);
            }
            // Common, and older than anything that replay needs.
            Action::WalBeforeReplay => {
                let name = "000000010000000000000000";
                for name in [format!("pg_wal/{name}"), format!("pg_wal/archive_status/{name}.done")]
                {
                    self.had(&name, pages(&[7]));
                    self.goes(&name);
                }
                self.stage_wal(2, 4, 44);
            }
            Action::Settings => self.add_settings(),
        }
    }

    fn add_wal(&mut self) {
        for (name, tag) in [
            // Holds lost transactions; preallocated behind them; waits to be archived.
            ("000000010000000000000003", 3),
            ("000000010000000000000005", 5),
            ("archive_status/000000010000000000000003.ready", 6),
        ] {
            self.had(&format!("pg_wal/{name}"), pages(&[tag]));
            self.goes(&format!("pg_wal/{name}"));
        }
        self.stage_wal(2, 3, 33);
        // The end of the timeline before takes the name of what holds lost transactions.
        self.stage_wal(1, 3, 34);
    }

    /// Stages a segment; with the first comes the history.
    fn stage_wal(&mut self, timeline: u32, number: u64, tag: u8) {
        let name = format!("{timeline:08X}{number:016X}");
        self.gets(&format!("pg_wal/{name}"), pages(&[tag]));
        // The last one is not complete.
        if number < 4 {
            self.gets(&format!("pg_wal/archive_status/{name}.done"), Vec::new());
        }
        self.gets("pg_wal/00000002.history", HISTORY.to_vec());
        self.gets("pg_wal/archive_status/00000002.history.done", Vec::new());
        self.staged_wal.insert(name, pages(&[tag]));
    }

    /// What happens in `pg_wal`, as it is decided for real.
    fn wal_changes(&self) -> WalChanges {
        if self.staged_wal.is_empty() {
            return WalChanges::default();
        }
        let below = |prefix: &str| -> Vec<String> {
            let names = self.files.keys().filter_map(|name| name.strip_prefix(prefix));
            names.filter(|name| !name.contains('/')).map(str::to_owned).collect()
        };
        let size = WalSegmentSize::new(16 << 20).expect("a size");
        let timeline = TimelineId::new(2).expect("a timeline");
        let staged = self.staged_wal.keys().filter_map(|name| SegmentName::parse(name, size));
        let there = WalNames {
            names: below("pg_wal/"),
            statuses: below("pg_wal/archive_status/"),
            summaries: Vec::new(),
        };
        let facts = WalFacts {
            there: &there,
            size,
            history: &TimelineHistory::parse(timeline, HISTORY).expect("a history"),
            histories: &[(timeline, HISTORY.to_vec())],
            fork: Some(Lsn::new(FORK)),
            target_end: Some(Lsn::new(FORK + 0x1000)),
            start: Lsn::new(0x100_0028),
            staged: &staged.collect(),
            end: Lsn::new(END),
            keep_as: Some("1-3000100".to_owned()),
        };
        changes(&facts).expect("plain names")
    }

    fn add_settings(&mut self) {
        self.had("postgresql.auto.conf", b"a = 1\n".to_vec());
        for (name, bytes) in [("postgresql.auto.conf", &b"a = 2\n"[..]), ("standby.signal", b"")] {
            self.gets(name, bytes.to_vec());
            self.settings.push(SmallFile { path: path(name), bytes: bytes.to_vec() });
        }
        self.had("recovery.signal", Vec::new());
        self.goes("recovery.signal");
        self.remove.push(path("recovery.signal"));
    }

    /// A disk with the target on it. The server was killed: what it wrote last is not durable.
    pub fn disk(&self) -> Simulated {
        let mut disk = Simulated::default();
        let mut made = std::collections::BTreeSet::new();
        for (name, bytes) in &self.files {
            let mut parents: Vec<DataPath> = Vec::new();
            let mut next = path(name).parent();
            while let Some(parent) = next {
                next = parent.parent();
                parents.push(parent);
            }
            for parent in parents.into_iter().rev() {
                if made.insert(parent.clone()) {
                    match parent.as_str() {
                        "pg_tblspc/16400" | "pg_wal" => disk.create_elsewhere(&parent),
                        _ => disk.apply(&Op::CreateDirectory(parent)),
                    }
                }
            }
            disk.apply(&Op::CreateFile(path(name)));
            let (path, bytes) = (path(name), vec![0xDD; bytes.len()]);
            disk.apply(&Op::Write { path, offset: 0, bytes });
        }
        disk.apply(&Op::SyncAll);
        for (name, bytes) in &self.files {
            for (block, page) in bytes.chunks(PAGE).enumerate() {
                let (offset, bytes) = ((block * PAGE) as u64, page.to_vec());
                disk.apply(&Op::Write { path: path(name), offset, bytes });
            }
        }
        disk
    }

    /// Whether a state is that of the rewound target, as far as contents go.
    pub fn is_rewound(&self, state: &State) -> Result<(), String> {
        Self::is(&self.rewound, state)
    }

    /// Whether a state is that of the target before.
    pub fn is_unchanged(&self, state: &State) -> Result<(), String> {
        Self::is(&self.files, state)
    }

    fn is(files: &BTreeMap<String, Vec<u8>>, state: &State) -> Result<(), String> {
        let found = state.of_the_server();
        for (name, bytes) in files {
            if found.content(name) != Some(bytes) {
                return Err(format!("{name} is not as it should be"));
            }
        }
        for name in found.files() {
            if !files.contains_key(name) {
                return Err(format!("{name} should not be there"));
            }
        }
        Ok(())
    }

    /// The live `pg_control` of a state.
    pub fn control_in(&self, state: &State) -> Control {
        // PostgreSQL reads a `backup_label` first.
        let warning = b"THIS DATA DIRECTORY IS BEING REWOUND BY PGREJOIN";
        if state.content("backup_label").is_some_and(|label| label.starts_with(warning)) {
            return Control::None;
        }
        match state.content("global/pg_control") {
            None => Control::None,
            Some(bytes) if *bytes == self.files["global/pg_control"] => Control::Old,
            Some(bytes) if *bytes == self.rewound["global/pg_control"] => Control::New,
            Some(_) => Control::Other,
        }
    }

    /// Rewinds the target in `root` as the program does once the source has answered everything.
    pub fn rewind(
        &self,
        root: &Path,
        door: &dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>,
    ) -> Result<(), RewindError> {
        let directory = Arc::new(DataDir::open(root).expect("a data directory"));
        let disk = door(Arc::new(RealDisk::new(Arc::clone(&directory), None, true).expect("disk")));
        let staging = |error| RewindError::because(client::Class::Preflight, "staging", error);
        let manifest = self.stage(root, (&directory, &disk)).map_err(staging)?;
        let signals = Signals::default();
        let work = Work {
            manifest: &manifest,
            disk: &*disk,
            directory: &directory,
            signals: &signals,
            monitor: &Silent,
        };
        work.redo()
    }

    fn stage(
        &self,
        root: &Path,
        (directory, disk): (&Arc<DataDir>, &Arc<dyn Disk>),
    ) -> std::io::Result<Manifest> {
        // R16 and the look at the files, as `inspect` does them.
        disk.sync_all()?;
        let mut target = TargetFiles::new();
        directory.walk("PG_15_202209061", &|_| true, &mut |entry| {
            target.insert(entry.path.clone(), entry);
            Ok(())
        })?;
        state_directory::prepare(&**disk, directory, None)?;
        pid_file::take(&**disk, root).map_err(std::io::Error::other)?;
        let mut pack = PackWriter::create(Arc::clone(disk), "1-0000".to_owned())?;
        for items in self.items.chunks(3) {
            let mut encoder = FrameEncoder::new();
            assert!(items.iter().all(|item| encoder.push(item.clone()).is_none()));
            pack.append(&encoder.flush().expect("a frame"))?;
        }
        let packs = vec![pack.finish()?];
        for (name, bytes) in &self.staged_wal {
            let path = layout::staged_wal(name);
            disk.create_file(&path)?;
            disk.write_at(&path, 0, bytes)?;
            disk.sync_file(&path)?;
        }
        let saved = |name: &str, images: &[Image]| match self.undo {
            true => save(disk, name, images, &Gate::default()),
            false => Ok(Vec::new()),
        };
        let mut images = saved("1-planned", &images(&self.plan, &target))?;
        let read = Read { shorter: &self.shorter, vanished: &self.vanished };
        let (files, shorter) = final_lengths(&self.plan.files, &self.listed, &target, read);
        let before = files.iter().map(|file| FileStat::of(target.get(&file.path)?)).collect();
        let mut manifest = Manifest {
            program_version: String::new(),
            old_control: self.files["global/pg_control"].clone(),
            new_control: self.rewound["global/pg_control"].clone(),
            files,
            before,
            packs,
            segments: self
                .staged_wal
                .keys()
                .map(|name| digest(&**disk, name))
                .collect::<Result<_, _>>()?,
            staging: None,
            shorter: shorter.into_iter().collect(),
            vanished: self.vanished.iter().copied().collect(),
            wal: self.wal_changes(),
            settings: self.settings.clone(),
            remove: self.remove.clone(),
            backup_label: self.rewound["backup_label"].clone(),
            undo: None,
            sync: true,
            summary: "rewound".to_owned(),
        };
        images.extend(saved("1-cut", &cut_images(&manifest.final_files(), self.plan.files.len()))?);
        manifest.undo = self.undo.then(|| Undo { images, small: self.old_files(&manifest.wal) });
        reserve::take(&**disk, directory, &manifest)?;
        let sealed = manifest.encode().map_err(std::io::Error::other)?;
        marks::seal(&**disk, &sealed)?;
        Ok(manifest)
    }

    fn old_files(&self, wal: &WalChanges) -> Vec<OldFile> {
        let written = wal.write.iter().chain(&self.settings).map(|file| &file.path);
        let label = path("backup_label");
        let all = written.chain(&self.remove).chain([&label]);
        let old = all.map(|path| {
            let content = self.files.get(path.as_str()).map(|bytes| (bytes.clone(), 0o600));
            OldFile { path: path.clone(), content }
        });
        old.collect()
    }
}

/// Which `pg_control` PostgreSQL would find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// None: it refuses to start.
    None,
    /// That of before.
    Old,
    /// That of the rewound node.
    New,
    /// Something else.
    Other,
}

/// One of the two ways an interrupted rewind ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the commands")]
pub enum Ending {
    Resume,
    Rollback,
}

impl Ending {
    /// Ends a rewind that was interrupted while it changed the target in `root`.
    pub fn run(
        self,
        root: &Path,
        door: &dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>,
    ) -> Result<(), RewindError> {
        self.run_until(root, door, &Signals::default())
    }

    /// The same, for an operator who may want to stop.
    pub fn run_until(
        self,
        root: &Path,
        door: &dyn Fn(Arc<dyn Disk>) -> Arc<dyn Disk>,
        signals: &Signals,
    ) -> Result<(), RewindError> {
        let directory = Arc::new(DataDir::open(root).expect("a data directory"));
        let disk = door(Arc::new(RealDisk::new(Arc::clone(&directory), None, true).expect("disk")));
        let state = marks::load(&*disk).expect("the state can be told");
        let (marks::State::Hidden(manifest)
        | marks::State::Exposed(manifest)
        | marks::State::Undoing(manifest)) = state
        else {
            panic!("the target is not being changed: {state:?}");
        };
        pid_file::take(&*disk, root)?;
        let (manifest, disk, directory) = (&*manifest, &*disk, &*directory);
        let work = Work { manifest, disk, directory, signals, monitor: &Silent };
        match self {
            Self::Resume => work.redo(),
            Self::Rollback => work.roll_back(),
        }
    }
}

/// Says nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Monitor for Silent {
    fn step(&self, _: Step) {}
    fn progress(&self, _: u64, _: u64) {}
    fn planned(&self, _: &PlannedChange<'_>) {}
    fn note(&self, _: &str) {}
    fn warning(&self, _: &str) {}
}

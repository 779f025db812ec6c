//! Small targets and what a rewind does to them, one action at a time or several together, with the
//! result known without running anything.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use client::RewindError;
use client::apply::disk::{Disk, RealDisk};
use client::apply::manifest::{Manifest, OldFile, SmallFile, Undo, WalChanges};
use client::apply::pack::PackWriter;
use client::apply::redo::Redo;
use client::apply::rollback::Rollback;
use client::apply::undo::{Gate, Image, save};
use client::apply::{hold, state};
use client::monitor::{Monitor, Step};
use client::plan::report::Change;
use client::plan::{FileAction, PlannedFile};
use data_dir::DataDir;
use pg_format::DataPath;
use proto::fetch::{Item, ItemBody, PageContent, VerifiedChunk, VerifiedPage};
use proto::frame::FrameEncoder;

use super::recorder::Op;
use super::simulated::{Simulated, State};

const PAGE: usize = 8192;

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
    InTablespace,
    Wal,
    WalOfTheSameName,
    Settings,
}

/// All of them.
pub const ACTIONS: [Action; 14] = [
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
    Action::InTablespace,
    Action::Wal,
    Action::WalOfTheSameName,
    Action::Settings,
];

/// A target and a plan for it.
#[derive(Debug, Default)]
pub struct Small {
    /// Content of the target's files; directories follow from their names.
    files: BTreeMap<String, Vec<u8>>,
    /// The same when it is rewound.
    rewound: BTreeMap<String, Vec<u8>>,
    planned: Vec<PlannedFile>,
    images: Vec<Image>,
    items: Vec<Item>,
    shorter: Vec<(usize, u64)>,
    vanished: Vec<usize>,
    wal: WalChanges,
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

/// A `pg_control` of PostgreSQL 15 that can be read.
fn control(tag: u8) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &u64::from(tag).to_le_bytes());
    put(8, &1300_u32.to_le_bytes());
    put(12, &202_209_061_u32.to_le_bytes());
    put(48, &1_u32.to_le_bytes());
    put(172, &1_i32.to_le_bytes());
    put(204, &8_u32.to_le_bytes());
    put(208, &1_234_567.0_f64.to_le_bytes());
    put(216, &8192_u32.to_le_bytes());
    put(220, &131_072_u32.to_le_bytes());
    put(224, &8192_u32.to_le_bytes());
    put(228, &(16_u32 << 20).to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..288]).to_le_bytes();
    bytes[288..292].copy_from_slice(&crc);
    bytes
}

impl Small {
    /// A target on which `actions` are done.
    pub fn new(actions: &[Action]) -> Self {
        let mut new = Self { undo: true, ..Self::default() };
        for (name, bytes) in [
            ("PG_VERSION", b"15\n".to_vec()),
            ("global/pg_control", control(1)),
            ("base/5/900", pages(&[90, 91])),
            ("pg_wal/archive_status/000000010000000000000001.done", Vec::new()),
            ("pg_wal/000000010000000000000001", pages(&[1])),
            ("pg_tblspc/16400/PG_15_202209061/5/90", pages(&[92])),
        ] {
            new.files.insert(name.to_owned(), bytes);
        }
        new.rewound = new.files.clone();
        new.rewound.insert("global/pg_control".to_owned(), control(2));
        new.rewound.insert("backup_label".to_owned(), b"START\n".to_vec());
        actions.iter().for_each(|action| new.add(*action));
        new
    }

    fn plan(&mut self, name: &str, action: FileAction) -> usize {
        self.planned.push(PlannedFile { path: path(name), action });
        self.planned.len() - 1
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

    fn image(&mut self, file: usize, name: &str, ranges: &[(u64, u64)]) {
        let ranges = ranges.iter().map(|(first, end)| first * PAGE as u64..end * PAGE as u64);
        self.images.push(Image { file, path: path(name), ranges: ranges.collect() });
    }

    fn patch(&mut self, name: &str, (old, new): (&[u8], &[u8]), wanted: &[u32]) {
        self.had(name, pages(old));
        self.gets(name, pages(new));
        let file = self.plan(name, FileAction::Patch { bytes: (new.len() * PAGE) as u64 });
        let mut saved: Vec<(u64, u64)> = Vec::new();
        for block in wanted {
            self.page(file, *block, new[*block as usize]);
            if (*block as usize) < old.len() {
                saved.push((u64::from(*block), u64::from(*block) + 1));
            }
        }
        if old.len() > new.len() {
            saved.push((new.len() as u64, old.len() as u64));
        }
        self.image(file, name, &saved);
    }

    fn create(&mut self, name: &str, tags: &[u8]) {
        self.gets(name, pages(tags));
        let bytes = Some((tags.len() * PAGE) as u64);
        let file = self.plan(name, FileAction::Replace { bytes });
        for (block, tag) in (0..).zip(tags) {
            self.page(file, block, *tag);
        }
    }

    fn remove_file(&mut self, name: &str) {
        self.had(name, pages(&[50]));
        self.goes(name);
        self.plan(name, FileAction::Remove);
    }

    fn add(&mut self, action: Action) {
        match action {
            Action::Grow => self.patch("base/5/10", (&[1, 2, 3], &[11, 2, 13, 14]), &[0, 2, 3]),
            Action::Shrink => self.patch("base/5/20", (&[1, 2, 3, 4], &[1, 22]), &[1]),
            Action::CutToNothing => {
                self.patch("base/5/21", (&[1, 2], &[1, 2]), &[]);
                self.gets("base/5/21", Vec::new());
                let file = self.planned.len() - 1;
                self.shorter.push((file, 0));
                self.images.pop();
                self.image(file, "base/5/21", &[(0, 2)]);
            }
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
                self.vanished.push(self.planned.len() - 1);
                self.goes("base/5/60");
            }
            Action::InTablespace => {
                let inside = |name: &str| format!("pg_tblspc/16400/PG_15_202209061/5/{name}");
                self.patch(&inside("70"), (&[1], &[71, 72]), &[0, 1]);
                self.remove_file(&inside("71"));
                self.create(&inside("72"), &[73]);
            }
            Action::Wal => self.add_wal(),
            Action::WalOfTheSameName => {
                let name = "000000020000000000000004";
                self.had(&format!("pg_wal/{name}"), pages(&[0]));
                self.gets(&format!("pg_wal/{name}"), pages(&[44]));
                self.wal.remove.push(name.to_owned());
                self.wal.place.push(name.to_owned());
                self.staged_wal.insert(name.to_owned(), pages(&[44]));
            }
            Action::Settings => self.add_settings(),
        }
    }

    fn add_wal(&mut self) {
        let (old, recycled) = ("000000010000000000000003", "000000010000000000000005");
        let new = "000000020000000000000003";
        self.had(&format!("pg_wal/{old}"), pages(&[3]));
        self.goes(&format!("pg_wal/{old}"));
        self.wal.diverged.push(old.to_owned());
        self.wal.keep_as = Some("1-300".to_owned());
        self.had(&format!("pg_wal/{recycled}"), pages(&[5]));
        self.goes(&format!("pg_wal/{recycled}"));
        self.wal.remove.push(recycled.to_owned());
        let ready = format!("archive_status/{old}.ready");
        self.had(&format!("pg_wal/{ready}"), Vec::new());
        self.goes(&format!("pg_wal/{ready}"));
        self.wal.remove.push(ready);
        self.gets(&format!("pg_wal/{new}"), pages(&[33]));
        self.wal.place.push(new.to_owned());
        self.staged_wal.insert(new.to_owned(), pages(&[33]));
        for (name, bytes) in [
            ("pg_wal/00000002.history", b"1\t0/300\tx\n".to_vec()),
            ("pg_wal/archive_status/00000002.history.done", Vec::new()),
        ] {
            self.gets(name, bytes.clone());
            self.wal.write.push(SmallFile { path: path(name), bytes });
        }
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
        let stop = AtomicBool::new(false);
        let redo = Redo {
            manifest: &manifest,
            disk: &*disk,
            directory: &directory,
            stop: &stop,
            monitor: &Silent,
        };
        redo.run()
    }

    fn stage(
        &self,
        root: &Path,
        (directory, disk): (&Arc<DataDir>, &Arc<dyn Disk>),
    ) -> std::io::Result<Manifest> {
        // R16, as `inspect` does it.
        disk.sync_all()?;
        let planned = self.planned.iter().map(|file| disk.stat(&file.path));
        let before = planned.collect::<std::io::Result<Vec<_>>>()?;
        state::prepare(&**disk, directory)?;
        hold::take(&**disk, root).map_err(std::io::Error::other)?;
        let mut pack = PackWriter::create(Arc::clone(disk), "1-0000".to_owned())?;
        for items in self.items.chunks(3) {
            let mut encoder = FrameEncoder::new();
            assert!(items.iter().all(|item| encoder.push(item.clone()).is_none()));
            pack.append(&encoder.flush().expect("a frame"))?;
        }
        let packs = vec![pack.finish()?];
        for (name, bytes) in &self.staged_wal {
            let path = state::staged_wal(name);
            disk.create_file(&path)?;
            disk.write_at(&path, 0, bytes)?;
            disk.sync_file(&path)?;
        }
        let undo = if self.undo {
            let images = save(disk, "1-planned", &self.images, &Gate::default())?;
            Some(Undo { images, small: self.old_files()? })
        } else {
            None
        };
        let manifest = Manifest {
            program_version: String::new(),
            old_control: self.files["global/pg_control"].clone(),
            new_control: self.rewound["global/pg_control"].clone(),
            files: self.planned.clone(),
            before,
            packs,
            staging: None,
            shorter: self.shorter.clone(),
            vanished: self.vanished.clone(),
            wal: self.wal.clone(),
            settings: self.settings.clone(),
            remove: self.remove.clone(),
            backup_label: self.rewound["backup_label"].clone(),
            undo,
            sync: true,
            summary: "rewound".to_owned(),
        };
        let sealed = manifest.encode().map_err(std::io::Error::other)?;
        state::seal(&**disk, &sealed)?;
        Ok(manifest)
    }

    fn old_files(&self) -> std::io::Result<Vec<OldFile>> {
        let written = self.wal.write.iter().chain(&self.settings).map(|file| &file.path);
        let label = path("backup_label");
        let all = written.chain(&self.remove).chain([&label]);
        let old = all.map(|path| {
            let content = self.files.get(path.as_str()).map(|bytes| (bytes.clone(), 0o600));
            Ok(OldFile { path: path.clone(), content })
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
        let directory = Arc::new(DataDir::open(root).expect("a data directory"));
        let disk = door(Arc::new(RealDisk::new(Arc::clone(&directory), None, true).expect("disk")));
        let state = state::load(&*disk).expect("the state can be told");
        let (state::State::Hidden(manifest) | state::State::Undoing(manifest)) = state else {
            panic!("the target is not being changed: {state:?}");
        };
        hold::take(&*disk, root)?;
        let (manifest, disk, directory) = (&*manifest, &*disk, &*directory);
        let (stop, monitor) = (&AtomicBool::new(false), &Silent);
        match self {
            Self::Resume => Redo { manifest, disk, directory, stop, monitor }.run(),
            Self::Rollback => Rollback { manifest, disk, directory, stop, monitor }.run(),
        }
    }
}

/// Says nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Monitor for Silent {
    fn step(&self, _: Step) {}
    fn progress(&self, _: u64, _: u64) {}
    fn planned(&self, _: &Change<'_>) {}
    fn note(&self, _: &str) {}
    fn warning(&self, _: &str) {}
}

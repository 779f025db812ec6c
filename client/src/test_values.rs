//! Plain values that tests of decisions begin from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use data_dir::DataDir;
use data_dir::settings;
use parking_lot::Mutex;
use pg_format::backup_label::ReplayStart;
use pg_format::{ControlFile, Lsn, TimelineHistory, TimelineId};
use proto::model::{Description, Node, Role};
use tempfile::TempDir;

use crate::config::{Config, Connections, Output, Recovery, SourceAddress};
use crate::monitor::{Monitor, Step};
use crate::plan::pg_wal::WalChanges;
use crate::plan::summary::PlannedChange;
use crate::plan::{Plan, Planned, SourceFiles, Strategy, StrategyChoice, TargetFiles};
use crate::source::Snapshot;
use crate::staging::disk::RealDisk;
use crate::staging::manifest::Manifest;
use crate::target::Target;

/// The least of a `pg_control` that can be read.
pub(crate) fn control_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    let mut put = |at: usize, value: &[u8]| {
        for (byte, new) in bytes.iter_mut().skip(at).zip(value) {
            *byte = *new;
        }
    };
    put(8, &1300_u32.to_le_bytes());
    put(12, &202_209_061_u32.to_le_bytes());
    put(32, &0x300_0060_u64.to_le_bytes());
    put(40, &0x300_0028_u64.to_le_bytes());
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

/// The same, read.
pub(crate) fn control() -> ControlFile {
    ControlFile::parse(&control_bytes()).expect("a control file")
}

/// A primary in this directory.
pub(crate) fn node(directory: [u8; 16]) -> Node {
    Node {
        role: Role::Primary,
        timeline: TimelineId::new(1).expect("a timeline"),
        control: control(),
        control_bytes: control_bytes(),
        histories: Vec::new(),
        postmaster: Some((1, 1_700_000_000)),
        directory,
    }
}

/// A primary with these WAL segments, whose last checkpoint began at `redo`, at second `time`.
pub(crate) fn described(segments: std::ops::Range<u64>, redo: Lsn, time: i64) -> Description {
    let mut node = node([1; 16]);
    node.control.checkpoint_copy.redo = redo;
    node.control.checkpoint_copy.time = time;
    let timeline = node.timeline;
    let name = |number| pg_format::wal::SegmentName { timeline, number };
    Description {
        program_version: String::new(),
        node,
        wal_segments: segments.map(name).collect(),
        tablespaces: Vec::new(),
        congestion_control: None,
    }
}

/// The same as a snapshot.
pub(crate) fn snapshot(segments: std::ops::Range<u64>, redo: Lsn) -> Snapshot {
    let description = described(segments, redo, 0);
    let history = TimelineHistory::parse(description.node.timeline, b"").expect("a history");
    Snapshot { description, history }
}

/// The files that every cluster has, with their lengths; directories have none.
pub(crate) fn least_files() -> Vec<(&'static str, Option<u64>)> {
    vec![
        ("PG_VERSION", Some(3)),
        ("global", None),
        ("global/pg_filenode.map", Some(512)),
        ("global/1262", Some(8192)),
        ("base", None),
        ("base/5", None),
        ("base/5/PG_VERSION", Some(3)),
        ("base/5/pg_filenode.map", Some(512)),
        ("base/5/1259", Some(8192)),
    ]
}

/// The beginning of WAL segment 3 of PostgreSQL 15 on timeline 1: so many records that change nothing
/// (`XLOG_NOOP`), the first of them at `planned().start.redo`. Also the end of the last one.
pub(crate) fn wal_of_noops(records: usize) -> (Vec<u8>, Lsn) {
    let start = 0x300_0000_u64;
    let mut bytes = Vec::new();
    // xlp_magic, xlp_info (a long header), xlp_tli, xlp_pageaddr, xlp_rem_len, padding.
    bytes.extend(0xD110_u16.to_le_bytes());
    bytes.extend(2_u16.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(start.to_le_bytes());
    bytes.extend([0; 8]);
    // xlp_sysid, xlp_seg_size, xlp_xlog_blcksz.
    bytes.extend(0_u64.to_le_bytes());
    bytes.extend((16_u32 << 20).to_le_bytes());
    bytes.extend(8192_u32.to_le_bytes());
    let mut previous = 0_u64;
    for _ in 0..records {
        let at = start + bytes.len() as u64;
        // xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, padding; then a short block of six bytes.
        let mut header = Vec::new();
        header.extend(32_u32.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header.extend(previous.to_le_bytes());
        header.extend([0x20, 0, 0, 0]);
        let data = [255, 6, 0, 0, 0, 0, 0, 0];
        let crc = crc32c::crc32c_append(crc32c::crc32c(&data), &header);
        bytes.extend(&header);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(data);
        previous = at;
    }
    let end = Lsn::new(start + bytes.len() as u64);
    assert!(bytes.len() <= 8192, "no more than one page");
    bytes.resize(8192, 0);
    (bytes, end)
}

/// A rewind that changes nothing but `pg_control`.
pub(crate) fn manifest() -> Manifest {
    Manifest {
        program_version: String::new(),
        old_control: b"old".to_vec(),
        new_control: b"new".to_vec(),
        files: Vec::new(),
        before: Vec::new(),
        packs: Vec::new(),
        segments: Vec::new(),
        staging: None,
        shorter: Vec::new(),
        vanished: Vec::new(),
        wal: WalChanges::default(),
        settings: Vec::new(),
        remove: Vec::new(),
        backup_label: Vec::new(),
        undo: None,
        sync: true,
        summary: String::new(),
    }
}

/// A planned rewind by *compare* that changes no file.
pub(crate) fn planned() -> Planned {
    let timeline = TimelineId::new(1).expect("a timeline");
    Planned {
        strategy: Strategy::Compare,
        why: String::new(),
        start: ReplayStart {
            redo: Lsn::new(0x300_0028),
            checkpoint: Lsn::new(0x300_0060),
            timeline,
        },
        source_redo: Lsn::new(0x300_0028),
        fork: None,
        target_end: None,
        plan: Plan::default(),
        listed: SourceFiles::new(),
        hash_bytes: 0,
    }
}

/// Makes a file, or gives it another content.
pub(crate) fn put_file(path: &std::path::Path, content: &[u8]) {
    let mut file = std::fs::File::create(path).expect("made");
    std::io::Write::write_all(&mut file, content).expect("written");
}

/// A data directory with a `pg_control` and nothing else, as a target that nobody runs on.
pub(crate) struct EmptyTarget {
    /// It.
    pub(crate) target: Arc<Target>,
    /// Where it lies.
    pub(crate) home: TempDir,
}

impl EmptyTarget {
    pub(crate) fn new() -> Self {
        Self::with_files(TargetFiles::new())
    }

    /// A target that was found to have these files.
    pub(crate) fn with_files(files: TargetFiles) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        for directory in ["global", "pg_wal", "base"] {
            std::fs::create_dir(home.path().join(directory)).expect("made");
        }
        for (name, content) in [
            ("PG_VERSION", b"15\n".to_vec()),
            ("global/pg_control", control_bytes()),
            ("postgresql.conf", Vec::new()),
        ] {
            put_file(&home.path().join(name), &content);
        }
        let directory = Arc::new(DataDir::open(home.path()).expect("a data directory"));
        let disk = RealDisk::new(Arc::clone(&directory), None, true).expect("a disk");
        let control = directory.control().expect("a control file");
        let settings = settings::read(&directory, control.file.major, None).expect("settings");
        let target = Target {
            history: TimelineHistory::first(control.file.timeline()),
            directory,
            disk: Arc::new(disk),
            staging: None,
            control,
            settings,
            files,
            unstarted: false,
        };
        Self { target: Arc::new(target), home }
    }

    /// Every name in it, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut open = vec![self.home.path().to_owned()];
        while let Some(directory) = open.pop() {
            for entry in std::fs::read_dir(directory).expect("readable").flatten() {
                let path = entry.path();
                let name = path.strip_prefix(self.home.path()).expect("inside");
                names.push(name.display().to_string());
                if path.is_dir() {
                    open.push(path);
                }
            }
        }
        names.sort();
        names
    }
}

/// A monitor that keeps what it is told.
#[derive(Debug, Default)]
pub(crate) struct RecordingMonitor(Mutex<Vec<String>>);

impl RecordingMonitor {
    fn note_down(&self, text: String) {
        self.0.lock().push(text);
    }

    /// All of it.
    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().clone()
    }
}

impl Monitor for RecordingMonitor {
    fn step(&self, step: Step) {
        self.note_down(step.to_string());
    }

    fn progress(&self, _done: u64, _total: u64) {}

    fn planned(&self, _change: &PlannedChange<'_>) {}

    fn note(&self, message: &str) {
        self.note_down(message.to_owned());
    }

    fn warning(&self, message: &str) {
        self.note_down(format!("warning: {message}"));
    }
}

/// The operator's choices as they are without options.
pub(crate) fn config() -> Config {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let server_name = "source.example".try_into().expect("a name");
    Config {
        target: PathBuf::from("/data"),
        source: SourceAddress {
            host: "source.example".to_owned(),
            port: 7432,
            server_name,
            tls: Arc::new(tls),
        },
        warnings: Vec::new(),
        dry_run: false,
        strategy: StrategyChoice::Auto,
        wait_checkpoint: None,
        connections: Connections::Adaptive,
        max_rate: None,
        timeout: Duration::from_secs(300),
        progress: false,
        output: Output::Text,
        recovery: Recovery::SignalOnly,
        restore_command: None,
        wal_archive: None,
        config_file: None,
        start: false,
        pg_ctl: None,
        staging_dir: None,
        undo: true,
        keep_diverged: true,
        tablespace_mapping: Vec::new(),
        config_from_source: false,
        mirror_extra_files: false,
        sync: true,
        accept_shrink: false,
    }
}

//! Plain values that tests of decisions begin from.

use pg_format::{ControlFile, Lsn, TimelineId};
use proto::model::{Description, Node, Role};

use crate::plan::pg_wal::WalChanges;
use crate::staging::manifest::Manifest;

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

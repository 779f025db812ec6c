//! Names a peer may send: a path stays inside the data directory, and what is parsed prints as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::postmaster_pid::PostmasterPid;
use pg_format::wal::SegmentName;
use pg_format::{DataPath, FileClass, RelationSegment, WalSegmentSize};

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    drop(PostmasterPid::parse(text));
    let size = WalSegmentSize::new(16 << 20).expect("a size initdb takes");
    if let Some(segment) = SegmentName::parse(text, size) {
        assert_eq!(segment.file_name(size), text);
    }
    let Ok(path) = DataPath::new(text) else { return };
    assert!(!text.starts_with('/') && !text.contains('\0'));
    assert!(text.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
    let class = FileClass::of(&path);
    if let Some(segment) = RelationSegment::parse(&path) {
        let version = text.split('/').nth(2).unwrap_or("PG_15_202209061");
        let back = segment.path(version).expect("a path of its own");
        assert_eq!(back.as_str(), text);
        let own = matches!(class, FileClass::Relation(_) | FileClass::Own);
        assert!(own, "{text} is a relation and {class:?}");
    }
});

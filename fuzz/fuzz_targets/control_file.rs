//! `pg_control` and relation maps: whatever a file holds, it is a value or a typed error; a `pg_control` can be made
//! into that of a rewound node and read back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::control_file::control_file_for_recovery;
use pg_format::{ControlFile, Lsn, Major, relation_map};

/// Bytes before the CRC in each layout: without a right CRC nothing behind it would be reached.
const CRC_OFFSETS: [usize; 4] = [288, 292, 304, 308];

/// A relation map with a right CRC, whatever it says.
fn read_relation_map(input: &[u8], major: Major) {
    let bytes = relation_map::file_bytes(major);
    let mut file = input.to_vec();
    file.resize(bytes, 0);
    let at = bytes - if major.number() >= 16 { 4 } else { 8 };
    let crc = crc32c::crc32c(&file[..at]);
    file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    if let Ok(mapped) = relation_map::parse(&file, major) {
        assert!(mapped.len() <= 64);
    }
}

fuzz_target!(|input: &[u8]| {
    drop(ControlFile::parse(input));
    for number in [15, 16] {
        read_relation_map(input, Major::new(number).expect("a major"));
    }
    for at in CRC_OFFSETS {
        let mut file = input.to_vec();
        file.resize(8192, 0);
        let crc = crc32c::crc32c(&file[..at]);
        file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        let Ok(control) = ControlFile::parse(&file) else { continue };
        let (end, timeline) = (Lsn::new(0x300_0028), control.timeline());
        let Ok(new) = control_file_for_recovery(&file, end, timeline) else { continue };
        let new = ControlFile::parse(&new).expect("what was written is read");
        assert_eq!(new.min_recovery_point, end);
        assert_eq!(new.system_identifier, control.system_identifier);
    }
});

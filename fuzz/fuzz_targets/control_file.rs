//! `pg_control`: whatever the file holds, it is a value or a typed error; a value can be made into
//! the control file of a rewound node and read back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::control_file::control_file_for_recovery;
use pg_format::{ControlFile, Lsn};

/// Bytes before the CRC in each layout: without a right CRC nothing behind it would be reached.
const CRC_OFFSETS: [usize; 4] = [288, 292, 304, 308];

fuzz_target!(|input: &[u8]| {
    drop(ControlFile::parse(input));
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

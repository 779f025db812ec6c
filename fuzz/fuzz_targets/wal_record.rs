//! One record behind its CRC: block references and effects of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::wal::effect::effect;
use pg_format::wal::{Record, RecordBody};
use pg_format::{Lsn, Major};

fuzz_target!(|input: &[u8]| {
    let [major, bytes @ ..] = input else { return };
    let Ok(major) = Major::new(13 + major % 7) else { return };
    if bytes.len() < 24 {
        return;
    }
    let lsn = Lsn::new(0x300_0028);
    let record = Record { lsn, end: lsn.plus(bytes.len() as u64).aligned(), bytes };
    let mut body = RecordBody::default();
    if body.decode(&record, major.wal_format()).is_ok() {
        for pair in body.blocks.windows(2) {
            assert!(pair[0].id < pair[1].id);
        }
        assert!(record.main_data(&body).len() <= bytes.len());
        drop(effect(&record, &body, major.wal_format()));
    }
});

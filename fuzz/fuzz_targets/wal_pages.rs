//! WAL pages: the decoder ends or errs, never panics, and gives only records whose CRC fits.
#![no_main]

use std::ops::ControlFlow;

use libfuzzer_sys::fuzz_target;
use pg_format::wal::effect::effect;
use pg_format::wal::{Decoder, Start, WalContext};
use pg_format::{Lsn, Major, WalSegmentSize};

fuzz_target!(|input: &[u8]| {
    let [major, seek, pages @ ..] = input else { return };
    let Ok(major) = Major::new(13 + major % 7) else { return };
    // The input says itself where it belongs, so that whole segments can be given.
    let word = |at: usize| pages.get(at..at + 8).and_then(|w| w.try_into().ok());
    let number = |at: usize| word(at).map_or(0, u64::from_le_bytes);
    let context = WalContext {
        format: major.wal_format(),
        system_identifier: number(24),
        segment_size: WalSegmentSize::new(1 << 20).expect("a size initdb takes"),
    };
    let at = Lsn::new(number(8) & 0xFFFF_FFFF_FFFF_E000);
    let start = match seek % 2 {
        0 => Start::FirstAfter(at),
        _ => Start::Record(Lsn::new(at.as_u64() | 40)),
    };
    let mut decoder = Decoder::new(context, start);
    let mut last = Lsn::new(0);
    drop(decoder.feed(pages, &mut |record, body| {
        assert!(record.lsn >= last && record.end > record.lsn);
        let (head, tail) = (&record.bytes[..20], &record.bytes[24..]);
        assert_eq!(record.crc(), crc32c::crc32c_append(crc32c::crc32c(tail), head));
        drop(effect(record, body, context.format));
        last = record.end;
        ControlFlow::Continue(())
    }));
});

//! See `integration_tests::readers::wal_record`.
#![no_main]

use integration_tests::readers::wal_record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| wal_record(input));

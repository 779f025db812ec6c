//! See `integration_tests::readers::wal_pages`.
#![no_main]

use integration_tests::readers::wal_pages;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| wal_pages(input));

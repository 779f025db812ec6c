//! See `integration_tests::readers::history`.
#![no_main]

use integration_tests::readers::history;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| history(input));

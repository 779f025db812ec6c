//! See `integration_tests::readers::frame`.
#![no_main]

use integration_tests::readers::frame;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| frame(input));

//! See `integration_tests::readers::delta`.
#![no_main]

use integration_tests::readers::delta;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| delta(input));

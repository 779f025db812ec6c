//! See `integration_tests::readers::plan`.
#![no_main]

use integration_tests::readers::plan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| plan(input));

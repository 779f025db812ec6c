//! See `integration_tests::readers::names`.
#![no_main]

use integration_tests::readers::names;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| names(input));

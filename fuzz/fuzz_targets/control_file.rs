//! See `integration_tests::readers::control_file`.
#![no_main]

use integration_tests::readers::control_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| control_file(input));

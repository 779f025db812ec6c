//! See `integration_tests::readers::conf_file`.
#![no_main]

use integration_tests::readers::conf_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| conf_file(input));

//! See `integration_tests::readers::options`.
#![no_main]

use integration_tests::readers::options;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| options(input));

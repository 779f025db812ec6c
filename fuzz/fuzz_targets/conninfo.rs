//! See `integration_tests::readers::connection_string`.
#![no_main]

use integration_tests::readers::connection_string;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| connection_string(input));

//! See `integration_tests::readers::packed`.
#![no_main]

use integration_tests::readers::packed;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| packed(input));

//! See `integration_tests::readers::manifest`.
#![no_main]

use integration_tests::readers::manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| manifest(input));

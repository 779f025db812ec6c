//! See `integration_tests::readers::private_key`.
#![no_main]

use integration_tests::readers::private_key;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| private_key(input));

//! See `integration_tests::readers::undo_images`.
#![no_main]

use integration_tests::readers::undo_images;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undo_images(input));

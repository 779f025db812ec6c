//! The manifest of a sealed rewind: damaged on disk it is an error, and what is read writes the same.
#![no_main]

use client::staging::header;
use client::staging::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    drop(Manifest::decode(input));
    // Behind the header, so that its CRC does not stop everything.
    let file = header::seal(input);
    if let Ok(manifest) = Manifest::decode(&file) {
        let again = Manifest::decode(&manifest.encode().expect("encodes")).expect("decodes");
        assert_eq!(again, manifest);
    }
});

//! Page differences and signatures from a peer: whatever they hold, a page comes out or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::BLOCK_SIZE;
use proto::delta::{AnyOffset, SIGNATURE_BYTES};

fuzz_target!(|input: &[u8]| {
    let codec = AnyOffset::new(input.len() as u64);
    let mut page = input.to_vec();
    page.resize(BLOCK_SIZE, 0);
    if let Ok(rebuilt) = codec.apply(&page, input) {
        assert_eq!(rebuilt.len(), BLOCK_SIZE);
    }
    if let Some(signature) = input.first_chunk::<SIGNATURE_BYTES>()
        && let Some(delta) = codec.encode(signature, &page)
    {
        assert!(delta.len() < 2 * BLOCK_SIZE);
        // The signature is of another page: what was made for that one may not fit this one.
        if let Ok(rebuilt) = codec.apply(&page, &delta) {
            assert_eq!(rebuilt.len(), BLOCK_SIZE);
        }
    }
    // Against itself nothing but the header travels.
    let delta = codec.encode(&codec.sign(&page), &page).expect("the same page");
    assert_eq!(codec.apply(&page, &delta).expect("our own"), page);
});

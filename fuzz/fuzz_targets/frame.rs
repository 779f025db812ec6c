//! Frames a peer may send: never more memory than a batch may have, never a page without its hash.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proto::PageHash;
use proto::fetch::{ItemBody, PageContent};
use proto::frame::{Codec, Frame};

fuzz_target!(|input: &[u8]| {
    let [codec, promised @ ..] = input else { return };
    let Some((promised, payload)) = promised.split_first_chunk::<4>() else { return };
    let payload = Bytes::copy_from_slice(payload);
    let (codec, batch_bytes) = match codec % 2 {
        0 => (Codec::Plain, u32::try_from(payload.len()).unwrap_or(u32::MAX)),
        _ => (Codec::Zstd, u32::from_le_bytes(*promised)),
    };
    let payload_crc = crc32c::crc32c(&payload);
    let frame = Frame { sequence: 0, codec, batch_bytes, payload, payload_crc };
    for item in frame.items().unwrap_or_default() {
        match item.body {
            ItemBody::Page {
                content: PageContent::Present(page) | PageContent::Torn(page), ..
            } => {
                assert_eq!(page.data().len(), 8192);
                assert_eq!(page.hash(), PageHash::of(page.data()));
            }
            ItemBody::Chunk(chunk) => assert_eq!(chunk.hash(), PageHash::of(chunk.data())),
            _ => {}
        }
    }
});

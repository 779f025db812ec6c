//! Every reader of bytes that a peer or a disk gives: whatever they are, a value comes out or a typed error, in bounded
//! memory. `make test` runs them on the seeds in `fuzz/corpus` and on mutations of these, `make fuzz` for longer.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::ops::ControlFlow;

use bytes::Bytes;
use client::apply::before_images;
use client::staging::header;
use client::staging::manifest::{Manifest, PackDigest};
use client::staging::pack::{self, Signer};
use client::staging::saved_plan::SavedPlan;
use pg_format::conf::{self, ConfLine};
use pg_format::control_file::control_file_for_recovery;
use pg_format::postmaster_pid::PostmasterPid;
use pg_format::wal::effect::effect;
use pg_format::wal::{Decoder, Record, RecordBody, SegmentName, Start, WalContext};
use pg_format::{
    BLOCK_SIZE, ControlFile, DataPath, FileClass, Lsn, Major, RelationSegment, TimelineHistory,
    TimelineId, WalSegmentSize, conninfo, postmaster_opts, relation_map,
};
use proto::PageHash;
use proto::delta::{AnyOffset, SIGNATURE_BYTES};
use proto::fetch::{ItemBody, PageContent};
use proto::frame::{Codec, Frame};

/// A reader and the name of its seeds.
#[derive(Debug, Clone, Copy)]
pub struct Reader {
    /// The directory of its seeds, and the name of its fuzz target.
    pub name: &'static str,
    /// Reads, and panics where what came out is not what it must be.
    pub read: fn(&[u8]),
}

/// All of them.
pub const READERS: [Reader; 15] = [
    Reader { name: "conf", read: conf_file },
    Reader { name: "conninfo", read: connection_string },
    Reader { name: "control_file", read: control_file },
    Reader { name: "delta", read: delta },
    Reader { name: "frame", read: frame },
    Reader { name: "history", read: history },
    Reader { name: "manifest", read: manifest },
    Reader { name: "names", read: names },
    Reader { name: "pack", read: packed },
    Reader { name: "plan", read: plan },
    Reader { name: "postmaster_opts", read: options },
    Reader { name: "private_key", read: private_key },
    Reader { name: "undo_images", read: undo_images },
    Reader { name: "wal_pages", read: wal_pages },
    Reader { name: "wal_record", read: wal_record },
];

/// Configuration files: a value that is set is the one that is read back, and others stay.
pub fn conf_file(input: &[u8]) {
    let cut = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let (text, value) = input.split_at(cut);
    let text = String::from_utf8_lossy(text).into_owned();
    // A setting is one line; the command line refuses others.
    let value = String::from_utf8_lossy(value).replace(['\n', '\r'], " ");
    let others = |text: &str| -> Vec<ConfLine> {
        let is_it = |line: &ConfLine| matches!(line, ConfLine::Setting(n, _) if n == "wanted");
        conf::parse(text).into_iter().filter(|line| !is_it(line)).collect()
    };
    let after = conf::with_setting(&text, "wanted", &value);
    assert_eq!(others(&text), others(&after));
    assert_eq!(conf::parse(&after).last(), Some(&ConfLine::Setting("wanted".to_owned(), value)));
}

/// Connection strings: names without `=` and blanks, whatever the text is.
pub fn connection_string(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for parameter in conninfo::parameters(&text) {
        let is_uri = text.trim_start().starts_with("postgres");
        assert!(is_uri || !parameter.name.contains('='), "{parameter:?}");
    }
}

/// `postmaster.opts`: names in lower case, whatever the text is.
pub fn options(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    postmaster_opts::program(&text);
    for (name, _) in postmaster_opts::settings(&text) {
        assert_eq!(name, name.to_ascii_lowercase());
    }
}

/// A file without a name that holds these bytes.
fn file(input: &[u8]) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create("pgrejoin-reader", flags).expect("a file in memory");
    let mut file = File::from(memory);
    file.write_all(input).expect("written");
    file.rewind().expect("at its start");
    file
}

/// The search for private keys: the same verdict twice.
pub fn private_key(input: &[u8]) {
    let verdict = || data_dir::private_keys::search(&file(input)).expect("readable");
    assert_eq!(verdict(), verdict());
}

/// Bytes before the CRC in each layout: without a right CRC nothing behind it would be reached.
const CRC_OFFSETS: [usize; 4] = [288, 292, 304, 308];

/// A relation map with a right CRC, whatever it says.
fn read_relation_map(input: &[u8], major: Major) {
    let bytes = relation_map::file_bytes(major);
    let mut file = input.to_vec();
    file.resize(bytes, 0);
    let at = bytes - if major.number() >= 16 { 4 } else { 8 };
    let crc = crc32c::crc32c(&file[..at]);
    file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    if let Ok(mapped) = relation_map::parse(&file, major) {
        assert!(mapped.len() <= 64);
    }
}

/// `pg_control` and relation maps: a `pg_control` can be made into that of a rewound node and read back.
pub fn control_file(input: &[u8]) {
    drop(ControlFile::parse(input));
    for number in [15, 16] {
        read_relation_map(input, Major::new(number).expect("a major"));
    }
    for at in CRC_OFFSETS {
        let mut file = input.to_vec();
        file.resize(8192, 0);
        let crc = crc32c::crc32c(&file[..at]);
        file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        let Ok(control) = ControlFile::parse(&file) else { continue };
        let (end, timeline) = (Lsn::new(0x300_0028), control.timeline());
        let Ok(new) = control_file_for_recovery(&file, end, timeline) else { continue };
        let new = ControlFile::parse(&new).expect("what was written is read");
        assert_eq!(new.min_recovery_point, end);
        assert_eq!(new.system_identifier, control.system_identifier);
    }
}

/// Page differences and signatures from a peer: a page comes out or an error.
pub fn delta(input: &[u8]) {
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
}

/// Frames a peer may send: never a page without its hash.
pub fn frame(input: &[u8]) {
    let [codec, promised @ ..] = input else { return };
    let Some((promised, payload)) = promised.split_first_chunk::<4>() else { return };
    let payload = Bytes::copy_from_slice(payload);
    let (codec, batch_bytes) = match codec % 2 {
        0 => (Codec::Plain, u32::try_from(payload.len()).unwrap_or(u32::MAX)),
        _ => (Codec::Zstd, u32::from_le_bytes(*promised)),
    };
    let payload_crc = crc32c::crc32c(&payload);
    let frame = Frame { sequence: 0, codec, batch_bytes, payload, payload_crc };
    frame.items().unwrap_or_default().iter().for_each(|item| check_item(&item.body));
}

/// What was checked has the hash that it came with.
fn check_item(body: &ItemBody) {
    match body {
        ItemBody::Page {
            content: PageContent::Present(page) | PageContent::Torn(page), ..
        } => {
            assert_eq!(page.data().len(), BLOCK_SIZE);
            assert_eq!(page.hash(), PageHash::of(page.data()));
        }
        ItemBody::Chunk(chunk) => assert_eq!(chunk.hash(), PageHash::of(chunk.data())),
        _ => {}
    }
}

/// Timeline histories: spans of a history meet, and the common ancestor of two lies in both.
pub fn history(input: &[u8]) {
    let [first, second, text @ ..] = input else { return };
    let cut = usize::from(*second).min(text.len());
    let parse = |number: u8, text: &[u8]| {
        TimelineHistory::parse(TimelineId::new(u32::from(number)).ok()?, text).ok()
    };
    let (a, b) = (parse(*first, &text[..cut]), parse(*second, &text[cut..]));
    for history in [&a, &b].into_iter().flatten() {
        for pair in history.spans().windows(2) {
            assert_eq!(pair[0].end, pair[1].begin);
            assert!(pair[0].timeline < pair[1].timeline);
        }
    }
    if let (Some(a), Some(b)) = (a, b)
        && let Some(common) = a.common_ancestor(&b)
    {
        assert!(a.contains(common.timeline) && b.contains(common.timeline));
    }
}

/// The manifest of a sealed rewind: what is read writes the same.
pub fn manifest(input: &[u8]) {
    drop(Manifest::decode(input));
    // Behind the header, so that its CRC does not stop everything.
    for body in [Some(input), input.get(header::HEADER_BYTES + 4..)].into_iter().flatten() {
        if let Ok(manifest) = Manifest::decode(&header::seal(body)) {
            let again = Manifest::decode(&manifest.encode().expect("encodes")).expect("decodes");
            assert_eq!(again, manifest);
        }
    }
}

/// The plan of an earlier run.
pub fn plan(input: &[u8]) {
    drop(SavedPlan::decode(input));
    for body in [Some(input), input.get(header::HEADER_BYTES + 4..)].into_iter().flatten() {
        if let Ok(Some(plan)) = SavedPlan::decode(&header::seal(body)) {
            assert!(plan.planned.plan.files.len() <= body.len());
        }
    }
}

/// What an earlier run has fetched: the usable part of a pack, and nothing behind it.
pub fn packed(input: &[u8]) {
    let mut give = |items: Vec<proto::fetch::Item>| {
        items.iter().for_each(|item| check_item(&item.body));
        Ok(())
    };
    if let Ok(Some((bytes, _))) = pack::recover(file(input), Signer::none(), &mut give) {
        assert!(bytes <= input.len() as u64);
    }
    let (bytes, crc) = (input.len() as u64, crc32c::crc32c(input));
    let digest = PackDigest { name: "1-0000".to_owned(), bytes, crc };
    drop(pack::read(file(input), &digest, Signer::none(), &mut give));
}

/// Undo images: each of a bounded length.
pub fn undo_images(input: &[u8]) {
    let (bytes, crc) = (input.len() as u64, crc32c::crc32c(input));
    let digest = PackDigest { name: "1-planned-0".to_owned(), bytes, crc };
    let mut give = |_: usize, _: u64, image: &[u8]| {
        assert!(image.len() <= 256 << 10);
        Ok(())
    };
    drop(before_images::read(file(input), &digest, Signer::none(), &mut give));
}

/// Names a peer may send: a path stays inside the data directory, and what is parsed prints as it was.
pub fn names(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    drop(PostmasterPid::parse(text));
    let shown = proto::text::of_peer(text);
    assert!(!shown.contains(char::is_control) && shown.len() <= proto::text::PEER_TEXT_BYTES_MAX);
    let size = WalSegmentSize::new(16 << 20).expect("a size initdb takes");
    if let Some(segment) = SegmentName::parse(text, size) {
        assert_eq!(segment.file_name(size), text);
    }
    let Ok(path) = DataPath::new(text) else { return };
    assert!(!text.starts_with('/') && !text.contains('\0'));
    assert!(text.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
    let class = FileClass::of(&path);
    if let Some(segment) = RelationSegment::parse(&path) {
        let version = text.split('/').nth(2).unwrap_or("PG_15_202209061");
        let back = segment.path(version).expect("a path of its own");
        assert_eq!(back.as_str(), text);
        let own = matches!(class, FileClass::Relation(_) | FileClass::Own);
        assert!(own, "{text} is a relation and {class:?}");
    }
}

/// WAL pages: the decoder gives only records whose CRC fits.
pub fn wal_pages(input: &[u8]) {
    let [major, seek, pages @ ..] = input else { return };
    let Ok(major) = Major::new(13 + major % 7) else { return };
    // The input says itself where it belongs, so that whole segments can be given.
    let word = |at: usize| pages.get(at..at + 8).and_then(|w| w.try_into().ok());
    let number = |at: usize| word(at).map_or(0, u64::from_le_bytes);
    let context = WalContext {
        format: major.wal_format(),
        system_identifier: number(24),
        segment_size: WalSegmentSize::new(1 << 20).expect("a size initdb takes"),
    };
    let at = Lsn::new(number(8) & 0xFFFF_FFFF_FFFF_E000);
    let start = match seek % 2 {
        0 => Start::FirstAfter(at),
        _ => Start::Record(Lsn::new(at.as_u64() | 40)),
    };
    let mut decoder = Decoder::new(context, start);
    let mut last = Lsn::new(0);
    drop(decoder.feed(pages, &mut |record, body| {
        assert!(record.lsn >= last && record.end > record.lsn);
        let (head, tail) = (&record.bytes[..20], &record.bytes[24..]);
        assert_eq!(record.crc(), crc32c::crc32c_append(crc32c::crc32c(tail), head));
        drop(effect(record, body, context.format));
        last = record.end;
        ControlFlow::Continue(())
    }));
}

/// One record behind its CRC: block references and effects of any bytes.
pub fn wal_record(input: &[u8]) {
    let [major, bytes @ ..] = input else { return };
    let Ok(major) = Major::new(13 + major % 7) else { return };
    if bytes.len() < 24 {
        return;
    }
    let lsn = Lsn::new(0x300_0028);
    let record = Record { lsn, end: lsn.plus(bytes.len() as u64).aligned(), bytes };
    let mut body = RecordBody::default();
    if body.decode(&record, major.wal_format()).is_ok() {
        for pair in body.blocks.windows(2) {
            assert!(pair[0].id < pair[1].id);
        }
        assert!(record.main_data(&body).len() <= bytes.len());
        drop(effect(&record, &body, major.wal_format()));
    }
}

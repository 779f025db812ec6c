//! What pages of a fork take on the wire, beside what they would at best.

use std::path::Path;
use std::time::{Duration, Instant};

use pg_format::{BLOCK_SIZE, DataPath, Fork, RelationSegment};
use proto::delta::{AnyOffset, SIGNATURE_BYTES};

use crate::workload::Frozen;

/// Level that is used where the link is not waited for.
const LEVEL: i32 = 1;
/// Bytes that are compressed together.
const FRAME_BYTES: usize = 256 << 10;

/// Pages of one kind: bytes each way, and time.
#[derive(Debug, Default)]
struct Pages {
    count: u32,
    wrong: u32,
    whole: Stream,
    differences: Stream,
    xor: Stream,
    ideal: usize,
    signing: Duration,
    encoding: Duration,
    applying: Duration,
}

/// Bytes on their way, as they would be compressed.
#[derive(Debug, Default)]
struct Stream {
    waiting: Vec<u8>,
    bytes: usize,
}

impl Stream {
    fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= FRAME_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let frame = zstd::bulk::compress(&self.waiting, LEVEL).expect("compressed");
        self.bytes += if self.waiting.is_empty() { 0 } else { frame.len() };
        self.waiting.clear();
    }
}

impl Pages {
    fn take(&mut self, codec: &AnyOffset, (old, new): (&[u8], &[u8])) {
        self.count += 1;
        self.whole.push(new);
        let xor: Vec<u8> = old.iter().zip(new).map(|(a, b)| a ^ b).collect();
        self.xor.push(&xor);
        let mut with_prefix = zstd::bulk::Compressor::with_dictionary(LEVEL, old).expect("zstd");
        self.ideal += with_prefix.compress(new).expect("compressed").len();
        let since = Instant::now();
        let signature = codec.sign(old);
        self.signing += since.elapsed();
        let since = Instant::now();
        let difference = codec.encode(&signature, new);
        self.encoding += since.elapsed();
        let Some(difference) = difference else {
            self.differences.push(new);
            return;
        };
        let since = Instant::now();
        let rebuilt = codec.apply(old, &difference);
        self.applying += since.elapsed();
        self.wrong += u32::from(rebuilt.as_deref() != Ok(new));
        self.differences.push(&difference);
    }

    fn print(mut self, kind: &str) {
        for stream in [&mut self.whole, &mut self.differences, &mut self.xor] {
            stream.flush();
        }
        let each = |bytes: usize| bytes as f64 / f64::from(self.count.max(1));
        let time = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(self.count.max(1));
        let down = each(self.differences.bytes);
        println!(
            "| {kind} | {} | {:.0} | {SIGNATURE_BYTES} + {down:.0} = {:.0} | {:.0} | {:.0} | {} | {:.1} + {:.1} + {:.1} |",
            self.count,
            each(self.whole.bytes),
            down + SIGNATURE_BYTES as f64,
            each(self.xor.bytes),
            each(self.ideal),
            self.wrong,
            time(self.signing),
            time(self.encoding),
            time(self.applying),
        );
    }
}

/// Prints a table of all pages of main forks that both nodes have and that are not the same.
pub(crate) fn print(frozen: &Frozen) {
    let (target, source) = frozen.stopped();
    let names = |directory: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(directory).expect("a directory").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut files: Vec<DataPath> = Vec::new();
    for database in names(&target.join("base")) {
        let below = names(&target.join("base").join(&database));
        files.extend(below.iter().filter_map(|name| {
            let path = DataPath::new(format!("base/{database}/{name}")).ok()?;
            let segment = RelationSegment::parse(&path)?;
            (segment.fork == Fork::Main).then_some(path)
        }));
    }
    let codec = AnyOffset::new(0x5EED);
    let (mut heap, mut index) = (Pages::default(), Pages::default());
    for path in files {
        let read = |data: &Path| std::fs::read(data.join(path.as_str())).unwrap_or_default();
        let (old, new) = (read(target), read(source));
        for pages in old.chunks_exact(BLOCK_SIZE).zip(new.chunks_exact(BLOCK_SIZE)) {
            let is_heap = pages.1.get(16..18) == Some(&[0, 0x20]);
            if pages.0 != pages.1 {
                if is_heap { &mut heap } else { &mut index }.take(&codec, pages);
            }
        }
    }
    println!(
        "| pages | number | whole | difference, up + down | xor | old page as prefix | rebuilt wrong | us to sign, encode, apply |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    heap.print("heap");
    index.print("index");
}

//! Every reader of a peer's or a disk's bytes, on its seeds and on mutations of them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use integration_tests::readers::{READERS, Reader};

/// Bytes of mutations that each seed is tried with, and the bounds of their number.
const MUTATED_BYTES: usize = 32 << 20;
const MUTATIONS_MIN: usize = 100;
const MUTATIONS_MAX: usize = 8000;

/// Random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound.max(1)
    }
}

/// Changes an input a little: in one place mostly, in some now and then.
fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.below(3) {
        let at = random.below(input.len());
        let length = 1 + random.below(16);
        let end = (at + length).min(input.len());
        match random.below(8) {
            0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            1 if !input.is_empty() => {
                input[at] = [0, 1, 0x7F, 0x80, 0xFE, 0xFF][random.below(6)];
            }
            2 => drop(input.drain(at..end)),
            3 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            4 => {
                let extreme = [0, 1, u64::MAX, 1 << 31, 1 << 63, u64::from(u32::MAX)];
                let bytes = extreme[random.below(6)].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(input.len() - at);
                input.splice(at..at + width, bytes.into_iter().take(width));
            }
            5 => input.truncate(at),
            6 => {
                let from = random.below(other.len());
                let piece = other.get(from..).unwrap_or_default().iter().copied().take(length);
                input.splice(at..at, piece);
            }
            _ => {
                let bytes = random.next().to_le_bytes();
                input.splice(at..at, bytes.into_iter().take(length));
            }
        }
    }
}

fn seeds(reader: &Reader) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let directory = root.join("fuzz/corpus").join(reader.name);
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().flatten().map(|f| f.path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Where a failure can be repeated from.
fn seed() -> u64 {
    let given = std::env::var("PGREJOIN_SEED").ok().and_then(|text| text.parse().ok());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    given.unwrap_or_else(now)
}

#[test]
fn every_reader_stands_its_seeds_and_what_is_nearly_like_them() {
    let seed = seed();
    println!("PGREJOIN_SEED={seed}");
    for reader in &READERS {
        let seeds = seeds(reader);
        assert!(!seeds.is_empty(), "{} has no seeds", reader.name);
        let mut random = Random(seed | 1);
        let mut tried = 0;
        for one in &seeds {
            (reader.read)(one);
            let mutations = (MUTATED_BYTES / one.len().max(1)).clamp(MUTATIONS_MIN, MUTATIONS_MAX);
            for _ in 0..mutations {
                let mut input = one.clone();
                let other = &seeds[random.below(seeds.len())];
                mutate(&mut random, &mut input, other);
                (reader.read)(&input);
            }
            tried += mutations;
        }
        println!("{}: {} seeds, {tried} mutations", reader.name, seeds.len());
    }
}

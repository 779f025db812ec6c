//! Pages as differences to the version that the receiver has: the receiver sends a short signature of its
//! page, and gets what the signature does not explain.
//!
//! A signature has one small hash for each block of a page. The sender looks for these blocks at every offset
//! in its own page that is a multiple of four, since pruning and inserting move what lies in a page without
//! changing it. The page header, which every change touches, is always sent. So is the state of heap tuples
//! ([`tuple_state`]), which differs all over pages with the same rows; blocks are compared without it. Hashes
//! this small collide now and then, so the rebuilt page is checked with the hash of the whole page.

use pg_format::{BLOCK_SIZE, tuple_state};

/// Bytes before the first block: the page header, which holds LSN and checksum.
const HEADER: usize = 24;

/// Bytes of a block. With 256 both ways together carry least (docs/PERFORMANCE.md).
const BLOCK: usize = 256;

/// Blocks in a page; the last one is shorter.
const BLOCKS: usize = (BLOCK_SIZE - HEADER).div_ceil(BLOCK);

/// Bytes of a block's hash.
const HASH: usize = 3;

/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = BLOCKS * HASH;

const WORD: usize = 4;
const HEADER_WORDS: usize = HEADER / WORD;
const BLOCK_WORDS: usize = BLOCK / WORD;
const PAGE_WORDS: usize = BLOCK_SIZE / WORD;

/// The error for a difference that cannot be applied, which may happen because it comes from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a page difference is malformed")]
pub struct Malformed;

/// Finds blocks at any offset, by hashes that depend on a seed: a pair of pages whose hashes collide with one
/// seed does not with another.
#[derive(Debug, Clone, Copy)]
pub struct AnyOffset {
    factor: u64,
    /// The factor of the first word of a block.
    first: u64,
}

impl AnyOffset {
    /// The codec with this seed.
    pub fn new(seed: u64) -> Self {
        // Multipliers that are 5 modulo 8 have the longest period modulo a power of two.
        let factor = (seed ^ 0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9) << 3 | 5;
        let first = (1..BLOCK_WORDS).fold(1_u64, |power, _| power.wrapping_mul(factor));
        Self { factor, first }
    }

    fn sum(&self, words: &[u32]) -> u64 {
        words.iter().fold(0, |sum: u64, word| {
            sum.wrapping_mul(self.factor).wrapping_add(u64::from(*word) + 1)
        })
    }

    /// The sum of the block one word later.
    fn roll(&self, sum: u64, leaves: u32, enters: u32) -> u64 {
        let left = sum.wrapping_sub((u64::from(leaves) + 1).wrapping_mul(self.first));
        left.wrapping_mul(self.factor).wrapping_add(u64::from(enters) + 1)
    }
}

/// The hash that is sent: 24 bits that depend on every bit of a sum.
fn short(sum: u64) -> u32 {
    let mixed = (sum ^ (sum >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB);
    u32::try_from(mixed >> 40).unwrap_or(0)
}

/// A whole page without the state of its tuples, and that state.
fn without_states(page: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut page = page.to_vec();
    page.resize(BLOCK_SIZE, 0);
    let states = tuple_state::take(&mut page);
    (page, states)
}

fn words(page: &[u8]) -> [u32; PAGE_WORDS] {
    let mut words = [0; PAGE_WORDS];
    let (whole, _) = page.as_chunks::<WORD>();
    words.iter_mut().zip(whole).for_each(|(word, bytes)| *word = u32::from_le_bytes(*bytes));
    words
}

/// The words of a block.
fn block(words: &[u32; PAGE_WORDS], number: usize) -> &[u32] {
    let start = HEADER_WORDS + number * BLOCK_WORDS;
    words.get(start..(start + BLOCK_WORDS).min(PAGE_WORDS)).unwrap_or_default()
}

/// Finds blocks by their hashes.
struct Index {
    hashes: [u32; BLOCKS],
    /// First block, counted from 1, whose hash begins with these bits; 0 for none.
    heads: [u8; 1 << INDEX_BITS],
    /// The next one after each.
    next: [u8; BLOCKS],
}

const INDEX_BITS: u32 = 10;
const HASH_BITS: u32 = 24;

impl Index {
    fn new(signature: &[u8; SIGNATURE_BYTES]) -> Self {
        let mut index =
            Self { hashes: [0; BLOCKS], heads: [0; 1 << INDEX_BITS], next: [0; BLOCKS] };
        let (hashes, _) = signature.as_chunks::<HASH>();
        for (number, [low, middle, high]) in hashes.iter().enumerate() {
            let hash = u32::from_le_bytes([*low, *middle, *high, 0]);
            let head = index.heads.get_mut(slot(hash));
            let places = (index.hashes.get_mut(number), index.next.get_mut(number), head);
            if let (Some(place), Some(next), Some(head)) = places {
                *place = hash;
                // The last block is shorter, and is looked for at its own place only.
                if number + 1 < BLOCKS {
                    (*next, *head) = (*head, u8::try_from(number + 1).unwrap_or(0));
                }
            }
        }
        index
    }

    fn is(&self, number: usize, hash: u32) -> bool {
        self.hashes.get(number) == Some(&hash)
    }

    /// A full block with this hash, by preference block `hint`.
    fn find(&self, hash: u32, hint: usize) -> Option<usize> {
        let mut at = usize::from(*self.heads.get(slot(hash))?);
        if at == 0 {
            return None;
        }
        if hint + 1 < BLOCKS && self.is(hint, hash) {
            return Some(hint);
        }
        while at > 0 {
            if self.is(at - 1, hash) {
                return Some(at - 1);
            }
            at = usize::from(*self.next.get(at - 1)?);
        }
        None
    }
}

fn slot(hash: u32) -> usize {
    (hash >> (HASH_BITS - INDEX_BITS)) as usize
}

/// Collects a difference: literal bytes, and runs of blocks of the old page.
struct Writer<'p> {
    page: &'p [u8],
    delta: Vec<u8>,
    /// First byte that is not yet part of a literal or a copy.
    literal: usize,
    /// Blocks to copy that follow each other: first and count.
    copy: Option<(usize, usize)>,
}

impl Writer<'_> {
    /// Notes that the bytes from `at` on are block `number` of the old page.
    fn copy(&mut self, at: usize, number: usize, bytes: usize) {
        match &mut self.copy {
            Some((first, count)) if self.literal == at && *first + *count == number => *count += 1,
            _ => {
                self.write_literal(at);
                self.copy = Some((number, 1));
            }
        }
        self.literal = at + bytes;
    }

    /// Writes the copy before it, if any, and the literal bytes up to `end`.
    fn write_literal(&mut self, end: usize) {
        if let Some((first, count)) = self.copy.take() {
            self.delta.extend([first, count].map(|number| u8::try_from(number).unwrap_or(0)));
        }
        let literal = self.page.get(self.literal..end).unwrap_or_default();
        // The length is written in one or two bytes of seven bits each, enough for any page.
        let [low, high, ..] = (literal.len() << 1).to_le_bytes();
        match literal.len() {
            0..0x80 => self.delta.push(low >> 1),
            _ => self.delta.extend([low >> 1 | 0x80, high]),
        }
        self.delta.extend_from_slice(literal);
    }
}

impl AnyOffset {
    /// The signature of a page, which the peer needs for [`Self::encode`]. Bytes that are missing at the
    /// page's end count as zeros.
    pub fn sign(&self, old: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let words = words(&without_states(old).0);
        let mut signature = [0; SIGNATURE_BYTES];
        let (places, _) = signature.as_chunks_mut::<HASH>();
        for (number, place) in places.iter_mut().enumerate() {
            let [low, middle, high, _] = short(self.sum(block(&words, number))).to_le_bytes();
            *place = [low, middle, high];
        }
        signature
    }

    /// The difference from the page that was signed to `page`; `None` if they have no block in common.
    pub fn encode(&self, signature: &[u8; SIGNATURE_BYTES], page: &[u8]) -> Option<Vec<u8>> {
        const LAST: usize = HEADER_WORDS + (BLOCKS - 1) * BLOCK_WORDS;
        let index = Index::new(signature);
        let (page, states) = without_states(page);
        let words = words(&page);
        let mut writer = Writer { page: &page, delta: Vec::new(), literal: 0, copy: None };
        let mut at = HEADER_WORDS;
        let mut hint = 0;
        let mut sum = None;
        while let Some(window) = words.get(at..at + BLOCK_WORDS) {
            let now = sum.unwrap_or_else(|| self.sum(window));
            if let Some(number) = index.find(short(now), hint) {
                writer.copy(at * WORD, number, BLOCK);
                (at, hint, sum) = (at + BLOCK_WORDS, number + 1, None);
                continue;
            }
            let enters = words.get(at + BLOCK_WORDS).copied().unwrap_or(0);
            sum = Some(self.roll(now, window.first().copied().unwrap_or(0), enters));
            at += 1;
            hint = at.saturating_sub(HEADER_WORDS) / BLOCK_WORDS;
        }
        let rest = words.get(LAST..).unwrap_or_default();
        if at <= LAST && index.is(BLOCKS - 1, short(self.sum(rest))) {
            writer.copy(LAST * WORD, BLOCKS - 1, rest.len() * WORD);
        }
        let copies = writer.copy.is_some() || !writer.delta.is_empty();
        writer.write_literal(page.len());
        writer.delta.extend_from_slice(&states);
        copies.then_some(writer.delta)
    }

    /// Applies a difference to the old page. Hashes in a signature can collide, so the caller must check the
    /// result with the page's own hash.
    ///
    /// # Errors
    /// The difference is malformed: it does not make a whole page.
    pub fn apply(&self, old: &[u8], delta: &[u8]) -> Result<Vec<u8>, Malformed> {
        let (old, _) = without_states(old);
        let mut page = Vec::with_capacity(BLOCK_SIZE);
        let mut rest = delta;
        loop {
            let length = take_length(&mut rest)?;
            let (literal, behind) = rest.split_at_checked(length).ok_or(Malformed)?;
            page.extend_from_slice(literal);
            if page.len() == BLOCK_SIZE {
                tuple_state::put(&mut page, behind).ok_or(Malformed)?;
                return Ok(page);
            }
            let [first, count, behind @ ..] = behind else {
                return Err(Malformed);
            };
            let start = HEADER + usize::from(*first) * BLOCK;
            let end = (start + usize::from(*count) * BLOCK).min(BLOCK_SIZE);
            page.extend_from_slice(old.get(start..end).ok_or(Malformed)?);
            if page.len() > BLOCK_SIZE {
                return Err(Malformed);
            }
            rest = behind;
        }
    }
}

/// A length of at most two bytes: no page is longer.
fn take_length(rest: &mut &[u8]) -> Result<usize, Malformed> {
    match **rest {
        [low @ 0..0x80, ref behind @ ..] => {
            *rest = behind;
            Ok(usize::from(low))
        }
        [low, high @ 0..0x80, ref behind @ ..] => {
            *rest = behind;
            Ok(usize::from(low & 0x7F) | usize::from(high) << 7)
        }
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page() -> impl Strategy<Value = Vec<u8>> {
        // Rows of few kinds beside noise and zeros, as pages have them.
        let part = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..600),
            (any::<u8>(), 1_usize..900).prop_map(|(byte, count)| vec![byte; count]),
        ];
        prop::collection::vec(part, 1..60).prop_map(|parts| {
            let mut page = parts.concat();
            page.resize(BLOCK_SIZE, 0);
            page
        })
    }

    /// What PostgreSQL does to pages: bytes change, parts move.
    fn changed() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let change = (0..BLOCK_SIZE, 0_usize..64, any::<bool>());
        (page(), prop::collection::vec(change, 0..12)).prop_map(|(old, changes)| {
            let mut new = old.clone();
            for (at, length, moves) in changes {
                match moves {
                    true => {
                        new.splice(at..at, std::iter::repeat_n(0x55, length * WORD));
                        new.truncate(BLOCK_SIZE);
                    }
                    false => {
                        for byte in new.iter_mut().skip(at).take(length) {
                            *byte = byte.wrapping_add(3);
                        }
                    }
                }
            }
            (old, new)
        })
    }

    proptest! {
        #[test]
        fn every_pair_rebuilds_or_is_told_to_be_wrong((old, new) in changed(), seed in any::<u64>()) {
            let codec = AnyOffset::new(seed);
            if let Some(delta) = codec.encode(&codec.sign(&old), &new) {
                prop_assert!(delta.len() < new.len() + 200);
                let rebuilt = codec.apply(&old, &delta).expect("well-formed");
                // Hashes of 24 bits lie once in some thousand pages, but not with every seed.
                if rebuilt != new {
                    let codec = AnyOffset::new(!seed);
                    let delta = codec.encode(&codec.sign(&old), &new).expect("much in common");
                    prop_assert!(codec.apply(&old, &delta).expect("well-formed") == new);
                }
            }
        }

        #[test]
        fn foreign_bytes_never_panic(
            old in page(),
            delta in prop::collection::vec(any::<u8>(), 0..300),
            signature in prop::collection::vec(any::<u8>(), SIGNATURE_BYTES),
        ) {
            let codec = AnyOffset::new(7);
            drop(codec.apply(&old, &delta));
            drop(codec.apply(&old[..100], &delta));
            let signature: [u8; SIGNATURE_BYTES] = signature.try_into().expect("its length");
            // What was made for another page may not fit this one.
            if let Some(Ok(page)) =
                codec.encode(&signature, &old).map(|delta| codec.apply(&old, &delta))
            {
                prop_assert_eq!(page.len(), BLOCK_SIZE);
            }
        }
    }

    #[test]
    fn what_moved_is_found_and_only_the_header_travels() {
        let codec = AnyOffset::new(1);
        let noise = |at: usize| (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let word = |at: usize| noise(at).to_le_bytes().into_iter().take(WORD);
        let old: Vec<u8> = (0..PAGE_WORDS).flat_map(word).collect();
        let mut new = old.clone();
        new[..HEADER].fill(1);
        let delta = codec.encode(&codec.sign(&old), &new).expect("much in common");
        assert_eq!(delta.len(), 1 + HEADER + 2 + 1, "header, one copy, nothing behind");
        assert_eq!(codec.apply(&old, &delta), Ok(new.clone()));
        // Everything behind byte 1000 moves by 12.
        new.splice(1000..1000, [9; 12]);
        new.truncate(BLOCK_SIZE);
        let delta = codec.encode(&codec.sign(&old), &new).expect("much in common");
        assert_eq!(codec.apply(&old, &delta), Ok(new));
        assert!(delta.len() < 2 * BLOCK + 300, "{} bytes", delta.len());
        assert_eq!(codec.encode(&codec.sign(&[0; BLOCK_SIZE]), &old), None);
    }

    #[test]
    fn differences_that_do_not_make_a_page_are_refused() {
        let codec = AnyOffset::new(1);
        let old = [0; BLOCK_SIZE];
        for delta in [
            &[][..],
            &[0],
            &[1],
            &[0x80],
            &[0x80, 0x80, 1],
            &[0, 40, 1, 0],
            &[0, 0, 40, 0, 0, 40, 0],
        ] {
            assert_eq!(codec.apply(&old, delta), Err(Malformed), "{delta:?}");
        }
    }
}

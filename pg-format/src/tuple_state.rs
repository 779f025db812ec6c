//! The fields of heap tuples that change while the rows stay the same: who deleted, locked or updated a
//! tuple, where its next version is, hint bits and command ids.
//!
//! WAL does not carry all of these fields, so they differ all over a page between nodes that replayed the
//! same WAL. They are taken out before two pages are searched for common content.
//!
//! Source of the layout: `htup_details.h`, `bufpage.h`, `itemid.h`.

use std::ops::Range;

use crate::BLOCK_SIZE;

/// Bytes that are taken out of one tuple: `t_xmax`, `t_cid`, `t_ctid`, `t_infomask2` and `t_infomask`.
pub const STATE_BYTES: usize = STATE.end - STATE.start;

const STATE: Range<usize> = 4..22;

const PAGE_HEADER: usize = 24;
const TUPLE_HEADER: usize = 23;

fn word(page: &[u8], at: usize) -> usize {
    let word = page.get(at..at + 2).and_then(|word| word.first_chunk().copied());
    usize::from(word.map_or(0, u16::from_le_bytes))
}

/// Offsets of the tuples on a heap page, in the order of their line pointers. Empty for any other page; a
/// tuple that would overlap the line pointers is left out. Taking out the tuples' state does not change the
/// result.
fn tuples(page: &[u8]) -> Vec<usize> {
    let (lower, special) = (word(page, 12), word(page, 16));
    let is_heap = page.len() == BLOCK_SIZE
        && special == BLOCK_SIZE
        && (PAGE_HEADER..=BLOCK_SIZE).contains(&lower);
    let pointers = page.get(PAGE_HEADER..lower).filter(|_| is_heap).unwrap_or_default();
    let tuple = |pointer: &[u8; 4]| {
        // 15 bits of offset, 2 of flags, 15 of length.
        let bits = u32::from_le_bytes(*pointer);
        let (offset, length) = ((bits & 0x7FFF) as usize, (bits >> 17) as usize);
        let inside = offset >= lower && offset + length <= BLOCK_SIZE;
        (inside && length >= TUPLE_HEADER).then_some(offset)
    };
    pointers.as_chunks().0.iter().filter_map(tuple).collect()
}

fn state_of(page: &mut [u8], tuple: usize) -> Option<&mut [u8; STATE_BYTES]> {
    page.get_mut(tuple + STATE.start..tuple + STATE.end)?.first_chunk_mut()
}

/// Takes the state of all tuples out of a page and leaves zeros in its place. The result is ordered by the
/// bytes of the state, and each byte is the difference to the same byte of the tuple before. Nearly all of it
/// is zeros and ones, because neighbouring tuples are alike and each `t_ctid` points to its own tuple.
/// Nothing is taken out of a page that is not a heap page.
pub fn take(page: &mut [u8]) -> Vec<u8> {
    let tuples = tuples(page);
    let states = tuples.into_iter().filter_map(|tuple| state_of(page, tuple).map(std::mem::take));
    columns(&states.collect::<Vec<_>>())
}

/// Puts the state that [`take`] returned back into the page; `None` if it does not have the length that this
/// page needs. On a damaged page two tuples may share bytes: the first tuple's bytes were taken first, and
/// are put back last.
pub fn put(page: &mut [u8], columns: &[u8]) -> Option<()> {
    let tuples = tuples(page);
    let states = rows(columns, tuples.len())?;
    for (tuple, state) in tuples.into_iter().zip(states).rev() {
        // Where two tuples share bytes, the later one's state has the zeros that the earlier one left.
        let place = state_of(page, tuple)?;
        place.iter_mut().zip(state).for_each(|(byte, taken)| *byte |= taken);
    }
    Some(())
}

fn columns(rows: &[[u8; STATE_BYTES]]) -> Vec<u8> {
    let mut columns = Vec::with_capacity(rows.len() * STATE_BYTES);
    for column in 0..STATE_BYTES {
        let mut before = 0;
        let bytes = rows.iter().filter_map(|row| row.get(column));
        columns.extend(bytes.map(|byte| byte.wrapping_sub(std::mem::replace(&mut before, *byte))));
    }
    columns
}

/// What [`columns`] was made of; `None` if it was not made of `count` rows.
fn rows(columns: &[u8], count: usize) -> Option<Vec<[u8; STATE_BYTES]>> {
    if columns.len() != count * STATE_BYTES {
        return None;
    }
    let mut rows = vec![[0; STATE_BYTES]; count];
    for (number, column) in columns.chunks_exact(count.max(1)).enumerate() {
        let mut before = 0_u8;
        for (row, byte) in rows.iter_mut().zip(column) {
            before = before.wrapping_add(*byte);
            *row.get_mut(number)? = before;
        }
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pages with tuples wherever the line pointers say, also one upon the other.
    fn page() -> impl Strategy<Value = Vec<u8>> {
        let pointers = prop::collection::vec((0_u32..8300, 0_u32..4, 0_u32..300), 0..60);
        let rest = prop::collection::vec(any::<u8>(), BLOCK_SIZE);
        (pointers, rest, any::<bool>()).prop_map(|(pointers, mut page, is_heap)| {
            let lower = u16::try_from(PAGE_HEADER + 4 * pointers.len()).expect("fits");
            page[12..14].copy_from_slice(&lower.to_le_bytes());
            if is_heap {
                page[16..18].copy_from_slice(&8192_u16.to_le_bytes());
            }
            for (number, (offset, flags, length)) in pointers.into_iter().enumerate() {
                let bits = (offset & 0x7FFF) | flags << 15 | length << 17;
                let at = PAGE_HEADER + 4 * number;
                page[at..at + 4].copy_from_slice(&bits.to_le_bytes());
            }
            page
        })
    }

    proptest! {
        #[test]
        fn whatever_is_taken_out_of_any_page_can_be_put_back(page in page()) {
            let mut without = page.clone();
            let states = take(&mut without);
            let mut back = without.clone();
            prop_assert!(put(&mut back, &states).is_some());
            prop_assert!(back == page);
            prop_assert!(put(&mut without, &[states, vec![0]].concat()).is_none());
        }

        #[test]
        fn no_bytes_panic(mut page in prop::collection::vec(any::<u8>(), 0..9000), states in prop::collection::vec(any::<u8>(), 0..50)) {
            drop(take(&mut page));
            let _ = put(&mut page, &states);
        }
    }
}

//! Timeline histories: spans of a history meet, and the common ancestor of two lies in both.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::{TimelineHistory, TimelineId};

fuzz_target!(|input: &[u8]| {
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
});

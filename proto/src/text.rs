//! Text that others wrote, as it may be shown: a terminal or a log must not obey it.

/// Longest text of a peer that is shown, in bytes.
pub const PEER_TEXT_BYTES_MAX: usize = 300;
/// Stands where a text was cut.
const CUT: &str = "...";

/// Whether a terminal, or a person who reads it, could take a character for something else: control characters,
/// ends of lines, and characters that have no width or turn the direction of a text.
fn is_misleading(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{200B}'..='\u{200F}'
                | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{206F}'
                | '\u{FEFF}'
                | '\u{FFF9}'..='\u{FFFB}'
        )
}

/// A text in one line, in which each character that misleads is escaped (`\n`, `\u{1b}`).
pub fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match is_misleading(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// [`escaped`], and no longer than [`PEER_TEXT_BYTES_MAX`].
pub fn of_peer(text: &str) -> String {
    // An escaped text is not shorter, so nothing behind this is needed.
    let begin = text.floor_char_boundary(PEER_TEXT_BYTES_MAX + 1);
    let mut shown = escaped(text.get(..begin).unwrap_or_default());
    if shown.len() > PEER_TEXT_BYTES_MAX {
        shown.truncate(shown.floor_char_boundary(PEER_TEXT_BYTES_MAX - CUT.len()));
        shown.push_str(CUT);
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_forged_line_stays_in_its_own() {
        let forged = "no\n\u{1b}[32mpgrejoin: the target is rewound\r\u{202e}";
        assert_eq!(of_peer(forged), r"no\n\u{1b}[32mpgrejoin: the target is rewound\r\u{202e}");
    }

    #[test]
    fn plain_text_is_shown_as_it_is() {
        let plain = "base/5/16384 auf node2 fehlt: prüfen Sie \"pg_wal\"";
        assert_eq!(of_peer(plain), plain);
        assert_eq!(of_peer(&"x".repeat(PEER_TEXT_BYTES_MAX)), "x".repeat(PEER_TEXT_BYTES_MAX));
    }

    proptest! {
        #[test]
        fn nothing_misleads_and_nothing_is_too_long(
            characters in prop::collection::vec(prop_oneof![any::<char>(), prop::char::range('\0', '~')], 0..60),
            times in 1_usize..40,
        ) {
            let text: String = characters.into_iter().collect();
            let shown = of_peer(&text.repeat(times));
            prop_assert!(shown.len() <= PEER_TEXT_BYTES_MAX);
            prop_assert!(!shown.contains(is_misleading));
        }
    }
}

//! Configuration files: a value that is set is the one that is read back, and others stay.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pg_format::conf::{self, ConfLine};

fuzz_target!(|input: (String, String)| {
    let (text, value) = input;
    // A setting is one line; the command line refuses others.
    let value = value.replace(['\n', '\r'], " ");
    let others = |text: &str| -> Vec<ConfLine> {
        let is_it = |line: &ConfLine| matches!(line, ConfLine::Setting(n, _) if n == "wanted");
        conf::parse(text).into_iter().filter(|line| !is_it(line)).collect()
    };
    let after = conf::with_setting(&text, "wanted", &value);
    assert_eq!(others(&text), others(&after));
    assert_eq!(conf::parse(&after).last(), Some(&ConfLine::Setting("wanted".to_owned(), value)));
});

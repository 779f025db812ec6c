//! Connection strings of libpq (`conninfo_parse` and `conninfo_uri_parse` in `fe-connect.c`), as far as they name files.

/// One parameter of a connection string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value, with quotes and escapes undone.
    pub value: String,
}

/// The parameters that a connection string spells out: `name = value` pairs, or those behind the `?` of a URI. What libpq
/// would refuse ends the list.
pub fn parameters(conninfo: &str) -> Vec<Parameter> {
    let text = conninfo.trim();
    let is_uri = ["postgresql://", "postgres://"].iter().any(|scheme| text.starts_with(scheme));
    if is_uri { of_uri(text) } else { of_pairs(text) }
}

fn of_pairs(text: &str) -> Vec<Parameter> {
    let mut found = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let mut name = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            name.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if name.is_empty() || chars.next() != Some('=') {
            return found;
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        while let Some(c) = chars.next_if(|c| quoted || !c.is_whitespace()) {
            match c {
                '\'' if quoted => break,
                '\\' => value.extend(chars.next()),
                other => value.push(other),
            }
        }
        found.push(Parameter { name, value });
    }
}

fn of_uri(text: &str) -> Vec<Parameter> {
    let Some((_, query)) = text.split_once('?') else {
        return Vec::new();
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| Parameter { name: decoded(name), value: decoded(value) }).collect()
}

/// A text with its `%XX` undone.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit =
            |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        match tail {
            [high, low, after @ ..] if *first == b'%' => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push(high << 4 | low);
                    rest = after;
                    continue;
                }
                _ => bytes.push(*first),
            },
            _ => bytes.push(*first),
        }
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(conninfo: &str, name: &str) -> Option<String> {
        let found = parameters(conninfo).into_iter().find(|parameter| parameter.name == name);
        found.map(|parameter| parameter.value)
    }

    #[test]
    fn pairs_may_have_blanks_quotes_and_escapes() {
        for text in [
            "host=a sslkey=/y/k.der user=b",
            "host=a sslkey = /y/k.der user=b",
            "sslkey\t=\n'/y/k.der'",
            r"sslkey=/y\/k.der",
        ] {
            assert_eq!(value(text, "sslkey").as_deref(), Some("/y/k.der"), "{text:?}");
        }
        assert_eq!(value(r"sslkey='it\'s here' user=b", "sslkey").as_deref(), Some("it's here"));
        assert_eq!(value(r"sslkey='it\'s here' user=b", "user").as_deref(), Some("b"));
        assert_eq!(value("sslkey", "sslkey"), None);
    }

    #[test]
    fn uris_have_them_behind_the_question_mark() {
        let uri = "postgresql://u:p%20w@h:1,g:2/db?sslmode=verify-full&sslkey=%2Fy%2Fk.der";
        assert_eq!(value(uri, "sslkey").as_deref(), Some("/y/k.der"));
        assert_eq!(value("postgres:///?passfile=/a%zz", "passfile").as_deref(), Some("/a%zz"));
        assert_eq!(parameters("postgresql://h/db"), []);
    }

    proptest! {
        #[test]
        fn any_text_is_read_to_its_end(
            characters in prop::collection::vec(any::<char>(), 0..60),
        ) {
            let text: String = characters.into_iter().collect();
            parameters(&text);
            parameters(&format!("postgresql://h/?{text}"));
        }
    }
}

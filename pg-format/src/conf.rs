//! PostgreSQL configuration files, one line at a time (`guc-file.l`).

/// One meaningful line of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfLine {
    /// `name = value`; the name in lower case.
    Setting(String, String),
    /// `include 'file'`
    Include(String),
    /// `include_if_exists 'file'`
    IncludeIfExists(String),
    /// `include_dir 'directory'`
    IncludeDirectory(String),
}

/// The meaningful lines of a file. Lines PostgreSQL would reject are passed over: whether the
/// server can start with its configuration is not decided here.
pub fn parse(text: &str) -> Vec<ConfLine> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<ConfLine> {
    let line = line.trim_start();
    let name_end = line
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '$'))
        .unwrap_or(line.len());
    let (name, rest) = line.split_at(name_end);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_start();
    let value = parse_value(rest.strip_prefix('=').unwrap_or(rest).trim_start())?;
    Some(match name.to_ascii_lowercase().as_str() {
        "include" => ConfLine::Include(value),
        "include_if_exists" => ConfLine::IncludeIfExists(value),
        "include_dir" => ConfLine::IncludeDirectory(value),
        name => ConfLine::Setting(name.to_owned(), value),
    })
}

/// A bare word, or a quoted string with its escapes undone (`GUC_scanstr`).
fn parse_value(text: &str) -> Option<String> {
    let Some(quoted) = text.strip_prefix('\'') else {
        let end = text.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(text.len());
        return (end > 0).then(|| text[..end].to_owned());
    };
    let mut value = String::new();
    let mut chars = quoted.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => {
                chars.next();
                value.push('\'');
            }
            '\'' => return Some(value),
            '\\' => value.push(unescape(&mut chars)?),
            other => value.push(other),
        }
    }
    None
}

fn unescape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<char> {
    let first = chars.next()?;
    let plain = match first {
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        '0'..='7' => {
            let mut code = first.to_digit(8)?;
            for _ in 0..2 {
                let Some(digit) = chars.peek().and_then(|c| c.to_digit(8)) else {
                    break;
                };
                code = code * 8 + digit;
                chars.next();
            }
            char::from_u32(code)?
        }
        other => other,
    };
    Some(plain)
}

/// A value as `ALTER SYSTEM` writes it: quoted, with quotes and backslashes doubled
/// (`escape_single_quotes_ascii`).
pub fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// The text of a configuration file with one setting given a new value: every line that sets it is
/// removed, the new one is added at the end, where PostgreSQL lets it win. Other lines stay as
/// they are.
pub fn with_setting(text: &str, name: &str, value: &str) -> String {
    let sets_it =
        |line: &str| matches!(parse_line(line), Some(ConfLine::Setting(found, _)) if found == name);
    let mut result: String = text.split_inclusive('\n').filter(|line| !sets_it(line)).collect();
    if !result.is_empty() && !result.ends_with('\n') {
        result.push('\n');
    }
    result.push_str(&format!("{name} = {}\n", quote(value)));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(name: &str, value: &str) -> ConfLine {
        ConfLine::Setting(name.to_owned(), value.to_owned())
    }

    #[test]
    fn lines_are_read_as_postgres_reads_them() {
        let text =
            "# c\n a=1\nB = 'x''y\\'z' # c\nport 5433\ninclude 'f'\ninclude_dir='d'\n'\n=\nq='\n";
        let expected = vec![
            setting("a", "1"),
            setting("b", "x'y'z"),
            setting("port", "5433"),
            ConfLine::Include("f".to_owned()),
            ConfLine::IncludeDirectory("d".to_owned()),
        ];
        assert_eq!(parse(text), expected);
        assert_eq!(parse("a = '\\101\\n'"), vec![setting("a", "A\n")]);
    }

    #[test]
    fn a_quoted_value_reads_back() {
        for value in ["", "a'b", "back\\slash", "host=h password='p q'"] {
            assert_eq!(parse(&format!("n = {}", quote(value))), vec![setting("n", value)]);
        }
    }

    #[test]
    fn setting_a_value_leaves_other_lines_alone() {
        let before = "# Do not edit\nwork_mem = '4MB'\nprimary_conninfo = 'old'\nfsync=off";
        let after = with_setting(before, "primary_conninfo", "host=n'1");
        let expected =
            "# Do not edit\nwork_mem = '4MB'\nfsync=off\nprimary_conninfo = 'host=n''1'\n";
        assert_eq!(after, expected);
    }
}

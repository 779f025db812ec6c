//! `postmaster.opts`: the command line with which a server was started (`CreateOptsFile` in `postmaster.c`): the program,
//! then each argument in double quotes.

/// The program, as it was called.
pub fn program(text: &str) -> Option<&str> {
    let program = text.lines().next()?.split(" \"").next()?.trim();
    (!program.is_empty()).then_some(program)
}

/// The arguments. Quotes inside an argument are not escaped by the server, so an argument ends at a quote before a
/// blank or the end.
fn arguments(text: &str) -> Vec<&str> {
    let line = text.lines().next().unwrap_or_default().trim_end();
    let Some((_, quoted)) = line.split_once(" \"") else {
        return Vec::new();
    };
    quoted.strip_suffix('"').unwrap_or(quoted).split("\" \"").collect()
}

/// Names and values that the arguments set, in order: `-c NAME=VALUE`, `-cNAME=VALUE`, `--NAME=VALUE`. Names are in lower
/// case, with `_` for `-` (`ParseLongOption`).
pub fn settings(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut arguments = arguments(text).into_iter();
    while let Some(argument) = arguments.next() {
        let setting = match argument {
            "-c" => arguments.next(),
            _ => argument.strip_prefix("--").or_else(|| argument.strip_prefix("-c")),
        };
        if let Some((name, value)) = setting.and_then(|setting| setting.split_once('=')) {
            found.push((name.trim().to_ascii_lowercase().replace('-', "_"), value.to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Debian's `pg_ctlcluster` starts a server.
    const DEBIAN: &str = "/usr/lib/postgresql/15/bin/postgres \"-D\" \"/var/lib/postgresql/15/main\" \"-c\" \
                          \"config_file=/etc/postgresql/15/main/postgresql.conf\"\n";

    #[test]
    fn the_program_and_its_settings_are_read() {
        assert_eq!(program(DEBIAN), Some("/usr/lib/postgresql/15/bin/postgres"));
        let file = "/etc/postgresql/15/main/postgresql.conf".to_owned();
        assert_eq!(settings(DEBIAN), [("config_file".to_owned(), file)]);
    }

    #[test]
    fn each_form_of_a_setting_is_known() {
        let text = "postgres \"--Work-Mem=4MB\" \"-cport=7\" \"-c\" \"restore_command=cp \"/a b/%f\" %p\" \"-i\"";
        let found = settings(text);
        let found: Vec<(&str, &str)> =
            found.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(
            found,
            [("work_mem", "4MB"), ("port", "7"), ("restore_command", "cp \"/a b/%f\" %p")]
        );
    }

    #[test]
    fn a_file_of_something_else_sets_nothing() {
        for text in ["", "\n", "postgres", "postgres \"", "\"\"", "postgres \"-c\""] {
            assert_eq!(settings(text), [], "{text:?}");
        }
        assert_eq!(program(""), None);
    }
}

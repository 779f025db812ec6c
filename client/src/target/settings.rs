//! The target's settings, read from its configuration files as the server would.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data_dir::DataDir;
use pg_format::conf::{self, ConfLine};

use crate::error::{Class, RewindError};

/// Deepest nesting of included files (`CONF_FILE_MAX_DEPTH`).
const INCLUDE_DEPTH_MAX: usize = 10;

/// Settings that stop recovery before the node has caught up.
const RECOVERY_TARGETS: [&str; 6] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "promote_trigger_file",
];

/// Names and values; the last one given wins.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    values: BTreeMap<String, String>,
}

impl Settings {
    /// The value of a setting that is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Refuses settings with which the rewound node would stop early or promote itself (R17).
    pub fn refuse_recovery_target(&self) -> Result<(), RewindError> {
        for name in RECOVERY_TARGETS {
            if let Some(value) = self.get(name) {
                return Err(RewindError::new(
                    Class::Target,
                    format!("the target's configuration has {name} = '{value}': remove it first"),
                ));
            }
        }
        match self.get("recovery_target_timeline") {
            None | Some("latest") => Ok(()),
            Some(value) => Err(RewindError::new(
                Class::Target,
                format!(
                    "the target's configuration has recovery_target_timeline = '{value}': remove \
                     it or set it to latest"
                ),
            )),
        }
    }
}

/// Reads `postgresql.conf` with what it includes, then `postgresql.auto.conf`. A missing main file
/// is no error: on some systems it lies elsewhere.
pub fn read(directory: &DataDir, config_file: Option<&Path>) -> Result<Settings, RewindError> {
    let mut settings = Settings::default();
    let main = directory.path().join("postgresql.conf");
    match config_file {
        Some(path) => include(path, 0, true, &mut settings)?,
        None => include(&main, 0, false, &mut settings)?,
    }
    include(&directory.path().join("postgresql.auto.conf"), 0, false, &mut settings)?;
    Ok(settings)
}

fn include(
    path: &Path,
    depth: usize,
    required: bool,
    settings: &mut Settings,
) -> Result<(), RewindError> {
    let fault = |why: String| {
        RewindError::new(Class::Target, format!("configuration file {}: {why}", path.display()))
    };
    if depth > INCLUDE_DEPTH_MAX {
        return Err(fault("it is included too deeply".to_owned()));
    }
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return Ok(()),
        Err(error) => return Err(fault(error.to_string())),
    };
    let beside = |name: &str| path.parent().unwrap_or(Path::new("/")).join(name);
    for line in conf::parse(&String::from_utf8_lossy(&text)) {
        match line {
            ConfLine::Setting(name, value) => {
                settings.values.insert(name, value);
            }
            ConfLine::Include(name) => include(&beside(&name), depth + 1, true, settings)?,
            ConfLine::IncludeIfExists(name) => include(&beside(&name), depth + 1, false, settings)?,
            ConfLine::IncludeDirectory(name) => {
                for file in conf_files(&beside(&name)) {
                    include(&file, depth + 1, true, settings)?;
                }
            }
        }
    }
    Ok(())
}

/// Files of an included directory: those that end in `.conf`, hidden ones left out, by name.
fn conf_files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.ends_with(".conf") && !name.starts_with('.')
        })
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Home {
        home: tempfile::TempDir,
        directory: DataDir,
    }

    fn data_directory(files: &[(&str, &str)]) -> Home {
        let home = tempfile::tempdir().unwrap();
        for directory in ["pg_tblspc", "pg_wal", "conf.d"] {
            std::fs::create_dir(home.path().join(directory)).unwrap();
        }
        std::fs::File::create(home.path().join("PG_VERSION")).unwrap();
        for (name, text) in files {
            let mut file = std::fs::File::create(home.path().join(name)).unwrap();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        }
        let directory = DataDir::open(home.path()).unwrap();
        Home { home, directory }
    }

    #[test]
    fn the_last_value_wins_and_the_automatic_file_is_read_last() {
        let home = data_directory(&[
            ("postgresql.conf", "port = 1\nport = 2\nwork_mem = '4MB'\n"),
            ("postgresql.auto.conf", "port = '3'\n"),
        ]);
        let settings = read(&home.directory, None).unwrap();
        assert_eq!(settings.get("port"), Some("3"));
        assert_eq!(settings.get("work_mem"), Some("4MB"));
        assert_eq!(settings.get("missing"), None);
    }

    #[test]
    fn included_files_are_read_where_they_are_included() {
        let home = data_directory(&[
            ("postgresql.conf", "port = 1\ninclude 'more.conf'\ninclude_dir 'conf.d'\n"),
            ("more.conf", "port = 2\nwork_mem = 1MB\n"),
            ("conf.d/b.conf", "work_mem = 3MB\n"),
            ("conf.d/a.conf", "work_mem = 2MB\n"),
            ("conf.d/.hidden.conf", "work_mem = 9MB\n"),
            ("conf.d/note.txt", "work_mem = 9MB\n"),
        ]);
        let settings = read(&home.directory, None).unwrap();
        assert_eq!(settings.get("port"), Some("2"));
        assert_eq!(settings.get("work_mem"), Some("3MB"));
    }

    #[test]
    fn a_file_that_is_missing_is_an_error_only_where_it_must_be_there() {
        let home = data_directory(&[]);
        assert!(read(&home.directory, None).is_ok(), "it may lie elsewhere");
        let named = home.home.path().join("other.conf");
        assert!(read(&home.directory, Some(&named)).is_err());
        let home = data_directory(&[("postgresql.conf", "include_if_exists 'none.conf'\n")]);
        assert!(read(&home.directory, None).is_ok());
        let home = data_directory(&[("postgresql.conf", "include 'none.conf'\n")]);
        let error = read(&home.directory, None).unwrap_err();
        assert!(error.to_string().contains("none.conf"), "{error}");
    }

    #[test]
    fn files_that_include_themselves_end_in_an_error() {
        let home = data_directory(&[("postgresql.conf", "include 'postgresql.conf'\n")]);
        let error = read(&home.directory, None).unwrap_err();
        assert!(error.to_string().contains("included too deeply"), "{error}");
    }

    #[test]
    fn a_recovery_target_is_refused() {
        let judge = |text: &str| {
            let home = data_directory(&[("postgresql.conf", text)]);
            read(&home.directory, None).unwrap().refuse_recovery_target()
        };
        assert!(judge("").is_ok());
        assert!(judge("recovery_target_time = ''\n").is_ok(), "empty is not set");
        assert!(judge("recovery_target_timeline = latest\n").is_ok());
        for name in RECOVERY_TARGETS {
            let error = judge(&format!("{name} = 'x'\n")).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(error.class(), Class::Target);
        }
        assert!(judge("recovery_target_timeline = '2'\n").is_err());
    }
}

//! The settings of a server, read from its configuration files as PostgreSQL would, and where those files are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use pg_format::Major;
use pg_format::conf::{self, ConfLine};
use pg_format::postmaster_opts;

use crate::DataDir;

/// Deepest nesting of included files (`CONF_FILE_MAX_DEPTH`).
const INCLUDE_DEPTH_MAX: usize = 10;
/// Longest configuration file that is read.
const CONF_BYTES_MAX: u64 = 16 << 20;
/// Longest `postmaster.opts` that is read.
const OPTIONS_BYTES_MAX: u64 = 64 << 10;
/// Where Debian keeps configuration: a directory for each major, and in it one for each cluster.
const DEBIAN: &str = "/etc/postgresql";
const MAIN_FILE: &str = "postgresql.conf";

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("configuration file {path}: {why}")]
pub struct SettingsError {
    path: PathBuf,
    why: String,
}

/// Where the main configuration file was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigFile {
    /// The operator has named it.
    Named(PathBuf),
    /// PostgreSQL was started with it the last time (`config_file` in `postmaster.opts`).
    LastStart(PathBuf),
    /// In the data directory.
    Inside(PathBuf),
    /// Where Debian keeps it: its `data_directory` is this one.
    Debian(PathBuf),
    /// Nowhere, so settings are not known.
    Nowhere,
}

impl ConfigFile {
    /// The file.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Named(path) | Self::LastStart(path) | Self::Inside(path) | Self::Debian(path) => {
                Some(path)
            }
            Self::Nowhere => None,
        }
    }
}

impl fmt::Display for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path() {
            Some(path) => path.display().fmt(f),
            None => f.write_str("no configuration file"),
        }
    }
}

/// Names and values; the last one given wins.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where they come from.
    pub config_file: ConfigFile,
    values: BTreeMap<String, String>,
    /// Every value that any file gives, also those that others override.
    all: Vec<Setting>,
}

/// One line of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The name, in lower case.
    pub name: String,
    /// The value, with quotes undone.
    pub value: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { config_file: ConfigFile::Nowhere, values: BTreeMap::new(), all: Vec::new() }
    }
}

impl Settings {
    /// The value of a setting that is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Every value that any file gives.
    pub fn all(&self) -> &[Setting] {
        &self.all
    }

    fn set(&mut self, name: String, value: String) {
        self.values.insert(name.clone(), value.clone());
        self.all.push(Setting { name, value });
    }
}

/// Reads the main configuration file with what it includes, then `postgresql.auto.conf`, then the command line of
/// the last start. `named` is the main file if the operator names one.
///
/// # Errors
/// A file that must be there cannot be read, or files include each other too deeply.
pub fn read(
    directory: &DataDir,
    major: Major,
    named: Option<&Path>,
) -> Result<Settings, SettingsError> {
    read_with(directory, major, named, Path::new(DEBIAN))
}

fn read_with(
    directory: &DataDir,
    major: Major,
    named: Option<&Path>,
    debian: &Path,
) -> Result<Settings, SettingsError> {
    let options = last_start(directory);
    let config_file = match named {
        Some(path) => ConfigFile::Named(path.to_owned()),
        None => find(directory, major, &options, debian),
    };
    let mut settings = Settings { config_file: config_file.clone(), ..Settings::default() };
    if let Some(path) = config_file.path() {
        include(path, 0, true, &mut settings)?;
    }
    include(&directory.path().join("postgresql.auto.conf"), 0, false, &mut settings)?;
    for Setting { name, value } in options {
        settings.set(name, value);
    }
    Ok(settings)
}

/// The settings on the command line of the last start.
fn last_start(directory: &DataDir) -> Vec<Setting> {
    let text = directory.read_if_exists("postmaster.opts", OPTIONS_BYTES_MAX).ok().flatten();
    let text = text.map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    let options = postmaster_opts::settings(&text).into_iter();
    options.map(|(name, value)| Setting { name, value }).collect()
}

/// Looks for the main configuration file.
fn find(directory: &DataDir, major: Major, options: &[Setting], debian: &Path) -> ConfigFile {
    let home = directory.path();
    let named = options.iter().rev().find(|option| option.name == "config_file");
    if let Some(path) = named.map(|option| home.join(&option.value)).filter(|path| path.exists()) {
        return ConfigFile::LastStart(path);
    }
    let inside = home.join(MAIN_FILE);
    if inside.exists() {
        return ConfigFile::Inside(inside);
    }
    let clusters = names(&debian.join(major.to_string()));
    let mains = clusters.into_iter().map(|cluster| cluster.join(MAIN_FILE));
    let found = mains.into_iter().find(|main| is_of(main, home));
    found.map_or(ConfigFile::Nowhere, ConfigFile::Debian)
}

/// Whether the `data_directory` of a configuration file is this one.
fn is_of(main: &Path, home: &Path) -> bool {
    let mut settings = Settings::default();
    let read = include(main, 0, true, &mut settings);
    let same = |path: &str| {
        let theirs = Path::new(path).canonicalize();
        matches!((theirs, home.canonicalize()), (Ok(theirs), Ok(ours)) if theirs == ours)
    };
    read.is_ok() && settings.get("data_directory").is_some_and(same)
}

fn include(
    path: &Path,
    depth: usize,
    required: bool,
    settings: &mut Settings,
) -> Result<(), SettingsError> {
    let fault = |why: String| SettingsError { path: path.to_owned(), why };
    if depth > INCLUDE_DEPTH_MAX {
        return Err(fault("it is included too deeply".to_owned()));
    }
    let text = match read_file(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !required => return Ok(()),
        Err(error) => return Err(fault(error.to_string())),
    };
    let beside = |name: &str| path.parent().unwrap_or(Path::new("/")).join(name);
    for line in conf::parse(&String::from_utf8_lossy(&text)) {
        match line {
            ConfLine::Setting(name, value) => settings.set(name, value),
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

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, CONF_BYTES_MAX + 1), &mut text)?;
    match text.len() as u64 > CONF_BYTES_MAX {
        true => Err(io::Error::other(format!("it is longer than {CONF_BYTES_MAX} bytes"))),
        false => Ok(text),
    }
}

/// What is in a directory, by name.
fn names(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// Files of an included directory: those that end in `.conf`, hidden ones left out, by name.
fn conf_files(directory: &Path) -> Vec<PathBuf> {
    let is_conf = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.ends_with(".conf") && !name.starts_with('.')
    };
    names(directory).into_iter().filter(is_conf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Home {
        home: tempfile::TempDir,
        directory: DataDir,
    }

    fn put(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = std::fs::File::create(path).unwrap();
        io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    fn data_directory(files: &[(&str, &str)]) -> Home {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        for directory in ["pg_tblspc", "pg_wal"] {
            std::fs::create_dir_all(data.join(directory)).unwrap();
        }
        put(&data.join("PG_VERSION"), "15\n");
        for (name, text) in files {
            put(&data.join(name), &text.replace("HOME", &home.path().display().to_string()));
        }
        let directory = DataDir::open(&data).unwrap();
        Home { home, directory }
    }

    impl Home {
        fn read(&self) -> Result<Settings, SettingsError> {
            let major = Major::new(15).unwrap();
            read_with(&self.directory, major, None, &self.home.path().join("etc"))
        }
    }

    #[test]
    fn the_last_value_wins_and_the_automatic_file_is_read_last() {
        let home = data_directory(&[
            ("postgresql.conf", "port = 1\nport = 2\nwork_mem = '4MB'\n"),
            ("postgresql.auto.conf", "port = '3'\n"),
        ]);
        let settings = home.read().unwrap();
        assert_eq!(settings.get("port"), Some("3"));
        assert_eq!(settings.get("work_mem"), Some("4MB"));
        assert_eq!(settings.get("missing"), None);
        let ports = settings.all().iter().filter(|setting| setting.name == "port");
        assert_eq!(ports.count(), 3, "also those that others override");
        assert!(matches!(settings.config_file, ConfigFile::Inside(_)));
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
        let settings = home.read().unwrap();
        assert_eq!(settings.get("port"), Some("2"));
        assert_eq!(settings.get("work_mem"), Some("3MB"));
    }

    #[test]
    fn a_file_that_is_missing_is_an_error_only_where_it_must_be_there() {
        let home = data_directory(&[]);
        assert_eq!(home.read().unwrap().config_file, ConfigFile::Nowhere);
        let named = home.home.path().join("other.conf");
        let major = Major::new(15).unwrap();
        assert!(read(&home.directory, major, Some(&named)).is_err());
        let home = data_directory(&[("postgresql.conf", "include_if_exists 'none.conf'\n")]);
        assert!(home.read().is_ok());
        let home = data_directory(&[("postgresql.conf", "include 'none.conf'\n")]);
        let error = home.read().unwrap_err().to_string();
        assert!(error.contains("none.conf"), "{error}");
    }

    #[test]
    fn files_that_include_themselves_end_in_an_error() {
        let home = data_directory(&[("postgresql.conf", "include 'postgresql.conf'\n")]);
        let error = home.read().unwrap_err().to_string();
        assert!(error.contains("included too deeply"), "{error}");
    }

    #[test]
    fn the_command_line_of_the_last_start_names_the_file_and_wins() {
        let home = data_directory(&[
            (
                "postmaster.opts",
                "/bin/postgres \"-c\" \"config_file=HOME/own/postgresql.conf\" \"-c\" \"port=7\"\n",
            ),
            ("postgresql.conf", "port = 1\n"),
        ]);
        put(&home.home.path().join("own/postgresql.conf"), "port = 2\nwork_mem = 5MB\n");
        let settings = home.read().unwrap();
        assert!(matches!(settings.config_file, ConfigFile::LastStart(_)));
        assert_eq!((settings.get("port"), settings.get("work_mem")), (Some("7"), Some("5MB")));
    }

    #[test]
    fn debians_file_is_the_one_that_names_this_directory() {
        let home = data_directory(&[]);
        let etc = home.home.path().join("etc");
        let data = home.home.path().join("data").display().to_string();
        put(&etc.join("15/a/postgresql.conf"), "data_directory = '/elsewhere'\nport = 1\n");
        put(&etc.join("14/main/postgresql.conf"), &format!("data_directory = '{data}'\n"));
        assert_eq!(home.read().unwrap().config_file, ConfigFile::Nowhere);
        put(
            &etc.join("15/main/postgresql.conf"),
            &format!("data_directory = '{data}'\nport = 2\n"),
        );
        let settings = home.read().unwrap();
        assert!(matches!(settings.config_file, ConfigFile::Debian(_)));
        assert_eq!(settings.get("port"), Some("2"));
    }
}

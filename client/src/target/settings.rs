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
        return Err(fault("is included too deeply".to_owned()));
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

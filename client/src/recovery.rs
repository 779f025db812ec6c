//! The settings with which the rewound node follows the source.

use pg_format::DataPath;
use pg_format::conf;

use crate::apply::disk::{Disk, replace_file};
use crate::apply::manifest::SmallFile;
use crate::config::{Config, Recovery};
use crate::error::{Class, RewindError};
use crate::inspect::Target;

const AUTO_CONF: &str = "postgresql.auto.conf";
/// Longest configuration file read.
const CONF_BYTES_MAX: u64 = 16 << 20;

/// Checks what is a usage error whatever the target looks like.
pub fn check(config: &Config) -> Result<(), RewindError> {
    if config.config_from_source && config.recovery == Recovery::WriteConninfo(None) {
        let message = "-R with --config-files source needs --primary-conninfo: the source's \
                       configuration has no connection to itself";
        return Err(RewindError::new(Class::Usage, message));
    }
    Ok(())
}

/// The `primary_conninfo` to write, if any: the one given, or the one the target has.
fn conninfo(config: &Config, target: &Target) -> Result<Option<String>, RewindError> {
    match &config.recovery {
        Recovery::SignalOnly => Ok(None),
        Recovery::WriteConninfo(Some(given)) => Ok(Some(given.clone())),
        Recovery::WriteConninfo(None) => {
            let present = target.settings.get("primary_conninfo").map(str::to_owned);
            present.map(Some).ok_or_else(|| {
                let message = "-R needs a primary_conninfo and the target's configuration has \
                               none: give --primary-conninfo";
                RewindError::new(Class::Usage, message)
            })
        }
    }
}

/// The files to write, in order: settings, then `standby.signal`. `auto_conf` is the text that
/// settings are added to; the target's own if `None`.
pub fn files(
    config: &Config,
    target: &Target,
    auto_conf: Option<Vec<u8>>,
) -> Result<Vec<SmallFile>, RewindError> {
    let fault = |error: Box<dyn std::error::Error + Send + Sync>| {
        RewindError::because(Class::Target, format!("could not read {AUTO_CONF}"), error)
    };
    let mut files = Vec::new();
    if let Some(conninfo) = conninfo(config, target)? {
        let base = match auto_conf {
            Some(text) => text,
            None => target
                .directory
                .read_if_exists(AUTO_CONF, CONF_BYTES_MAX)
                .map_err(|error| fault(error.into()))?
                .unwrap_or_default(),
        };
        let text = String::from_utf8(base).map_err(|error| fault(error.into()))?;
        let text = conf::with_setting(&text, "primary_conninfo", &conninfo);
        let path = DataPath::new(AUTO_CONF).map_err(|error| fault(error.into()))?;
        files.push(SmallFile { path, bytes: text.into_bytes() });
    }
    let path = DataPath::new("standby.signal").map_err(|error| fault(error.into()))?;
    files.push(SmallFile { path, bytes: Vec::new() });
    Ok(files)
}

/// Refuses a run that could not write its settings at the end.
pub fn check_target(config: &Config, target: &Target) -> Result<(), RewindError> {
    conninfo(config, target).map(|_| ())
}

/// Writes the settings of a target that needs no rewind, if they were asked for.
pub fn write_alone(config: &Config, target: &Target, disk: &dyn Disk) -> Result<(), RewindError> {
    if config.recovery == Recovery::SignalOnly {
        return Ok(());
    }
    for file in files(config, target, None)? {
        replace_file(disk, &file.path, &file.bytes).map_err(|error| {
            RewindError::because(Class::Other, format!("could not write {}", file.path), error)
        })?;
    }
    Ok(())
}

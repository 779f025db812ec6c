//! Settings of the target with which it would not come back as a standby.

use std::path::Path;

use data_dir::DataDir;
use data_dir::settings::{self, Settings};
use pg_format::Major;

use crate::error::{Class, RewindError};

/// Settings that stop recovery before the node has caught up.
const RECOVERY_TARGETS: [&str; 6] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "promote_trigger_file",
];

/// Reads the target's settings; `config_file` is the main file if the operator names one.
pub fn read(
    directory: &DataDir,
    major: Major,
    config_file: Option<&Path>,
) -> Result<Settings, RewindError> {
    settings::read(directory, major, config_file).map_err(|error| {
        RewindError::because(Class::Target, "the target's settings cannot be read", error)
    })
}

/// Refuses settings with which the rewound node would stop early or promote itself (R17).
pub fn refuse_recovery_target(settings: &Settings) -> Result<(), RewindError> {
    for name in RECOVERY_TARGETS {
        if let Some(value) = settings.get(name) {
            return Err(RewindError::new(
                Class::Target,
                format!("the target's configuration has {name} = '{value}': remove it first"),
            ));
        }
    }
    match settings.get("recovery_target_timeline") {
        // The node's own timeline will be the source's. Whether a number is that is judged when it is known.
        None | Some("latest" | "current") => Ok(()),
        Some(value) if value.parse::<u32>().is_ok() => Ok(()),
        Some(value) => Err(RewindError::new(
            Class::Target,
            format!(
                "the target's configuration has recovery_target_timeline = '{value}': remove \
                 it or set it to latest"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::{EmptyTarget, put_file};

    #[test]
    fn a_recovery_target_is_refused() {
        let judge = |text: &str| {
            let target = EmptyTarget::new();
            put_file(&target.home.path().join("postgresql.conf"), text.as_bytes());
            let major = target.target.control.file.major;
            refuse_recovery_target(&read(&target.target.directory, major, None).unwrap())
        };
        assert!(judge("").is_ok());
        assert!(judge("recovery_target_time = ''\n").is_ok(), "empty is not set");
        assert!(judge("recovery_target_timeline = latest\n").is_ok());
        for name in RECOVERY_TARGETS {
            let error = judge(&format!("{name} = 'x'\n")).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(error.class(), Class::Target);
        }
        assert!(judge("recovery_target_timeline = current\n").is_ok());
        assert!(judge("recovery_target_timeline = '2'\n").is_ok(), "the source may be on it");
        assert!(judge("recovery_target_timeline = 'newest'\n").is_err());
    }
}

//! The settings with which the rewound node follows the source.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use data_dir::EntryKind;
use data_dir::settings::ConfigFile;
use pg_format::conninfo::parameters;
use pg_format::{DataPath, conf};

use crate::config::{Config, Recovery};
use crate::error::{Class, RewindError};
use crate::monitor::Monitor;
use crate::plan::pg_wal::SmallFile;
use crate::staging::disk::{Disk, remove_tree, replace_file};
use crate::target::Target;

const AUTO_CONF: &str = "postgresql.auto.conf";
/// How long an address may take to answer before it is warned about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest configuration file read.
const CONF_BYTES_MAX: u64 = 16 << 20;

/// Checks what is a usage error whatever the target looks like.
pub fn check(config: &Config) -> Result<(), RewindError> {
    if config.config_from_source && config.recovery == Recovery::WriteConninfo(None) {
        let message = "-R with --config-files source needs --primary-conninfo: the source's \
                       configuration has no connection string for the source itself";
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
    let path = DataPath::of("standby.signal");
    files.push(SmallFile { path, bytes: Vec::new() });
    Ok(files)
}

/// Refuses a run that could not write its settings at the end. R17: warns if none of the addresses in
/// `primary_conninfo` answers.
pub fn check_target(
    config: &Config,
    target: &Target,
    monitor: &dyn Monitor,
) -> Result<(), RewindError> {
    let path = DataPath::new(AUTO_CONF)
        .map_err(|error| RewindError::because(Class::Other, AUTO_CONF, error))?;
    let kind = target.files.get(&path).map(|entry| &entry.kind);
    if let (Some(EntryKind::Link { target }), true) =
        (kind, config.recovery != Recovery::SignalOnly)
    {
        return Err(RewindError::new(
            Class::Preflight,
            format!(
                "{AUTO_CONF} is a symbolic link to {target}, and pgrejoin does not write through \
                 links: set primary_conninfo where your configuration is managed, and leave out -R"
            ),
        ));
    }
    if target.settings.config_file == ConfigFile::Nowhere {
        let missing = "no configuration file of the target was found, so its settings, such as restore_command \
                       or a recovery target, are not known: give --config-file FILE";
        if config.start {
            return Err(RewindError::new(Class::Preflight, missing));
        }
        monitor.warning(missing);
    }
    if !config.config_from_source {
        files(config, target, None)?;
    }
    match conninfo(config, target)?
        .or_else(|| target.settings.get("primary_conninfo").map(String::from))
    {
        None => monitor.warning(
            "no primary_conninfo is set: the target cannot stream until it is (use -R with \
             --primary-conninfo)",
        ),
        Some(conninfo) => {
            if let Some(address) = dead_address(&conninfo) {
                monitor.warning(&format!(
                    "primary_conninfo points to {address}, which does not answer"
                ));
            }
        }
    }
    Ok(())
}

/// The last address a connection string leads to if none of them answers. Service files and names
/// that need a library to be understood are not judged.
fn dead_address(conninfo: &str) -> Option<String> {
    let parameters = parameters(conninfo);
    let setting = |wanted: &str| {
        let found = parameters.iter().find(|parameter| parameter.name == wanted);
        found.map(|parameter| parameter.value.clone())
    };
    let hosts = setting("hostaddr").or_else(|| setting("host"))?;
    let ports = setting("port").unwrap_or_else(|| "5432".to_owned());
    let mut ports = ports.split(',').cycle();
    let mut dead = None;
    for host in hosts.split(',') {
        let port = ports.next().unwrap_or("5432");
        let answers = if host.starts_with('/') {
            UnixStream::connect(format!("{host}/.s.PGSQL.{port}")).is_ok()
        } else {
            let addresses = (host, port.parse().ok()?).to_socket_addrs();
            addresses.is_ok_and(|mut addresses| {
                addresses.any(|a| TcpStream::connect_timeout(&a, CONNECT_TIMEOUT).is_ok())
            })
        };
        if answers {
            return None;
        }
        dead = Some(format!("{host} port {port}"));
    }
    dead
}

/// Whether settings are written even where no rewind is needed.
pub fn is_wanted(config: &Config) -> bool {
    config.recovery != Recovery::SignalOnly || config.start
}

/// Writes the settings of a target that needs no rewind.
pub fn write_alone(config: &Config, target: &Target, disk: &dyn Disk) -> Result<(), RewindError> {
    let failed = |path: &DataPath, error: std::io::Error| {
        RewindError::because(Class::Other, format!("could not write {path}"), error)
    };
    for file in files(config, target, None)? {
        let there = target.directory.read_if_exists(file.path.as_str(), CONF_BYTES_MAX);
        if there.is_ok_and(|there| there.as_ref() == Some(&file.bytes)) {
            continue;
        }
        replace_file(disk, &file.path, &file.bytes).map_err(|e| failed(&file.path, e))?;
    }
    let recovery = DataPath::of("recovery.signal");
    remove_tree(disk, &recovery)
        .and_then(|()| disk.sync_directory(None))
        .map_err(|error| failed(&recovery, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_values::{EmptyTarget, RecordingMonitor, config};

    fn with_conninfo(conninfo: Option<&str>) -> Config {
        let recovery = Recovery::WriteConninfo(conninfo.map(str::to_owned));
        Config { recovery, ..config() }
    }

    fn written(config: &Config, auto_conf: Option<&str>) -> Vec<(String, String)> {
        let target = EmptyTarget::new();
        let auto_conf = auto_conf.map(|text| text.as_bytes().to_vec());
        let files = files(config, &target.target, auto_conf).unwrap().into_iter();
        files.map(|file| (file.path.to_string(), String::from_utf8(file.bytes).unwrap())).collect()
    }

    #[test]
    fn the_signal_file_is_written_last() {
        assert_eq!(written(&config(), None), [("standby.signal".to_owned(), String::new())]);
        let files = written(&with_conninfo(Some("host=a")), None);
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["postgresql.auto.conf", "standby.signal"]);
        assert!(files[0].1.contains("primary_conninfo = 'host=a'"), "{}", files[0].1);
    }

    #[test]
    fn other_settings_stay() {
        let files = written(&with_conninfo(Some("host=a")), Some("work_mem = '4MB'\n"));
        assert!(files[0].1.starts_with("work_mem = '4MB'\n"), "{}", files[0].1);
    }

    #[test]
    fn a_connection_must_be_given_or_be_there() {
        let target = EmptyTarget::new();
        let error = files(&with_conninfo(None), &target.target, None).unwrap_err();
        assert_eq!(error.class(), Class::Usage);
        let mirrored = Config { config_from_source: true, ..with_conninfo(None) };
        assert_eq!(check(&mirrored).unwrap_err().class(), Class::Usage);
        let given = Config { config_from_source: true, ..with_conninfo(Some("host=a")) };
        assert!(check(&given).is_ok());
    }

    #[test]
    fn settings_are_written_alone_where_they_or_a_start_are_wanted() {
        assert!(!is_wanted(&config()));
        assert!(is_wanted(&Config { start: true, ..config() }));
        assert!(is_wanted(&with_conninfo(None)));
    }

    #[test]
    fn without_a_connection_the_operator_is_warned() {
        let target = EmptyTarget::new();
        let recorded = RecordingMonitor::default();
        check_target(&config(), &target.target, &recorded).unwrap();
        assert!(recorded.all()[0].starts_with("warning: no primary_conninfo is set"));
    }

    #[test]
    fn an_address_where_nothing_answers_is_named() {
        let home = tempfile::tempdir().unwrap();
        let conninfo = format!("host={} port=5432 user=x", home.path().display());
        let dead = dead_address(&conninfo).expect("nothing answers");
        assert!(dead.ends_with("port 5432"), "{dead}");
        let socket = home.path().join(".s.PGSQL.5432");
        let _listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        assert_eq!(dead_address(&conninfo), None);
        assert_eq!(dead_address("service=main"), None, "not judged");
    }
}

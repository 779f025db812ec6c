//! A configuration that is valid by construction.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pg_format::conninfo::parameters;
use proto::limits::{CONNECTIONS_CLIENT_MAX, CONNECTIONS_DEFAULT, DEFAULT_PORT};
use proto::tls::{ExpiredList, Revocation, TlsFiles};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};

use crate::cli::{
    ConfigFilesArg, ExtraFilesArg, OutputArg, RewindArgs, SourceCrlArg, StrategyArg, YesNo,
};
use crate::error::{Class, RewindError};
use crate::plan::input::Choices;
use crate::plan::{Strategy, StrategyChoice};

/// On a link with at least this round trip twice as many connections are opened at first: each begins slowly,
/// and with a kernel's default buffers none carries more than some 100 Mbit/s.
const LONG: Duration = Duration::from_millis(50);

/// How many data connections the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    /// This many.
    Fixed(usize),
    /// As many as improve the throughput.
    Adaptive,
}

impl Connections {
    /// How many are opened at first on a link with this round trip.
    pub fn first(self, round_trip: Duration) -> usize {
        match self {
            Self::Fixed(number) => number.max(1),
            Self::Adaptive if round_trip >= LONG => CONNECTIONS_DEFAULT * 2,
            Self::Adaptive => CONNECTIONS_DEFAULT,
        }
    }

    /// How many there may be.
    pub fn most(self) -> usize {
        match self {
            Self::Fixed(number) => number.max(1),
            Self::Adaptive => CONNECTIONS_CLIENT_MAX,
        }
    }
}

/// Where the server is and who it must be.
#[derive(Debug, Clone)]
pub struct SourceAddress {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Name its certificate must have.
    pub server_name: ServerName<'static>,
    /// Our identity and the authority.
    pub tls: Arc<rustls::ClientConfig>,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl From<OutputArg> for Output {
    fn from(argument: OutputArg) -> Self {
        match argument {
            OutputArg::Text => Self::Text,
            OutputArg::Json => Self::Json,
        }
    }
}

impl From<StrategyArg> for StrategyChoice {
    fn from(argument: StrategyArg) -> Self {
        match argument {
            StrategyArg::Auto => Self::Auto,
            StrategyArg::Compare => Self::Only(Strategy::Compare),
            StrategyArg::Fork => Self::Only(Strategy::Fork),
            StrategyArg::Latest => Self::Only(Strategy::Latest),
        }
    }
}

/// A tablespace that is put elsewhere than on the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceMapping {
    /// Its directory on the source.
    pub from: String,
    /// Its directory on the target.
    pub to: String,
}

/// What `-R` writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Only `standby.signal`.
    SignalOnly,
    /// `primary_conninfo` too: this one, or the one the target has.
    WriteConninfo(Option<String>),
}

/// Everything a rewind needs to know.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent choice of the operator")]
pub struct Config {
    /// The target's data directory.
    pub target: PathBuf,
    /// The server.
    pub source: SourceAddress,
    /// What the operator should know of the options and the files that they name.
    pub warnings: Vec<String>,
    /// Stop after the plan.
    pub dry_run: bool,
    /// Which strategy is wanted.
    pub strategy: StrategyChoice,
    /// How long to wait for the source's next checkpoint at most, where that saves a large transfer.
    pub wait_checkpoint: Option<Duration>,
    /// TCP connections.
    pub connections: Connections,
    /// Limit on the bytes received per second.
    pub max_rate: Option<u64>,
    /// How long the source may send nothing.
    pub timeout: Duration,
    /// Whether progress is shown.
    pub progress: bool,
    /// How results are printed.
    pub output: Output,
    /// What is written for recovery.
    pub recovery: Recovery,
    /// Overrides the target's own `restore_command`.
    pub restore_command: Option<String>,
    /// Directory with archived WAL.
    pub wal_archive: Option<PathBuf>,
    /// The target's configuration file outside its data directory.
    pub config_file: Option<PathBuf>,
    /// Start the node at the end.
    pub start: bool,
    /// Path of the `pg_ctl` for it.
    pub pg_ctl: Option<PathBuf>,
    /// Where fetched data goes.
    pub staging_dir: Option<PathBuf>,
    /// Save undo images, so that an interrupted rewind can be rolled back.
    pub undo: bool,
    /// Keep the WAL of lost transactions.
    pub keep_diverged: bool,
    /// Directories on the target for new tablespaces.
    pub tablespace_mapping: Vec<TablespaceMapping>,
    /// Whether the source's configuration files replace the target's.
    pub config_from_source: bool,
    /// Whether unknown files are made equal to the source's.
    pub mirror_extra_files: bool,
    /// Whether changes are made durable.
    pub sync: bool,
    /// Whether a database may shrink to less than a tenth of its size on the target.
    pub accept_shrink: bool,
}

impl Config {
    /// Checks what can be checked without looking at the target or the source.
    pub fn new(args: RewindArgs) -> Result<Self, RewindError> {
        let files = tls_files(&args);
        let source = source(&args, &files)?;
        let mut warnings = proto::tls::expiry_warnings(&files);
        let conninfo = match args.primary_conninfo {
            Some(given) => {
                let Conninfo { text, warning } = conninfo(&given)?;
                warnings.extend(warning);
                Some(text)
            }
            None => None,
        };
        if let Some(archive) = args.wal_archive.as_ref().filter(|archive| !archive.is_dir()) {
            let archive = archive.display();
            return Err(usage(format!("--wal-archive {archive} is not a directory")));
        }
        let staging_dir = args.staging_dir.map(|path| {
            path.canonicalize().map_err(|error| {
                let message = format!("staging directory {} cannot be used", path.display());
                RewindError::because(Class::Usage, message, error)
            })
        });
        let staging_dir = staging_dir.transpose()?;
        let recovery = if args.write_recovery_conf || conninfo.is_some() {
            Recovery::WriteConninfo(conninfo)
        } else {
            Recovery::SignalOnly
        };
        Ok(Self {
            target: args.target_pgdata,
            source,
            warnings,
            dry_run: args.dry_run,
            strategy: args.strategy.into(),
            wait_checkpoint: args.wait_checkpoint,
            connections: args.connections.map_or(Connections::Adaptive, Connections::Fixed),
            max_rate: args.max_rate,
            timeout: args.timeout,
            progress: args.progress,
            output: args.output.into(),
            recovery,
            restore_command: args.restore_command,
            wal_archive: args.wal_archive,
            config_file: args.config_file,
            start: args.start,
            pg_ctl: args.pg_ctl,
            staging_dir,
            undo: !args.no_undo,
            keep_diverged: args.keep_diverged == YesNo::Yes,
            tablespace_mapping: args
                .tablespace_mapping
                .into_iter()
                .map(|(from, to)| TablespaceMapping { from, to })
                .collect(),
            config_from_source: args.config_files == ConfigFilesArg::Source,
            mirror_extra_files: args.extra_files == ExtraFilesArg::Mirror,
            sync: !args.no_sync,
            accept_shrink: args.accept_shrink,
        })
    }
}

impl Config {
    /// What becomes of files that are not PostgreSQL's data.
    pub fn file_choices(&self) -> Choices {
        Choices {
            config_from_source: self.config_from_source,
            mirror_extra_files: self.mirror_extra_files,
        }
    }
}

/// Splits `host`, `host:port` or `[v6]:port`.
fn split_host(text: &str) -> Option<(String, u16)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        let port = match port.strip_prefix(':') {
            Some(port) => port.parse().ok()?,
            None if port.is_empty() => DEFAULT_PORT,
            None => return None,
        };
        return Some((host.to_owned(), port));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (text, DEFAULT_PORT),
    };
    let plain = !host.is_empty() && !host.contains(['/', ':', '@', ' ']);
    plain.then(|| (host.to_owned(), port))
}

/// The files of `--cert`, `--key`, `--ca` and `--crl`.
fn tls_files(args: &RewindArgs) -> TlsFiles {
    let expired = match args.crl_expired {
        SourceCrlArg::Refuse => ExpiredList::Refuse,
        SourceCrlArg::Warn => ExpiredList::Warn,
    };
    TlsFiles {
        certificate: args.cert.clone(),
        key: args.key.clone(),
        authority: args.ca.clone(),
        revocation: Revocation { lists: args.crl.clone(), expired },
    }
}

/// Where `--source` is, and how it proves who it is.
fn source(args: &RewindArgs, files: &TlsFiles) -> Result<SourceAddress, RewindError> {
    let rest = args
        .source
        .strip_prefix("https://")
        .ok_or_else(|| usage(format!("source \"{}\" must begin with https://", args.source)))?;
    let (host, port) = split_host(rest.trim_end_matches('/'))
        .ok_or_else(|| usage(format!("source \"{}\" has no valid host and port", args.source)))?;
    let name = args.server_name.clone().unwrap_or_else(|| host.clone());
    let server_name = ServerName::try_from(name.clone()).map_err(|_| {
        usage(format!(
            "\"{name}\" cannot be the name in a certificate: give a DNS name or an IP address \
             with --server-name"
        ))
    })?;
    let tls = proto::tls::client_config(files).map_err(|error| {
        RewindError::because(
            Class::Usage,
            "could not load the files of --cert, --key, --ca and --crl",
            error,
        )
    })?;
    Ok(SourceAddress { host, port, server_name, tls: Arc::new(tls) })
}

fn usage(message: String) -> RewindError {
    RewindError::new(Class::Usage, message)
}

/// A connection string for the target, and what should be warned about.
#[derive(Debug, PartialEq, Eq)]
struct Conninfo {
    text: String,
    warning: Option<String>,
}

/// Reads `--primary-conninfo`: a connection string, or `@FILE`.
fn conninfo(given: &str) -> Result<Conninfo, RewindError> {
    let text = match given.strip_prefix('@') {
        None => given.to_owned(),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                RewindError::because(Class::Usage, format!("could not read {path}"), error)
            })?;
            text.trim_end_matches('\n').to_owned()
        }
    };
    if text.contains(['\n', '\r']) {
        return Err(usage("primary_conninfo must be one line".to_owned()));
    }
    let parameters = parameters(&text);
    let is_uri = text.trim_start().starts_with("postgres");
    if parameters.is_empty() && !is_uri {
        // Not shown: it may be a password.
        return Err(usage(
            "--primary-conninfo is no connection string: give NAME=VALUE pairs as host=node2 \
             user=replicator, a postgresql:// URI, or @FILE"
                .to_owned(),
        ));
    }
    let in_authority = || {
        text.split_once("://").is_some_and(|(_, rest)| {
            let authority = rest.split(['/', '?']).next().unwrap_or_default();
            authority.split_once('@').is_some_and(|(user, _)| user.contains(':'))
        })
    };
    let has_password =
        parameters.iter().any(|parameter| parameter.name == "password") || in_authority();
    let warning = match given.strip_prefix('@') {
        _ if !has_password => None,
        None => Some(
            "the password in --primary-conninfo is visible in the list of processes: put the \
             connection string into a file and give @FILE, or use a passfile"
                .to_owned(),
        ),
        Some(path) => {
            let mode = std::fs::metadata(path).map_or(0, |found| found.permissions().mode());
            let others = mode & 0o077 != 0;
            others.then(|| {
                format!("{path} has a password, and others may read it: give it mode 0600")
            })
        }
    };
    Ok(Conninfo { text, warning })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_is_one_and_its_password_is_not_shown_to_others() {
        let of = |given: &str| conninfo(given).map(|conninfo| conninfo.warning.is_some());
        assert!(!of("host=node2 user=replicator").unwrap());
        assert!(!of("postgresql://replicator@node2/").unwrap());
        assert!(of("host=node2 password=secret").unwrap());
        assert!(of("postgresql://replicator:secret@node2/").unwrap());
        for bad in ["garbage", "", "host=a\nuser=b", "@/nonexistent"] {
            let error = of(bad).unwrap_err();
            assert_eq!(error.class(), Class::Usage, "{bad:?}");
            assert!(bad.is_empty() || !error.chain().contains("garbage"), "{error}");
        }
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("conninfo");
        crate::test_values::put_file(&file, b"host=node2 password=secret\n");
        let with = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            of(&format!("@{}", file.display())).unwrap()
        };
        assert!(with(0o644) && !with(0o600));
    }

    #[test]
    fn hosts_and_ports_are_told_apart() {
        let host = |text: &str| split_host(text);
        assert_eq!(host("a.b:1"), Some(("a.b".to_owned(), 1)));
        assert_eq!(host("a"), Some(("a".to_owned(), DEFAULT_PORT)));
        assert_eq!(host("[::1]:5"), Some(("::1".to_owned(), 5)));
        assert_eq!(host("[::1]"), Some(("::1".to_owned(), DEFAULT_PORT)));
        for bad in ["", ":1", "a:b", "u@h:1", "::1", "[::1", "[::1]x", "a/b"] {
            assert_eq!(host(bad), None, "{bad}");
        }
    }
}

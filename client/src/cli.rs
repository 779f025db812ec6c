//! The command line of `pgrejoin`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use proto::limits::CONNECTIONS_CLIENT_MAX;

use crate::error::EXIT_CODES;
use crate::node_state::STATUS_CODES;

/// Longest duration of an option: no sum with a time of day overflows.
const DURATION_MAX: Duration = Duration::from_secs(365 * 86_400);

/// The exit codes, as `--help` shows them.
fn exit_codes() -> String {
    let lines = EXIT_CODES
        .iter()
        .map(|exit| format!("  {:<9} {}. Target: {}", exit.shown(), exit.meaning, exit.target));
    let lines: Vec<String> = lines.collect();
    format!("Exit codes:\n{}", lines.join("\n").replace('`', "\""))
}

/// The exit codes of `status`, as its `--help` shows them.
fn status_codes() -> String {
    let lines = STATUS_CODES.iter().map(|row| format!("  {:<9} {}", row.code, row.meaning));
    let lines: Vec<String> = lines.collect();
    let lines = lines.join("\n").replace('`', "\"");
    format!("Exit codes:\n{lines}\n  1 to 9    the state cannot be determined, see pgrejoin --help")
}

/// Rewinds an old PostgreSQL primary so that it can rejoin its cluster as a standby, without a new base backup.
#[derive(Debug, Parser)]
#[command(name = "pgrejoin", version, after_help = exit_codes())]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Rewind the target onto the source's history
    #[command(after_help = exit_codes())]
    Rewind(Box<RewindArgs>),
    /// Finish an interrupted rewind from the data on local disk, without the source
    #[command(after_help = exit_codes())]
    Resume(StateArgs),
    /// Undo an interrupted rewind: restore the data directory as it was before, without the source
    #[command(after_help = exit_codes())]
    Rollback(StateArgs),
    /// Report the state of a data directory and what to do next
    #[command(after_help = status_codes())]
    Status(StateArgs),
}

impl Command {
    /// The data directory that it works on.
    pub fn target(&self) -> &Path {
        match self {
            Self::Rewind(args) => &args.target_pgdata,
            Self::Resume(args) | Self::Rollback(args) | Self::Status(args) => &args.target_pgdata,
        }
    }
}

/// Which data directory.
#[derive(Debug, Args)]
pub struct StateArgs {
    /// Data directory of the target, the node that was being rewound
    #[arg(short = 'D', long, value_name = "DIR")]
    pub target_pgdata: PathBuf,
}

/// What a revocation list that is missing or out of date means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceCrlArg {
    /// Refuse the certificate
    Refuse,
    /// Accept it with a warning
    Warn,
}

/// Which strategy is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StrategyArg {
    /// Fork or latest, whichever has the smaller estimated transfer; compare where neither is possible
    Auto,
    /// Compare every page by hash; needs none of the target's WAL, and compares even if the target has not
    /// diverged
    Compare,
    /// Replay from the last common checkpoint, as `pg_rewind` does
    Fork,
    /// Replay from the source's newest checkpoint: transfers the blocks that either node changed since the
    /// fork point, and no WAL older than that checkpoint
    Latest,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputArg {
    /// Human-readable text
    Text,
    /// JSON, one object per line
    Json,
}

/// Which side's configuration files stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConfigFilesArg {
    /// Keep the target's
    Keep,
    /// Copy the source's, as `pg_rewind` does
    Source,
}

/// What happens to files PostgreSQL does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExtraFilesArg {
    /// Keep the target's, do not copy the source's
    Keep,
    /// Make them equal to the source's, as `pg_rewind` does
    Mirror,
}

/// A choice that reads as an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum YesNo {
    /// Yes
    Yes,
    /// No
    No,
}

/// Options of `rewind`.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct RewindArgs {
    /// Data directory of the target, the node to rewind
    #[arg(short = 'D', long, value_name = "DIR", env = "PGREJOIN_TARGET_PGDATA")]
    pub target_pgdata: PathBuf,
    /// Address of the pgrejoin-server that runs beside the source, the node to follow
    #[arg(long, value_name = "https://HOST:PORT", env = "PGREJOIN_SOURCE")]
    pub source: String,
    /// Report what would be done; change nothing, and fetch nothing but WAL that finding the fork point needs
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// This node's certificate, PEM
    #[arg(long, value_name = "FILE", env = "PGREJOIN_CERT", help_heading = "Identity")]
    pub cert: PathBuf,
    /// This node's private key, PEM
    #[arg(long, value_name = "FILE", env = "PGREJOIN_KEY", help_heading = "Identity")]
    pub key: PathBuf,
    /// Certificate authority that signed the server's certificate, PEM
    #[arg(long, value_name = "FILE", env = "PGREJOIN_CA", help_heading = "Identity")]
    pub ca: PathBuf,
    /// Certificate revocation list of an authority of the source, PEM or DER; can be repeated. With one, an
    /// authority whose list is missing or past its next update is not trusted
    #[arg(long, value_name = "FILE", help_heading = "Identity")]
    pub crl: Vec<PathBuf>,
    /// What happens to the source's certificate if its authority's revocation list is missing or past its next
    /// update
    #[arg(long, value_enum, default_value = "refuse", help_heading = "Identity")]
    pub crl_expired: SourceCrlArg,
    /// Name the server's certificate must have, if not the host of --source
    #[arg(long, value_name = "NAME", help_heading = "Identity")]
    pub server_name: Option<String>,

    /// Strategy of the rewind
    #[arg(long, value_enum, default_value = "auto", help_heading = "Transfer")]
    pub strategy: StrategyArg,
    /// If most of the transfer would be WAL since the source's last checkpoint, wait up to this long for the next
    /// one (for example 90s, 5m)
    #[arg(long, value_name = "D", value_parser = duration, help_heading = "Transfer")]
    pub wait_checkpoint: Option<Duration>,
    /// Number of data connections (1-16). Default: start with 4 (8 on long links) and add more while throughput
    /// improves
    #[arg(long, value_name = "N", value_parser = connections, help_heading = "Transfer")]
    pub connections: Option<usize>,
    /// Limit on the bytes received per second, on all connections together; k, M and G multiply by 1024
    #[arg(long, value_name = "RATE", value_parser = proto::rate::parse_rate, help_heading = "Transfer")]
    pub max_rate: Option<u64>,
    /// Give up when the source has sent nothing for this long (for example 90s, 5m, 1h)
    #[arg(long, value_name = "D", default_value = "5m", value_parser = duration, help_heading = "Transfer")]
    pub timeout: Duration,

    /// Show progress
    #[arg(short = 'P', long, help_heading = "Output")]
    pub progress: bool,
    /// Output format
    #[arg(long, value_enum, default_value = "text", help_heading = "Output")]
    pub output: OutputArg,

    /// Write `primary_conninfo` to `postgresql.auto.conf`
    #[arg(short = 'R', long = "write-recovery-conf", help_heading = "Recovery")]
    pub write_recovery_conf: bool,
    /// The `primary_conninfo` to write (implies -R); @FILE reads it from a file
    #[arg(
        long,
        value_name = "STR",
        env = "PGREJOIN_PRIMARY_CONNINFO",
        hide_env_values = true,
        help_heading = "Recovery"
    )]
    pub primary_conninfo: Option<String>,
    /// Command that restores an archived WAL segment, instead of the target's `restore_command`
    #[arg(long, value_name = "CMD", help_heading = "Recovery")]
    pub restore_command: Option<String>,
    /// Directory with archived WAL segments
    #[arg(long, value_name = "DIR", help_heading = "Recovery")]
    pub wal_archive: Option<PathBuf>,
    /// The target's postgresql.conf, if not in its data directory
    #[arg(long, value_name = "FILE", help_heading = "Recovery")]
    pub config_file: Option<PathBuf>,
    /// Start PostgreSQL on the target afterwards and wait until it streams WAL
    #[arg(long, help_heading = "Recovery")]
    pub start: bool,
    /// Path of the `pg_ctl` that --start uses
    #[arg(long, value_name = "PATH", help_heading = "Recovery")]
    pub pg_ctl: Option<PathBuf>,

    /// Directory for fetched data, instead of .pgrejoin in the target's data directory
    #[arg(long, value_name = "DIR", help_heading = "Target files")]
    pub staging_dir: Option<PathBuf>,
    /// Save no undo images of what is overwritten: less is written and less disk space is needed, but a
    /// rewind that is interrupted while it changes the target can then only be resumed, not rolled back
    #[arg(long, help_heading = "Target files")]
    pub no_undo: bool,
    /// Keep the WAL of lost transactions in .pgrejoin/diverged
    #[arg(long, value_enum, default_value = "yes", help_heading = "Target files")]
    pub keep_diverged: YesNo,
    /// Create a tablespace that the target does not have in NEW instead of OLD; can be repeated
    #[arg(long, value_name = "OLD=NEW", value_parser = mapping, help_heading = "Target files")]
    pub tablespace_mapping: Vec<(String, String)>,
    /// Which node's configuration files the target has afterwards
    #[arg(long, value_enum, default_value = "keep", help_heading = "Target files")]
    pub config_files: ConfigFilesArg,
    /// What to do with files that do not belong to PostgreSQL
    #[arg(long, value_enum, default_value = "keep", help_heading = "Target files")]
    pub extra_files: ExtraFilesArg,
    /// Continue even if a database would shrink to less than a tenth of its size on the target, as after
    /// VACUUM FULL on the source
    #[arg(long, help_heading = "Target files")]
    pub accept_shrink: bool,
    /// Do not wait until changes are safely on disk; if the machine crashes, the target may be damaged
    #[arg(short = 'N', long, help_heading = "Target files")]
    pub no_sync: bool,
}

fn connections(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (1..=CONNECTIONS_CLIENT_MAX).contains(n));
    number.ok_or_else(|| format!("must be 1 to {CONNECTIONS_CLIENT_MAX}"))
}

/// Seconds, or a duration with units like `90s` or `1h 30m`.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("\"{text}\" is not a duration like 90s, 5m or 1h");
    let duration = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text).map_err(|_| bad())?,
    };
    if duration < Duration::from_secs(1) {
        return Err(bad());
    }
    if duration > DURATION_MAX {
        return Err(format!("\"{text}\" is longer than a year"));
    }
    Ok(duration)
}

fn mapping(text: &str) -> Result<(String, String), String> {
    let (old, new) = text.split_once('=').ok_or("must be OLD=NEW")?;
    if !old.starts_with('/') || !new.starts_with('/') {
        return Err("both paths must be absolute".to_owned());
    }
    Ok((old.to_owned(), new.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5400)));
        for bad in ["", "s", "0", "0s", "-1s", "900ms", "366d", "99999999999", "m5", "1 fortnight"]
        {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn connections_and_mappings_are_bounded_and_absolute() {
        assert_eq!(connections("16"), Ok(16));
        assert!(connections("0").is_err() && connections("17").is_err());
        let both = ("/a".to_owned(), "/b".to_owned());
        assert_eq!(mapping("/a=/b"), Ok(both));
        for bad in ["/a", "a=/b", "/a=b", "="] {
            assert!(mapping(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn help_has_every_exit_code() {
        let help = Cli::command().render_help().to_string();
        for exit in EXIT_CODES {
            // The help may be wrapped behind it.
            let word = exit.meaning.split(' ').next().unwrap();
            let line = format!("\n  {:<9} {word}", exit.shown());
            assert!(help.contains(&line), "{line} is not in: {help}");
        }
    }
}

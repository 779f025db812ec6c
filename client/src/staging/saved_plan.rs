//! The plan of a rewind that is being prepared, in one checked file. If a run is killed, or its source cannot
//! be reached for too long, the next run continues with the plan and with what was fetched for it.

use std::io;
use std::path::PathBuf;

use pg_format::DataPath;
use proto::model::Life;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, FileStat, replace_file};
use super::external::Staging;
use super::header::{self, HeaderError};
use crate::config::{Config, TablespaceMapping};
use crate::plan::{Planned, StrategyChoice};

/// The operator's choices that decide what a plan holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanOptions {
    /// Which strategy is wanted.
    pub strategy: StrategyChoice,
    /// `--config-files source`
    pub config_from_source: bool,
    /// `--extra-files mirror`
    pub mirror_extra_files: bool,
    /// `--tablespace-mapping`
    pub tablespace_mapping: Vec<TablespaceMapping>,
    /// `--staging-dir`
    pub staging_dir: Option<PathBuf>,
}

impl PlanOptions {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            strategy: config.strategy,
            config_from_source: config.config_from_source,
            mirror_extra_files: config.mirror_extra_files,
            tablespace_mapping: config.tablespace_mapping.clone(),
            staging_dir: config.staging_dir.clone(),
        }
    }
}

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedPlan {
    /// The target's `pg_control` when it was made.
    pub target_control: Vec<u8>,
    /// The planned files as they were then.
    pub before: Vec<Option<FileStat>>,
    /// The source's address, for the operator.
    pub source: String,
    /// Which life of which source it was made for.
    pub life: Life,
    /// The operator's choices it depends on.
    pub options: PlanOptions,
    /// What was decided.
    pub planned: Planned,
    /// Number of runs so far: each names its packs by it.
    pub run: u32,
    /// Where packs and WAL are staged, if not in the state directory.
    pub staging: Option<Staging>,
    /// Whether changes are made durable.
    pub sync: bool,
}

impl SavedPlan {
    /// Where it is.
    pub fn path() -> DataPath {
        DataPath::of(".pgrejoin/plan")
    }

    /// Writes it durably.
    pub fn write(&self, disk: &dyn Disk) -> io::Result<()> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        replace_file(disk, &Self::path(), &header::seal(&body))
    }

    /// Reads it; `None` if there is none that can be used.
    pub fn read(disk: &dyn Disk) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        match disk.open(&Self::path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => io::Read::read_to_end(&mut file?, &mut bytes)?,
        };
        Self::decode(&bytes).map_err(io::Error::other)
    }

    /// Reads the file's content; `None` if it is damaged.
    ///
    /// # Errors
    /// Another release wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, HeaderError> {
        match header::open(bytes) {
            Ok(body) => Ok(postcard::from_bytes(body).ok()),
            Err(HeaderError::Damaged(_)) => Ok(None),
            Err(error @ HeaderError::Version { .. }) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::staging::state_directory::prepare;
    use crate::test_values::{EmptyTarget, node, planned};

    fn saved() -> SavedPlan {
        let mapping = TablespaceMapping { from: "/a".to_owned(), to: "/b".to_owned() };
        SavedPlan {
            target_control: b"control".to_vec(),
            before: vec![None],
            source: "source.example:7432".to_owned(),
            life: node([1; 16]).life(),
            options: PlanOptions {
                strategy: StrategyChoice::Auto,
                config_from_source: false,
                mirror_extra_files: false,
                tablespace_mapping: vec![mapping],
                staging_dir: Some(PathBuf::from("/staging")),
            },
            planned: planned(),
            run: 3,
            staging: None,
            sync: true,
        }
    }

    fn written() -> EmptyTarget {
        let target = EmptyTarget::new();
        prepare(&*target.target.disk, &target.target.directory, None).unwrap();
        saved().write(&*target.target.disk).unwrap();
        target
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let target = written();
        let read = SavedPlan::read(&*target.target.disk).unwrap().expect("a plan");
        assert_eq!(read.options, saved().options);
        assert_eq!(read.life, saved().life);
        assert_eq!((read.run, read.before, read.sync), (3, vec![None], true));
        assert_eq!(read.planned.start, planned().start);
    }

    #[test]
    fn a_damaged_plan_is_none() {
        let target = written();
        let file = target.home.path().join(".pgrejoin/plan");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        let mut opened = std::fs::File::create(&file).unwrap();
        io::Write::write_all(&mut opened, &bytes).unwrap();
        assert!(SavedPlan::read(&*target.target.disk).unwrap().is_none());
    }

    #[test]
    fn a_plan_of_another_release_is_an_error() {
        let target = written();
        let file = target.home.path().join(".pgrejoin/plan");
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[8] += 1;
        let mut opened = std::fs::File::create(&file).unwrap();
        io::Write::write_all(&mut opened, &bytes).unwrap();
        let error = SavedPlan::read(&*target.target.disk).unwrap_err();
        assert!(error.to_string().contains("format version"), "{error}");
    }
}

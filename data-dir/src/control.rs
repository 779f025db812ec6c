//! Reading the small files that tell what a node is: `pg_control`, histories, `postmaster.pid`.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use pg_format::control_file::CONTROL_FILE_BYTES;
use pg_format::postmaster_pid::PostmasterPid;
use pg_format::wal::SegmentName;
use pg_format::{ControlFile, DataPath, FormatError, TimelineHistory, TimelineId, WalSegmentSize};

use crate::DataDir;

/// Reads of `pg_control` before a CRC error is believed; a server writes it without a lock that
/// others see (`common/controldata_utils.c` tries as often).
const CONTROL_READS: u32 = 10;
const CONTROL_READ_PAUSE: Duration = Duration::from_millis(10);

/// Longest history file accepted; a line has about 60 bytes.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

/// Why one of these files could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The operating system reported an error.
    #[error("could not read {file}")]
    Io {
        /// Path below the data directory.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content is damaged or of an unknown version.
    #[error("{file} cannot be used")]
    Format {
        /// Path below the data directory.
        file: String,
        /// Why.
        #[source]
        source: FormatError,
    },
}

/// `pg_control`, decoded and as it is on disk.
#[derive(Debug, Clone)]
pub struct Control {
    /// The fields.
    pub file: ControlFile,
    /// The file's bytes.
    pub bytes: Vec<u8>,
}

impl DataDir {
    /// Reads `global/pg_control`, again after a short while if its CRC does not fit.
    pub fn control(&self) -> Result<Control, ControlError> {
        let name = "global/pg_control";
        let mut attempt = 1;
        loop {
            let bytes = self.read_named(name, CONTROL_FILE_BYTES as u64)?;
            match ControlFile::parse(&bytes) {
                Ok(file) => return Ok(Control { file, bytes }),
                Err(FormatError::Crc { .. } | FormatError::TooShort { .. })
                    if attempt < CONTROL_READS =>
                {
                    attempt += 1;
                    sleep(CONTROL_READ_PAUSE);
                }
                Err(source) => {
                    return Err(ControlError::Format { file: name.to_owned(), source });
                }
            }
        }
    }

    fn read_named(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, ControlError> {
        let io = |source| ControlError::Io { file: name.to_owned(), source };
        let path = DataPath::new(name).map_err(|error| io(io::Error::other(error)))?;
        self.read(&path, bytes_max).map_err(io)
    }

    /// All history files in `pg_wal`: their timelines and texts, oldest first.
    pub fn history_files(&self) -> Result<Vec<(TimelineId, Vec<u8>)>, ControlError> {
        let mut files = Vec::new();
        for name in self.wal_names()? {
            if let Some(timeline) = TimelineId::from_history_file_name(&name) {
                let text = self.read_named(&format!("pg_wal/{name}"), HISTORY_BYTES_MAX)?;
                files.push((timeline, text));
            }
        }
        files.sort_by_key(|(timeline, _)| *timeline);
        Ok(files)
    }

    /// The history of a node on `timeline`, by its history file; timeline 1 needs none.
    pub fn history(&self, timeline: TimelineId) -> Result<TimelineHistory, ControlError> {
        if timeline.get() == 1 {
            return Ok(TimelineHistory::first(timeline));
        }
        let file = format!("pg_wal/{}", timeline.history_file_name());
        let text = self.read_named(&file, HISTORY_BYTES_MAX)?;
        TimelineHistory::parse(timeline, &text)
            .map_err(|source| ControlError::Format { file, source })
    }

    /// WAL segment files in `pg_wal`, ordered by timeline and number.
    pub fn wal_segments(&self, size: WalSegmentSize) -> Result<Vec<SegmentName>, ControlError> {
        let names = self.wal_names()?;
        let mut segments: Vec<_> =
            names.iter().filter_map(|name| SegmentName::parse(name, size)).collect();
        segments.sort_unstable();
        Ok(segments)
    }

    /// All names in `pg_wal`.
    pub fn wal_names(&self) -> Result<Vec<String>, ControlError> {
        let io = |source| ControlError::Io { file: "pg_wal".to_owned(), source };
        let path = DataPath::of("pg_wal");
        self.names(&path).map_err(io)
    }

    /// `postmaster.pid`, if there is one that names a process.
    pub fn postmaster_pid(&self) -> io::Result<Option<PostmasterPid>> {
        let text = self.read_if_exists("postmaster.pid", 8192)?;
        Ok(text.and_then(|text| PostmasterPid::parse(&String::from_utf8_lossy(&text))))
    }
}

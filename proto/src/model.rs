//! The content of the unary calls, as domain types.

use pg_format::wal::SegmentName;
use pg_format::{ClusterState, ControlFile, DataPath, FormatError, TimelineHistory, TimelineId};
use serde::{Deserialize, Serialize};

use crate::PageHash;

/// The role of a node in its cluster, proven by its files alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Accepts writes.
    Primary,
    /// Replays another node's WAL.
    Standby,
    /// Was shut down cleanly.
    Stopped,
}

/// Identifies one life of one node: it changes when the node is restarted, promoted or stopped, or crashes.
/// What was read in one life is not valid in another (docs/RULES.md, R8).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    system_identifier: u64,
    role: Role,
    timeline: TimelineId,
    state: ClusterState,
    postmaster: Option<(i64, i64)>,
    directory: [u8; 16],
    /// Hash of the `pg_control` of a node that does not run.
    stopped_as: Option<[u8; 16]>,
}

/// What a node is at one moment.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its role.
    pub role: Role,
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Its `pg_control`, decoded.
    pub control: ControlFile,
    /// Its `pg_control`, as it is on disk.
    pub control_bytes: Vec<u8>,
    /// All its history files, oldest first.
    pub histories: Vec<(TimelineId, Vec<u8>)>,
    /// Process id and start time of its postmaster, if one runs.
    pub postmaster: Option<(i64, i64)>,
    /// Identifies the data directory and its machine. The process id is not enough: in containers every
    /// postmaster may have the same one.
    pub directory: [u8; 16],
}

impl Node {
    /// The history of its timeline. Timeline 1 has no file.
    pub fn history(&self) -> Result<TimelineHistory, FormatError> {
        if self.timeline.get() == 1 {
            return Ok(TimelineHistory::first(self.timeline));
        }
        let text = self.histories.iter().find(|(timeline, _)| *timeline == self.timeline);
        let (_, text) = text.ok_or_else(|| FormatError::Invalid {
            what: "the source's pg_wal",
            why: format!("{} is missing", self.timeline.history_file_name()),
        })?;
        TimelineHistory::parse(self.timeline, text)
    }

    /// Which life of which node this is. Nothing that was read in another life may be relied on.
    pub fn life(&self) -> Life {
        // A stopped node may have been started and stopped in between.
        let stopped = (self.role == Role::Stopped).then(|| PageHash::of(&self.control_bytes));
        Life {
            system_identifier: self.control.system_identifier,
            role: self.role,
            timeline: self.timeline,
            state: self.control.state,
            postmaster: self.postmaster,
            directory: self.directory,
            stopped_as: stopped.map(|hash| *hash.as_bytes()),
        }
    }

    /// Whether it is the same life of the same node as at an earlier moment.
    pub fn same_life(&self, earlier: &Self) -> bool {
        self.life() == earlier.life()
    }
}

/// A tablespace of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its OID.
    pub oid: u32,
    /// Where its link points; `None` if it lies in place, inside `pg_tblspc`.
    pub location: Option<String>,
}

/// The answer to the first call.
#[derive(Debug, Clone)]
pub struct Description {
    /// Version of the server program, for messages.
    pub program_version: String,
    /// The node.
    pub node: Node,
    /// WAL segments in its `pg_wal`.
    pub wal_segments: Vec<SegmentName>,
    /// Its tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// Congestion control of the connection, if known.
    pub congestion_control: Option<String>,
}

/// A file or directory of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Where.
    pub path: DataPath,
    /// Its length; `None` for a directory.
    pub bytes: Option<u64>,
}

/// The answer to the last call of a rewind.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// The node as it is now.
    pub node: Node,
    /// The end of a record. No page that was served before has a change from a later record.
    pub end: pg_format::Lsn,
    /// The timeline that holds the byte before [`Self::end`].
    pub end_timeline: TimelineId,
}

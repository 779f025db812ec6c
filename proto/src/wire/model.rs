//! Generated messages to domain types and back: the unary calls and the file list.

use pg_format::wal::SegmentName;
use pg_format::{ControlFile, DataPath, Lsn, TimelineId};

use crate::limits::{HISTORIES_MAX, TABLESPACES_MAX, WAL_SEGMENTS_MAX};
use crate::model::{Description, FileEntry, Node, Role, Sealed, Tablespace};
use crate::refusal::CallError;
use crate::text::of_peer;
use crate::{PROTOCOL_VERSION, wire};

#[expect(clippy::needless_pass_by_value, reason = "used as map_err(invalid)")]
fn invalid(error: impl ToString) -> CallError {
    CallError::InvalidReply(error.to_string())
}

fn timeline(number: u32) -> Result<TimelineId, CallError> {
    TimelineId::new(number).map_err(invalid)
}

impl From<Node> for wire::Node {
    fn from(node: Node) -> Self {
        let role = match node.role {
            Role::Primary => wire::Role::Primary,
            Role::Standby => wire::Role::Standby,
            Role::Stopped => wire::Role::Stopped,
        };
        let (postmaster_pid, postmaster_start) = node.postmaster.unwrap_or_default();
        let histories = node.histories.into_iter().map(|(timeline, text)| wire::HistoryFile {
            timeline: timeline.get(),
            text: text.into(),
        });
        Self {
            role: role.into(),
            timeline: node.timeline.get(),
            control_file: node.control_bytes.into(),
            histories: histories.collect(),
            postmaster_pid,
            postmaster_start,
            directory: node.directory.to_vec().into(),
        }
    }
}

impl TryFrom<wire::Node> for Node {
    type Error = CallError;

    fn try_from(node: wire::Node) -> Result<Self, CallError> {
        let role = match node.role() {
            wire::Role::Primary => Role::Primary,
            wire::Role::Standby => Role::Standby,
            wire::Role::Stopped => Role::Stopped,
            wire::Role::Unspecified => return Err(invalid("the node has no role")),
        };
        if node.histories.len() > HISTORIES_MAX {
            return Err(invalid("the node has too many history files"));
        }
        let histories: Result<Vec<_>, CallError> = node
            .histories
            .into_iter()
            .map(|file| Ok((timeline(file.timeline)?, file.text.to_vec())))
            .collect();
        let postmaster =
            (node.postmaster_pid != 0).then_some((node.postmaster_pid, node.postmaster_start));
        let directory = node.directory.as_ref().try_into();
        Ok(Self {
            role,
            directory: directory
                .map_err(|_| invalid("the node does not identify its data directory"))?,
            timeline: timeline(node.timeline)?,
            control: ControlFile::parse(&node.control_file).map_err(invalid)?,
            control_bytes: node.control_file.to_vec(),
            histories: histories?,
            postmaster,
        })
    }
}

impl From<Description> for wire::DescribeReply {
    fn from(description: Description) -> Self {
        let segments = description.wal_segments.into_iter().map(|segment| wire::WalSegment {
            timeline: segment.timeline.get(),
            number: segment.number,
        });
        let tablespaces = description.tablespaces.into_iter().map(|space| wire::Tablespace {
            oid: space.oid,
            location: space.location.unwrap_or_default(),
        });
        Self {
            protocol_version: PROTOCOL_VERSION,
            features: Vec::new(),
            program_version: description.program_version,
            node: Some(description.node.into()),
            wal_segments: segments.collect(),
            tablespaces: tablespaces.collect(),
            congestion_control: description.congestion_control.unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::DescribeReply> for Description {
    type Error = CallError;

    fn try_from(reply: wire::DescribeReply) -> Result<Self, CallError> {
        if reply.protocol_version != PROTOCOL_VERSION {
            return Err(invalid(format!(
                "it speaks protocol version {}, this program speaks {PROTOCOL_VERSION}: install \
                 the same pgrejoin release on both nodes",
                reply.protocol_version
            )));
        }
        let node: Node = reply
            .node
            .ok_or_else(|| invalid("the description of the node is missing"))?
            .try_into()?;
        let too_many = |what: &str| invalid(format!("it describes too many {what}"));
        if reply.wal_segments.len() > WAL_SEGMENTS_MAX {
            return Err(too_many("WAL segments"));
        }
        if reply.tablespaces.len() > TABLESPACES_MAX {
            return Err(too_many("tablespaces"));
        }
        let numbers = u64::MAX / node.control.wal_segment_size.bytes();
        let segments: Result<Vec<_>, CallError> = reply
            .wal_segments
            .iter()
            .map(|s| {
                let number = Some(s.number).filter(|number| *number < numbers);
                let number =
                    number.ok_or_else(|| invalid("the number of a WAL segment is out of range"))?;
                Ok(SegmentName { timeline: timeline(s.timeline)?, number })
            })
            .collect();
        let text = |text: String| (!text.is_empty()).then_some(text);
        Ok(Self {
            program_version: of_peer(&reply.program_version),
            node,
            wal_segments: segments?,
            tablespaces: reply
                .tablespaces
                .into_iter()
                .map(|space| Tablespace { oid: space.oid, location: text(space.location) })
                .collect(),
            congestion_control: text(of_peer(&reply.congestion_control)),
        })
    }
}

impl From<FileEntry> for wire::FileEntry {
    fn from(entry: FileEntry) -> Self {
        Self {
            path: entry.path.into(),
            directory: entry.bytes.is_none(),
            bytes: entry.bytes.unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::FileEntry> for FileEntry {
    type Error = CallError;

    fn try_from(entry: wire::FileEntry) -> Result<Self, CallError> {
        let path = DataPath::new(entry.path).map_err(invalid)?;
        Ok(Self { path, bytes: (!entry.directory).then_some(entry.bytes) })
    }
}

impl From<Sealed> for wire::SealReply {
    fn from(sealed: Sealed) -> Self {
        Self {
            node: Some(sealed.node.into()),
            end: sealed.end.as_u64(),
            end_timeline: sealed.end_timeline.get(),
        }
    }
}

impl TryFrom<wire::SealReply> for Sealed {
    type Error = CallError;

    fn try_from(reply: wire::SealReply) -> Result<Self, CallError> {
        let node = reply.node.ok_or_else(|| invalid("the description of the node is missing"))?;
        Ok(Self {
            node: node.try_into()?,
            end: Lsn::new(reply.end),
            end_timeline: timeline(reply.end_timeline)?,
        })
    }
}

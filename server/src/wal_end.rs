//! Where replay must end: the position at or past every page served so far (R7).

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use data_dir::DataDir;
use data_dir::wal::{LocalWal, Segments as _, scan};
use pg_format::wal::Start;
use pg_format::{Lsn, TimelineHistory, TimelineId};
use proto::model::{Node, Role, Sealed};
use proto::{Reason, Refusal};

use crate::node;

/// Times the end is looked for again when a checkpoint completed meanwhile.
const ATTEMPTS_MAX: u32 = 10;

/// Inspects the node again and finds the end of its WAL. Blocks: reads the WAL since the last checkpoint.
///
/// A checkpoint that completes while the WAL is read lets the server recycle what is being read, and recycled
/// WAL looks like an end. The result counts only if the checkpoint is the same afterwards.
pub(crate) fn seal(pgdata: &Path) -> Result<Sealed, Refusal> {
    let mut attempt = 1;
    loop {
        let directory = node::open(pgdata)?;
        let before = node::inspect(&directory)?;
        let end = find_end(&directory, &before);
        let after = node::inspect(&directory)?;
        let same = before.control.checkpoint == after.control.checkpoint;
        match end {
            Ok((end, end_timeline)) if same => {
                return Ok(Sealed { node: after, end, end_timeline });
            }
            Err(refusal) if same => return Err(refusal),
            _ if attempt == ATTEMPTS_MAX => {
                let message = "the source makes checkpoints faster than its WAL can be read";
                return Err(Refusal::new(Reason::NotReady, message));
            }
            _ => attempt += 1,
        }
    }
}

fn find_end(directory: &DataDir, node: &Node) -> Result<(Lsn, TimelineId), Refusal> {
    let history = node.history().map_err(|error| {
        Refusal::new(
            Reason::Damaged,
            format!("the source's timeline history is not usable: {error}"),
        )
    })?;
    let wal = LocalWal { directory, history: &history, context: node::wal_context(&node.control) };
    let end = match node.role {
        Role::Primary => end_of_wal(&wal, node.control.checkpoint_copy.redo)?,
        Role::Standby => standby_end(&wal, node)?,
        Role::Stopped => {
            let record = end_of_record(&wal, node.control.checkpoint)?;
            record.max(node.control.min_recovery_point)
        }
    };
    if node.role != Role::Stopped {
        sync(&wal, node.control.checkpoint_copy.redo, end)?;
    }
    Ok((end, history.timeline_of(Lsn::new(end.as_u64().saturating_sub(1)))))
}

/// End of the last valid record on disk. A page is written only after the WAL up to its LSN, so
/// every page read so far is covered.
fn end_of_wal(wal: &LocalWal<'_>, from: Lsn) -> Result<Lsn, Refusal> {
    let scanned =
        scan(wal, wal.context, Start::Record(from), &mut |_, _| ControlFlow::Continue(()));
    let scanned = scanned.map_err(|error| node::internal("its WAL", &error))?;
    match scanned.last_record {
        Some(_) => Ok(scanned.end),
        None => Err(Refusal::new(
            Reason::WalMissing,
            format!(
                "the source has no valid WAL at its own redo position {from}: {}",
                scanned.stopped_by.map_or("nothing was read", |end| end.why)
            ),
        )),
    }
}

/// The end for a standby: its minimum recovery point, or the end of the WAL that it has received if that is
/// later. A standby writes a page only after it has moved its minimum recovery point past the page's LSN. The
/// point is read after everything that was served, so it covers every page; the end of the received WAL
/// covers relation maps too. WAL that was received past the point where a newer known timeline begins belongs
/// to an abandoned branch and does not count.
fn standby_end(wal: &LocalWal<'_>, node: &Node) -> Result<Lsn, Refusal> {
    let minimum = node.control.min_recovery_point;
    let switched = node.histories.iter().filter_map(|(timeline, text)| {
        let history = TimelineHistory::parse(*timeline, text).ok()?;
        let ours = history.spans().iter().find(|span| span.timeline == node.timeline)?;
        (*timeline != node.timeline).then_some(ours.end)
    });
    let limit = switched.min().unwrap_or(Lsn::MAX);
    if minimum > limit {
        let message = format!(
            "the source has replayed to {minimum}, past {limit} where a newer timeline began: the \
             source itself must be rewound first"
        );
        return Err(Refusal::new(Reason::NotReady, message));
    }
    let received = end_of_wal(wal, node.control.checkpoint_copy.redo);
    Ok(received.map_or(minimum, |end| end.min(limit).max(minimum)))
}

fn end_of_record(wal: &LocalWal<'_>, lsn: Lsn) -> Result<Lsn, Refusal> {
    let mut end = None;
    scan(wal, wal.context, Start::Record(lsn), &mut |record, _| {
        end = Some(record.end);
        ControlFlow::Break(())
    })
    .map_err(|error| node::internal("its last checkpoint", &error))?;
    end.ok_or_else(|| {
        let message = format!("the source's last checkpoint record at {lsn} is not in its pg_wal");
        Refusal::new(Reason::WalMissing, message)
    })
}

/// Makes the WAL up to the end durable before it is announced: after a crash of its machine the
/// source could otherwise write other records at the same positions.
fn sync(wal: &LocalWal<'_>, from: Lsn, end: Lsn) -> Result<(), Refusal> {
    let size = wal.context.segment_size;
    for number in size.segment_of(from)..=size.segment_of(end) {
        let synced = wal.open(number).and_then(|file| match file {
            Some(file) => rustix::fs::fdatasync(&file).map_err(io::Error::from),
            None => Ok(()),
        });
        synced.map_err(|error| node::internal("its WAL (to sync it to disk)", &error))?;
    }
    Ok(())
}

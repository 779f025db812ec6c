//! Where replay must end: the position at or past every page served so far (R7).

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use data_dir::wal::{LocalWal, Segments as _, scan};
use pg_format::Lsn;
use pg_format::wal::Start;
use proto::model::{Node, Role, Sealed};
use proto::{Reason, Refusal};

use crate::node;

/// Looks at the node again and finds the end. Blocks: reads the WAL since the last checkpoint.
pub(crate) fn seal(pgdata: &Path) -> Result<Sealed, Refusal> {
    let directory = node::open(pgdata)?;
    let node = node::inspect(&directory)?;
    let history = node
        .history()
        .map_err(|error| Refusal::new(Reason::Damaged, format!("source: {error}")))?;
    let wal = LocalWal {
        directory: &directory,
        history: &history,
        context: node::wal_context(&node.control),
    };
    let end = match node.role {
        Role::Primary => end_of_wal(&wal, node.control.checkpoint_copy.redo)?,
        Role::Standby => standby_end(&wal, &node),
        Role::Stopped => {
            let record = end_of_record(&wal, node.control.checkpoint)?;
            record.max(node.control.min_recovery_point)
        }
    };
    if node.role != Role::Stopped {
        sync(&wal, node.control.checkpoint_copy.redo, end)?;
    }
    let end_timeline = history.timeline_of(Lsn::new(end.as_u64().saturating_sub(1)));
    Ok(Sealed {
        node,
        end,
        end_timeline,
    })
}

/// End of the last valid record on disk. A page is written only after the WAL up to its LSN, so
/// every page read so far is covered.
fn end_of_wal(wal: &LocalWal<'_>, from: Lsn) -> Result<Lsn, Refusal> {
    let scanned = scan(wal, wal.context, Start::Record(from), &mut |_, _| {
        ControlFlow::Continue(())
    });
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

/// A standby writes a page only after it moved its minimum recovery point past it. The end of the
/// WAL it has received is better if it is later: it also covers relation maps.
fn standby_end(wal: &LocalWal<'_>, node: &Node) -> Lsn {
    let minimum = node.control.min_recovery_point;
    let received = end_of_wal(wal, node.control.checkpoint_copy.redo);
    received.map_or(minimum, |end| end.max(minimum))
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
        synced.map_err(|error| node::internal("its WAL to make it durable", &error))?;
    }
    Ok(())
}

//! Questions whose answers are most likely needed, asked while others are on their way: on a long link
//! each would cost a round trip. An answer that turns out to be of no use is thrown away.

use pg_format::{BLOCK_BYTES, Lsn, TimelineHistory, WalSegmentSize};
use proto::fetch::{Unit, UnitKind};
use proto::model::{Description, Sealed};
use tokio_util::task::AbortOnDropHandle;

use crate::analysis::{Analysis, source_start};
use crate::changes::{Gathered, gather, is_there};
use crate::choose::Choice;
use crate::config::Config;
use crate::error::RewindError;
use crate::fetch::Session;
use crate::fetch::session::Answer;
use crate::inspect::Target;
use crate::own_wal::fetched_from;

/// What comes of a question that was asked beside others.
pub(crate) type Asked<T> = AbortOnDropHandle<Result<T, RewindError>>;

/// WAL that is asked for before it is known whether all of the plan can be: less than a round trip holds.
const WAL_BYTES_MAX: u64 = 256 << 10;

/// A position that is likely to be the fork, and what the source changed since.
pub(crate) type Assumed = (Lsn, Asked<Gathered>);

/// What is asked while the fork is being proven, on the assumption that it lies where the histories say.
pub(crate) struct Ahead {
    /// Where the source's WAL ends.
    pub(crate) announced: Asked<Sealed>,
    /// What it changed since the assumed fork.
    pub(crate) changes: Option<Assumed>,
}

impl Ahead {
    /// Asks. `with_changes` says whether they may be needed at all.
    pub(crate) fn ask(
        session: &Session,
        target: &Target,
        (source, history): (&Description, &TimelineHistory),
        with_changes: bool,
    ) -> Self {
        let mut asking = session.clone();
        let announced = AbortOnDropHandle::new(tokio::spawn(async move { asking.seal().await }));
        let fork = target.history.common_ancestor(history).map(|ancestor| ancestor.end);
        let redo = source_start(source).redo;
        let assumed = fork.filter(|fork| {
            with_changes && *fork < redo && is_there(source, history, (*fork, redo)).is_ok()
        });
        let changes = assumed.map(|fork| {
            let mut asking = session.clone();
            let asked = async move { gather(&mut asking, (fork, redo), false).await };
            (fork, AbortOnDropHandle::new(tokio::spawn(asked)))
        });
        Self { announced, changes }
    }
}

/// Asks for the WAL that replay needs, if it is little and no choice is left which.
pub(crate) fn wal(
    session: &Session,
    history: &TimelineHistory,
    (config, target): (&Config, &Target),
    (analysis, choice, end): (&Analysis, &Choice<'_>, Lsn),
    size: WalSegmentSize,
) -> Option<Asked<Answer>> {
    let fork = analysis.fork.map_or(Lsn::INVALID, |fork| fork.lsn.page_start());
    let span = (choice.start.redo, end);
    let from = fetched_from((config, &target.settings), span, fork, size);
    let end = page_end(end);
    let last = Lsn::new(end.as_u64().saturating_sub(1));
    let is_little = end > from && end.distance_from(from) <= WAL_BYTES_MAX;
    if !is_little || size.segment_of(from) != size.segment_of(last) {
        return None;
    }
    let number = size.segment_of(from);
    let timeline = history.timeline_of_segment(number, size);
    let piece =
        |id, offset, length| Unit { id, kind: UnitKind::Wal { timeline, number, offset, length } };
    let mut units = vec![piece(0, size.offset_of(from), end.distance_from(from))];
    if from > fork && size.offset_of(from) > 0 && size.segment_of(fork) < number {
        units.push(piece(1, 0, BLOCK_BYTES));
    }
    let mut asking = session.clone();
    Some(AbortOnDropHandle::new(tokio::spawn(async move { asking.ask(units).await })))
}

/// The end of the page that holds what lies before a position.
fn page_end(lsn: Lsn) -> Lsn {
    let start = lsn.page_start();
    if start == lsn { lsn } else { start.plus(BLOCK_BYTES) }
}

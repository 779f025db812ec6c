//! What replay would get wrong, and what is done about it: another strategy, a newer checkpoint, or a refusal.
//! docs/RULES.md, R9, R11 and R12.

use pg_format::Lsn;
use proto::model::Role;

use crate::config::{Config, TablespaceMapping};
use crate::error::{Abort, Class, Replan, RewindError};
use crate::plan::replay_hazards::Hazard;
use crate::plan::{Planned, Strategy, StrategyChoice};
use crate::source::Source;
use crate::strategy::tablespaces::is_mapped;
use crate::target::places::check_place;

/// What decides whether something is a hazard.
#[derive(Debug, Clone, Copy)]
struct Circumstances<'a> {
    strategy: Strategy,
    /// Redo position of the source's newest checkpoint before anything was read from it.
    source_redo: Lsn,
    role: Role,
    mapping: &'a [TablespaceMapping],
}

/// What is to be done about a hazard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Nothing: replay on the target is correct.
    Harmless,
    /// A strategy whose replay begins later.
    NotFromTheFork,
    /// A newer checkpoint of the source.
    NeedsCheckpoint,
}

/// Decides what to do about a hazard. `is_free` says whether a tablespace can be created in a directory of
/// the target.
fn judge(
    hazard: &Hazard,
    circumstances: Circumstances<'_>,
    is_free: impl Fn(&str) -> bool,
) -> Verdict {
    let Circumstances { strategy, source_redo, role, mapping } = circumstances;
    let harmless = match hazard {
        // A tablespace with an empty path lies inside `pg_tblspc`, where replay creates it.
        Hazard::Tablespace { location: Some(place), .. } => {
            place.is_empty() || is_free(place) && !is_mapped(mapping, place)
        }
        // Full-page images are needed only for pages that were written while they were read, and these were
        // changed behind `source_redo`.
        Hazard::FullPageWritesOff { at } => *at < source_redo || role == Role::Stopped,
        Hazard::Tablespace { location: None, .. }
        | Hazard::CopyDatabase { .. }
        | Hazard::MinimalWal { .. } => false,
    };
    if harmless {
        Verdict::Harmless
    } else if hazard.at() < source_redo && strategy == Strategy::Fork {
        Verdict::NotFromTheFork
    } else {
        Verdict::NeedsCheckpoint
    }
}

/// Plans again where another start of replay avoids a hazard, and refuses where none does.
pub async fn check(
    config: &Config,
    source: &Source,
    planned: &Planned,
    hazards: &[Hazard],
) -> Result<(), Abort> {
    let circumstances = Circumstances {
        strategy: planned.strategy,
        source_redo: planned.source_redo,
        role: source.snapshot.description.node.role,
        mapping: &config.tablespace_mapping,
    };
    let insists = config.strategy == StrategyChoice::Only(Strategy::Fork);
    let refuse = |message| RewindError::new(Class::Preflight, message);
    for hazard in hazards {
        match judge(hazard, circumstances, |place| check_place(place).is_ok()) {
            Verdict::Harmless => {}
            Verdict::NotFromTheFork if insists => {
                return Err(refuse(hazard.explain_to_fork()).into());
            }
            Verdict::NotFromTheFork => {
                return Err(Abort::replan(Replan::ForkImpossible, hazard.explain_to_fork()));
            }
            Verdict::NeedsCheckpoint => {
                let now = source.session.clone().describe().await?;
                if now.node.control.checkpoint_copy.redo > hazard.at() {
                    let why = format!("the source made a checkpoint after {}", hazard.at());
                    return Err(Abort::replan(Replan::NewCheckpoint, why));
                }
                let advice = match insists {
                    true => hazard.explain_to_fork_without_checkpoint(),
                    false => hazard.explain(),
                };
                return Err(refuse(advice).into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a hazard at 100, with the source's checkpoint at `redo`.
    fn verdict(hazard: &Hazard, strategy: Strategy, redo: u64, role: Role) -> Verdict {
        let mapping = [TablespaceMapping { from: "/mapped".to_owned(), to: "/here".to_owned() }];
        let circumstances =
            Circumstances { strategy, source_redo: Lsn::new(redo), role, mapping: &mapping };
        judge(hazard, circumstances, |place| place != "/taken")
    }

    fn tablespace(place: &str) -> Hazard {
        Hazard::Tablespace {
            at: Lsn::new(100),
            tablespace: 16400,
            location: Some(place.to_owned()),
        }
    }

    #[test]
    fn a_copied_database_is_avoided_by_a_later_start() {
        let copied = Hazard::CopyDatabase { at: Lsn::new(100), database: 5 };
        let judge = |strategy, redo| verdict(&copied, strategy, redo, Role::Primary);
        assert_eq!(judge(Strategy::Fork, 200), Verdict::NotFromTheFork);
        assert_eq!(judge(Strategy::Fork, 50), Verdict::NeedsCheckpoint);
        assert_eq!(judge(Strategy::Latest, 50), Verdict::NeedsCheckpoint);
        assert_eq!(judge(Strategy::Compare, 50), Verdict::NeedsCheckpoint);
    }

    #[test]
    fn a_tablespace_is_made_by_replay_where_its_place_is_free_and_not_mapped() {
        let judge = |place| verdict(&tablespace(place), Strategy::Fork, 200, Role::Primary);
        assert_eq!(judge("/free"), Verdict::Harmless);
        assert_eq!(judge(""), Verdict::Harmless, "it lies in place");
        assert_eq!(judge("/taken"), Verdict::NotFromTheFork);
        assert_eq!(judge("/mapped"), Verdict::NotFromTheFork, "replay takes it literally");
        let dropped = Hazard::Tablespace { at: Lsn::new(100), tablespace: 16400, location: None };
        let judge = verdict(&dropped, Strategy::Latest, 50, Role::Primary);
        assert_eq!(judge, Verdict::NeedsCheckpoint);
    }

    #[test]
    fn torn_pages_matter_only_where_pages_are_read_while_they_are_written() {
        let off = Hazard::FullPageWritesOff { at: Lsn::new(100) };
        let judge = |redo, role| verdict(&off, Strategy::Fork, redo, role);
        assert_eq!(judge(200, Role::Primary), Verdict::Harmless, "before anything was read");
        assert_eq!(judge(100, Role::Primary), Verdict::NeedsCheckpoint);
        assert_eq!(judge(50, Role::Standby), Verdict::NeedsCheckpoint);
        assert_eq!(judge(50, Role::Stopped), Verdict::Harmless, "nothing is written");
    }

    #[test]
    fn minimal_wal_is_never_replayed() {
        let minimal = Hazard::MinimalWal { at: Lsn::new(100) };
        let judge = |strategy, redo| verdict(&minimal, strategy, redo, Role::Primary);
        assert_eq!(judge(Strategy::Fork, 200), Verdict::NotFromTheFork);
        assert_eq!(judge(Strategy::Latest, 50), Verdict::NeedsCheckpoint);
    }
}

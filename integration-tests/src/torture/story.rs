//! What a seed chooses.

use std::fmt;

use crate::faults::judge::Choices;
use crate::pair::Shape;

/// All majors there are.
pub const MAJORS: [u32; 5] = [14, 15, 16, 17, 18];

/// How the target came to be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The primary before the failover.
    OldPrimary,
    /// A standby that has replayed more than the one that was elected.
    StandbyAhead,
    /// A standby that was promoted by mistake, while the primary goes on.
    PromotedByMistake {
        /// Whether it came to a checkpoint of its own.
        own_checkpoint: bool,
    },
    /// Rewound and never started, then rewound again.
    NeverStarted {
        /// Whether the cluster failed over once more in between.
        to_another_timeline: bool,
    },
}

/// Every kind of target.
pub const TARGETS: [Target; 6] = [
    Target::OldPrimary,
    Target::StandbyAhead,
    Target::PromotedByMistake { own_checkpoint: true },
    Target::PromotedByMistake { own_checkpoint: false },
    Target::NeverStarted { to_another_timeline: true },
    Target::NeverStarted { to_another_timeline: false },
];

/// How the source is while it is rewound from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A primary that is written to.
    Live,
    /// A running primary without work.
    Quiet,
    /// A stopped primary.
    Stopped,
    /// A standby of the primary.
    Standby,
}

/// What is switched on or off while a node is stopped, after the nodes parted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offline {
    /// Nothing.
    Nothing,
    /// Checksums on both nodes, the one thing that both must have alike.
    Checksums,
    /// `wal_log_hints` on the target, which then runs for a while.
    HintsOnTarget,
    /// `wal_log_hints` on the source.
    HintsOnSource,
}

/// How the target ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// An orderly shutdown.
    Fast,
    /// Without a checkpoint.
    Immediate,
    /// Killed.
    Killed,
}

/// All that is decided before the life begins; pauses and random rows are not.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct Story {
    /// What it was drawn from.
    pub seed: u32,
    /// PostgreSQL major.
    pub major: u32,
    /// The template cluster.
    pub shape: Shape,
    /// Who is rewound.
    pub target: Target,
    /// From whom.
    pub source: Source,
    /// What is switched while nodes are stopped.
    pub offline: Offline,
    /// How the target ends.
    pub ending: Ending,
    /// Whether a long transaction is open across checkpoint and fork.
    pub is_long_open: bool,
    /// Whether a prepared one is.
    pub is_prepared_open: bool,
    /// Whether somebody reads on every node.
    pub has_readers: bool,
    /// Whether `pgbench` runs before the fork.
    pub has_pgbench: bool,
    /// `summarize_wal`, from 17 on.
    pub summarize: bool,
    /// `wal_keep_size`
    pub keep: &'static str,
    /// `wal_compression`
    pub compress: bool,
    /// `--strategy`
    pub strategy: &'static str,
    /// `--connections`
    pub connections: usize,
    /// `--keep-diverged`
    pub keep_diverged: &'static str,
    /// So many runs are killed before one is left alone.
    pub kills: usize,
    /// What else has to be chosen on the way.
    pub choices: Choices,
}

impl Story {
    /// Draws a life on a given major.
    pub fn draw(seed: u32, major: u32) -> Self {
        let mut choices = Choices::new(u64::from(seed));
        // The first numbers of small seeds are alike.
        for _ in 0..8 {
            choices.below(2);
        }
        let shape = Shape {
            checksums: choices.below(2) == 0,
            wal_log_hints: choices.below(2) == 0,
            segment_mb: one_of(&mut choices, &[1, 16]),
            group_access: choices.below(4) == 0,
        };
        // Each kind of target comes as often as any other, whatever the seeds.
        let target = TARGETS[seed as usize % TARGETS.len()];
        let sources = [Source::Live, Source::Quiet, Source::Stopped, Source::Standby];
        let offline = match (shape.checksums, choices.below(3)) {
            (false, 0) if major != 17 => Offline::Checksums,
            (false, 0 | 1) => {
                one_of(&mut choices, &[Offline::HintsOnTarget, Offline::HintsOnSource])
            }
            _ => Offline::Nothing,
        };
        Self {
            seed,
            major,
            shape,
            target,
            source: one_of(&mut choices, &sources),
            offline,
            ending: one_of(&mut choices, &[Ending::Fast, Ending::Immediate, Ending::Killed]),
            is_long_open: choices.below(2) == 0,
            is_prepared_open: choices.below(2) == 0,
            has_readers: choices.below(3) > 0,
            has_pgbench: choices.below(3) == 0,
            summarize: major >= 17 && choices.below(2) == 0,
            keep: one_of(&mut choices, &["0", "1GB"]),
            compress: choices.below(2) == 0,
            strategy: one_of(&mut choices, &["auto", "auto", "latest", "fork", "compare"]),
            connections: 1 + choices.below(8),
            keep_diverged: one_of(&mut choices, &["yes", "no"]),
            kills: choices.below(4),
            choices,
        }
    }

    /// Settings of every node.
    pub fn settings(&self) -> String {
        let on = |is_on: bool| if is_on { "on" } else { "off" };
        let mut settings =
            format!("wal_keep_size = {}\nwal_compression = {}", self.keep, on(self.compress));
        if self.summarize {
            settings.push_str("\nsummarize_wal = on");
        }
        settings
    }
}

fn one_of<T: Copy>(choices: &mut Choices, values: &[T]) -> T {
    values[choices.below(values.len())]
}

impl fmt::Display for Story {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, major, shape, target, source, offline, ending, .. } = self;
        write!(
            formatter,
            "life {seed} on {major}: {target:?} {ending:?} from {source:?}, {offline:?}, {shape:?}, long {}, \
             prepared {}, readers {}, pgbench {}, summarize {}, keep {}, compress {}, {} by {} connections, \
             diverged {}, {} kills",
            self.is_long_open,
            self.is_prepared_open,
            self.has_readers,
            self.has_pgbench,
            self.summarize,
            self.keep,
            self.compress,
            self.strategy,
            self.connections,
            self.keep_diverged,
            self.kills
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Among three hundred lives every shape comes twenty times at least.
    #[test]
    fn no_shape_is_rare() {
        let stories: Vec<Story> =
            (0..300).map(|seed| Story::draw(seed, MAJORS[seed as usize / 60])).collect();
        let at_least_twenty = |what: &str, is: &dyn Fn(&Story) -> bool| {
            let count = stories.iter().filter(|story| is(story)).count();
            assert!(count >= 20, "{what}: {count}");
        };
        for target in TARGETS {
            at_least_twenty(&format!("{target:?}"), &|story| story.target == target);
        }
        for source in [Source::Live, Source::Quiet, Source::Stopped, Source::Standby] {
            at_least_twenty(&format!("{source:?}"), &|story| story.source == source);
        }
        let switched = [Offline::Checksums, Offline::HintsOnTarget, Offline::HintsOnSource];
        for offline in switched {
            at_least_twenty(&format!("{offline:?}"), &|story| story.offline == offline);
        }
        for ending in [Ending::Fast, Ending::Immediate, Ending::Killed] {
            at_least_twenty(&format!("{ending:?}"), &|story| story.ending == ending);
        }
        at_least_twenty("long", &|story| story.is_long_open);
        at_least_twenty("prepared", &|story| story.is_prepared_open);
        at_least_twenty("readers", &|story| story.has_readers);
        at_least_twenty("summaries", &|story| story.summarize);
        at_least_twenty("no WAL kept", &|story| story.keep == "0");
        at_least_twenty("no checksums", &|story| !story.shape.checksums);
        at_least_twenty("hints logged", &|story| story.shape.wal_log_hints);
    }

    #[test]
    fn a_seed_draws_the_same_again() {
        assert_eq!(Story::draw(7, 15).to_string(), Story::draw(7, 15).to_string());
        assert_ne!(Story::draw(7, 15).to_string(), Story::draw(8, 15).to_string());
    }
}

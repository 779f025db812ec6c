//! Which part of an exhaustive simulation is tried.

use std::fmt;
use std::time::SystemTime;

/// Of so many cases one is tried where not all are wanted; a prime, so that no pattern of cases is left out.
const ONE_IN: u64 = 7;

/// A part of all cases; `PGREJOIN_FAULTS=all` makes it all of them, `PGREJOIN_SEED=n` the same part again.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    one_in: u64,
    seed: u64,
}

impl Sample {
    /// All cases.
    pub const ALL: Self = Self { one_in: 1, seed: 0 };

    /// What the environment wants; by itself another part in every run.
    pub fn chosen() -> Self {
        if std::env::var("PGREJOIN_FAULTS").as_deref() == Ok("all") {
            return Self::ALL;
        }
        let given = std::env::var("PGREJOIN_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { one_in: ONE_IN, seed: given.unwrap_or(u64::from(now.subsec_nanos())) }
    }

    /// Whether a case is part of it.
    pub fn has(self, case: u64) -> bool {
        case % self.one_in == self.seed % self.one_in
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.one_in {
            1 => formatter.write_str("all cases"),
            one_in => write!(formatter, "one case in {one_in}, seed {}", self.seed),
        }
    }
}

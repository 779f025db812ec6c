//! The states of a data directory that `pgrejoin status` tells apart, and their exit codes.

/// In which state a data directory is, as far as the operator must act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// No rewind is under way.
    Idle,
    /// A rewind is being prepared, and its run is alive. The data directory is unchanged.
    Fetching,
    /// A rewind was being prepared, and its run is gone. The data directory is unchanged.
    FetchEnded,
    /// A rewind is prepared and has changed nothing.
    Prepared,
    /// A live run is changing the data directory.
    Changing,
    /// The data directory is partly changed, and no run is alive.
    PartlyChanged,
    /// PostgreSQL has run on a partly changed data directory.
    Spoiled,
    /// It is rewound and PostgreSQL has not been started since.
    NotStarted,
    /// It is rewound or rolled back, and temporary files are left.
    FilesLeft,
    /// `pg_control` is missing, and nothing says why.
    Damaged,
}

/// The exit code of `pgrejoin status` for each state, and what it means.
pub const STATUS_CODES: [StatusCode; 10] = [
    StatusCode { state: NodeState::Idle, code: 0, meaning: "no rewind is under way" },
    StatusCode {
        state: NodeState::Fetching,
        code: 10,
        meaning: "a rewind is being prepared; the data directory is unchanged",
    },
    StatusCode {
        state: NodeState::FetchEnded,
        code: 11,
        meaning: "a rewind was being prepared and its run has ended; the data directory is unchanged",
    },
    StatusCode {
        state: NodeState::Prepared,
        code: 12,
        meaning: "a rewind is prepared and has changed nothing",
    },
    StatusCode {
        state: NodeState::Changing,
        code: 13,
        meaning: "a run is changing the data directory",
    },
    StatusCode {
        state: NodeState::PartlyChanged,
        code: 14,
        meaning: "the data directory is partly changed: run `pgrejoin resume` or `pgrejoin rollback`",
    },
    StatusCode {
        state: NodeState::Spoiled,
        code: 15,
        meaning: "PostgreSQL has run on a partly changed data directory",
    },
    StatusCode {
        state: NodeState::NotStarted,
        code: 16,
        meaning: "rewound, PostgreSQL has not been started yet",
    },
    StatusCode {
        state: NodeState::FilesLeft,
        code: 17,
        meaning: "rewound or rolled back, temporary files are left",
    },
    StatusCode {
        state: NodeState::Damaged,
        code: 19,
        meaning: "`pg_control` is missing, and nothing says why",
    },
];

/// See [`STATUS_CODES`].
#[derive(Debug, Clone, Copy)]
pub struct StatusCode {
    /// The state.
    pub state: NodeState,
    /// The exit code.
    pub code: u8,
    /// What it means.
    pub meaning: &'static str,
}

impl NodeState {
    /// Its exit code.
    pub fn code(self) -> u8 {
        let row = STATUS_CODES.iter().find(|row| row.state == self);
        row.map_or(1, |row| row.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::EXIT_CODES;

    #[test]
    fn each_state_has_a_code_of_its_own() {
        let codes: std::collections::BTreeSet<u8> =
            STATUS_CODES.iter().map(|row| row.state.code()).collect();
        assert_eq!(codes.len(), STATUS_CODES.len());
        let taken = EXIT_CODES.iter().flat_map(|exit| exit.codes).filter(|code| **code > 0);
        assert!(
            taken.into_iter().all(|code| !codes.contains(code)),
            "no failure has the same code"
        );
    }
}

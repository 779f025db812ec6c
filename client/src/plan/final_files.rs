//! The final state of planned files, known once everything was fetched.

use super::file_actions::PlannedFile;

/// A planned file, what it was, and what the source had of it by the time it was read.
#[derive(Debug, Clone, Copy)]
pub struct FinalFile<'a> {
    /// What was planned.
    pub planned: &'a PlannedFile,
    /// Its length on the target before; `None` if it was no regular file.
    pub bytes_before: Option<u64>,
    /// Its length on the source when it was read, if that was less than listed.
    pub shorter: Option<u64>,
    /// Whether it was gone on the source when it was read.
    pub is_gone: bool,
}

impl FinalFile<'_> {
    /// The file's length at the end, where the plan has `planned` bytes.
    pub fn bytes(&self, planned: u64) -> u64 {
        self.shorter.map_or(planned, |shorter| planned.min(shorter))
    }
}

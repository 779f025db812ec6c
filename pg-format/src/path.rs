//! A path inside a data directory, proven to stay there.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::FormatError;

/// Longest path accepted; PostgreSQL's own are far shorter (`MAXPGPATH` is 1024).
const PATH_BYTES_MAX: usize = 1024;

/// A relative path of plain components: no empty one, no `.` or `..`, no NUL, no leading slash.
///
/// The check covers names only. The code that opens the file must deal with symbolic links.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DataPath(Box<str>);

impl DataPath {
    /// Checks a path.
    ///
    /// # Errors
    /// The path is empty, longer than 1024 bytes, or not made of plain components.
    pub fn new(path: impl Into<String>) -> Result<Self, FormatError> {
        let path: String = path.into();
        let bad = |why: &str| FormatError::invalid("path", format!("{path:?} {why}"));
        if path.is_empty() || path.len() > PATH_BYTES_MAX {
            return Err(bad("is empty or too long"));
        }
        if path.contains('\0') {
            return Err(bad("contains a NUL byte"));
        }
        if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(bad("does not stay inside the data directory"));
        }
        Ok(Self(path.into_boxed_str()))
    }

    /// A path that is written in the program itself. It is not checked in a release build: tests construct
    /// every such path.
    pub fn of(path: &'static str) -> Self {
        debug_assert!(Self::new(path).is_ok(), "{path}");
        Self(path.into())
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its components, outermost first.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// The directory that holds it; `None` at the top level.
    pub fn parent(&self) -> Option<Self> {
        self.0.rsplit_once('/').map(|(parent, _)| Self(parent.into()))
    }

    /// A path one level below this one.
    pub fn join(&self, name: &str) -> Result<Self, FormatError> {
        Self::new(format!("{}/{name}", self.0))
    }

    /// Whether this path is `directory` or lies below it.
    pub fn is_within(&self, directory: &str) -> bool {
        let rest = self.0.strip_prefix(directory);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DataPath {
    type Error = FormatError;

    fn try_from(path: String) -> Result<Self, FormatError> {
        Self::new(path)
    }
}

impl From<DataPath> for String {
    fn from(path: DataPath) -> Self {
        path.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths() {
        for bad in ["", "/", "/etc", "a/", "a//b", "..", "a/../b", "./a", "a\0b", &"x".repeat(1025)]
        {
            assert!(DataPath::new(bad).is_err(), "{bad:?}");
        }
        let path = DataPath::new("base/5/16384_fsm.2").unwrap();
        assert_eq!(path.file_name(), "16384_fsm.2");
        assert_eq!(path.parent().unwrap().as_str(), "base/5");
        assert!(path.is_within("base") && path.is_within("base/5") && !path.is_within("base/5/1"));
        assert!(!DataPath::new("baseline").unwrap().is_within("base"));
    }
}

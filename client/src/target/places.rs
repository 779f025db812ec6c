//! Directories outside the data directory where tablespaces are to be.

use std::io;
use std::os::unix::fs::MetadataExt as _;

/// Why a tablespace cannot be put in a directory.
#[derive(Debug, thiserror::Error)]
pub enum BadPlace {
    /// It cannot be looked at: it may not exist.
    #[error("is not usable ({0})")]
    NotUsable(io::Error),
    /// It is something else.
    #[error("is not a directory")]
    NoDirectory,
    /// PostgreSQL could not write there.
    #[error("belongs to another user")]
    NotOurs,
    /// It may contain another tablespace.
    #[error("is not empty")]
    NotEmpty,
    /// It is not known whether it is empty.
    #[error("cannot be read ({0})")]
    Unreadable(io::Error),
}

/// A tablespace's directory must exist, be empty and belong to us.
pub fn check_place(place: &str) -> Result<(), BadPlace> {
    let metadata = std::fs::metadata(place).map_err(BadPlace::NotUsable)?;
    if !metadata.is_dir() {
        return Err(BadPlace::NoDirectory);
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(BadPlace::NotOurs);
    }
    match std::fs::read_dir(place).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(BadPlace::NotEmpty),
        Err(error) => Err(BadPlace::Unreadable(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_an_empty_directory_of_ours() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name).display().to_string();
        assert!(check_place(&path("")).is_ok());
        assert!(matches!(check_place(&path("missing")), Err(BadPlace::NotUsable(_))));
        std::fs::File::create(path("file")).unwrap();
        assert!(matches!(check_place(&path("file")), Err(BadPlace::NoDirectory)));
        assert!(matches!(check_place(&path("")), Err(BadPlace::NotEmpty)));
    }
}

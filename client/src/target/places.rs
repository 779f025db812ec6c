//! Directories outside the data directory where tablespaces are to be.

/// A tablespace's directory must exist, be empty and belong to us.
pub fn check_place(place: &str) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(place).map_err(|error| format!("is not usable ({error})"))?;
    if !metadata.is_dir() {
        return Err("is no directory".to_owned());
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err("belongs to another user".to_owned());
    }
    match std::fs::read_dir(place).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err("is not empty".to_owned()),
        Err(error) => Err(format!("cannot be read ({error})")),
    }
}

//! Whether a sealed plan is still valid: until the target is changed, somebody may have worked on it.

use std::io;

use pg_format::DataPath;

use crate::plan::FileAction;
use crate::staging::disk::Disk;
use crate::staging::manifest::Manifest;
use crate::target::places::check_place;

/// Why the plan is void; `None` if it holds.
pub fn reason(disk: &dyn Disk, manifest: &Manifest) -> io::Result<Option<String>> {
    let mut live = Vec::new();
    let control = DataPath::of("global/pg_control");
    io::Read::read_to_end(&mut disk.open(&control)?, &mut live)?;
    if live != manifest.old_control {
        let why = "PostgreSQL was started on the target while the rewind was prepared";
        return Ok(Some(why.to_owned()));
    }
    for (index, file) in manifest.files.iter().enumerate() {
        let path = &file.path;
        let why = match &file.action {
            FileAction::RemoveTree => None,
            // Afterwards the directory must contain files of this cluster only.
            FileAction::MakeDirectory { link: Some(place) } => {
                check_place(place).err().map(|why| format!("directory {place} for {path} {why}"))
            }
            _ if disk.stat(path)?.as_ref() != manifest.before(index) => {
                Some(format!("{path} on the target changed while the rewind was prepared"))
            }
            _ => None,
        };
        if why.is_some() {
            return Ok(why);
        }
    }
    for old in manifest.undo.iter().flat_map(|undo| &undo.small) {
        let live = match disk.open(&old.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            file => {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut file?, &mut bytes)?;
                Some(bytes)
            }
        };
        if live.as_ref() != old.content.as_ref().map(|(bytes, _)| bytes) {
            let path = &old.path;
            return Ok(Some(format!("{path} on the target changed while the rewind was prepared")));
        }
    }
    Ok(None)
}

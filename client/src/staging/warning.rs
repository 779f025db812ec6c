//! The `backup_label` in a data directory that is being changed. PostgreSQL refuses to start with it
//! (`read_backup_label`: "invalid data in file"), even if somebody puts `pg_control` back, and its text says
//! what to do.

use std::io;
use std::path::Path;

use pg_format::file_class::OWN_DIRECTORY;

use crate::outcome::utc_now;
use crate::staging::disk::Disk;
use crate::staging::layout::own;

/// PostgreSQL reads it before anything else where it is.
const LABEL: &str = "backup_label";
/// A new label before it is put in place.
const NEW_LABEL: &str = ".pgrejoin/backup_label.new";
const FIRST_LINE: &str =
    "THIS DATA DIRECTORY IS BEING REWOUND BY PGREJOIN: DO NOT START POSTGRESQL\n";
const ADVICE: &str = "Run \"pgrejoin resume\" to finish the rewind or \"pgrejoin rollback\" to \
                      undo it, with -D and the path of this directory.\n";

/// Whether the target's `backup_label` is this one.
pub(crate) fn stands(disk: &dyn Disk) -> io::Result<bool> {
    match disk.open(&own(LABEL)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        file => {
            let mut first = Vec::new();
            let limit = FIRST_LINE.len() as u64;
            io::Read::read_to_end(&mut io::Read::take(file?, limit), &mut first)?;
            Ok(first == FIRST_LINE.as_bytes())
        }
    }
}

/// Whether a data directory that is not locked has this `backup_label`; `false` also if it cannot be read.
pub(crate) fn stands_in(pgdata: &Path) -> bool {
    let label = std::fs::read(pgdata.join(LABEL)).unwrap_or_default();
    label.starts_with(FIRST_LINE.as_bytes())
}

/// Puts it in place, unless it is there.
pub(crate) fn put(disk: &dyn Disk) -> io::Result<()> {
    if stands(disk)? {
        return Ok(());
    }
    let text = format!("{FIRST_LINE}{ADVICE}It began at {}.\n", utc_now());
    replace(disk, text.as_bytes())
}

/// Puts another `backup_label` in place, durably. If there was one, at no moment is there none.
pub(crate) fn replace(disk: &dyn Disk, bytes: &[u8]) -> io::Result<()> {
    let new = own(NEW_LABEL);
    disk.create_file(&new)?;
    disk.write_at(&new, 0, bytes)?;
    disk.sync_file(&new)?;
    disk.rename(&new, &own(LABEL))?;
    disk.sync_directory(None)?;
    disk.sync_directory(Some(&own(OWN_DIRECTORY)))
}

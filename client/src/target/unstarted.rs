//! A node that was rewound and on which PostgreSQL has not been started yet.
//!
//! Its `backup_label` names the `pg_control` that was put in place with it. A server that starts renames
//! `backup_label` and changes `pg_control`.

use data_dir::DataDir;
use pg_format::backup_label::label_of;
use proto::PageHash;

use crate::error::{Class, RewindError};

const BACKUP_LABEL: &str = "backup_label";
/// PostgreSQL's own have a few hundred bytes.
const LABEL_BYTES_MAX: u64 = 64 << 10;

/// The label of the `backup_label` that belongs to this `pg_control`: a hash of it.
pub(crate) fn label(control: &[u8]) -> String {
    let hash = PageHash::of(control);
    let digits: String = hash.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("pgrejoin {digits}")
}

/// Whether a data directory is as a rewind left it.
pub(crate) fn is_unstarted(directory: &DataDir) -> Result<bool, RewindError> {
    let text = directory.read_if_exists(BACKUP_LABEL, LABEL_BYTES_MAX).map_err(|error| {
        RewindError::because(Class::Target, "could not read the target's backup_label", error)
    })?;
    let text = text.map(|text| String::from_utf8_lossy(&text).into_owned());
    let Some(found) = text.as_deref().and_then(label_of) else {
        return Ok(false);
    };
    Ok(found == label(&directory.control()?.bytes))
}

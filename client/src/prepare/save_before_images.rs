//! Saves what a rollback needs, before the seal.

use std::sync::Arc;

use pg_format::DataPath;

use super::claim::Claim;
use super::disk_space::BeforeImages;
use crate::apply::before_images;
use crate::error::{Class, RewindError};
use crate::plan::before_images::{Image, bytes_of};
use crate::staging::manifest::{Manifest, OldFile, PackDigest, Undo};
use crate::target::Target;
use crate::task::blocking;

/// Longest settings or history file that is saved for a rollback.
const SMALL_FILE_BYTES_MAX: u64 = 16 << 20;

/// Which images are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Images of what the plan overwrites. Images that an earlier run has saved for the same plan are used
    /// again.
    Planned,
    /// Images of what is cut besides, because files came shorter than planned.
    Cut,
}

/// Saves images of what will be overwritten, if they are wanted.
pub async fn save(
    target: &Target,
    claim: &Claim,
    wanted: BeforeImages,
    which: Which,
    images: Vec<Image>,
) -> Result<Vec<PackDigest>, RewindError> {
    if wanted == BeforeImages::NotSaved || images.is_empty() {
        return Ok(Vec::new());
    }
    let (disk, gate) = (Arc::clone(&target.disk), Arc::clone(claim.saving()));
    let bytes = bytes_of(&images);
    let name = match which {
        Which::Planned => format!("{}-planned", claim.run()),
        Which::Cut => format!("{}-cut", claim.run()),
    };
    blocking(move || {
        let save = || before_images::save(&disk, &name, &images, &gate);
        let saved = match which {
            Which::Planned => before_images::adopt(&*disk, &images, &gate)
                .and_then(|adopted| adopted.map_or_else(save, Ok)),
            Which::Cut => save(),
        };
        saved.map_err(|error| {
            let message = format!("could not save the {bytes} bytes that will be overwritten");
            RewindError::because(Class::Preflight, message, error)
        })
    })
    .await
}

/// What a rollback needs, once everything that will change is known.
pub fn undo(
    target: &Target,
    manifest: &Manifest,
    images: Vec<PackDigest>,
) -> Result<Undo, RewindError> {
    let written = manifest.wal.write.iter().chain(&manifest.settings).map(|file| &file.path);
    let label = DataPath::of("backup_label");
    let paths = written.chain(&manifest.remove).chain([&label]);
    let small = paths.map(|path| old_file(target, path)).collect::<Result<_, _>>()?;
    Ok(Undo { images, small })
}

fn old_file(target: &Target, path: &DataPath) -> Result<OldFile, RewindError> {
    let disk = &*target.disk;
    let content = match disk.stat(path) {
        Ok(None) if matches!(disk.is_directory(path), Ok(None)) => Ok(None),
        Ok(None) => {
            let message = format!(
                "{path} on the target would be replaced, but it is not a regular file: move it out \
                 of the way"
            );
            return Err(RewindError::new(Class::Preflight, message));
        }
        Ok(Some(stat)) => {
            let read = target.directory.read(path, SMALL_FILE_BYTES_MAX);
            read.map(|bytes| Some((bytes, stat.mode)))
        }
        Err(error) => Err(error),
    };
    let content = content.map_err(|error| {
        RewindError::because(Class::Target, format!("could not read {path}"), error)
    })?;
    Ok(OldFile { path: path.clone(), content })
}

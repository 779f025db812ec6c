//! What it takes to undo a rewind, gathered before the seal.

use std::sync::Arc;

use pg_format::DataPath;

use crate::apply::before_images;
use crate::error::{Class, RewindError};
use crate::plan::before_images::{Image, bytes_of};
use crate::prepare::seal::Sealing;
use crate::staging::manifest::{Manifest, OldFile, PackDigest, Undo};
use crate::staging::staging;
use crate::task::blocking;

/// Longest settings or history file that is saved for the way back.
const SMALL_FILE_BYTES_MAX: u64 = 16 << 20;

/// Images of what the plan overwrites; the others are of what turns out to be cut besides.
pub(crate) const PLANNED: &str = "planned";

impl Sealing<'_> {
    /// Saves images of what will be overwritten, if the way back is wanted.
    pub(crate) async fn images(
        &self,
        when: &str,
        images: Vec<Image>,
    ) -> Result<Vec<PackDigest>, RewindError> {
        let Some(gate) = self.undo.clone().filter(|_| !images.is_empty()) else {
            return Ok(Vec::new());
        };
        let disk = Arc::clone(self.disk);
        let bytes = bytes_of(&images);
        let name = format!("{}-{when}", self.attempt);
        // What an earlier run saved for the same plan need not be saved again.
        let adopted = when == PLANNED;
        blocking(move || {
            let saved = || match adopted {
                true => before_images::adopt(&*disk, &images, &gate)?
                    .map_or_else(|| before_images::save(&disk, &name, &images, &gate), Ok),
                false => before_images::save(&disk, &name, &images, &gate),
            };
            saved().map_err(|error| {
                let message = format!("could not save the {bytes} bytes that will be overwritten");
                RewindError::because(Class::Preflight, message, error)
            })
        })
        .await
    }

    /// What it takes to go back, once all is known that will change.
    pub(crate) fn way_back(
        &self,
        manifest: &Manifest,
        images: Vec<PackDigest>,
    ) -> Result<Option<Undo>, RewindError> {
        if self.undo.is_none() {
            return Ok(None);
        }
        let written = manifest.wal.write.iter().chain(&manifest.settings).map(|file| &file.path);
        let label = DataPath::new("backup_label").map_err(|e| staging(std::io::Error::other(e)))?;
        let mut small = Vec::new();
        for path in written.chain(&manifest.remove).chain([&label]) {
            small.push(self.old_file(path)?);
        }
        Ok(Some(Undo { images, small }))
    }

    fn old_file(&self, path: &DataPath) -> Result<OldFile, RewindError> {
        let content = match self.disk.stat(path) {
            Ok(None) if matches!(self.disk.is_directory(path), Ok(None)) => Ok(None),
            Ok(None) => {
                let message = format!(
                    "{path} on the target is no regular file and would be replaced: move it away"
                );
                return Err(RewindError::new(Class::Preflight, message));
            }
            Ok(Some(stat)) => {
                let read = self.target.directory.read(path, SMALL_FILE_BYTES_MAX);
                read.map(|bytes| Some((bytes, stat.mode)))
            }
            Err(error) => Err(error),
        };
        let content = content.map_err(|error| {
            RewindError::because(Class::Target, format!("could not read {path}"), error)
        })?;
        Ok(OldFile { path: path.clone(), content })
    }
}

//! Whether a sealed plan is still valid: until the target is changed, somebody may have worked on it.

use std::io;

use pg_format::DataPath;

use crate::plan::FileAction;
use crate::staging::disk::{Disk, read_all};
use crate::staging::manifest::{Manifest, OldFile};
use crate::target::places::{BadPlace, check_place};

/// Why a sealed plan is not valid any more.
#[derive(Debug, thiserror::Error)]
pub enum NotValid {
    /// `pg_control` is not the one that the plan was made for.
    #[error("PostgreSQL was started on the target while the rewind was prepared")]
    Started,
    /// A file that the plan changes is not what it was.
    #[error("{0} on the target changed while the rewind was prepared")]
    FileChanged(DataPath),
    /// A new tablespace cannot be put where the plan puts it: the directory must contain files of this
    /// cluster only.
    #[error("directory {place} for {path} {why}")]
    PlaceTaken {
        /// The directory.
        place: String,
        /// The link to it.
        path: DataPath,
        /// What is wrong with it.
        why: BadPlace,
    },
}

/// Why the plan is not valid any more; `None` if it is valid.
///
/// # Errors
/// A file of the target cannot be read.
pub fn check(disk: &dyn Disk, manifest: &Manifest) -> io::Result<Option<NotValid>> {
    if read_all(disk, &DataPath::of("global/pg_control"))? != manifest.old_control {
        return Ok(Some(NotValid::Started));
    }
    for index in 0..manifest.files.len() {
        if let Some(why) = check_file(disk, manifest, index)? {
            return Ok(Some(why));
        }
    }
    for old in manifest.undo.iter().flat_map(|undo| &undo.small) {
        if !is_unchanged(disk, old)? {
            return Ok(Some(NotValid::FileChanged(old.path.clone())));
        }
    }
    Ok(None)
}

fn check_file(disk: &dyn Disk, manifest: &Manifest, index: usize) -> io::Result<Option<NotValid>> {
    let Some(file) = manifest.files.get(index) else {
        return Ok(None);
    };
    let path = || file.path.clone();
    Ok(match &file.action {
        FileAction::RemoveTree => None,
        FileAction::MakeDirectory { link: Some(place) } => check_place(place)
            .err()
            .map(|why| NotValid::PlaceTaken { place: place.clone(), path: path(), why }),
        FileAction::MakeDirectory { link: None }
        | FileAction::Replace { .. }
        | FileAction::Patch { .. }
        | FileAction::Remove => (disk.stat(&file.path)?.as_ref() != manifest.before(index))
            .then(|| NotValid::FileChanged(path())),
    })
}

/// Whether a small file that a rollback would restore is what was saved of it.
fn is_unchanged(disk: &dyn Disk, old: &OldFile) -> io::Result<bool> {
    let live = match read_all(disk, &old.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        bytes => Some(bytes?),
    };
    Ok(live.as_ref() == old.content.as_ref().map(|(bytes, _)| bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlannedFile;
    use crate::staging::manifest::Undo;
    use crate::test_values::{EmptyTarget, control_bytes, manifest, put_file};

    /// A target with a file, and what a plan that patches it says.
    fn sealed(target: &EmptyTarget) -> Manifest {
        let path = DataPath::of("base/16384");
        put_file(&target.home.path().join("base/16384"), &[1; 8192]);
        let before = target.target.disk.stat(&path).unwrap();
        let action = FileAction::Patch { bytes: 8192 };
        Manifest {
            old_control: control_bytes(),
            files: vec![PlannedFile { path, action }],
            before: vec![before],
            ..manifest()
        }
    }

    fn checked(target: &EmptyTarget, manifest: &Manifest) -> Option<NotValid> {
        check(&*target.target.disk, manifest).unwrap()
    }

    #[test]
    fn a_plan_is_valid_as_long_as_nobody_touches_the_target() {
        let target = EmptyTarget::new();
        let manifest = sealed(&target);
        assert!(checked(&target, &manifest).is_none());
    }

    #[test]
    fn a_target_that_was_started_has_another_pg_control() {
        let target = EmptyTarget::new();
        let manifest = Manifest { old_control: b"another".to_vec(), ..sealed(&target) };
        assert!(matches!(checked(&target, &manifest), Some(NotValid::Started)));
    }

    #[test]
    fn a_file_that_was_changed_removed_or_made_is_named() {
        let target = EmptyTarget::new();
        let file = target.home.path().join("base/16384");
        let changed = |manifest: &Manifest| match checked(&target, manifest) {
            Some(NotValid::FileChanged(path)) => path.to_string(),
            other => panic!("{other:?}"),
        };
        let manifest = sealed(&target);
        put_file(&file, &[1; 16384]);
        assert_eq!(changed(&manifest), "base/16384");
        let manifest = sealed(&target);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(changed(&manifest), "base/16384");
        let manifest = Manifest { before: vec![None], ..sealed(&target) };
        assert_eq!(changed(&manifest), "base/16384", "there was none");
    }

    #[test]
    fn what_is_in_a_directory_that_goes_does_not_matter() {
        let target = EmptyTarget::new();
        let mut manifest = sealed(&target);
        for file in &mut manifest.files {
            file.action = FileAction::RemoveTree;
        }
        put_file(&target.home.path().join("base/16384"), b"longer");
        assert!(checked(&target, &manifest).is_none());
    }

    #[test]
    fn a_tablespace_is_not_put_where_something_is_by_now() {
        let (target, place) = (EmptyTarget::new(), tempfile::tempdir().unwrap());
        let link = Some(place.path().display().to_string());
        let action = FileAction::MakeDirectory { link };
        let path = DataPath::of("pg_tblspc/16400");
        let mut manifest = sealed(&target);
        manifest.files.push(PlannedFile { path, action });
        manifest.before.push(None);
        assert!(checked(&target, &manifest).is_none());
        put_file(&place.path().join("file"), b"");
        let why = checked(&target, &manifest).unwrap();
        assert!(matches!(why, NotValid::PlaceTaken { why: BadPlace::NotEmpty, .. }), "{why}");
    }

    #[test]
    fn settings_that_were_edited_are_noticed_where_a_rollback_would_restore_them() {
        let target = EmptyTarget::new();
        let path = DataPath::of("postgresql.auto.conf");
        let file = target.home.path().join("postgresql.auto.conf");
        let saved = |content: Option<&str>| {
            let content = content.map(|text| (text.as_bytes().to_vec(), 0o600));
            let small = vec![OldFile { path: path.clone(), content }];
            Manifest { undo: Some(Undo { images: Vec::new(), small }), ..sealed(&target) }
        };
        assert!(checked(&target, &saved(None)).is_none(), "there was none and there is none");
        assert!(checked(&target, &saved(Some("a = 1"))).is_some(), "it is gone");
        put_file(&file, b"a = 1");
        assert!(checked(&target, &saved(Some("a = 1"))).is_none());
        assert!(checked(&target, &saved(Some("a = 2"))).is_some(), "it was edited");
        assert!(checked(&target, &saved(None)).is_some(), "it is new");
    }
}

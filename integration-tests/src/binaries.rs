//! The programs under test, copied where the unprivileged user can run them: the clone may lie in a
//! directory it cannot enter.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Tests that run side by side in one process share the copy.
static COPYING: Mutex<()> = Mutex::new(());

/// Path of a runnable copy of a program of this workspace.
pub fn program(name: &str) -> PathBuf {
    let _alone = COPYING.lock().unwrap_or_else(PoisonError::into_inner);
    let test = std::env::current_exe().expect("the test has a path");
    let built = test.ancestors().nth(2).expect("target/<profile>").join(name);
    let metadata = fs::metadata(&built)
        .unwrap_or_else(|error| panic!("{}: {error}: run make test", built.display()));
    let home = Path::new("/var/tmp/pgrejoin-test-bin");
    fs::create_dir_all(home).expect("a directory for programs");
    // Its time and size name the copy, so that parallel tests share it and a new build replaces it.
    let stamp = format!("{name}-{}-{}", metadata.mtime_nsec(), metadata.len());
    let copy = home.join(&stamp);
    if !copy.exists() {
        for old in fs::read_dir(home).expect("readable").flatten() {
            let old_name = old.file_name().to_string_lossy().into_owned();
            let same = old_name.strip_prefix(name).is_some_and(|rest| {
                rest.starts_with('-') && rest[1..].starts_with(|c: char| c.is_ascii_digit())
            });
            let day_old = old
                .metadata()
                .and_then(|m| m.modified())
                .is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age.as_secs() > 86_400));
            if same && day_old {
                drop(fs::remove_file(old.path()));
            }
        }
        let temporary = home.join(format!("{stamp}.{}", std::process::id()));
        fs::copy(&built, &temporary).expect("copied");
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755)).expect("chmod");
        #[expect(clippy::disallowed_methods, reason = "a test's own file")]
        fs::rename(&temporary, &copy).expect("renamed");
    }
    copy
}

//! Small disks of their own: files behind a loop device, with a real file system on them. Takes root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::command::run;
use crate::user::User;

/// A mounted disk; gone when dropped.
#[derive(Debug)]
pub struct Device {
    /// What the disk holds: what reached it, not what waits in the kernel's cache.
    image: PathBuf,
    mount: PathBuf,
    /// The file lies in memory.
    home: TempDir,
}

impl Device {
    /// An empty disk, mounted on `mount`, which is made.
    pub fn new(mount: &Path, megabytes: u64) -> Self {
        let home = memory(megabytes);
        let image = home.path().join("image");
        run(Command::new("truncate").arg(format!("--size={megabytes}M")).arg(&image));
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image));
        Self::mounted(home, mount)
    }

    fn mounted(home: TempDir, mount: &Path) -> Self {
        let image = home.path().join("image");
        fs::create_dir_all(mount).expect("mount point");
        // The journal is written when somebody waits for it, not every few seconds.
        let options = "loop,commit=300,errors=remount-ro";
        run(Command::new("mount").args(["-o", options]).arg(&image).arg(mount));
        User::unprivileged().own(mount);
        Self { image, mount: mount.to_owned(), home }
    }

    /// The same disk after a power cut at this moment, on another mount point.
    pub fn after_a_power_cut(&self, mount: &Path) -> Self {
        let megabytes = fs::metadata(&self.image).expect("image").len() >> 20;
        let home = memory(megabytes);
        let copy = home.path().join("image");
        loop {
            fs::copy(&self.image, &copy).expect("copied");
            // The kernel may have written in between: such a disk never was.
            let same = Command::new("cmp").arg("-s").arg(&self.image).arg(&copy).status();
            if same.expect("cmp runs").success() {
                break;
            }
        }
        Self::mounted(home, mount)
    }

    /// Writes to places that hold nothing yet fail from now on with an I/O error, whereupon the file
    /// system becomes read-only: there is no memory left behind the disk.
    pub fn refuse_writes(&self) {
        fill(&self.home.path().join("filler"));
    }

    /// Writes are taken again; the file system is mounted anew, as after a repair.
    pub fn take_writes(self) -> Self {
        fs::remove_file(self.home.path().join("filler")).expect("removed");
        run(Command::new("umount").arg(&self.mount));
        let Self { home, mount, .. } = &self;
        let options = "loop,commit=300,errors=remount-ro";
        run(Command::new("mount").args(["-o", options]).arg(home.path().join("image")).arg(mount));
        self
    }

    /// Takes all room there is; the file that holds it.
    pub fn fill(&self) -> PathBuf {
        let file = self.mount.join("filler");
        fill(&file);
        file
    }
}

/// A file system in memory, as large as the disk whose file will lie on it.
fn memory(megabytes: u64) -> TempDir {
    let home = tempfile::tempdir_in("/dev/shm").expect("memory");
    let size = format!("size={}M", megabytes + 8);
    run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "pgrejoin"]).arg(home.path()));
    home
}

/// Writes until nothing more fits.
fn fill(file: &Path) {
    let mut fill = Command::new("dd");
    fill.args(["if=/dev/zero", "bs=64k", "status=none"]).arg(format!("of={}", file.display()));
    let ended = fill.stderr(std::process::Stdio::null()).status().expect("dd runs");
    assert!(!ended.success(), "the disk was not filled");
}

impl Drop for Device {
    fn drop(&mut self) {
        for mount in [self.mount.as_path(), self.home.path()] {
            drop(Command::new("umount").arg("-l").arg(mount).status());
        }
    }
}

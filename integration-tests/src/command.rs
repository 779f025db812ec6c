//! Programs that must succeed.

use std::process::Command;

/// Runs a command that must succeed; its output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut shown = format!("{command:?}");
    shown.truncate(shown.floor_char_boundary(600));
    assert!(
        output.status.success(),
        "{shown} ended with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

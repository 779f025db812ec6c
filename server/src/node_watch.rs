//! Says in the log what the data directory is, at the start and whenever that changes: an operator who reads the log
//! must see what clients are told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::model::Role;

use crate::node;

/// How often the data directory is looked at.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks at the data directory for as long as the server runs.
pub(crate) async fn watch(pgdata: PathBuf) {
    let mut before = None;
    loop {
        let looked_at = pgdata.clone();
        let seen = tokio::task::spawn_blocking(move || look(&looked_at)).await;
        if let Ok(seen) = seen
            && before.as_ref() != Some(&seen)
        {
            match &seen {
                Seen::Node(what) => tracing::info!("the data directory is that of {what}"),
                Seen::NotServed(why) => {
                    tracing::warn!("the data directory cannot be served now: {why}");
                }
            }
            before = Some(seen);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What a client would be told.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Node(String),
    NotServed(String),
}

fn look(pgdata: &Path) -> Seen {
    let node = node::open(pgdata).and_then(|directory| node::inspect(&directory));
    match node {
        Ok(node) => {
            let role = match node.role {
                Role::Primary => "a primary",
                Role::Standby => "a standby",
                Role::Stopped => "a node that was shut down",
            };
            let (major, timeline) = (node.control.major, node.timeline);
            Seen::Node(format!("{role} of PostgreSQL {major} on timeline {timeline}"))
        }
        Err(refusal) => Seen::NotServed(refusal.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_data_directory_is_said() {
        let home = tempfile::tempdir().unwrap();
        let Seen::NotServed(why) = look(home.path()) else { panic!("it is none") };
        assert!(why.contains("not a PostgreSQL data directory"), "{why}");
        assert!(matches!(look(&home.path().join("missing")), Seen::NotServed(_)));
    }
}

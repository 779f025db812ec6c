//! The nodes of a life.

use super::story::Story;
use crate::cluster::Node;
use crate::pair::Pair;
use crate::server::Pki;

/// The nodes of a life and what both programs need.
#[derive(Debug)]
pub struct World {
    /// The first primary `a` and its standby `b`.
    pub pair: Pair,
    /// Certificates.
    pub pki: Pki,
    /// What was drawn.
    pub story: Story,
}

impl World {
    /// A cluster as the story wants it: a primary and a standby that has caught up.
    pub fn new(story: Story) -> Self {
        let pair = Pair::with(story.major, story.shape, &story.settings());
        let pki = Pki::new(pair.home.path());
        Self { pair, pki, story }
    }

    /// A place for a node.
    pub fn place(&self, name: &str) -> std::path::PathBuf {
        self.pair.home.path().join(name)
    }
}

/// Who comes back, and to whom.
#[derive(Debug)]
pub struct Parted {
    /// The node to be rewound; stopped or killed.
    pub target: Node,
    /// The primary whose history counts; running.
    pub source: Node,
}

//! Random lives: nodes part in every way they can, one of them comes back, and then lives on.
//!
//! A life is drawn from a seed ([`story`]), parted ([`parting`]), rewound ([`way_back`]) and lived
//! ([`afterwards`]). The truth about the rows comes from a copy of the source, so that looking at them makes
//! the source log nothing that would mend a wrong page of the result.

#![expect(clippy::print_stdout, reason = "a seed must be seen to be repeated")]

pub mod afterwards;
pub mod parting;
pub mod story;
pub mod way_back;
pub mod work;

use crate::cluster::Node;
use crate::pair::Pair;
use crate::server::Pki;
use story::Story;

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

/// One life; panics where it does not end well.
pub fn live(story: Story) {
    println!("{story}");
    let world = World::new(story);
    let parted = parting::part(&world);
    let primary = way_back::come_back(&world, &parted);
    afterwards::live_on(&world, &parted.target, &primary);
}

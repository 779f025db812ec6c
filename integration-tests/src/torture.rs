//! Random lives: nodes part in every way they can, one of them comes back, and then lives on.
//!
//! A life is drawn from a seed ([`story`]), parted ([`parting`]), rewound ([`coming_back`]) and lived
//! ([`afterwards`]). The truth about the rows comes from a copy of the source, so that looking at them makes
//! the source log nothing that would mend a wrong page of the result.

#![expect(clippy::print_stdout, reason = "a seed must be seen to be repeated")]

pub mod afterwards;
pub mod coming_back;
pub mod parting;
pub mod story;
pub mod work;
pub mod world;

use story::Story;
use world::World;

/// One life; panics where it does not end well.
pub fn live(story: Story) {
    println!("{story}");
    let world = World::new(story);
    let parted = parting::part(&world);
    let primary = coming_back::come_back(&world, &parted);
    afterwards::live_on(&world, &parted.target, &primary);
}

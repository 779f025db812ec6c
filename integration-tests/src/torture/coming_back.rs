//! The rewind of a life: with random options, killed at random moments, from a source in any state.

use std::thread::sleep;
use std::time::Duration;

use rustix::process::Signal;

use super::story::{Source, Target};
use super::work::work;
use super::world::{Parted, World};
use crate::client::{Ended, Rewind, state_command};
use crate::cluster::Node;
use crate::oracle;
use crate::server::Server;
use crate::snapshot::Content;

/// Brings the target back; returns the primary that it follows, which runs.
pub fn come_back(world: &World, parted: &Parted) -> Node {
    let Parted { target, source } = parted;
    let story = &world.story;
    let served = match story.source {
        Source::Standby => source.copy_running(source, &world.place("served")),
        Source::Stopped => {
            source.stop("fast");
            source.clone()
        }
        Source::Live | Source::Quiet => source.clone(),
    };
    let live = (story.source == Source::Live).then(|| source.load(&work("l", story.seed)));
    let server = Server::start(&served, &world.pki);
    let ended = rewind_with_kills(world, parted, &server);
    let [result, strategy, reason] =
        ["result", "strategy", "strategy_reason"].map(|name| ended.field(name));
    println!("life {}: {result} by {strategy}: {reason}", story.seed);
    if story.source == Source::Stopped {
        if !matches!(story.target, Target::NeverStarted { .. }) {
            oracle::only_replay_rebuilds_differences(target, &server, &world.pki);
        }
        source.start();
    }
    target.start();
    sleep(Duration::from_millis(200));
    drop(live);
    drop(server);
    if story.source == Source::Standby {
        served.stop("fast");
    }
    source.clone()
}

/// Some runs are killed at random moments before one is left alone; in between PostgreSQL must not start from
/// a target that is being changed.
fn rewind_with_kills(world: &World, parted: &Parted, server: &Server) -> Ended {
    let Parted { target, source } = parted;
    let story = &world.story;
    let mut choices = story.choices.clone();
    let connections = story.connections.to_string();
    let rewind = |strategy: &str| {
        Rewind::new(target, server, &world.pki).following(source).args([
            "--strategy",
            strategy,
            "--connections",
            &connections,
            "--keep-diverged",
            story.keep_diverged,
        ])
    };
    for _ in 0..story.kills {
        let running = rewind(story.strategy).spawn();
        sleep(Duration::from_millis(choices.below(1200) as u64));
        running.signal(Signal::KILL);
        running.wait();
        let status = state_command("status", target);
        assert!(status.code == 0 || status.code >= 10, "{}", status.text);
        if status.text.contains("has not finished") {
            assert!(!target.try_start(), "started in the middle of a rewind");
        }
    }
    let is_untouched = !state_command("status", target).text.contains("has not finished");
    let before = Content::without(&target.data, &[".pgrejoin", "postmaster.pid"]);
    let ended = rewind(story.strategy).run();
    if ended.code == 0 {
        return came_back(ended);
    }
    // Who insists on a strategy may be refused, and finds everything as it was.
    assert!(["fork", "latest"].contains(&story.strategy), "{}", ended.text);
    assert!([5, 6, 7].contains(&ended.code) && is_untouched, "{}", ended.text);
    before.assert_same(&Content::without(&target.data, &[".pgrejoin", "postmaster.pid"]));
    came_back(rewind("auto").succeed())
}

fn came_back(ended: Ended) -> Ended {
    let result = ended.field("result");
    let expected = ["rewound", "resumed", "already_rewound"];
    assert!(expected.contains(&result.as_str()), "{}", ended.text);
    ended
}

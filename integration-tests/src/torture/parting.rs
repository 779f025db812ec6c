//! How the nodes of a life part.

use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use super::story::{Ending, Offline, Target};
use super::work::{Open, make_watched, read, read_once, work};
use super::world::{Parted, World};
use crate::client::Rewind;
use crate::cluster::{Install, Load, Node};
use crate::command::run;
use crate::faults::judge::Choices;
use crate::oracle;
use crate::server::Server;

/// What goes on before the nodes part.
struct Common {
    open: Open,
    loads: Vec<Load>,
    choices: Choices,
}

impl Common {
    fn chance(&mut self, one_in: usize) -> bool {
        self.choices.below(one_in) == 0
    }

    fn pause(&mut self, milliseconds_max: usize) {
        sleep(Duration::from_millis(self.choices.below(milliseconds_max) as u64));
    }

    /// New segments and checkpoints, now and then.
    fn mark(&mut self, node: &Node) {
        if self.chance(2) {
            node.sql("select pg_switch_wal()");
        }
        if self.chance(2) {
            node.sql("checkpoint");
        }
    }

    /// Ends the prepared transaction here in one way or the other, or leaves it open.
    fn end_prepared(&mut self, node: &Node) {
        match self.choices.below(3) {
            0 => self.open.end_prepared(node, true),
            1 => self.open.end_prepared(node, false),
            _ => {}
        }
    }
}

/// Parts the nodes as the story says.
pub fn part(world: &World) -> Parted {
    match world.story.target {
        Target::OldPrimary => old_primary(world),
        Target::StandbyAhead => standby_ahead(world),
        Target::PromotedByMistake { own_checkpoint } => promoted(world, own_checkpoint),
        Target::NeverStarted { to_another_timeline } => never_started(world, to_another_timeline),
    }
}

/// Work on the primary, transactions that stay open, readers, and checkpoints now and then.
fn common(world: &World) -> Common {
    let World { pair, story, .. } = world;
    let mut choices = story.choices.clone();
    make_watched(&pair.a);
    if story.has_pgbench {
        pair.a.pgbench_init(1);
    }
    let mut loads = vec![pair.a.load(&work("c", story.seed))];
    if story.has_pgbench {
        loads.push(pair.a.pgbench());
    }
    let open_first = choices.below(3) > 0;
    let begin = || Open::begin(&pair.a, story.is_long_open, story.is_prepared_open);
    let early = open_first.then(begin);
    sleep(Duration::from_millis(choices.below(500) as u64));
    if choices.below(3) > 0 {
        pair.a.sql("checkpoint");
    }
    let open = early.unwrap_or_else(begin);
    pair.catch_up();
    if story.has_readers {
        loads.extend([read(&pair.a), read(&pair.b)]);
    }
    if choices.below(2) == 0 {
        pair.b.sql("checkpoint");
    }
    sleep(Duration::from_millis(choices.below(400) as u64));
    Common { open, loads, choices }
}

fn old_primary(world: &World) -> Parted {
    let parted = failed_over(world);
    switch_offline(world, &parted);
    parted
}

fn failed_over(world: &World) -> Parted {
    let World { pair, story, .. } = world;
    let mut common = common(world);
    pair.b.promote();
    common.loads.push(pair.a.load(&work("o", story.seed)));
    let new = pair.b.load(&work("n", story.seed));
    common.pause(500);
    let commits = common.chance(2);
    common.open.end_here(&pair.a, commits);
    common.end_prepared(&pair.b);
    if story.has_readers {
        read_once(&pair.a);
        read_once(&pair.b);
    }
    common.pause(500);
    common.mark(&pair.a);
    common.mark(&pair.b);
    common.pause(400);
    end(&pair.a, story.ending);
    drop((common, new));
    Parted { target: pair.a.clone(), source: pair.b.clone() }
}

fn standby_ahead(world: &World) -> Parted {
    let World { pair, story, .. } = world;
    let elected = pair.b.copy_running(&pair.a, &world.place("c"));
    let mut common = common(world);
    let lsn = pair.a.lsn();
    elected.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    elected.stop("fast");
    common.pause(500);
    let commits = common.chance(3);
    common.open.end_here(&pair.a, !commits);
    common.pause(400);
    pair.catch_up();
    if story.has_readers {
        read_once(&pair.b);
    }
    if common.chance(2) {
        pair.b.sql("checkpoint");
    }
    pair.a.kill();
    end(&pair.b, story.ending);
    common.loads.clear();
    elected.elect();
    work_for_a_while(world, &elected, &mut common);
    let parted = Parted { target: pair.b.clone(), source: elected };
    switch_offline(world, &parted);
    parted
}

fn promoted(world: &World, own_checkpoint: bool) -> Parted {
    let World { pair, story, .. } = world;
    let mut common = common(world);
    if !own_checkpoint {
        kill_process(pair.b.process("checkpointer"), Signal::STOP).expect("stopped");
    }
    pair.b.promote();
    common.end_prepared(&pair.b);
    let old = pair.b.load(&work("o", story.seed));
    common.pause(500);
    pair.b.sql("delete from watched where id > 400");
    if story.has_readers {
        read_once(&pair.b);
    }
    if own_checkpoint {
        pair.b.sql("checkpoint");
        common.pause(300);
        end(&pair.b, story.ending);
    } else {
        pair.b.kill();
    }
    drop(old);
    let commits = common.chance(2);
    common.open.end_here(&pair.a, commits);
    common.pause(300);
    common.mark(&pair.a);
    drop(common);
    let parted = Parted { target: pair.b.clone(), source: pair.a.clone() };
    switch_offline(world, &parted);
    parted
}

fn never_started(world: &World, to_another_timeline: bool) -> Parted {
    let parted = old_primary(world);
    let next =
        to_another_timeline.then(|| parted.source.copy_running(&parted.source, &world.place("s")));
    let server = Server::start(&parted.source, &world.pki);
    Rewind::new(&parted.target, &server, &world.pki).following(&parted.source).succeed();
    drop(server);
    let mut common = Common {
        open: Open::begin(&parted.source, false, false),
        loads: Vec::new(),
        choices: world.story.choices.clone(),
    };
    work_for_a_while(world, &parted.source, &mut common);
    let Some(next) = next else {
        return parted;
    };
    let lsn = parted.source.lsn();
    next.wait("postgres", &format!("pg_last_wal_replay_lsn() >= '{lsn}'"));
    parted.source.kill();
    next.promote();
    work_for_a_while(world, &next, &mut common);
    Parted { target: parted.target, source: next }
}

fn work_for_a_while(world: &World, node: &Node, common: &mut Common) {
    let load = node.load(&work("n", world.story.seed));
    common.pause(500);
    common.end_prepared(node);
    common.mark(node);
    drop(load);
}

fn end(node: &Node, ending: Ending) {
    match ending {
        Ending::Fast => node.stop("fast"),
        Ending::Immediate => node.stop("immediate"),
        Ending::Killed => node.kill(),
    }
}

fn switch_offline(world: &World, parted: &Parted) {
    let logs_hints = world.story.shape.wal_log_hints;
    let other = format!("wal_log_hints = {}", if logs_hints { "off" } else { "on" });
    let Parted { target, source } = parted;
    match world.story.offline {
        Offline::Nothing => {}
        Offline::HintsOnTarget => {
            target.configure(&other);
            target.start();
            read_once(target);
            end(target, world.story.ending);
        }
        Offline::HintsOnSource => {
            source.stop("fast");
            source.configure(&other);
            source.start();
        }
        Offline::Checksums => {
            if !oracle::is_shut_down(target) {
                target.start();
                target.stop("fast");
            }
            source.stop("fast");
            for node in [target, source] {
                let install = if node.install.major == 18 { 18 } else { 15 };
                let program = Install::of(install).program("pg_checksums");
                run(node.user.command(program).arg("--enable").arg("-D").arg(&node.data));
            }
            source.start();
        }
    }
}

//! A long link on one machine: two network namespaces joined by TUN devices with a link between them
//! that has a round trip, a rate, a queue and loss. The kernel's own TCP runs over it, so windows,
//! slow start and congestion control are real. Takes root.
//!
//! netem is not in every kernel, and a TCP proxy shows neither windows nor loss.

pub mod link;

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tun_rs::{DeviceBuilder, SyncDevice};

use self::link::{Counters, Direction};

pub use self::link::Shape;
use crate::command::run;

/// Address of the source's end.
pub const SOURCE_ADDRESS: &str = "10.77.0.1";
/// Address of the target's end.
pub const TARGET_ADDRESS: &str = "10.77.0.2";

/// One end of a link: the namespace a command runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    serial: (u32, u32),
    end: char,
}

impl Network {
    /// Its name, which `ip netns` knows.
    pub fn name(self) -> String {
        let (process, number) = self.serial;
        format!("pgr{process}n{number}{}", self.end)
    }

    fn path(self) -> String {
        format!("/run/netns/{}", self.name())
    }

    /// The argument of `nsenter`.
    pub fn argument(self) -> String {
        format!("--net={}", self.path())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Wan {
    /// Where the source runs.
    pub source: Network,
    /// Where the target runs.
    pub target: Network,
    /// What went from the source to the target.
    pub down: Arc<Counters>,
    /// What went from the target to the source.
    pub up: Arc<Counters>,
    stop: Arc<AtomicBool>,
    lifted: Arc<AtomicBool>,
    directions: Vec<JoinHandle<std::io::Result<()>>>,
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Wan {
    /// Makes a link of this shape.
    pub fn new(shape: Shape) -> Self {
        assert!(rustix::process::geteuid().is_root(), "network namespaces take root");
        let serial = (std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let [source, target] = ['s', 't'].map(|end| Network { serial, end });
        let near = end(source, SOURCE_ADDRESS, shape);
        let far = end(target, TARGET_ADDRESS, shape);
        let (down, up) = (Arc::<Counters>::default(), Arc::<Counters>::default());
        let (stop, lifted) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let carry =
            |from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, counters: &Arc<Counters>, seed| {
                let ends = (Arc::clone(from), Arc::clone(to));
                let direction =
                    Direction::new(ends, (shape, Arc::clone(&lifted)), Arc::clone(counters), seed);
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || direction.carry(&stop))
            };
        let directions = vec![carry(&near, &far, &down, 0x5EED), carry(&far, &near, &up, 0xFEED)];
        Self { source, target, down, up, stop, lifted, directions }
    }

    /// From now on it carries everything at once and loses nothing: what is measured is over.
    pub fn lift(&self) {
        self.lifted.store(true, Ordering::Relaxed);
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for direction in self.directions.drain(..) {
            if let Ok(Err(error)) = direction.join() {
                assert!(std::thread::panicking(), "the link failed: {error}");
            }
        }
        for network in [self.source, self.target] {
            // Whatever still runs in it keeps it until it ends.
            drop(std::process::Command::new("ip").args(["netns", "del", &network.name()]).output());
        }
    }
}

/// Makes a namespace with one end of the link in it.
fn end(network: Network, address: &str, shape: Shape) -> Arc<SyncDevice> {
    let ip = |args: &str| {
        let args = args.split(' ').map(str::to_owned);
        run(std::process::Command::new("ip").args(args));
    };
    let name = network.name();
    ip(&format!("netns add {name}"));
    let device = std::thread::spawn(move || device_in(network)).join().expect("device");
    ip(&format!("-n {name} link set lo up"));
    ip(&format!("-n {name} addr add {address}/24 dev wan"));
    ip(&format!("-n {name} link set wan up txqueuelen 10000"));
    let control = shape.congestion_control;
    ip(&format!("-n {name} route replace 10.77.0.0/24 dev wan congctl lock {control}"));
    device
}

/// A device belongs to the namespace of the thread that makes it.
fn device_in(network: Network) -> Arc<SyncDevice> {
    let namespace = std::fs::File::open(network.path()).expect("namespace");
    let kind = Some(LinkNameSpaceType::Network);
    let entered = move_into_link_name_space(namespace.as_fd(), kind);
    entered.expect("entered");
    let device = DeviceBuilder::new().name("wan").offload(true).mtu(1500).build_sync();
    let device = device.expect("a TUN device (/dev/net/tun)");
    device.set_nonblocking(true).expect("does not block");
    Arc::new(device)
}

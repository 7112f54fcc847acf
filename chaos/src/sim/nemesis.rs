//! The nemesis of a simulated cluster: faults as data, drawn from a seed, printed, and carried out. Must never leave a
//! fault behind when it has ended, but for what [`Schedule::heal`] is there to mend.

use std::{collections::BTreeSet, fmt, time::Duration};

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use stentor_raft_store::DiskError;
use stentor_transport::memory::{Death, Latency, stream_of};
use tokio::{task::JoinSet, time::Instant};

use super::cluster::Cluster;

/// One fault. Brokers and gateways are numbered from 0.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Brokers lose their power or their process at the same moment, and are back after `down`.
    Crash {
        /// Which.
        brokers: Vec<usize>,
        /// How.
        death: Death,
        /// For how long.
        down: Duration,
    },
    /// A broker is stopped in good order, hands over what it leads, and is back `down` later.
    Restart {
        /// Which.
        broker: usize,
        /// For how long.
        down: Duration,
    },
    /// The next broker of these whose disk has synced a vote loses its power `after` that.
    CrashAfterVote {
        /// Which may be hit.
        brokers: Vec<usize>,
        /// How soon after the vote.
        after: Duration,
        /// For how long.
        down: Duration,
    },
    /// Nothing gets between one side and all others, either way.
    Partition {
        /// The brokers and gateways of one side.
        side: Side,
        /// For how long.
        lasts: Duration,
    },
    /// Nothing gets from one broker to another; the way back is open.
    OneWay {
        /// From whom.
        from: usize,
        /// To whom.
        to: usize,
        /// For how long.
        lasts: Duration,
    },
    /// Only one broker can talk to all others, which cannot talk to each other.
    Bridge {
        /// Who can.
        middle: usize,
        /// For how long.
        lasts: Duration,
    },
    /// Every fsync of a broker takes so long.
    SlowDisk {
        /// Which.
        broker: usize,
        /// How long an fsync takes.
        sync: Duration,
        /// For how long.
        lasts: Duration,
    },
    /// A write or an fsync of a broker fails, which must stop it; its process is back after `down`.
    DiskFails {
        /// Which.
        broker: usize,
        /// How many operations later, counted from 1.
        operation: u64,
        /// How.
        error: DiskError,
        /// For how long.
        down: Duration,
        /// It comes back with an empty disk, and has to join.
        wiped: bool,
    },
    /// Packets are lost and late everywhere.
    BadNetwork {
        /// One way, at most.
        max: Duration,
        /// Of a thousand packets so many are lost.
        lost_per_mille: u32,
        /// For how long.
        lasts: Duration,
    },
    /// All connections between two brokers are reset.
    Reset {
        /// One.
        one: usize,
        /// The other.
        other: usize,
    },
    /// A gateway dies and is back after `down`.
    GatewayLoss {
        /// Which.
        gateway: usize,
        /// How.
        death: Death,
        /// For how long.
        down: Duration,
    },
    /// A broker's wall clock jumps.
    Clock {
        /// Which.
        broker: usize,
        /// By how much it is wrong from now on, in ms.
        skew_ms: i64,
    },
}

/// The hosts of one side of a partition.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Side {
    /// Brokers.
    pub brokers: Vec<usize>,
    /// Gateways.
    pub gateways: Vec<usize>,
}

/// A fault at its time.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Since the chaos began.
    pub at: Duration,
    /// What happens.
    pub fault: Fault,
}

/// What happens to a cluster, in order of time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Schedule(pub Vec<Step>);

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| writeln!(f, "  {:>6} ms  {:?}", step.at.as_millis(), step.fault))
    }
}

fn ms(random: &mut StdRng, from: u64, to: u64) -> Duration {
    Duration::from_millis(random.random_range(from..=to))
}

/// Some of `count`, at least one, at most `most`.
fn some(random: &mut StdRng, count: usize, most: usize) -> Vec<usize> {
    let all: Vec<usize> = (0..count).collect();
    let many = random.random_range(1..=most.clamp(1, count.max(1)));
    let mut some: Vec<usize> = all.choose_multiple(random, many).copied().collect();
    some.sort_unstable();
    some
}

fn death(random: &mut StdRng) -> Death {
    if random.random_range(0..3) == 0 { Death::Process } else { Death::Power }
}

impl Schedule {
    /// A schedule of `lasts` for a cluster of so many brokers and gateways: a fault every 200 ms to 3 s, some of which
    /// outlast the next ones.
    pub fn draw(seed: u64, brokers: usize, gateways: usize, lasts: Duration) -> Self {
        let random = &mut stream_of(seed, "nemesis", 0);
        let mut at = ms(random, 0, 1_000);
        let mut steps = Vec::new();
        while at < lasts {
            steps.push(Step { at, fault: Self::fault(random, brokers, gateways) });
            at += ms(random, 200, 3_000);
        }
        Self::wipe_once(&mut steps);
        Self(steps)
    }

    /// What is not yet on its new disk must be on the others: a second loss could be the second copy of something.
    fn wipe_once(steps: &mut [Step]) {
        let wipes = steps.iter_mut().filter_map(|step| match &mut step.fault {
            Fault::DiskFails { wiped, .. } if *wiped => Some(wiped),
            _ => None,
        });
        wipes.skip(1).for_each(|wiped| *wiped = false);
    }

    fn fault(random: &mut StdRng, brokers: usize, gateways: usize) -> Fault {
        let any = random.random_range(0..brokers.max(1));
        let other = (any + random.random_range(1..brokers.max(2))) % brokers.max(1);
        let lasts = ms(random, 500, 6_000);
        match random.random_range(0..118) {
            0..25 => {
                let down = ms(random, 20, 4_000);
                // One, a minority, a majority, all.
                Fault::Crash { brokers: some(random, brokers, brokers), death: death(random), down }
            }
            25..40 => {
                let after = ms(random, 0, 6);
                Fault::CrashAfterVote { brokers: some(random, brokers, brokers), after, down: ms(random, 20, 2_000) }
            }
            40..52 => {
                let gateways = (0..gateways).filter(|_| random.random_range(0..2) == 0).collect();
                Fault::Partition { side: Side { brokers: vec![any], gateways }, lasts }
            }
            52..60 => Fault::OneWay { from: any, to: other, lasts },
            60..66 => Fault::Bridge { middle: any, lasts },
            66..74 => Fault::SlowDisk { broker: any, sync: ms(random, 20, 2_000), lasts },
            74..81 => {
                let lost_per_mille = [10, 100, 300].choose(random).copied().unwrap_or(10);
                Fault::BadNetwork { max: ms(random, 10, 150), lost_per_mille, lasts }
            }
            81..86 => Fault::Reset { one: any, other },
            86..94 => {
                let gateway = random.random_range(0..gateways.max(1));
                Fault::GatewayLoss { gateway, death: death(random), down: ms(random, 100, 4_000) }
            }
            94..104 => {
                let error = [DiskError::Io, DiskError::NoSpace].choose(random).copied().unwrap_or_default();
                let (operation, down) = (random.random_range(1..=60), ms(random, 20, 3_000));
                Fault::DiskFails { broker: any, operation, error, down, wiped: random.random_range(0..3) == 0 }
            }
            104..112 => Fault::Restart { broker: any, down: ms(random, 0, 3_000) },
            _ => Fault::Clock { broker: any, skew_ms: random.random_range(-600_000..=600_000) },
        }
    }

    /// Carries everything out; returns when the last fault has ended.
    pub(super) async fn carry_out(&self, cluster: &Cluster) {
        let (began, mut running) = (Instant::now(), JoinSet::new());
        for Step { at, fault } in &self.0 {
            tokio::time::sleep_until(began + *at).await;
            cluster.network().trace().note("fault", &[], format!("{fault:?}").as_bytes());
            running.spawn(fault.clone().happen(cluster.clone()));
        }
        while running.join_next().await.is_some() {}
    }

    /// Mends all that may still be broken: links, disks, clocks, and whatever does not run.
    pub(super) async fn heal(cluster: &Cluster) {
        cluster.network().heal_all();
        cluster.network().set_latency(Latency::default());
        for n in 0..cluster.brokers() {
            cluster.network().set_wall_skew(Cluster::broker_ip(n), 0);
            if let Some(disk) = cluster.disk(n) {
                disk.set_sync_delay(Duration::ZERO);
                disk.heal();
            }
            cluster.start_broker(n).await;
        }
        for n in 0..cluster.gateways() {
            cluster.start_gateway(n).await;
        }
    }
}

impl Fault {
    async fn happen(self, cluster: Cluster) {
        match self {
            Self::Crash { brokers, death, down } => crash(&cluster, &brokers, death, down).await,
            Self::CrashAfterVote { brokers, after, down } => {
                if let Some(hit) = next_vote(&cluster, &brokers).await {
                    tokio::time::sleep(after).await;
                    crash(&cluster, &[hit], Death::Power, down).await;
                }
            }
            Self::Restart { broker, down } => {
                cluster.stop_broker(broker).await;
                tokio::time::sleep(down).await;
                cluster.start_broker(broker).await;
            }
            Self::Partition { side, lasts } => {
                last(&cluster, across(&cluster, &side), lasts).await;
            }
            Self::OneWay { from, to, lasts } => {
                let cut = (Cluster::broker_ip(from), Cluster::broker_ip(to));
                last(&cluster, BTreeSet::from([cut]), lasts).await;
            }
            Self::Bridge { middle, lasts } => {
                let others: Vec<_> = (0..cluster.brokers()).filter(|n| *n != middle).map(Cluster::broker_ip).collect();
                let pairs = others.iter().flat_map(|a| others.iter().map(|b| (*a, *b))).filter(|(a, b)| a != b);
                last(&cluster, pairs.collect(), lasts).await;
            }
            Self::SlowDisk { broker, sync, lasts } => {
                let Some(disk) = cluster.disk(broker) else { return };
                disk.set_sync_delay(sync);
                tokio::time::sleep(lasts).await;
                disk.set_sync_delay(Duration::ZERO);
            }
            Self::DiskFails { broker, operation, error, down, wiped } => {
                if cluster.fail_disk(broker, operation, error).await {
                    cluster.crash_broker(broker, Death::Process);
                    tokio::time::sleep(down).await;
                    if wiped {
                        cluster.wipe(broker);
                    }
                }
                cluster.start_broker(broker).await;
            }
            Self::BadNetwork { max, lost_per_mille, lasts } => {
                cluster.network().set_latency(Latency { max, lost_per_mille, ..Latency::default() });
                tokio::time::sleep(lasts).await;
                cluster.network().set_latency(Latency::default());
            }
            Self::Reset { one, other } => {
                cluster.network().reset(Cluster::broker_ip(one), Cluster::broker_ip(other));
            }
            Self::GatewayLoss { gateway, death, down } => {
                cluster.crash_gateway(gateway, death);
                tokio::time::sleep(down).await;
                cluster.start_gateway(gateway).await;
            }
            Self::Clock { broker, skew_ms } => cluster.network().set_wall_skew(Cluster::broker_ip(broker), skew_ms),
        }
    }
}

async fn crash(cluster: &Cluster, brokers: &[usize], death: Death, down: Duration) {
    brokers.iter().for_each(|&n| cluster.crash_broker(n, death));
    tokio::time::sleep(down).await;
    for &n in brokers {
        cluster.start_broker(n).await;
    }
}

/// The first of these brokers to sync a vote, if one does within a while.
async fn next_vote(cluster: &Cluster, brokers: &[usize]) -> Option<usize> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut voters = JoinSet::new();
    for &n in brokers {
        let Some(mut votes) = cluster.disk(n).map(|disk| disk.votes_synced()) else { continue };
        votes.mark_unchanged();
        voters.spawn(async move { votes.changed().await.is_ok().then_some(n) });
    }
    tokio::time::timeout(PATIENCE, voters.join_next()).await.ok()??.ok()?
}

type Cuts = BTreeSet<(std::net::IpAddr, std::net::IpAddr)>;

fn across(cluster: &Cluster, side: &Side) -> Cuts {
    let brokers = (0..cluster.brokers()).map(|n| (Cluster::broker_ip(n), side.brokers.contains(&n)));
    let gateways = (0..cluster.gateways()).map(|n| (Cluster::gateway_ip(n), side.gateways.contains(&n)));
    let all: Vec<_> = brokers.chain(gateways).collect();
    let pairs = all.iter().flat_map(|a| all.iter().map(move |b| (a, b)));
    pairs.filter(|(a, b)| a.1 != b.1).map(|(a, b)| (a.0, b.0)).collect()
}

async fn last(cluster: &Cluster, cuts: Cuts, lasts: Duration) {
    cuts.iter().for_each(|&(from, to)| cluster.network().cut(from, to));
    tokio::time::sleep(lasts).await;
    cuts.iter().for_each(|&(from, to)| cluster.network().heal(from, to));
}

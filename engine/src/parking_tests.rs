//! A leader and its followers over ways that delay, lose and reorder. Must fail when a leader may count on a lease that a
//! follower does not keep.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules {
    lease: Duration::from_millis(1_000),
    answer: Duration::from_millis(300),
    silence: Duration::from_millis(600),
};
const LEADER: BrokerId = BrokerId(1);
const PEERS: [BrokerId; 2] = [BrokerId(2), BrokerId(3)];
const SHARDS: u32 = 3;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn park(shard: u32, term: u64) -> Park {
    Park { shard: ShardId(shard), term, last_index: 7 }
}

/// One message, and the answer that is under way.
enum OnTheWay {
    Told(BrokerId, Told),
    /// It is looked whether these can be parked; the answer to a message of this list and round comes after that.
    Check(BrokerId, Vec<Park>, u64, u64),
    Answer(BrokerId, Confirmed),
}

struct World {
    now: Duration,
    leads: Leads,
    follows: BTreeMap<BrokerId, Follows>,
    way: Vec<OnTheWay>,
    /// Replicas that do not tick.
    still: BTreeSet<(BrokerId, ShardId)>,
    /// Whether a follower's replica can be parked.
    fits: bool,
}

impl World {
    fn new() -> Self {
        let follows = PEERS.map(|peer| (peer, Follows::new(RULES))).into();
        Self {
            now: ms(5_000),
            leads: Leads::new(RULES, 40),
            follows,
            way: Vec::new(),
            still: BTreeSet::new(),
            fits: true,
        }
    }

    fn follower(&mut self, peer: BrokerId) -> &mut Follows {
        self.follows.get_mut(&peer).unwrap()
    }

    fn pulse(&mut self) {
        for peer in PEERS {
            self.way.extend(self.leads.tell(self.now, peer).map(|told| OnTheWay::Told(peer, told)));
            let now = self.now;
            let woken = self.follower(peer).silent(now);
            self.tick(peer, woken);
        }
        let _ = self.leads.lapsed(self.now);
    }

    fn tick(&mut self, peer: BrokerId, shards: impl IntoIterator<Item = ShardId>) {
        for shard in shards {
            if self.still.remove(&(peer, shard)) {
                self.follower(peer).woken(shard);
            }
        }
    }

    fn deliver(&mut self, at: usize) {
        if self.way.is_empty() {
            return;
        }
        let (now, fits) = (self.now, self.fits);
        match self.way.remove(at % self.way.len()) {
            OnTheWay::Told(peer, told) => {
                let todo = self.follower(peer).told(now, LEADER, &told);
                self.tick(peer, todo.wake);
                self.way.push(OnTheWay::Check(peer, todo.park, told.list, told.round));
            }
            OnTheWay::Check(peer, parks, list, round) => {
                for park in parks {
                    self.still.insert((peer, park.shard));
                    if !self.follower(peer).checked(LEADER, (list, round), park.shard, fits) {
                        self.tick(peer, [park.shard]);
                    }
                }
                let answer = self.follower(peer).confirm(LEADER, list, round);
                self.way.push(OnTheWay::Answer(peer, answer));
            }
            OnTheWay::Answer(peer, answer) => self.leads.answered(peer, &answer),
        }
    }

    /// One pulse after the other, nothing lost.
    fn calm(&mut self, pulses: usize) {
        for _ in 0..pulses {
            self.pulse();
            while !self.way.is_empty() {
                self.deliver(0);
            }
            self.now += ms(150);
        }
    }

    /// Nobody stands still whom nobody keeps: he would never stand for election again.
    fn check_ticks(&self) {
        for (peer, shard) in &self.still {
            assert!(self.follows[peer].keeps(*shard), "{shard} does not tick at {peer}, and nobody knows");
        }
    }

    /// Where the leader counts on its lease, a quorum must be impossible without it: of two followers one keeps it.
    fn check(&mut self) {
        for shard in (0..SHARDS).map(ShardId) {
            if self.leads.lease_left(self.now, shard).is_zero() {
                continue;
            }
            let keeps = |follower: &Follows| {
                let parked = follower.lists.values().filter_map(|list| list.shards.get(&shard));
                let parked = parked.into_iter().any(|(_, state)| *state != State::Withdrawn);
                let gates = follower.gates.range((shard, BrokerId(0))..=(shard, BrokerId(u32::MAX)));
                parked || gates.into_iter().any(|(_, until)| self.now < *until)
            };
            assert!(self.follows.values().any(keeps), "{shard}: a quorum may elect another leader at {:?}", self.now);
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Park(u32),
    Wake(u32),
    Vote(usize, u32),
    Append(usize, u32),
    Pulse,
    Deliver(usize),
    Lose(usize),
    Connect(usize),
    Restart(usize),
    Fits(bool),
    Time(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (shard, peer) = (|| 0..SHARDS, || 0..PEERS.len());
    prop_oneof![
        4 => shard().prop_map(Op::Park),
        2 => shard().prop_map(Op::Wake),
        2 => (peer(), shard()).prop_map(|(peer, shard)| Op::Vote(peer, shard)),
        1 => (peer(), shard()).prop_map(|(peer, shard)| Op::Append(peer, shard)),
        6 => Just(Op::Pulse),
        12 => any::<usize>().prop_map(Op::Deliver),
        1 => any::<usize>().prop_map(Op::Lose),
        1 => peer().prop_map(Op::Connect),
        1 => peer().prop_map(Op::Restart),
        1 => any::<bool>().prop_map(Op::Fits),
        6 => (1u64..400).prop_map(Op::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_lease_that_is_counted_on_is_kept(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        let mut term = 1;
        for op in ops {
            match op {
                Op::Park(shard) => {
                    term += 1;
                    world.leads.park(world.now, park(shard, term), PEERS.to_vec(), 3);
                }
                Op::Wake(shard) => world.leads.wake(ShardId(shard)),
                Op::Vote(peer, shard) => {
                    let (now, peer) = (world.now, PEERS[peer]);
                    if world.follower(peer).refuses(now, ShardId(shard)).woke {
                        world.tick(peer, [ShardId(shard)]);
                    }
                }
                Op::Append(peer, shard) => world.tick(PEERS[peer], [ShardId(shard)]),
                Op::Pulse => world.pulse(),
                Op::Deliver(at) => world.deliver(at),
                Op::Lose(at) => if !world.way.is_empty() {
                    world.way.remove(at % world.way.len());
                },
                Op::Connect(peer) => world.leads.forget(PEERS[peer]),
                Op::Restart(peer) => {
                    // A process that begins helps nobody to a leadership for a lease (`FIRST_LEASE`).
                    let mut begun = Follows::new(RULES);
                    let until = world.now + RULES.lease;
                    (0..SHARDS).for_each(|shard| _ = begun.gates.insert((ShardId(shard), LEADER), until));
                    world.follows.insert(PEERS[peer], begun);
                    world.still.retain(|(still, _)| *still != PEERS[peer]);
                    world.way.retain(|way| !matches!(way, OnTheWay::Check(at, ..) if *at == PEERS[peer]));
                }
                Op::Fits(fits) => world.fits = fits,
                Op::Time(passed) => world.now += ms(passed),
            }
            world.check();
            world.check_ticks();
        }
        // Whatever happened, both sides come to agree, and what stays parked is confirmed.
        world.fits = true;
        world.way.clear();
        PEERS.iter().for_each(|&peer| world.leads.forget(peer));
        world.calm(10);
        (0..SHARDS).for_each(|shard| world.leads.park(world.now, park(shard, term + 1), PEERS.to_vec(), 3));
        world.calm(20);
        prop_assert_eq!(world.leads.len(), SHARDS as usize);
        for peer in PEERS {
            prop_assert_eq!(world.follower(peer).parked(), SHARDS as usize);
        }
    }
}

#[test]
fn a_parked_shard_is_led_as_long_as_one_of_two_confirms() {
    let mut world = World::new();
    world.leads.park(world.now, park(0, 1), PEERS.to_vec(), 3);
    assert!(world.leads.lease_left(world.now, ShardId(0)).is_zero(), "nobody has confirmed it");
    world.calm(3);
    assert!(world.leads.lease_left(world.now, ShardId(0)) >= ms(800));
    // The other is gone for good.
    for _ in 0..20 {
        world.pulse();
        world.way.retain(|way| matches!(way, OnTheWay::Told(peer, _) if *peer == PEERS[0]));
        while !world.way.is_empty() {
            world.deliver(0);
        }
        world.now += ms(150);
    }
    assert!(world.leads.lease_left(world.now, ShardId(0)) >= ms(800));
    assert!(world.leads.lapsed(world.now).is_empty());
    assert_eq!(world.follower(PEERS[1]).parked(), 0, "it has not heard of its leader");
    // And when it is back it is told anew.
    world.leads.forget(PEERS[1]);
    assert_eq!(world.leads.lapsed(world.now), [ShardId(0)]);
    assert!(world.leads.is_empty());
}

#[test]
fn a_vote_is_refused_for_one_lease_and_wakes_everybody() {
    let mut world = World::new();
    world.leads.park(world.now, park(0, 1), PEERS.to_vec(), 3);
    world.calm(2);
    let (now, told) = (world.now, world.now - ms(150));
    assert_eq!(world.follower(PEERS[0]).refuses(now, ShardId(0)), Asked { refused: true, woke: true });
    assert_eq!(world.follower(PEERS[0]).refuses(told + ms(999), ShardId(0)), Asked { refused: true, woke: false });
    assert!(!world.follower(PEERS[0]).refuses(told + ms(1_000), ShardId(0)).refused);
    let other = world.follower(PEERS[0]).refuses(now, ShardId(1));
    assert!(!other.refused && !other.woke, "a shard that is not parked is Raft's own affair");
    world.calm(2);
    assert!(world.leads.is_empty(), "the leader was told");
    world.calm(1);
    assert_eq!(world.follower(PEERS[1]).parked(), 0, "and told the other");
    let now = world.now;
    assert!(!world.follower(PEERS[1]).refuses(now, ShardId(0)).refused, "its leader has given it up");
}

#[test]
fn thousands_of_shards_do_not_wake_at_once() {
    let mut world = World::new();
    let shards = 3 * WAKES_AT_ONCE as u32;
    (0..shards).for_each(|shard| world.leads.park(world.now, park(shard, 1), PEERS.to_vec(), 3));
    world.calm(3);
    assert_eq!(world.follower(PEERS[0]).parked(), shards as usize);
    let later = world.now + RULES.silence + ms(1);
    for left in [2, 1, 0, 0] {
        let woken = (world.leads.lapsed(later).len(), world.follower(PEERS[0]).silent(later).len());
        assert!(woken.0 <= WAKES_AT_ONCE && woken.1 <= WAKES_AT_ONCE);
        assert_eq!(world.leads.len(), left * WAKES_AT_ONCE);
        assert_eq!(world.follower(PEERS[0]).parked(), left * WAKES_AT_ONCE);
    }
    // Parked and not led: whoever wants to vote is let as soon as the lease is over.
    assert!(!world.follower(PEERS[1]).refuses(later + RULES.lease, ShardId(0)).refused);
}

#[test]
fn who_cannot_park_in_time_keeps_the_others_awake() {
    let mut world = World::new();
    world.fits = false;
    world.leads.park(world.now, park(0, 1), PEERS.to_vec(), 3);
    world.calm(2);
    assert!(world.leads.is_empty());
    // Nor may it take for ever.
    world.leads.park(world.now, park(0, 1), PEERS.to_vec(), 3);
    world.now += ms(301);
    assert_eq!(world.leads.lapsed(world.now), [ShardId(0)]);
}

#[test]
fn followers_of_a_silent_leader_wake_before_its_lease_ends_and_vote_after_it() {
    let mut world = World::new();
    world.leads.park(world.now, park(0, 1), PEERS.to_vec(), 3);
    world.pulse();
    world.deliver(0);
    let told = world.now;
    let follower = world.follower(PEERS[0]);
    assert!(follower.silent(told + ms(600)).is_empty());
    assert_eq!(follower.silent(told + ms(601)), [ShardId(0)]);
    assert!(follower.refuses(told + ms(999), ShardId(0)).refused);
    assert!(!follower.refuses(told + ms(1_000), ShardId(0)).refused);
}

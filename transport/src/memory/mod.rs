//! The network's twin for simulation: hosts with addresses, byte streams and QUIC-like connections between them, and the
//! faults that a nemesis asks for. One seed, one thread, paused time: the same run again, bit for bit. Must never
//! deliver what a real network could not: reordered within a stream, torn by a crash's author, or twice.
//!
//! What TCP and QUIC hide stays hidden: a lost packet is a late one, so a cut link holds what is sent into it and gives
//! it out when it heals. What they do not hide is here: a host that loses its power says nothing, and whoever talks to
//! it learns of that by silence, or by a reset from its successor.

mod host;
mod packet;
mod quic;
mod stream;
mod trace;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BinaryHeap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{sync::Notify, time::Instant};
use twox_hash::XxHash3_64;

pub use self::trace::Trace;
pub(crate) use self::{
    host::Host,
    quic::{Incoming, Listener as QuicListener, Receiver, Sender, Side, connect as connect_quic},
    stream::{Stream, StreamListener, connect as connect_stream},
    wire::{Gone, Stopped},
};
use self::{
    packet::{Event, Packet},
    wire::{Kind, Wire},
};

/// How long packets take.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    /// One way, at least.
    pub min: Duration,
    /// One way, at most, unless a packet is lost.
    pub max: Duration,
    /// Of a thousand packets so many are lost, and come after [`Self::again`].
    pub lost_per_mille: u32,
    /// After which a lost packet is sent again.
    pub again: Duration,
}

impl Default for Latency {
    fn default() -> Self {
        let (min, max) = (Duration::from_micros(300), Duration::from_millis(3));
        Self { min, max, lost_per_mille: 0, again: Duration::from_millis(200) }
    }
}

/// How a host dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// Its process is killed; the kernel resets its connections at once.
    Process,
    /// Its power goes: nobody is told anything.
    Power,
}

/// A simulated network. Clones are the same one. Its events are worked off by [`Network::run`].
#[derive(Debug, Clone)]
pub struct Network(pub(crate) Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    /// An event was added that may be the next one.
    wake: Notify,
    pub(crate) trace: Trace,
    seed: u64,
    started: Instant,
    /// The wall clock of a host without skew, when the network began, in ms since the Unix epoch.
    wall_ms: u64,
}

#[derive(Debug, Default)]
struct Machine {
    /// Which of its lives; a killed host's handles belong to an earlier one.
    life: u64,
    up: bool,
    skew_ms: i64,
    /// What came while it was down; its senders try again.
    missed: Vec<Event>,
}

#[derive(Debug)]
pub(crate) struct State {
    random: StdRng,
    latency: Latency,
    machines: BTreeMap<IpAddr, Machine>,
    /// One-way cuts, and what waits for their end.
    cuts: BTreeMap<(IpAddr, IpAddr), Vec<Event>>,
    events: BinaryHeap<Event>,
    next_event: u64,
    next_wire: u64,
    next_port: u16,
    wires: Vec<Weak<Wire>>,
    pub(crate) listeners: BTreeMap<(SocketAddr, Kind), Arc<wire::Backlog>>,
}

/// First of the ports that a caller gets.
const EPHEMERAL: u16 = 32_768;

impl Network {
    /// A network without hosts. `seed` decides all latencies and all that its hosts draw; `wall_ms` is where their wall
    /// clocks begin, in ms since the Unix epoch. Must be called within a runtime whose time is paused.
    pub fn new(seed: u64, wall_ms: u64, trace: Trace) -> Self {
        let state = State {
            random: stream_of(seed, "network", 0),
            latency: Latency::default(),
            machines: BTreeMap::new(),
            cuts: BTreeMap::new(),
            events: BinaryHeap::new(),
            next_event: 0,
            next_wire: 0,
            next_port: EPHEMERAL,
            wires: Vec::new(),
            listeners: BTreeMap::new(),
        };
        let (state, wake, started) = (Mutex::new(state), Notify::new(), Instant::now());
        Self(Arc::new(Shared { state, wake, trace, seed, started, wall_ms }))
    }

    /// Carries packets until it is dropped: spawn it once.
    pub async fn run(self) {
        loop {
            let next = self.0.state.lock().events.peek().map(|event| event.at);
            let changed = self.0.wake.notified();
            match next {
                Some(at) if at <= Instant::now() => {}
                Some(at) => tokio::select! {
                    biased;
                    () = changed => continue,
                    () = tokio::time::sleep_until(at) => {}
                },
                None => {
                    changed.await;
                    continue;
                }
            }
            let event = self.0.state.lock().events.pop();
            if let Some(event) = event {
                self.0.arrive(event);
            }
        }
    }

    /// Switches a host on, for the first time or after [`Self::kill`].
    pub fn boot(&self, ip: IpAddr) -> crate::Host {
        let missed = {
            let mut state = self.0.state.lock();
            let machine = state.machines.entry(ip).or_default();
            machine.life += 1;
            machine.up = true;
            std::mem::take(&mut machine.missed)
        };
        self.0.trace.note("boot", &[ip_number(ip)], &[]);
        missed.into_iter().for_each(|event| self.0.again(event));
        let life = self.0.state.lock().machines.get(&ip).map_or(0, |machine| machine.life);
        let random = stream_of(self.0.seed, &format!("host {ip}"), life);
        crate::Host::simulated(Host { network: self.clone(), ip, life, random: Mutex::new(random) })
    }

    /// Ends a host's present life: its listeners and connections are gone, its handles good for nothing.
    pub fn kill(&self, ip: IpAddr, death: Death) {
        self.0.trace.note("kill", &[ip_number(ip), u64::from(death == Death::Power)], &[]);
        let (wires, life) = {
            let mut state = self.0.state.lock();
            let Some(machine) = state.machines.get_mut(&ip) else { return };
            let life = machine.life;
            machine.life += 1;
            machine.up = false;
            state.listeners.retain(|(addr, _), _| addr.ip() != ip);
            state.wires.retain(|wire| wire.strong_count() > 0);
            (state.wires.iter().filter_map(Weak::upgrade).collect::<Vec<_>>(), life)
        };
        for wire in wires {
            for side in [0, 1] {
                if wire.ends[side].ip() != ip || wire.lives[side].load(Ordering::Relaxed) != life {
                    continue;
                }
                if death == Death::Process && wire.gone(side).is_none() {
                    self.0.transmit(&wire, side, Packet::Reset, true);
                }
                wire.end(side, Gone::Killed);
            }
        }
    }

    /// Whether the host is on.
    pub fn is_up(&self, ip: IpAddr) -> bool {
        self.0.state.lock().machines.get(&ip).is_some_and(|machine| machine.up)
    }

    /// From now on nothing gets from one host to the other. The way back is not touched.
    pub fn cut(&self, from: IpAddr, to: IpAddr) {
        self.0.trace.note("cut", &[ip_number(from), ip_number(to)], &[]);
        self.0.state.lock().cuts.entry((from, to)).or_default();
    }

    /// Ends one cut; what waited comes a little later.
    pub fn heal(&self, from: IpAddr, to: IpAddr) {
        self.0.trace.note("heal", &[ip_number(from), ip_number(to)], &[]);
        let held = self.0.state.lock().cuts.remove(&(from, to)).unwrap_or_default();
        held.into_iter().for_each(|event| self.0.again(event));
    }

    /// Ends all cuts.
    pub fn heal_all(&self) {
        let cuts: Vec<_> = self.0.state.lock().cuts.keys().copied().collect();
        cuts.into_iter().for_each(|(from, to)| self.heal(from, to));
    }

    /// Resets every byte stream and connection between two hosts, both ends told.
    pub fn reset(&self, one: IpAddr, other: IpAddr) {
        self.0.trace.note("reset", &[ip_number(one), ip_number(other)], &[]);
        let wires: Vec<_> = self.0.state.lock().wires.iter().filter_map(Weak::upgrade).collect();
        for wire in wires {
            let ips = [wire.ends[0].ip(), wire.ends[1].ip()];
            if ips == [one, other] || ips == [other, one] {
                wire.end(0, Gone::Reset);
                wire.end(1, Gone::Reset);
            }
        }
    }

    /// How long packets take from now on.
    pub fn set_latency(&self, latency: Latency) {
        self.0.state.lock().latency = latency;
    }

    /// By how much a host's wall clock is wrong from now on, in ms.
    pub fn set_wall_skew(&self, ip: IpAddr, skew_ms: i64) {
        self.0.trace.note("skew", &[ip_number(ip), skew_ms as u64], &[]);
        self.0.state.lock().machines.entry(ip).or_default().skew_ms = skew_ms;
    }

    /// What happened so far.
    pub fn trace(&self) -> &Trace {
        &self.0.trace
    }
}

/// The random stream of one purpose: drawing from one never moves another.
pub fn stream_of(seed: u64, purpose: &str, number: u64) -> StdRng {
    let seed = XxHash3_64::oneshot_with_seed(seed, purpose.as_bytes());
    StdRng::seed_from_u64(XxHash3_64::oneshot_with_seed(seed, &number.to_le_bytes()))
}

fn ip_number(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => u128::from(ip) as u64,
    }
}

impl Shared {
    /// Whether this life of a host is still its present one.
    fn lives(&self, ip: IpAddr, life: u64) -> bool {
        self.state.lock().machines.get(&ip).is_some_and(|machine| machine.up && machine.life == life)
    }

    fn new_wire(self: &Arc<Self>, kind: Kind, from: (IpAddr, u64), to: SocketAddr, windows: [usize; 2]) -> Arc<Wire> {
        let mut state = self.state.lock();
        state.next_wire += 1;
        state.next_port = state.next_port.checked_add(1).unwrap_or(EPHEMERAL);
        let caller = SocketAddr::new(from.0, state.next_port);
        let wire = Arc::new(Wire::new(state.next_wire, kind, Arc::downgrade(self), [caller, to], from.1, windows));
        if state.wires.len() > 64 && state.wires.len().is_multiple_of(64) {
            state.wires.retain(|wire| wire.strong_count() > 0);
        }
        state.wires.push(Arc::downgrade(&wire));
        wire
    }

    /// Sends a packet from one side of a wire to the other. A host that is dead sends nothing, but for what its
    /// successor's kernel says (`kernel`).
    pub(crate) fn transmit(&self, wire: &Arc<Wire>, from_side: usize, packet: Packet, kernel: bool) {
        let (from, to) = (wire.ends[from_side].ip(), wire.ends[1 - from_side].ip());
        if !kernel && !self.lives(from, wire.lives[from_side].load(Ordering::Relaxed)) {
            return;
        }
        self.route(Event { at: Instant::now(), no: 0, wire: wire.clone(), to_side: 1 - from_side, packet }, from, to);
    }

    /// What was lost on its way is sent again.
    fn again(&self, mut event: Event) {
        let (from, to) = (event.wire.ends[1 - event.to_side].ip(), event.wire.ends[event.to_side].ip());
        event.at = Instant::now();
        self.route(event, from, to);
    }

    fn route(&self, mut event: Event, from: IpAddr, to: IpAddr) {
        let mut state = self.state.lock();
        if let Some(held) = state.cuts.get_mut(&(from, to)) {
            held.push(event);
            return;
        }
        let Latency { min, max, lost_per_mille, again } = state.latency;
        let mut takes = Duration::from_micros(
            state.random.random_range(min.as_micros() as u64..=max.as_micros().max(min.as_micros()) as u64),
        );
        if lost_per_mille > 0 && state.random.random_range(0..1_000) < lost_per_mille {
            takes += again;
        }
        // Within a stream nothing overtakes.
        let us = (event.at + takes).duration_since(self.started).as_micros() as u64;
        let us = event.wire.last_us[event.to_side].fetch_max(us, Ordering::Relaxed).max(us);
        event.at = self.started + Duration::from_micros(us);
        self.schedule(&mut state, event);
    }

    fn schedule(&self, state: &mut State, mut event: Event) {
        state.next_event += 1;
        event.no = state.next_event;
        let first = state.events.peek().is_none_or(|next| event.at < next.at);
        state.events.push(event);
        if first {
            self.wake.notify_one();
        }
    }

    /// Something that happens on one side by itself.
    pub(crate) fn later(&self, wire: &Arc<Wire>, side: usize, after: Duration, packet: Packet) {
        let event = Event { at: Instant::now() + after, no: 0, wire: wire.clone(), to_side: side, packet };
        self.schedule(&mut self.state.lock(), event);
    }

    fn arrive(&self, event: Event) {
        let Event { wire, to_side, packet, .. } = &event;
        if let Packet::Watch = packet {
            return self.watch(wire);
        }
        let to = wire.ends[*to_side];
        let known = {
            let mut state = self.state.lock();
            let machine = state.machines.entry(to.ip()).or_default();
            if !machine.up {
                machine.missed.push(event);
                return;
            }
            machine.life == wire.lives[*to_side].load(Ordering::Relaxed)
        };
        let (what, numbers, bytes) = packet.describe();
        self.trace.note(what, &[wire.id, *to_side as u64, numbers], bytes);
        match packet {
            Packet::Dial => self.dialled(wire),
            Packet::Reset | Packet::Refused => {
                if known {
                    wire.end(*to_side, if matches!(packet, Packet::Reset) { Gone::Reset } else { Gone::Refused });
                }
            }
            _ if !known => self.transmit(wire, *to_side, Packet::Reset, true),
            _ => {
                let Event { wire, to_side, packet, .. } = event;
                wire.take(to_side, packet);
            }
        }
    }

    /// A call arrives at the listener's host.
    fn dialled(&self, wire: &Arc<Wire>) {
        let addr = wire.ends[1];
        let (backlog, life) = {
            let state = self.state.lock();
            let life = state.machines.get(&addr.ip()).map_or(0, |machine| machine.life);
            (state.listeners.get(&(addr, wire.kind)).cloned(), life)
        };
        wire.lives[1].store(life, Ordering::Relaxed);
        match backlog {
            Some(backlog) => {
                if wire.kind == Kind::Stream {
                    self.transmit(wire, 1, Packet::Welcome, false);
                }
                backlog.push(wire.clone());
            }
            None => self.transmit(wire, 1, Packet::Refused, true),
        }
    }

    /// A connection's idle timers and keep-alive.
    fn watch(&self, wire: &Arc<Wire>) {
        let mut anybody = false;
        for side in [0, 1] {
            let alive = self.lives(wire.ends[side].ip(), wire.lives[side].load(Ordering::Relaxed));
            if !alive || wire.gone(side).is_some() {
                continue;
            }
            if wire.silent_for(side) >= packet::IDLE {
                wire.end(side, Gone::TimedOut);
                continue;
            }
            anybody = true;
            if side == 0 {
                self.transmit(wire, 0, Packet::Ping, false);
            }
        }
        if anybody {
            self.later(wire, 0, packet::KEEP_ALIVE, Packet::Watch);
        }
    }
}

/// Numbers of the streams on all wires come from here; see [`wire::Wire`].
pub(crate) type Counter = AtomicU64;

/// Bytes that wait.
pub(crate) type Ready = VecDeque<bytes::Bytes>;

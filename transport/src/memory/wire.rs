//! One connection between two simulated hosts: byte streams with windows, and how it ends on either side. Side 0 has
//! dialled. Must never let a writer run ahead of its reader by more than the window: back-pressure is real.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{Counter, Ready, Shared, packet::Packet};

/// What a listener listens for: the two have ports of their own, as TCP and UDP have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Stream,
    Quic,
}

/// Why a side's connection is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gone {
    Killed,
    Reset,
    Refused,
    TimedOut,
    Closed,
    ClosedByPeer(u32, String),
}

#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) ends: [SocketAddr; 2],
    /// In which life of its host each side was made.
    pub(crate) lives: [Counter; 2],
    /// When the last packet to each side arrives, in µs since the network began.
    pub(crate) last_us: [Counter; 2],
    network: Weak<Shared>,
    windows: [usize; 2],
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    gone: [Option<Gone>; 2],
    welcome: bool,
    heard: [Instant; 2],
    streams: BTreeMap<u64, [Pipe; 2]>,
    opened: [u64; 2],
    /// Streams that the other side has opened and nobody has accepted.
    waiting: [VecDeque<u64>; 2],
    /// Whoever waits for anything that is no byte.
    wakers: [Vec<Waker>; 2],
}

/// One direction of a stream.
#[derive(Debug, Default)]
struct Pipe {
    /// A packet of it has arrived.
    seen: bool,
    ready: Ready,
    ready_bytes: usize,
    finished: bool,
    reader: Option<Waker>,
    /// The reader was dropped.
    abandoned: bool,
    /// Read, and the writer does not know yet.
    uncredited: usize,
    /// Written, and not known to be read.
    unread: usize,
    sent_finish: bool,
    stopped: bool,
    writer: Option<Waker>,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl Wire {
    pub(crate) fn new(
        id: u64,
        kind: Kind,
        network: Weak<Shared>,
        ends: [SocketAddr; 2],
        life: u64,
        windows: [usize; 2],
    ) -> Self {
        let state = State {
            gone: [None, None],
            welcome: false,
            heard: [Instant::now(); 2],
            streams: BTreeMap::new(),
            opened: [0; 2],
            waiting: Default::default(),
            wakers: Default::default(),
        };
        let lives = [Counter::new(life), Counter::new(0)];
        Self { id, kind, ends, lives, last_us: Default::default(), network, windows, state: Mutex::new(state) }
    }

    pub(crate) fn send(self: &Arc<Self>, side: usize, packet: Packet) {
        if let Some(network) = self.network.upgrade() {
            network.transmit(self, side, packet, false);
        }
    }

    pub(crate) fn later(self: &Arc<Self>, side: usize, after: Duration, packet: Packet) {
        if let Some(network) = self.network.upgrade() {
            network.later(self, side, after, packet);
        }
    }

    pub(crate) fn gone(&self, side: usize) -> Option<Gone> {
        self.state.lock().gone[side].clone()
    }

    pub(crate) fn silent_for(&self, side: usize) -> Duration {
        self.state.lock().heard[side].elapsed()
    }

    /// The connection is over for this side; the first reason stays.
    pub(crate) fn end(&self, side: usize, why: Gone) {
        let mut state = self.state.lock();
        if state.gone[side].is_some() {
            return;
        }
        state.gone[side] = Some(why);
        for pipes in state.streams.values_mut() {
            wake(&mut pipes[1 - side].reader);
            wake(&mut pipes[side].writer);
        }
        state.wakers[side].drain(..).for_each(Waker::wake);
    }

    /// A packet arrives.
    pub(crate) fn take(self: &Arc<Self>, side: usize, packet: Packet) {
        let mut state = self.state.lock();
        state.heard[side] = Instant::now();
        let gone = state.gone[side].is_some();
        match packet {
            Packet::Data(..) if gone => {
                drop(state);
                self.reply_reset(side);
            }
            Packet::Data(stream, bytes) => {
                state.incoming(side, stream);
                let Some(pipes) = state.streams.get_mut(&stream) else { return };
                let pipe = &mut pipes[1 - side];
                if !pipe.abandoned {
                    pipe.ready_bytes += bytes.len();
                    pipe.ready.push_back(bytes);
                    wake(&mut pipe.reader);
                }
            }
            Packet::Finish(stream) if !gone => {
                state.incoming(side, stream);
                let Some(pipes) = state.streams.get_mut(&stream) else { return };
                pipes[1 - side].finished = true;
                wake(&mut pipes[1 - side].reader);
            }
            Packet::Credit(stream, bytes) => {
                let Some(pipes) = state.streams.get_mut(&stream) else { return };
                pipes[side].unread = pipes[side].unread.saturating_sub(bytes);
                wake(&mut pipes[side].writer);
            }
            Packet::Stop(stream) => {
                let Some(pipes) = state.streams.get_mut(&stream) else { return };
                pipes[side].stopped = true;
                wake(&mut pipes[side].writer);
            }
            Packet::Welcome => {
                state.welcome = true;
                state.wakers[side].drain(..).for_each(Waker::wake);
            }
            Packet::Close(code, reason) => {
                drop(state);
                self.end(side, Gone::ClosedByPeer(code, reason));
            }
            Packet::Ping => {
                drop(state);
                if !gone {
                    self.send(side, Packet::Pong);
                }
            }
            _ => {}
        }
    }

    fn reply_reset(self: &Arc<Self>, side: usize) {
        if let Some(network) = self.network.upgrade() {
            network.transmit(self, side, Packet::Reset, true);
        }
    }

    /// The next stream of this side's own.
    pub(crate) fn open(&self, side: usize) -> u64 {
        let mut state = self.state.lock();
        let stream = state.opened[side] * 2 + side as u64;
        state.opened[side] += 1;
        state.streams.insert(stream, Default::default());
        stream
    }

    /// The next stream that the other side has opened.
    pub(crate) fn poll_accept(&self, side: usize, context: &mut Context<'_>) -> Poll<Result<u64, Gone>> {
        let mut state = self.state.lock();
        if let Some(stream) = state.waiting[side].pop_front() {
            return Poll::Ready(Ok(stream));
        }
        state.ended(side, context)
    }

    /// Ready when the other side has taken the call.
    pub(crate) fn poll_welcome(&self, side: usize, context: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let mut state = self.state.lock();
        if state.welcome { Poll::Ready(Ok(())) } else { state.ended(side, context) }
    }

    /// Ready when this side's connection is over.
    pub(crate) fn poll_gone(&self, side: usize, context: &mut Context<'_>) -> Poll<Gone> {
        let ended: Poll<Result<(), Gone>> = self.state.lock().ended(side, context);
        ended.map(|ended| ended.err().unwrap_or(Gone::Closed))
    }

    /// At most `max` bytes of a stream; `None` at its end.
    pub(crate) fn poll_read(
        self: &Arc<Self>,
        side: usize,
        stream: u64,
        max: usize,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, Gone>> {
        let mut state = self.state.lock();
        let window = self.windows[1 - side];
        let gone = state.gone[side].clone();
        let Some(pipes) = state.streams.get_mut(&stream) else { return Poll::Ready(Ok(None)) };
        let pipe = &mut pipes[1 - side];
        let Some(front) = pipe.ready.front_mut() else {
            return match gone {
                _ if pipe.finished => Poll::Ready(Ok(None)),
                Some(why) => Poll::Ready(Err(why)),
                None => {
                    pipe.reader = Some(context.waker().clone());
                    Poll::Pending
                }
            };
        };
        let bytes = if front.len() > max { front.split_to(max) } else { std::mem::take(front) };
        if front.is_empty() {
            pipe.ready.pop_front();
        }
        pipe.ready_bytes -= bytes.len();
        pipe.uncredited += bytes.len();
        // Not for every read: real acknowledgements are gathered too.
        let credit = if pipe.uncredited * 4 >= window || (pipe.finished && pipe.ready.is_empty()) {
            std::mem::take(&mut pipe.uncredited)
        } else {
            0
        };
        drop(state);
        if credit > 0 {
            self.send(side, Packet::Credit(stream, credit));
        }
        Poll::Ready(Ok(Some(bytes)))
    }

    /// Takes as much of `bytes` as the window has room for.
    pub(crate) fn poll_write(
        self: &Arc<Self>,
        side: usize,
        stream: u64,
        bytes: &mut Bytes,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Stopped>> {
        let mut state = self.state.lock();
        let window = self.windows[side];
        if let Some(why) = state.gone[side].clone() {
            return Poll::Ready(Err(Stopped::Gone(why)));
        }
        let Some(pipes) = state.streams.get_mut(&stream) else { return Poll::Ready(Err(Stopped::Finished)) };
        let pipe = &mut pipes[side];
        if pipe.stopped {
            return Poll::Ready(Err(Stopped::ByReader));
        }
        if pipe.sent_finish {
            return Poll::Ready(Err(Stopped::Finished));
        }
        let room = window.saturating_sub(pipe.unread).min(bytes.len());
        if room == 0 && !bytes.is_empty() {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let now = bytes.split_to(room);
        pipe.unread += now.len();
        drop(state);
        if !now.is_empty() {
            self.send(side, Packet::Data(stream, now));
        }
        Poll::Ready(Ok(()))
    }

    /// No more will be written.
    pub(crate) fn finish(self: &Arc<Self>, side: usize, stream: u64) {
        let first = {
            let mut state = self.state.lock();
            let over = state.gone[side].is_some();
            state.streams.get_mut(&stream).is_some_and(|pipes| !std::mem::replace(&mut pipes[side].sent_finish, true))
                && !over
        };
        if first {
            self.send(side, Packet::Finish(stream));
        }
    }

    /// Ready when the reader has everything, or will never have it.
    pub(crate) fn poll_drained(&self, side: usize, stream: u64, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        let gone = state.gone[side].is_some();
        let Some(pipes) = state.streams.get_mut(&stream) else { return Poll::Ready(()) };
        let pipe = &mut pipes[side];
        if gone || pipe.stopped || pipe.unread == 0 {
            return Poll::Ready(());
        }
        pipe.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// Nobody reads the stream any more. Says whether bytes were thrown away.
    pub(crate) fn abandon(self: &Arc<Self>, side: usize, stream: u64) -> bool {
        let (first, unread) = {
            let mut state = self.state.lock();
            let Some(pipes) = state.streams.get_mut(&stream) else { return false };
            let pipe = &mut pipes[1 - side];
            let unread = pipe.ready_bytes > 0;
            pipe.ready.clear();
            pipe.ready_bytes = 0;
            (!std::mem::replace(&mut pipe.abandoned, true) && !pipe.finished, unread)
        };
        if first && self.kind == Kind::Quic {
            self.send(side, Packet::Stop(stream));
        }
        unread
    }
}

/// Why nothing more can be written.
#[derive(Debug)]
pub(crate) enum Stopped {
    ByReader,
    Finished,
    Gone(Gone),
}

impl State {
    /// The first packet of a stream is what tells the other side that it was opened.
    fn incoming(&mut self, side: usize, stream: u64) {
        let theirs = stream % 2 == 1 - side as u64;
        let Some(pipes) = self.streams.get_mut(&stream) else { return };
        if theirs && !std::mem::replace(&mut pipes[1 - side].seen, true) {
            self.waiting[side].push_back(stream);
            self.wakers[side].drain(..).for_each(Waker::wake);
        }
    }

    fn ended<T>(&mut self, side: usize, context: &mut Context<'_>) -> Poll<Result<T, Gone>> {
        match self.gone[side].clone() {
            Some(why) => Poll::Ready(Err(why)),
            None => {
                self.wakers[side].push(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Calls that a listener has not taken yet.
#[derive(Debug, Default)]
pub(crate) struct Backlog(Mutex<Calls>);

#[derive(Debug, Default)]
struct Calls {
    waiting: VecDeque<Arc<Wire>>,
    waker: Option<Waker>,
    closed: bool,
}

impl Backlog {
    pub(crate) fn push(&self, wire: Arc<Wire>) {
        let mut calls = self.0.lock();
        calls.waiting.push_back(wire);
        wake(&mut calls.waker);
    }

    pub(crate) fn close(&self) {
        let mut calls = self.0.lock();
        calls.closed = true;
        wake(&mut calls.waker);
    }

    /// `None` once closed.
    pub(crate) fn poll_next(&self, context: &mut Context<'_>) -> Poll<Option<Arc<Wire>>> {
        let mut calls = self.0.lock();
        if calls.closed {
            return Poll::Ready(None);
        }
        match calls.waiting.pop_front() {
            Some(wire) => Poll::Ready(Some(wire)),
            None => {
                calls.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

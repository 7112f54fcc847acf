//! One connection: quinn-proto's state machine behind a lock, and what drives it. Must never send more at once than its
//! turn allows: what is left goes on in the endpoint's task, after everybody else's.

use std::{
    cell::Cell,
    fmt, mem,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn_proto::{
    ConnectionError, ConnectionEvent, ConnectionHandle, Dir, Event, StreamEvent, StreamId, Transmit, TransportError,
    TransportErrorCode, VarInt,
};
use tokio::sync::Notify;

use super::{
    ReceiveHalf, SendHalf,
    endpoint::Shared,
    socket::Sent,
    timers::{NEVER, Tick, Timers},
    waiting::{Half, Waiting, Woken},
};

/// Packets of one turn. Enough for a page of history; a long backlog takes several turns.
const TURN_PACKETS: usize = 40;

thread_local! {
    /// Where packets are made. One for each thread: a connection's own would be most of its memory after a burst.
    static PACKETS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What the endpoint knows of a connection, shared with its owners.
pub(super) struct Core {
    pub(super) endpoint: Arc<Shared>,
    handle: ConnectionHandle,
    /// Owners: connections and halves of streams. Without any, it closes.
    owners: AtomicUsize,
    state: Mutex<State>,
    /// Its reader has more frames at hand, whose answers may come soon.
    busy: AtomicBool,
    /// Tells of its handshake, of streams that may be accepted or opened, of its end.
    changed: Notify,
}

pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    pub(super) waiting: Waiting,
    /// Why it ended. Until it is drained it may still have something to say.
    pub(super) error: Option<ConnectionError>,
    connected: bool,
    /// The endpoint has forgotten it.
    drained: bool,
    /// It is in the endpoint's queue.
    queued: bool,
    /// Something was written while it was busy that nobody drove yet.
    pub(super) late: bool,
    /// Its last turn left something to send.
    owed: bool,
    /// When the endpoint's timers look at it: on their fine level and on their coarse one.
    near: Tick,
    far: Tick,
    /// What they look for.
    deadline: Option<Instant>,
    /// Packets that the socket did not take.
    held: Option<Box<(Transmit, Box<[u8]>)>>,
}

/// Why a turn ended before everything was sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    Nothing,
    /// The turn was long enough.
    Packets,
    /// The socket takes no more.
    Blocked,
}

impl Core {
    /// With one owner.
    pub(super) fn begin(endpoint: Arc<Shared>, handle: ConnectionHandle, proto: quinn_proto::Connection) -> Connection {
        let state = State {
            proto,
            waiting: Waiting::default(),
            error: None,
            connected: false,
            drained: false,
            queued: false,
            late: false,
            owed: false,
            near: NEVER,
            far: NEVER,
            deadline: None,
            held: None,
        };
        let (owners, busy, changed) = (AtomicUsize::new(1), AtomicBool::new(false), Notify::new());
        Connection(Arc::new(Self { endpoint, handle, owners, state: Mutex::new(state), busy, changed }))
    }

    /// Looks at it or registers a waiter, without driving it.
    pub(super) fn look<R>(&self, look: impl FnOnce(&mut State) -> R) -> R {
        look(&mut self.state.lock())
    }

    /// Does something to it and everything that follows from that.
    pub(super) fn act<R>(self: &Arc<Self>, act: impl FnOnce(&mut State) -> R) -> R {
        self.act_if(|state| (true, act(state)))
    }

    /// The same, if something was done: an attempt tells whether.
    pub(super) fn act_if<R>(self: &Arc<Self>, attempt: impl FnOnce(&mut State) -> (bool, R)) -> R {
        let mut state = self.state.lock();
        let (done, result) = attempt(&mut state);
        let mut woken = Woken::default();
        if done {
            self.drive(&mut state, &mut woken);
        }
        drop(state);
        self.wake(woken);
        result
    }

    /// Whether what is written now may wait for more of the same.
    pub(super) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// Like [`Self::act_if`]. A busy connection is driven later: when its reader has nothing more, at the latest by
    /// the endpoint's task. So answers to frames that came together go out together.
    pub(super) fn write<R>(self: &Arc<Self>, attempt: impl FnOnce(&mut State) -> (bool, R)) -> R {
        let mut state = self.state.lock();
        let (done, result) = attempt(&mut state);
        let mut woken = Woken::default();
        if done && !self.busy.load(Ordering::Relaxed) {
            self.drive(&mut state, &mut woken);
        } else if done {
            self.drive_later(&mut state, &mut woken);
        }
        drop(state);
        self.wake(woken);
        result
    }

    /// Takes in what has come for it.
    pub(super) fn receive(self: &Arc<Self>, events: impl Iterator<Item = ConnectionEvent>) {
        let (mut state, mut woken, mut count) = (self.state.lock(), Woken::default(), 0);
        for event in events {
            state.proto.handle_event(event);
            count += 1;
        }
        if count > 1 {
            // They are to be acknowledged at once. If somebody reads them, he may answer, in the same packet.
            Self::events(&mut state, &mut woken);
        }
        if woken.reads() {
            self.drive_later(&mut state, &mut woken);
        } else {
            self.drive(&mut state, &mut woken);
        }
        drop(state);
        self.wake(woken);
    }

    /// Its next turn after it was queued.
    pub(super) fn turn(self: &Arc<Self>) {
        // Whoever drove it meanwhile may have sent everything.
        self.act_if(|state| {
            state.queued = false;
            (state.late || state.owed, ())
        });
    }

    /// The endpoint's timers look at it at `tick`, which is `now`.
    pub(super) fn time(self: &Arc<Self>, tick: Tick, now: Instant) {
        let mut state = self.state.lock();
        // All entries up to now are gone.
        state.near = if state.near <= tick { NEVER } else { state.near };
        state.far = if state.far <= tick { NEVER } else { state.far };
        if state.deadline.is_none_or(|deadline| deadline > now) {
            let wake = self.arm(&mut state);
            drop(state);
            if wake {
                self.endpoint.wake();
            }
            return;
        }
        state.proto.handle_timeout(now);
        let mut woken = Woken::default();
        self.drive(&mut state, &mut woken);
        drop(state);
        self.wake(woken);
    }

    /// Closes it on our side.
    pub(super) fn close(self: &Arc<Self>, code: VarInt, reason: Bytes) {
        self.act(|state| {
            state.proto.close(Instant::now(), code, reason);
            state.error.get_or_insert(ConnectionError::LocallyClosed);
        });
        self.end(None);
    }

    /// Tells everybody who waits that it has ended, for `why` unless that is known already.
    pub(super) fn end(&self, why: Option<ConnectionError>) {
        let mut woken = Woken::default();
        let mut state = self.state.lock();
        if let Some(why) = why {
            state.error.get_or_insert(why);
        }
        state.waiting.wake_all(&mut woken);
        drop(state);
        self.wake(woken);
    }

    fn wake(&self, woken: Woken) {
        if woken.everybody {
            self.changed.notify_waiters();
        }
        if woken.task {
            self.endpoint.wake();
        }
        woken.wake();
    }

    /// When its reader waits again or somebody writes, at the latest in the next turn of the endpoint's task.
    fn drive_later(self: &Arc<Self>, state: &mut State, woken: &mut Woken) {
        state.late = true;
        if !mem::replace(&mut state.queued, true) {
            woken.task |= self.endpoint.queue(self.clone(), false);
        }
    }

    fn drive(self: &Arc<Self>, state: &mut State, woken: &mut Woken) {
        state.late = false;
        self.exchange(state);
        let mut rest = self.transmit(state);
        if self.exchange(state) && rest == Rest::Nothing {
            rest = self.transmit(state);
        }
        Self::events(state, woken);
        state.owed = rest != Rest::Nothing;
        if state.owed && !mem::replace(&mut state.queued, true) {
            woken.task |= self.endpoint.queue(self.clone(), rest == Rest::Blocked);
        }
        state.deadline = state.proto.poll_timeout();
        woken.task |= self.arm(state);
    }

    /// Passes events to the endpoint and its answers back. True if there was an answer.
    fn exchange(&self, state: &mut State) -> bool {
        let mut answered = false;
        while let Some(event) = state.proto.poll_endpoint_events() {
            if state.drained {
                continue;
            }
            state.drained = event.is_drained();
            if let Some(answer) = self.endpoint.handle_event(self.handle, event) {
                state.proto.handle_event(answer);
                answered = true;
            }
        }
        answered
    }

    fn transmit(&self, state: &mut State) -> Rest {
        if self.endpoint.is_lost() {
            return Rest::Nothing;
        }
        let socket = &self.endpoint.socket;
        if let Some(held) = state.held.take()
            && socket.send(&held.0, &held.1) == Sent::Blocked
        {
            state.held = Some(held);
            return Rest::Blocked;
        }
        let now = Instant::now();
        let burst = socket.burst_packets();
        let mut buffer = PACKETS.try_with(Cell::take).unwrap_or_default();
        let mut packets = 0;
        let rest = loop {
            buffer.clear();
            let Some(transmit) = state.proto.poll_transmit(now, burst, &mut buffer) else { break Rest::Nothing };
            let bytes = buffer.get(..transmit.size).unwrap_or(&buffer);
            packets += transmit.segment_size.map_or(1, |segment| bytes.len().div_ceil(segment.max(1)));
            if socket.send(&transmit, bytes) == Sent::Blocked {
                state.held = Some(Box::new((transmit, bytes.into())));
                break Rest::Blocked;
            }
            if packets >= TURN_PACKETS {
                break Rest::Packets;
            }
        };
        let _ = PACKETS.try_with(|packets| packets.set(buffer));
        rest
    }

    fn events(state: &mut State, woken: &mut Woken) {
        while let Some(event) = state.proto.poll() {
            match event {
                Event::Connected => {
                    state.connected = true;
                    woken.everybody = true;
                }
                Event::ConnectionLost { reason } => {
                    state.error.get_or_insert(reason);
                    state.waiting.wake_all(woken);
                }
                Event::Stream(StreamEvent::Readable { id }) => state.waiting.wake(Half::Receive, id, woken),
                Event::Stream(
                    StreamEvent::Writable { id } | StreamEvent::Finished { id } | StreamEvent::Stopped { id, .. },
                ) => state.waiting.wake(Half::Send, id, woken),
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi } | StreamEvent::Available { dir: Dir::Bi }) => {
                    woken.everybody = true;
                }
                Event::Stream(StreamEvent::Opened { .. } | StreamEvent::Available { .. })
                | Event::HandshakeDataReady
                | Event::DatagramReceived
                | Event::DatagramsUnblocked => {}
            }
        }
    }

    /// True if the endpoint's task is to be woken.
    fn arm(&self, state: &mut State) -> bool {
        let Some(deadline) = state.deadline else { return false };
        let tick = Timers::tick(self.endpoint.began, deadline);
        if state.near.min(state.far) <= tick {
            return false;
        }
        // Entries of the coarse level are earlier than the deadline, so that one of them is enough.
        let (at, wake) = self.endpoint.arm(self.handle, tick);
        if at < tick {
            state.far = at
        } else {
            state.near = at
        }
        wake
    }
}

/// An owner of a connection; clones are the same one. Without any, it closes.
pub(in crate::quic) struct Connection(pub(super) Arc<Core>);

impl Connection {
    /// Waits for the end of the handshake.
    pub(in crate::quic) async fn connected(&self) -> Result<(), ConnectionError> {
        self.wait(|state| state.connected.then_some(())).await
    }

    /// Waits for its end.
    pub(in crate::quic) async fn closed(&self) -> ConnectionError {
        match self.wait(|_| None::<std::convert::Infallible>).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    /// Opens a stream as soon as the other side allows one more.
    pub(in crate::quic) async fn open(&self) -> Result<(SendHalf, ReceiveHalf), ConnectionError> {
        Ok(self.halves(self.wait(|state| state.proto.streams().open(Dir::Bi)).await?))
    }

    /// The next stream that the other side opened. Cancel-safe.
    pub(in crate::quic) async fn accept(&self) -> Result<(SendHalf, ReceiveHalf), ConnectionError> {
        Ok(self.halves(self.wait(|state| state.proto.streams().accept(Dir::Bi)).await?))
    }

    pub(in crate::quic) fn remote_address(&self) -> SocketAddr {
        self.0.look(|state| state.proto.remote_address())
    }

    pub(in crate::quic) fn close(&self, code: u32, reason: &str) {
        self.0.close(VarInt::from_u32(code), Bytes::copy_from_slice(reason.as_bytes()));
    }

    async fn wait<R>(&self, mut ready: impl FnMut(&mut State) -> Option<R>) -> Result<R, ConnectionError> {
        loop {
            // Made first: who becomes ready after it was looked at is not missed.
            let changed = self.0.changed.notified();
            let looked = self.0.look(|state| match ready(state) {
                Some(result) => Some(Ok(result)),
                None => state.error.clone().map(Err),
            });
            if let Some(result) = looked {
                return result;
            }
            changed.await;
        }
    }

    fn halves(&self, stream: StreamId) -> (SendHalf, ReceiveHalf) {
        (SendHalf::new(self.clone(), stream), ReceiveHalf::new(self.clone(), stream))
    }
}

impl Clone for Connection {
    fn clone(&self) -> Self {
        self.0.owners.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.0.owners.fetch_sub(1, Ordering::AcqRel) == 1 && !self.0.look(|state| state.proto.is_closed()) {
            self.0.close(VarInt::from_u32(0), Bytes::new());
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.0.handle.0).finish()
    }
}

/// Why the connections of an endpoint end whose runtime is gone.
pub(super) fn abandoned() -> ConnectionError {
    ConnectionError::TransportError(TransportError {
        code: TransportErrorCode::INTERNAL_ERROR,
        frame: None,
        reason: "what drives the socket is gone".into(),
    })
}

//! An endpoint's one task: receives, keeps time, and goes on with connections that could not send everything. Must give
//! way to other tasks after a bounded piece of work, whatever comes in.

use std::{
    future::Future,
    io::{self, IoSliceMut},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use quinn_proto::{ConnectionEvent, DatagramEvent, EcnCodepoint};
use quinn_udp::{BATCH_SIZE, RecvMeta};
use tokio::time::Sleep;

use super::{
    connection::Core,
    endpoint::{Routing, Shared},
    timers::NEVER,
};

/// Batches of datagrams of one poll.
const TURN_BATCHES: usize = 8;
/// For how long a socket that reports an error is left alone.
const PAUSE: Duration = Duration::from_millis(10);

/// See the module.
pub(super) struct Task {
    shared: Arc<Shared>,
    /// Room for a batch of datagrams.
    buffer: Box<[u8]>,
    sleep: Pin<Box<Sleep>>,
    /// The socket had an error; until then nothing is received.
    paused: Option<Instant>,
    routed: Vec<(Arc<Core>, ConnectionEvent)>,
    due: Vec<u32>,
    turns: Vec<Arc<Core>>,
}

impl Task {
    /// Must be called within a tokio runtime.
    pub(super) fn new(shared: Arc<Shared>, datagram_bytes: usize) -> Self {
        let buffer = vec![0; datagram_bytes * shared.socket.receive_segments() * BATCH_SIZE].into();
        let sleep = Box::pin(tokio::time::sleep_until(shared.began.into()));
        Self { shared, buffer, sleep, paused: None, routed: Vec::new(), due: Vec::new(), turns: Vec::new() }
    }

    /// Receives batch after batch. True if there may be more.
    fn receive(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        if self.paused.take_if(|until| *until <= now).is_none() && self.paused.is_some() {
            return false;
        }
        for _ in 0..TURN_BATCHES {
            let mut meta = [RecvMeta::default(); BATCH_SIZE];
            let received = {
                let room = (self.buffer.len() / BATCH_SIZE).max(1);
                let mut chunks = self.buffer.chunks_mut(room);
                let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
                    std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
                self.shared.socket.poll_receive(context, &mut buffers, &mut meta)
            };
            match received {
                Poll::Pending => return false,
                Poll::Ready(Ok(count)) => {
                    self.route(meta.get(..count).unwrap_or(&meta));
                    self.deliver();
                }
                // Whoever can forge an ICMP message could cause it.
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Poll::Ready(Err(error)) => {
                    tracing::warn!(%error, "cannot receive from a UDP socket");
                    self.paused = Some(now + PAUSE);
                    return false;
                }
            }
        }
        true
    }

    /// Finds out for whom the datagrams of a batch are.
    fn route(&mut self, meta: &[RecvMeta]) {
        let Self { shared, buffer, routed, .. } = self;
        let now = Instant::now();
        let room = (buffer.len() / BATCH_SIZE).max(1);
        let mut routing = shared.routing.lock();
        let knocking = routing.incoming.len();
        for (meta, bytes) in meta.iter().zip(buffer.chunks(room)) {
            let ecn = meta.ecn.map(|ecn| match ecn {
                quinn_udp::EcnCodepoint::Ect0 => EcnCodepoint::Ect0,
                quinn_udp::EcnCodepoint::Ect1 => EcnCodepoint::Ect1,
                quinn_udp::EcnCodepoint::Ce => EcnCodepoint::Ce,
            });
            for datagram in bytes.get(..meta.len).unwrap_or(bytes).chunks(meta.stride.max(1)) {
                let mut response = Vec::new();
                let event =
                    routing.proto.handle(now, meta.addr, meta.dst_ip, ecn, BytesMut::from(datagram), &mut response);
                match event {
                    Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                        if let Some(core) = routing.connection(handle.0) {
                            routed.push((core.clone(), event));
                        }
                    }
                    Some(DatagramEvent::NewConnection(incoming)) => knock(shared, &mut routing, incoming),
                    Some(DatagramEvent::Response(transmit)) => shared.respond(&transmit, &response),
                    None => {}
                }
            }
        }
        let knocked = routing.incoming.len() > knocking;
        drop(routing);
        if knocked {
            shared.knocks.notify_waiters();
        }
    }

    /// Hands each connection of a batch all that came for it.
    fn deliver(&mut self) {
        // Stable: a connection's datagrams stay in order.
        self.routed.sort_by_key(|(core, _)| Arc::as_ptr(core).addr());
        let mut routed = self.routed.drain(..).peekable();
        while let Some((core, first)) = routed.next() {
            let more = std::iter::from_fn(|| routed.next_if(|(next, _)| Arc::ptr_eq(next, &core)).map(|(_, e)| e));
            core.receive(std::iter::once(first).chain(more));
        }
    }

    /// Looks at the connections whose time has come.
    fn keep_time(&mut self, now: Instant) {
        let tick = self.shared.work.lock().timers.fire(now, &mut self.due);
        if self.due.is_empty() {
            return;
        }
        let routing = self.shared.routing.lock();
        self.turns.extend(self.due.drain(..).filter_map(|handle| routing.connection(handle as usize).cloned()));
        drop(routing);
        self.turns.drain(..).for_each(|core| core.time(tick, now));
        self.turns.shrink_to(BATCH_SIZE);
        self.due.shrink_to(BATCH_SIZE);
    }

    /// Gives queued connections their turns.
    fn take_turns(&mut self, context: &mut Context<'_>) {
        self.turns.append(&mut self.shared.work.lock().ready);
        self.turns.drain(..).for_each(|core| core.turn());
        if self.shared.work.lock().blocked.is_empty() || self.shared.socket.poll_writable(context).is_pending() {
            return;
        }
        self.turns.append(&mut self.shared.work.lock().blocked);
        self.turns.drain(..).for_each(|core| core.turn());
        self.turns.shrink_to(BATCH_SIZE);
    }

    /// Prepares to sleep. False if there is something to do at once.
    fn rest(&mut self, context: &mut Context<'_>) -> bool {
        let until = {
            let mut work = self.shared.work.lock();
            if !work.ready.is_empty() {
                return false;
            }
            if !work.blocked.is_empty() && self.shared.socket.poll_writable(context).is_ready() {
                return false;
            }
            work.awake = false;
            work.sleeps_until = work.timers.next();
            (work.sleeps_until != NEVER).then(|| work.timers.instant(work.sleeps_until))
        };
        let Some(until) = until.into_iter().chain(self.paused).min() else { return true };
        if self.sleep.deadline().into_std() != until {
            self.sleep.as_mut().reset(until.into());
        }
        self.sleep.as_mut().poll(context).is_pending()
    }

    fn is_done(&self) -> bool {
        // Nobody can become its owner again.
        self.shared.is_orphaned() && self.shared.routing.lock().is_empty()
    }
}

/// Keeps a caller until he is accepted.
fn knock(shared: &Shared, routing: &mut Routing, incoming: quinn_proto::Incoming) {
    if routing.is_closed() || shared.is_orphaned() {
        let mut response = Vec::new();
        let transmit = routing.proto.refuse(incoming, &mut response);
        shared.respond(&transmit, &response);
    } else {
        routing.incoming.push_back(incoming);
    }
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        // A task's own is the same all its life.
        this.shared.waker.get_or_init(|| context.waker().clone());
        this.shared.work.lock().awake = true;
        let now = Instant::now();
        let more = this.receive(context, now);
        this.keep_time(now);
        this.take_turns(context);
        if this.is_done() {
            return Poll::Ready(());
        }
        if more || !this.rest(context) {
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.shared.lose();
    }
}

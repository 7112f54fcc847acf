//! One UDP socket and its connections: who calls, who is called, where a datagram belongs. Must never hold anything for a
//! caller who was neither accepted nor refused beyond what quinn-proto allows.

use std::{
    collections::VecDeque,
    fmt, mem,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, EndpointConfig, EndpointEvent,
    ServerConfig, Transmit, VarInt,
};
use tokio::sync::Notify;

use super::{
    Socket,
    connection::{Connection, Core, abandoned},
    task,
    timers::{NEVER, Tick, Timers},
};

/// What an endpoint's owners, its task and its connections share.
pub(super) struct Shared {
    pub(super) socket: Socket,
    pub(super) began: Instant,
    pub(super) routing: Mutex<Routing>,
    pub(super) work: Mutex<Work>,
    /// The task's, from its first turn on.
    pub(super) waker: OnceLock<Waker>,
    /// Tells of callers and of the end of accepting.
    pub(super) knocks: Notify,
    /// Tells that no connection is left.
    idle: Notify,
    /// Its task is gone, and so is its runtime: nothing may be sent any more.
    lost: AtomicBool,
    /// Without any, the task ends with the last connection.
    owners: AtomicUsize,
}

pub(super) struct Routing {
    pub(super) proto: quinn_proto::Endpoint,
    /// By handle.
    connections: Vec<Option<Arc<Core>>>,
    count: usize,
    pub(super) incoming: VecDeque<quinn_proto::Incoming>,
    /// With what connections are closed since nobody is accepted any more.
    closed: Option<(VarInt, Bytes)>,
}

/// What the task has to do besides receiving.
pub(super) struct Work {
    pub(super) timers: Timers,
    /// Connections that have more to send than a turn allows.
    pub(super) ready: Vec<Arc<Core>>,
    /// Connections that the socket would not take a packet of.
    pub(super) blocked: Vec<Arc<Core>>,
    /// The task runs or was woken: it looks at all of this again before it sleeps.
    pub(super) awake: bool,
    /// Until when it sleeps if nothing comes.
    pub(super) sleeps_until: Tick,
}

impl Work {
    /// True if the task is to be woken, once no lock is held.
    #[must_use]
    fn rouse(&mut self) -> bool {
        !mem::replace(&mut self.awake, true)
    }
}

impl Routing {
    pub(super) fn connection(&self, handle: usize) -> Option<&Arc<Core>> {
        self.connections.get(handle)?.as_ref()
    }

    fn insert(&mut self, handle: ConnectionHandle, core: &Arc<Core>) {
        if self.connections.len() <= handle.0 {
            self.connections.resize_with(handle.0 + 1, || None);
        }
        if let Some(place) = self.connections.get_mut(handle.0) {
            *place = Some(core.clone());
            self.count += 1;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Shared {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn is_orphaned(&self) -> bool {
        self.owners.load(Ordering::Acquire) == 0
    }

    /// Takes an event of the connection with `handle`; its lock may be held.
    pub(super) fn handle_event(&self, handle: ConnectionHandle, event: EndpointEvent) -> Option<ConnectionEvent> {
        let drained = event.is_drained();
        let mut routing = self.routing.lock();
        let answer = routing.proto.handle_event(handle, event);
        if !drained {
            return answer;
        }
        let gone = routing.connections.get_mut(handle.0).and_then(Option::take);
        routing.count -= usize::from(gone.is_some());
        let empty = routing.is_empty();
        drop(routing);
        if empty {
            self.idle.notify_waiters();
            if self.is_orphaned() {
                self.rouse();
            }
        }
        None
    }

    /// Wakes the task for something that no lock tells of.
    fn rouse(&self) {
        if self.work.lock().rouse() {
            self.wake();
        }
    }

    /// Wakes the task, which [`Self::queue`] or [`Self::arm`] asked for.
    pub(super) fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    /// Gives a connection another turn, after everybody else's or once the socket takes packets again. True if
    /// [`Self::wake`] is to be called.
    pub(super) fn queue(&self, core: Arc<Core>, blocked: bool) -> bool {
        let mut work = self.work.lock();
        if blocked { &mut work.blocked } else { &mut work.ready }.push(core);
        work.rouse()
    }

    /// Has a connection looked at no later than at `tick`; tells when, and whether [`Self::wake`] is to be called.
    pub(super) fn arm(&self, handle: ConnectionHandle, tick: Tick) -> (Tick, bool) {
        let mut work = self.work.lock();
        let at = work.timers.add(handle.0 as u32, tick);
        (at, at < work.sleeps_until && work.rouse())
    }

    /// Sends what needs no connection, or drops it when the socket is full: who it is for will ask again.
    pub(super) fn respond(&self, transmit: &Transmit, bytes: &[u8]) {
        if !self.is_lost() {
            self.socket.send(transmit, bytes.get(..transmit.size).unwrap_or(bytes));
        }
    }

    /// The runtime is gone. Whoever waits is told; nothing is sent.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        let mut routing = self.routing.lock();
        let connections = mem::take(&mut routing.connections);
        routing.count = 0;
        let incoming: Vec<_> = routing.incoming.drain(..).collect();
        incoming.into_iter().for_each(|incoming| routing.proto.ignore(incoming));
        drop(routing);
        let mut work = self.work.lock();
        let queued = (mem::take(&mut work.ready), mem::take(&mut work.blocked));
        drop(work);
        drop(queued);
        connections.iter().flatten().for_each(|core| core.end(Some(abandoned())));
        self.knocks.notify_waiters();
        self.idle.notify_waiters();
    }
}

/// An owner of an endpoint; clones are the same one. Its connections outlive it.
pub(in crate::quic) struct Endpoint(Arc<Shared>);

impl Endpoint {
    /// Begins to serve `socket`; with a `server` it takes calls. Must be called within a tokio runtime.
    pub(in crate::quic) fn new(config: EndpointConfig, server: Option<ServerConfig>, socket: Socket) -> Self {
        let datagram_bytes = config.get_max_udp_payload_size() as usize;
        let proto = quinn_proto::Endpoint::new(Arc::new(config), server.map(Arc::new), !socket.may_fragment(), None);
        let routing = Routing { proto, connections: Vec::new(), count: 0, incoming: VecDeque::new(), closed: None };
        let began = Instant::now();
        let work = Work {
            timers: Timers::new(began),
            ready: Vec::new(),
            blocked: Vec::new(),
            awake: false,
            sleeps_until: NEVER,
        };
        let shared = Arc::new(Shared {
            socket,
            began,
            routing: Mutex::new(routing),
            work: Mutex::new(work),
            waker: OnceLock::new(),
            knocks: Notify::new(),
            idle: Notify::new(),
            lost: AtomicBool::new(false),
            owners: AtomicUsize::new(1),
        });
        tokio::spawn(task::Task::new(shared.clone(), datagram_bytes));
        Self(shared)
    }

    /// Calls `addr`. The handshake is still to be waited for.
    pub(in crate::quic) fn connect(
        &self,
        config: ClientConfig,
        addr: SocketAddr,
        name: &str,
    ) -> Result<Connection, ConnectError> {
        if addr.is_ipv6() != self.0.socket.is_ipv6() {
            return Err(ConnectError::InvalidRemoteAddress(addr));
        }
        let mut routing = self.0.routing.lock();
        if self.0.is_lost() || routing.is_closed() {
            return Err(ConnectError::EndpointStopping);
        }
        let (handle, proto) = routing.proto.connect(Instant::now(), config, addr, name)?;
        let connection = Core::begin(self.0.clone(), handle, proto);
        routing.insert(handle, &connection.0);
        drop(routing);
        connection.0.act(|_| ());
        Ok(connection)
    }

    /// The next caller. `None` once closed. Cancel-safe.
    pub(in crate::quic) async fn accept(&self) -> Option<Incoming> {
        loop {
            // Made first: who calls after it was looked at is not missed.
            let knocks = self.0.knocks.notified();
            {
                let mut routing = self.0.routing.lock();
                if self.0.is_lost() {
                    return None;
                }
                if let Some(proto) = routing.incoming.pop_front() {
                    let (from, proven) = (proto.remote_address(), proto.remote_address_validated());
                    return Some(Incoming { from, proven, proto: Some(proto.into()), endpoint: self.clone() });
                }
                if routing.is_closed() {
                    return None;
                }
            }
            knocks.await;
        }
    }

    pub(in crate::quic) fn open_connections(&self) -> usize {
        self.0.routing.lock().proto.open_connections()
    }

    /// Closes every connection and accepts no more.
    pub(in crate::quic) fn close(&self, code: u32, reason: &str) {
        let with = (VarInt::from_u32(code), Bytes::copy_from_slice(reason.as_bytes()));
        let mut routing = self.0.routing.lock();
        routing.closed = Some(with.clone());
        let connections: Vec<_> = routing.connections.iter().flatten().cloned().collect();
        drop(routing);
        connections.iter().for_each(|core| core.close(with.0, with.1.clone()));
        self.0.knocks.notify_waiters();
    }

    /// Waits until no connection is left.
    pub(in crate::quic) async fn wait_idle(&self) {
        loop {
            let idle = self.0.idle.notified();
            if self.0.routing.lock().is_empty() {
                return;
            }
            idle.await;
        }
    }
}

impl Clone for Endpoint {
    fn clone(&self) -> Self {
        self.0.owners.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if self.0.owners.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.rouse();
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("connections", &self.0.routing.lock().count).finish_non_exhaustive()
    }
}

/// A caller. Dropped, he gets no answer.
pub(in crate::quic) struct Incoming {
    from: SocketAddr,
    proven: bool,
    /// Boxed: it would be most of the memory of the task that holds it, to the end of the session.
    proto: Option<Box<quinn_proto::Incoming>>,
    /// Keeps the task until he is answered.
    endpoint: Endpoint,
}

impl Incoming {
    pub(in crate::quic) fn remote_address(&self) -> SocketAddr {
        self.from
    }

    /// Whether he has shown that he receives what is sent to his address.
    pub(in crate::quic) fn is_proven(&self) -> bool {
        self.proven
    }

    /// Begins the handshake.
    pub(in crate::quic) fn accept(mut self) -> Result<Connection, ConnectionError> {
        let Some(incoming) = self.proto.take() else { return Err(abandoned()) };
        let mut response = Vec::new();
        let mut routing = self.endpoint.0.routing.lock();
        if self.endpoint.0.is_lost() {
            routing.proto.ignore(*incoming);
            return Err(abandoned());
        }
        match routing.proto.accept(*incoming, Instant::now(), &mut response, None) {
            Ok((handle, proto)) => {
                let connection = Core::begin(self.endpoint.0.clone(), handle, proto);
                routing.insert(handle, &connection.0);
                let closed = routing.closed.clone();
                drop(routing);
                match closed {
                    Some((code, reason)) => connection.0.close(code, reason),
                    None => connection.0.act(|_| ()),
                }
                Ok(connection)
            }
            Err(error) => {
                drop(routing);
                if let Some(transmit) = &error.response {
                    self.endpoint.0.respond(transmit, &response);
                }
                Err(error.cause)
            }
        }
    }

    /// Turns him away.
    pub(in crate::quic) fn refuse(mut self) {
        if let Some(incoming) = self.proto.take() {
            let mut response = Vec::new();
            let transmit = self.endpoint.0.routing.lock().proto.refuse(*incoming, &mut response);
            self.endpoint.0.respond(&transmit, &response);
        }
    }

    /// Has him show that he receives what is sent to his address, and forgets him until then.
    pub(in crate::quic) fn retry(mut self) {
        let Some(incoming) = self.proto.take() else { return };
        let mut response = Vec::new();
        let retried = self.endpoint.0.routing.lock().proto.retry(*incoming, &mut response);
        match retried {
            Ok(transmit) => self.endpoint.0.respond(&transmit, &response),
            // He has shown it before.
            Err(error) => self.proto = Some(error.into_incoming().into()),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(incoming) = self.proto.take() {
            self.endpoint.0.routing.lock().proto.ignore(*incoming);
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Incoming").field(&self.from).finish()
    }
}

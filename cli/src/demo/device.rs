//! One device of the demo: a real client that follows its conversations, notes everything that arrives, and goes away and
//! comes back when it is told to. Must note every arrival as it came, whatever it thinks of it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use stentor_client::{Client, ClientTls, Event, From, Incoming, MemoryCursors};
use stentor_proto::{
    ids::{ConversationId, Seq},
    v1::EventKind,
};
use tokio::sync::{Notify, Semaphore, mpsc, watch};

use super::proof::{Arrival, NOT_LIVE, fingerprint};
use crate::{failure::Failure, session};

/// What all devices share.
pub(super) struct Shared {
    /// Where devices connect.
    pub(super) gateways: Vec<std::net::SocketAddr>,
    /// Whom they trust.
    pub(super) tls: ClientTls,
    /// Bounds how many connect at the same time.
    pub(super) connecting: Semaphore,
    /// When the demo began.
    pub(super) began: Instant,
    /// Counts arrivals, for people.
    pub(super) bar: indicatif::ProgressBar,
    /// Counts arrivals, to tell waiting from standing still.
    pub(super) arrivals: AtomicU64,
    /// The test hook: one delivered body gets one byte changed before anything looks at it.
    pub(super) alter_next: AtomicBool,
}

impl Shared {
    /// µs since the demo began.
    pub(super) fn now_us(&self) -> u32 {
        u32::try_from(self.began.elapsed().as_micros()).unwrap_or(NOT_LIVE - 1).min(NOT_LIVE - 1)
    }
}

/// What came of one conversation to one device.
#[derive(Debug, Default)]
pub(super) struct Trace {
    arrivals: Mutex<Vec<Arrival>>,
    last: AtomicU64,
}

impl Trace {
    /// The highest seq that came.
    pub(super) fn last(&self) -> Seq {
        Seq(self.last.load(Ordering::Acquire))
    }

    /// Everything that came, in order; leaves nothing.
    pub(super) fn take(&self) -> Vec<Arrival> {
        std::mem::take(&mut *self.arrivals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, arrival: Arrival) {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
        self.last.fetch_max(arrival.seq.0, Ordering::Release);
    }
}

enum Order {
    Follow(ConversationId, Arc<Trace>),
    Leave,
    Return,
    End,
}

/// A running device.
pub(super) struct DeviceHandle {
    orders: mpsc::UnboundedSender<Order>,
    online: watch::Receiver<Option<Arc<Client>>>,
    unanswered: Arc<Unanswered>,
    task: tokio::sync::Mutex<tokio::task::JoinHandle<Result<(), Failure>>>,
}

/// Counts a device's sends without an answer: it goes away only when there are none, since a client that is gone can
/// not be told what became of them.
#[derive(Default)]
struct Unanswered {
    count: AtomicUsize,
    none: Notify,
}

/// One send on its way; dropped with its answer.
pub(super) struct OnItsWay(Arc<Unanswered>);

impl Drop for OnItsWay {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_one();
        }
    }
}

impl DeviceHandle {
    /// Starts a device that connects at once.
    pub(super) fn start(shared: Arc<Shared>, user: Arc<str>, token: String) -> Self {
        let (orders, received) = mpsc::unbounded_channel();
        let (online_in, online) = watch::channel(None);
        let unanswered = Arc::new(Unanswered::default());
        let device = Device {
            shared,
            user,
            token,
            cursors: Arc::new(MemoryCursors::new()),
            traces: HashMap::new(),
            orders: received,
            online: online_in,
            unanswered: unanswered.clone(),
        };
        let task = tokio::spawn(device.run()).into();
        Self { orders, online, unanswered, task }
    }

    /// Begins to follow a conversation from its first event.
    pub(super) fn follow(&self, conversation: ConversationId, trace: Arc<Trace>) {
        // A device that has failed is noticed by what it lacks.
        let _ = self.orders.send(Order::Follow(conversation, trace));
    }

    /// Disconnects as soon as its own sends are answered.
    pub(super) fn leave(&self) {
        let _ = self.orders.send(Order::Leave);
    }

    /// Connects again.
    pub(super) fn come_back(&self) {
        let _ = self.orders.send(Order::Return);
    }

    /// Its client, as soon as it is connected; and the mark of a send that is about to be made.
    pub(super) async fn client(&self) -> Result<(Arc<Client>, OnItsWay), Failure> {
        let mut online = self.online.clone();
        let ended = |_| Failure::failed("a device of the demo has failed");
        loop {
            self.unanswered.count.fetch_add(1, Ordering::AcqRel);
            let mark = OnItsWay(self.unanswered.clone());
            // Counted before looking: from here on the device does not go away.
            if let Some(client) = online.borrow_and_update().clone() {
                return Ok((client, mark));
            }
            drop(mark);
            online.changed().await.map_err(ended)?;
        }
    }

    /// Disconnects for good. To be called once.
    pub(super) async fn end(&self) -> Result<(), Failure> {
        let _ = self.orders.send(Order::End);
        (&mut *self.task.lock().await).await.map_err(|_| Failure::failed("a device of the demo has panicked"))?
    }
}

struct Device {
    shared: Arc<Shared>,
    user: Arc<str>,
    token: String,
    /// Outlive the client: a device that comes back goes on where it was.
    cursors: Arc<MemoryCursors>,
    traces: HashMap<ConversationId, Arc<Trace>>,
    orders: mpsc::UnboundedReceiver<Order>,
    online: watch::Sender<Option<Arc<Client>>>,
    unanswered: Arc<Unanswered>,
}

/// Why a device stops listening.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Away {
    ForAWhile,
    ForGood,
}

impl Device {
    async fn run(mut self) -> Result<(), Failure> {
        loop {
            if Box::pin(self.be_online()).await? == Away::ForGood {
                return Ok(());
            }
            loop {
                match self.orders.recv().await {
                    Some(Order::Return) => break,
                    Some(Order::Follow(conversation, trace)) => drop(self.traces.insert(conversation, trace)),
                    Some(Order::Leave) => {}
                    Some(Order::End) | None => return Ok(()),
                }
            }
        }
    }

    async fn connect(&self) -> Result<Client, Failure> {
        let _turn = self.shared.connecting.acquire().await;
        let mut builder =
            Client::builder().tls(self.shared.tls.clone()).token(&self.token).cursors(self.cursors.clone());
        for gateway in &self.shared.gateways {
            builder = builder.gateway(*gateway);
        }
        let connected = builder.connect().await;
        connected.map_err(|error| Failure::failed(format_args!("{}: cannot connect: {error}", self.user)))
    }

    async fn be_online(&mut self) -> Result<Away, Failure> {
        let client = Arc::new(self.connect().await?);
        let online_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        for conversation in self.traces.keys() {
            client.subscribe(conversation, From::Cursor).await.map_err(session::failure)?;
        }
        self.online.send_replace(Some(client.clone()));
        let mut leaving = None;
        loop {
            if leaving.is_some() && self.unanswered.count.load(Ordering::Acquire) == 0 {
                break;
            }
            tokio::select! {
                incoming = client.next() => match incoming {
                    Some(incoming) => self.note(&client, incoming, online_ms)?,
                    None => {
                        let why = client.ended().map_or("", |refusal| &refusal.reason);
                        return Err(Failure::failed(format_args!("{}: the session has ended {why}", self.user)));
                    }
                },
                order = self.orders.recv(), if leaving.is_none() => match order {
                    Some(Order::Follow(conversation, trace)) => {
                        client.subscribe(&conversation, From::Seq(Seq(0))).await.map_err(session::failure)?;
                        self.traces.insert(conversation, trace);
                    }
                    Some(Order::Return) => {}
                    Some(Order::Leave) => leaving = self.stop_sending(Away::ForAWhile),
                    Some(Order::End) | None => leaving = self.stop_sending(Away::ForGood),
                },
                () = self.unanswered.none.notified(), if leaving.is_some() => {}
            }
        }
        client.close().await;
        Ok(leaving.unwrap_or(Away::ForGood))
    }

    /// From here on nobody gets the client any more; those who have it are counted.
    fn stop_sending(&self, away: Away) -> Option<Away> {
        self.online.send_replace(None);
        Some(away)
    }

    fn note(&self, client: &Client, incoming: Incoming, online_ms: u64) -> Result<(), Failure> {
        match incoming {
            Incoming::Event { conversation, event } => {
                let Some(trace) = self.traces.get(&conversation) else { return Ok(()) };
                // What was said before this connection was made says nothing about how fast it is.
                let live = event.stamp_ms.0 >= online_ms;
                let at_us = if live { self.shared.now_us() } else { NOT_LIVE };
                let fingerprint = self.fingerprint(&event);
                trace.note(Arrival { seq: event.seq, fingerprint, at_us });
                client.delivered(&conversation, event.seq);
                self.shared.arrivals.fetch_add(1, Ordering::Relaxed);
                self.shared.bar.inc(1);
                Ok(())
            }
            Incoming::Ended { conversation, refusal } => {
                Err(Failure::failed(format_args!("{}: {conversation} has ended: {}", self.user, refusal.message)))
            }
            // A hidden stretch is noticed by the events that it lacks.
            _ => Ok(()),
        }
    }

    fn fingerprint(&self, event: &Event) -> u64 {
        let is_message = matches!(event.kind, EventKind::Message | EventKind::Action);
        let alter = &self.shared.alter_next;
        if is_message && alter.load(Ordering::Relaxed) && alter.swap(false, Ordering::Relaxed) {
            let mut body = event.body.to_vec();
            body.iter_mut().take(1).for_each(|byte| *byte ^= 1);
            return fingerprint(event.kind, &event.sender, &body);
        }
        // Who was added is what such an event says.
        let body = if is_message { &event.body[..] } else { event.subject.as_bytes() };
        fingerprint(event.kind, &event.sender, body)
    }
}

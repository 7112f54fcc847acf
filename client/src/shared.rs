//! What the application's side and the client's task share: the inbox, cursor moves that wait, the end. Must never
//! hold a lock across an await, nor more in the inbox than the credit allows.

use std::{
    collections::{BTreeMap, VecDeque},
    mem::discriminant,
    sync::OnceLock,
};

use parking_lot::Mutex;
use stentor_engine::session::client::{Answer, Full, Session};
use stentor_proto::{
    ids::{ConversationId, Seq},
    v1::{self, Refusal, request::Call, response},
};
use stentor_transport::Host;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use crate::{ClientError, Connection, From, Identity, Incoming, Sent, connection::State};

/// Items that cost no credit are left out, or kept once of each kind, when so many items wait.
const HINTS_BELOW: usize = 4_096;

/// What the application asks of the task.
pub(crate) enum Command {
    Send { send: Box<v1::Send>, ticket: SendTicket },
    Subscribe { conversation: ConversationId, from: From, reply: oneshot::Sender<Result<(), Full>> },
    Unsubscribe { conversation: ConversationId },
    Request { call: Box<Call>, reply: RequestTicket },
    Close { done: oneshot::Sender<()> },
}

/// Who waits for a send, and its place in the window.
#[derive(Debug)]
pub(crate) struct SendTicket {
    pub(crate) reply: oneshot::Sender<Result<Sent, ClientError>>,
    pub(crate) conversation: ConversationId,
    /// Given back when the send is decided.
    pub(crate) _window: OwnedSemaphorePermit,
}

impl SendTicket {
    pub(crate) fn decide(self, answer: Answer) {
        let result = match answer {
            Answer::Sent { send_no, seq, stamp, repeat } => Ok(Sent { seq, stamp_ms: stamp, repeat, send_no }),
            Answer::Refused(refusal) => Err(ClientError::Refused(refusal)),
            Answer::Unknown(refusal) => Err(ClientError::Unknown(refusal.message)),
        };
        self.fail_or(result);
    }

    pub(crate) fn fail_or(self, result: Result<Sent, ClientError>) {
        // Nobody waits any more: the send stands all the same.
        let _ = self.reply.send(result);
    }
}

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Reply {
    Answer(Result<response::Result, Refusal>),
    /// The connection ended before its answer, or the session did.
    Lost {
        maybe_done: bool,
    },
    Full(Full),
}

pub(crate) type RequestTicket = oneshot::Sender<Reply>;

/// A (delivered, read) pair that waits.
pub(crate) type Moves = BTreeMap<ConversationId, (Seq, Seq)>;

#[derive(Debug, Default)]
struct Inbox {
    items: VecDeque<(Incoming, u64)>,
    /// Credit of the items that wait.
    held_bytes: u64,
    /// Credit of the items that were taken since the task last looked.
    consumed_bytes: u64,
    is_closed: bool,
}

#[derive(Debug)]
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    arrived: Notify,
    moves: Mutex<Moves>,
    /// Wakes the task.
    pub(crate) wake: Notify,
    connection: Mutex<State>,
    pub(crate) host: Host,
    pub(crate) identity: OnceLock<Identity>,
    pub(crate) ended: OnceLock<Refusal>,
    /// The task is told of consumed credit in steps of this.
    credit_step: u64,
}

impl Shared {
    pub(crate) fn new(credit_bytes: u64, host: Host) -> Self {
        Self {
            inbox: Mutex::default(),
            arrived: Notify::new(),
            moves: Mutex::default(),
            wake: Notify::new(),
            connection: Mutex::new(State::new(Instant::now())),
            host,
            identity: OnceLock::new(),
            ended: OnceLock::new(),
            credit_step: (credit_bytes / 4).max(1),
        }
    }

    /// The next item, or `None` when there is none now. The second value says whether there will be more.
    pub(crate) fn try_next(&self) -> (Option<Incoming>, bool) {
        let mut inbox = self.inbox.lock();
        let Some((item, credit_bytes)) = inbox.items.pop_front() else { return (None, !inbox.is_closed) };
        let before = inbox.consumed_bytes;
        inbox.consumed_bytes += credit_bytes;
        inbox.held_bytes -= credit_bytes;
        let tell = before < self.credit_step && inbox.consumed_bytes >= self.credit_step;
        let more = !inbox.items.is_empty();
        if inbox.items.is_empty() {
            // An idle client holds no buffer.
            inbox.items = VecDeque::new();
        }
        drop(inbox);
        if tell {
            self.wake.notify_one();
        }
        if more {
            // Another task may wait here too.
            self.arrived.notify_one();
        }
        (Some(item), true)
    }

    pub(crate) async fn next(&self) -> Option<Incoming> {
        loop {
            let arrived = self.arrived.notified();
            match self.try_next() {
                (Some(item), _) => return Some(item),
                (None, false) => {
                    self.arrived.notify_one();
                    return None;
                }
                (None, true) => arrived.await,
            }
        }
    }

    /// Hands over what arrived. States and cursor moves are hints, so they are left out when too much waits; a
    /// reconnect nobody looked at is not told, so that a flapping connection cannot fill the inbox.
    pub(crate) fn deliver(&self, batch: &mut Vec<(Incoming, u64)>) {
        if batch.is_empty() {
            return;
        }
        let mut inbox = self.inbox.lock();
        for (item, credit_bytes) in batch.drain(..) {
            let crowded = inbox.items.len() >= HINTS_BELOW;
            match &item {
                Incoming::State { .. } | Incoming::CursorsMoved { .. } | Incoming::StoreFailed(_) if crowded => {
                    continue;
                }
                Incoming::UpToDate | Incoming::Connected { .. } | Incoming::Disconnected { .. } if crowded => {
                    // Of these only the last counts.
                    let same = |(other, _): &(Incoming, u64)| discriminant(other) == discriminant(&item);
                    let earlier = inbox.items.iter().position(same);
                    earlier.and_then(|at| inbox.items.remove(at));
                }
                Incoming::Disconnected { .. }
                    if matches!(inbox.items.back(), Some((Incoming::Connected { .. }, _))) =>
                {
                    inbox.items.pop_back();
                    if matches!(inbox.items.back(), Some((Incoming::Disconnected { .. }, _))) {
                        continue;
                    }
                }
                _ => {}
            }
            inbox.held_bytes += credit_bytes;
            inbox.items.push_back((item, credit_bytes));
        }
        drop(inbox);
        self.arrived.notify_one();
    }

    pub(crate) fn close(&self) {
        self.inbox.lock().is_closed = true;
        self.disconnected();
        self.arrived.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.inbox.lock().is_closed
    }

    /// Tells the session what was taken since the last call; returns the credit of what waits.
    pub(crate) fn consumed_now<S, R>(&self, session: &mut Session<S, R>) -> u64 {
        let mut inbox = self.inbox.lock();
        if inbox.consumed_bytes > 0 {
            session.consumed(std::mem::take(&mut inbox.consumed_bytes));
        }
        inbox.held_bytes
    }

    /// Notes a cursor move; the highest counts.
    pub(crate) fn note_move(&self, conversation: &ConversationId, delivered: Seq, read: Seq) {
        let mut moves = self.moves.lock();
        let first = moves.is_empty();
        match moves.get_mut(conversation.as_str()) {
            Some(kept) => *kept = (kept.0.max(delivered), kept.1.max(read)),
            None => {
                moves.insert(conversation.clone(), (delivered, read));
            }
        }
        drop(moves);
        if first {
            self.wake.notify_one();
        }
    }

    pub(crate) fn has_moves(&self) -> bool {
        !self.moves.lock().is_empty()
    }

    pub(crate) fn take_moves(&self) -> Moves {
        std::mem::take(&mut self.moves.lock())
    }

    pub(crate) fn note_failure(&self, failure: String) {
        self.connection.lock().failed(failure);
    }

    pub(crate) fn last_failure(&self) -> Option<String> {
        self.connection.lock().reason()
    }

    pub(crate) fn connected(&self, gateway: &str) {
        self.connection.lock().online(Instant::now(), gateway);
    }

    pub(crate) fn disconnected(&self) {
        self.connection.lock().offline(Instant::now());
    }

    pub(crate) fn retry_at(&self, at: Instant) {
        self.connection.lock().retry_at(at);
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connection.lock().is_online()
    }

    pub(crate) fn connection(&self) -> Connection {
        self.connection.lock().at(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliver(shared: &Shared, item: Incoming) {
        shared.deliver(&mut vec![(item, 0)]);
    }

    fn items(shared: &Shared) -> Vec<Incoming> {
        std::iter::from_fn(|| shared.try_next().0).collect()
    }

    #[test]
    fn a_flapping_connection_cannot_fill_an_inbox_that_nobody_reads() {
        let shared = Shared::new(1_000, Host::real());
        let id = ConversationId::new("c").unwrap_or_else(|e| unreachable!("{e}"));
        for n in 0..20_000 {
            deliver(&shared, Incoming::Connected { gateway: n.to_string() });
            let (head, delivered, read) = (Seq(n), Seq(0), Seq(0));
            deliver(&shared, Incoming::State { conversation: id.clone(), head, delivered, read });
            deliver(&shared, Incoming::UpToDate);
            deliver(&shared, Incoming::Disconnected { reason: n.to_string() });
        }
        let items = items(&shared);
        assert!(items.len() <= HINTS_BELOW + 3, "{} items", items.len());
        assert!(matches!(items.last(), Some(Incoming::Disconnected { reason }) if reason == "19999"));
        assert!(items.iter().rev().take(3).any(|i| matches!(i, Incoming::UpToDate)), "what is waited for still comes");
    }

    #[test]
    fn a_reconnect_that_nobody_saw_is_told_once() {
        let shared = Shared::new(1_000, Host::real());
        for n in 0..3 {
            deliver(&shared, Incoming::Disconnected { reason: n.to_string() });
            deliver(&shared, Incoming::Connected { gateway: n.to_string() });
        }
        let items = items(&shared);
        assert!(
            matches!(&items[..], [Incoming::Disconnected { .. }, Incoming::Connected { gateway }] if gateway == "2")
        );
    }

    #[test]
    fn the_task_hears_of_consumed_credit_in_steps() {
        let shared = Shared::new(400, Host::real());
        let mut batch: Vec<_> = (0..4).map(|_| (Incoming::UpToDate, 60)).collect();
        shared.deliver(&mut batch);
        let woken = || futures_util::FutureExt::now_or_never(shared.wake.notified()).is_some();
        shared.try_next();
        assert!(!woken());
        shared.try_next();
        assert!(woken());
        shared.try_next();
        assert!(!woken(), "once is enough");
    }
}

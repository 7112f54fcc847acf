//! The gateway's half of a session: which frame may come when, how many unanswered sends and calls a connection may
//! have, how many event bytes may be out, and the coalescing of cursor moves. Must never let a device make the
//! gateway hold more than these bounds.

use std::collections::BTreeMap;

use stentor_proto::{
    Bytes,
    frame::{ClientFrame, negotiate},
    ids::{ConversationId, Seq, SessionNo, ShardId},
    reason::Reason,
    v1,
};

use crate::limits;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Only `Hello` may come.
    Hello,
    /// The user's shard is asked for the fencing number; nothing is read.
    Opening,
    /// Welcome was sent; everything may come, `Resume` once.
    Open { resumed: bool },
    /// Nothing counts any more.
    Ended,
}

/// One connection of a session. Order of use: [`Server::frame`] for every frame that was decoded, [`Server::opened`]
/// when the fencing number is there, the counting functions as sends and calls are started and answered.
#[derive(Debug)]
pub struct Server {
    phase: Phase,
    session_no: SessionNo,
    sends: usize,
    by_shard: BTreeMap<ShardId, InFlight>,
    calls: usize,
}

/// A session's unanswered sends of one shard.
#[derive(Debug)]
struct InFlight {
    sends: usize,
    /// When the first of them was taken in, or the shard answered one last.
    since_ms: u64,
}

impl InFlight {
    fn is_stuck(&self, now_ms: u64) -> bool {
        now_ms >= self.since_ms + limits::STUCK_SHARD_MS
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// A connection that said nothing yet.
    pub fn new() -> Self {
        Self { phase: Phase::Hello, session_no: SessionNo(0), sends: 0, by_shard: BTreeMap::new(), calls: 0 }
    }

    /// Whether this frame may come now. A refusal ends the connection: the device does not follow the protocol.
    pub fn frame(&mut self, frame: &ClientFrame) -> Result<(), Reason> {
        match (&mut self.phase, frame) {
            (Phase::Hello, ClientFrame::Hello(_)) => self.phase = Phase::Opening,
            (Phase::Open { resumed: resumed @ false }, ClientFrame::Resume(_)) => *resumed = true,
            (Phase::Open { .. }, ClientFrame::Hello(_) | ClientFrame::Resume(_)) => {
                return Err(Reason::UnexpectedFrame);
            }
            (Phase::Open { .. }, _) => {}
            _ => return Err(Reason::UnexpectedFrame),
        }
        Ok(())
    }

    /// The session has its fencing number; the device may go on.
    pub fn opened(&mut self, session_no: SessionNo) {
        if self.phase == Phase::Opening {
            self.phase = Phase::Open { resumed: false };
            self.session_no = session_no;
        }
    }

    /// The fencing number; 0 before [`Self::opened`].
    pub fn session_no(&self) -> SessionNo {
        self.session_no
    }

    /// Ends it: no frame is allowed any more.
    pub fn end(&mut self) {
        self.phase = Phase::Ended;
    }

    /// Whether the next frame may be read from the stream. While not, the stream's flow control holds the device.
    pub fn wants_frames(&self, now_ms: u64) -> bool {
        matches!(self.phase, Phase::Hello | Phase::Open { .. })
            && self.window_has_room(now_ms)
            && self.calls < limits::SESSION_CALLS_IN_FLIGHT
    }

    /// Sends of shards that give no answer leave the window to the others.
    fn window_has_room(&self, now_ms: u64) -> bool {
        if self.sends < limits::SESSION_SENDS_IN_FLIGHT {
            return true;
        }
        let counted = self.by_shard.values().filter(|shard| !shard.is_stuck(now_ms)).map(|shard| shard.sends);
        self.sends < limits::SESSION_SENDS_HELD && counted.sum::<usize>() < limits::SESSION_SENDS_IN_FLIGHT
    }

    /// When a full window may get room by itself, since a shard has then given no answer for too long.
    pub fn room_at_ms(&self, now_ms: u64) -> Option<u64> {
        if self.window_has_room(now_ms) {
            return None;
        }
        let waiting = self.by_shard.values().filter(|shard| !shard.is_stuck(now_ms));
        waiting.map(|shard| shard.since_ms + limits::STUCK_SHARD_MS).min()
    }

    /// Whether a shard answers none of this session's sends: more of them are refused for now.
    pub fn is_stuck(&self, shard: ShardId, now_ms: u64) -> bool {
        self.by_shard.get(&shard).is_some_and(|shard| shard.is_stuck(now_ms))
    }

    /// Sends were taken in together.
    pub fn sends_started(&mut self, shard: ShardId, count: usize, now_ms: u64) {
        self.sends += count;
        self.by_shard.entry(shard).or_insert(InFlight { sends: 0, since_ms: now_ms }).sends += count;
    }

    /// They were answered; `by_shard` unless they were only given up.
    pub fn sends_answered(&mut self, shard: ShardId, count: usize, by_shard: bool, now_ms: u64) {
        let Some(in_flight) = self.by_shard.get_mut(&shard) else { return };
        self.sends = self.sends.saturating_sub(count);
        in_flight.sends = in_flight.sends.saturating_sub(count);
        if by_shard {
            in_flight.since_ms = now_ms;
        }
        if in_flight.sends == 0 {
            self.by_shard.remove(&shard);
        }
    }

    /// A call (`Request`) was taken in.
    pub fn call_started(&mut self) {
        self.calls += 1;
    }

    /// A call was answered.
    pub fn call_answered(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }
}

/// Sends that were refused for now, and with them everything behind: a later send of the same conversation is refused
/// too until the device has come back to the refused one, so that its order stays.
#[derive(Debug, Default)]
pub struct HeldBack {
    first: BTreeMap<String, (u64, Reason)>,
}

impl HeldBack {
    /// Why this send must wait, if an earlier one was refused.
    pub fn is_behind(&self, conversation: &str, send_no: u64) -> Option<Reason> {
        self.first.get(conversation).filter(|(first, _)| send_no > *first).map(|&(_, reason)| reason)
    }

    /// This send was refused for now.
    pub fn refused(&mut self, conversation: &str, send_no: u64, reason: Reason) {
        if self.first.len() >= limits::SESSION_HELD_BACK {
            // What is out of order is still refused where order is decided.
            self.first.clear();
        }
        self.first.insert(conversation.to_owned(), (send_no, reason));
    }

    /// This send goes on.
    pub fn admitted(&mut self, conversation: &str) {
        if !self.first.is_empty() {
            self.first.remove(conversation);
        }
    }
}

/// What a good `Hello` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The protocol version to speak.
    pub version: u32,
    /// The session's nonce.
    pub nonce: Bytes,
}

/// Checks everything of a `Hello` but its token.
pub fn greet(hello: &v1::Hello) -> Result<Greeting, Reason> {
    let version = negotiate(hello.min_version, hello.max_version).ok_or(Reason::UnsupportedVersion)?;
    if hello.session_nonce.len() != limits::SESSION_NONCE_BYTES {
        return Err(Reason::Malformed);
    }
    Ok(Greeting { version, nonce: hello.session_nonce.clone() })
}

/// How many event bytes may still be sent before the device gives more credit.
#[derive(Debug)]
pub struct Credit {
    left: i64,
}

impl Default for Credit {
    fn default() -> Self {
        Self { left: limits::SESSION_CREDIT_BYTES as i64 }
    }
}

impl Credit {
    /// Sets the credit that `Resume` brought; 0 means the default.
    pub fn resume(&mut self, bytes: u64) {
        let bytes = if bytes == 0 { limits::SESSION_CREDIT_BYTES } else { bytes };
        self.left = bytes.min(limits::SESSION_MAX_CREDIT_BYTES) as i64;
    }

    /// The device took in that many bytes. More than the most that may be out is cut, not believed.
    pub fn add(&mut self, bytes: u64) {
        let bytes = bytes.min(limits::SESSION_MAX_CREDIT_BYTES) as i64;
        self.left = (self.left + bytes).min(limits::SESSION_MAX_CREDIT_BYTES as i64);
    }

    /// Events of this cost (see [`super::client::credit_cost`]) were queued.
    pub fn spend(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub_unsigned(bytes);
    }

    /// What is left. A frame may go out while anything is: it may overdraw once, so that one frame larger than the
    /// credit does not hang a session.
    pub fn left(&self) -> usize {
        self.left.max(0) as usize
    }
}

/// Cursor moves that wait to become one command for the user's shard.
#[derive(Debug, Default)]
pub struct Cursors {
    delivered: BTreeMap<ConversationId, Seq>,
    read: BTreeMap<ConversationId, Seq>,
    due_ms: Option<u64>,
}

/// Which cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CursorKind {
    /// The device's own.
    Delivered,
    /// The user's.
    Read,
}

/// The moves of one command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moves {
    /// Of the device.
    pub delivered: Vec<(ConversationId, Seq)>,
    /// Of its user.
    pub read: Vec<(ConversationId, Seq)>,
}

impl Cursors {
    /// Notes a move; of several of one conversation the highest counts.
    pub fn moved(&mut self, kind: CursorKind, conversation: &ConversationId, seq: Seq, now_ms: u64) {
        let map = match kind {
            CursorKind::Delivered => &mut self.delivered,
            CursorKind::Read => &mut self.read,
        };
        match map.get_mut(conversation.as_str()) {
            Some(kept) => *kept = (*kept).max(seq),
            None => drop(map.insert(conversation.clone(), seq)),
        }
        let due_ms = if self.is_full() { now_ms } else { now_ms + limits::CURSOR_COALESCE_MS };
        self.due_ms = Some(self.due_ms.map_or(due_ms, |due| due.min(due_ms)));
    }

    /// When they must go out.
    pub fn due_ms(&self) -> Option<u64> {
        self.due_ms
    }

    /// Whether they fill a command.
    pub fn is_full(&self) -> bool {
        self.delivered.len() + self.read.len() >= limits::CURSOR_MOVES_PER_COMMAND
    }

    /// As many moves as one command may have; call it again until there are none.
    pub fn take(&mut self) -> Option<Moves> {
        let mut moves = Moves::default();
        while moves.delivered.len() + moves.read.len() < limits::CURSOR_MOVES_PER_COMMAND {
            if let Some(delivered) = self.delivered.pop_first() {
                moves.delivered.push(delivered);
            } else if let Some(read) = self.read.pop_first() {
                moves.read.push(read);
            } else {
                self.due_ms = None;
                break;
            }
        }
        (moves != Moves::default()).then_some(moves)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> Vec<ClientFrame> {
        vec![
            v1::Hello::default().into(),
            v1::Resume::default().into(),
            v1::Subscribe::default().into(),
            v1::Unsubscribe::default().into(),
            v1::Send::default().into(),
            v1::MoveCursors::default().into(),
            v1::Credit::default().into(),
            v1::Ping::default().into(),
            v1::Request::default().into(),
            v1::SendRun::default().into(),
        ]
    }

    #[test]
    fn only_hello_may_come_first_and_only_once() {
        for frame in frames().iter().skip(1) {
            assert_eq!(Server::new().frame(frame), Err(Reason::UnexpectedFrame), "{frame:?}");
        }
        let mut server = Server::new();
        assert_eq!(server.frame(&frames()[0]), Ok(()));
        assert!(!server.wants_frames(0), "nothing is read while the session is opened");
        for frame in frames() {
            assert_eq!(server.frame(&frame), Err(Reason::UnexpectedFrame), "{frame:?}");
        }
        server.opened(SessionNo(7));
        assert_eq!(server.session_no(), SessionNo(7));
        assert_eq!(server.frame(&frames()[0]), Err(Reason::UnexpectedFrame));
        for frame in frames().iter().skip(1) {
            assert_eq!(server.frame(frame), Ok(()), "{frame:?}");
        }
        assert_eq!(server.frame(&frames()[1]), Err(Reason::UnexpectedFrame), "a second resume");
        server.end();
        assert_eq!(server.frame(&frames()[7]), Err(Reason::UnexpectedFrame));
    }

    #[test]
    fn unanswered_sends_and_calls_hold_the_stream() {
        let mut server = Server::new();
        server.frame(&frames()[0]).unwrap();
        server.opened(SessionNo(1));
        let shard = ShardId(1);
        for _ in 0..limits::SESSION_SENDS_IN_FLIGHT {
            assert!(server.wants_frames(5));
            server.sends_started(shard, 1, 5);
        }
        assert!(!server.wants_frames(5));
        server.sends_answered(shard, 1, true, 5);
        assert!(server.wants_frames(5));
        (0..limits::SESSION_CALLS_IN_FLIGHT).for_each(|_| server.call_started());
        assert!(!server.wants_frames(5));
        server.call_answered();
        assert!(server.wants_frames(5));
    }

    #[test]
    fn a_shard_that_gives_no_answer_leaves_the_window_to_the_others() {
        let mut server = Server::new();
        server.frame(&frames()[0]).unwrap();
        server.opened(SessionNo(1));
        let (dead, alive) = (ShardId(1), ShardId(2));
        (0..limits::SESSION_SENDS_IN_FLIGHT).for_each(|_| server.sends_started(dead, 1, 10));
        let later = 10 + limits::STUCK_SHARD_MS;
        assert!(!server.wants_frames(later - 1) && !server.is_stuck(dead, later - 1));
        assert_eq!(server.room_at_ms(later - 1), Some(later));
        assert!(server.wants_frames(later) && server.is_stuck(dead, later) && !server.is_stuck(alive, later));
        assert_eq!(server.room_at_ms(later), None);
        (0..limits::SESSION_SENDS_IN_FLIGHT).for_each(|_| server.sends_started(alive, 1, later));
        assert!(!server.wants_frames(later));
        server.sends_answered(alive, 1, true, later + 5);
        assert!(server.wants_frames(later + 5), "what is alive goes on");
        server.sends_answered(dead, 1, false, later + 5);
        assert!(server.is_stuck(dead, later + 5), "what was given up is no sign of life");
        server.sends_answered(dead, 1, true, later + 6);
        assert!(!server.is_stuck(dead, later + 6));
        assert!(!server.wants_frames(later + 6), "and counts again");
    }

    proptest! {
        #[test]
        fn never_more_sends_are_held_than_the_bound(steps: Vec<(u8, u16, bool)>) {
            let mut server = Server::new();
            server.frame(&frames()[0]).unwrap();
            server.opened(SessionNo(1));
            let (mut now_ms, mut held) = (0, Vec::new());
            for (shard, ms, answered) in steps.into_iter().cycle().take(5_000) {
                now_ms += u64::from(ms) % 50;
                let shard = ShardId(u32::from(shard) % 8);
                if answered && let Some(at) = held.iter().position(|of| *of == shard) {
                    held.swap_remove(at);
                    server.sends_answered(shard, 1, true, now_ms);
                } else if server.wants_frames(now_ms) && !server.is_stuck(shard, now_ms) {
                    held.push(shard);
                    server.sends_started(shard, 1, now_ms);
                }
                prop_assert!(held.len() <= limits::SESSION_SENDS_HELD);
                let room_at_ms = server.room_at_ms(now_ms);
                prop_assert!(server.wants_frames(now_ms) || room_at_ms.is_some() || held.len() == limits::SESSION_SENDS_HELD);
            }
        }
    }

    #[test]
    fn everything_behind_a_refused_send_waits_for_it() {
        let mut held = HeldBack::default();
        held.refused("c", 5, Reason::RateLimited);
        assert_eq!(held.is_behind("c", 6), Some(Reason::RateLimited));
        assert_eq!((held.is_behind("c", 5), held.is_behind("c", 4), held.is_behind("d", 9)), (None, None, None));
        held.refused("c", 4, Reason::Unavailable);
        assert_eq!(held.is_behind("c", 5), Some(Reason::Unavailable));
        held.admitted("c");
        assert_eq!(held.is_behind("c", 6), None);
        for n in 0..10 * limits::SESSION_HELD_BACK {
            held.refused(&n.to_string(), 1, Reason::RateLimited);
        }
        assert!(held.first.len() <= limits::SESSION_HELD_BACK);
    }

    #[test]
    fn a_hello_needs_a_common_version_and_a_whole_nonce() {
        let hello = |min_version, max_version, nonce: &'static [u8]| v1::Hello {
            min_version,
            max_version,
            session_nonce: nonce.into(),
            ..Default::default()
        };
        assert_eq!(greet(&hello(1, 9, &[7; 16])).unwrap().version, 1);
        assert_eq!(greet(&hello(2, 9, &[7; 16])), Err(Reason::UnsupportedVersion));
        assert_eq!(greet(&hello(1, 1, &[7; 15])), Err(Reason::Malformed));
    }

    #[test]
    fn cursor_moves_coalesce_to_the_highest() {
        let id = |n: usize| ConversationId::new(format!("c{n}")).unwrap();
        let mut cursors = Cursors::default();
        assert_eq!(cursors.take(), None);
        cursors.moved(CursorKind::Delivered, &id(0), Seq(5), 1_000);
        cursors.moved(CursorKind::Delivered, &id(0), Seq(3), 1_100);
        cursors.moved(CursorKind::Read, &id(0), Seq(2), 1_200);
        assert_eq!(cursors.due_ms(), Some(1_000 + limits::CURSOR_COALESCE_MS));
        let moves = cursors.take().unwrap();
        assert_eq!(moves, Moves { delivered: vec![(id(0), Seq(5))], read: vec![(id(0), Seq(2))] });
        assert_eq!(cursors.due_ms(), None);
        for n in 0..limits::CURSOR_MOVES_PER_COMMAND + 1 {
            cursors.moved(CursorKind::Read, &id(n), Seq(1), 5_000);
        }
        assert_eq!(cursors.due_ms(), Some(5_000), "a full command waits for nothing");
        assert_eq!(cursors.take().unwrap().read.len(), limits::CURSOR_MOVES_PER_COMMAND);
        assert_eq!(cursors.take().unwrap().read.len(), 1);
        assert_eq!(cursors.take(), None);
    }

    proptest! {
        #[test]
        fn no_credit_frame_makes_more_than_the_most_credit(steps: Vec<(u64, u64)>) {
            let mut credit = Credit::default();
            for (add, spend) in steps {
                credit.add(add);
                if credit.left() > 0 {
                    credit.spend(spend % (1 << 20));
                }
                prop_assert!(credit.left() as u64 <= limits::SESSION_MAX_CREDIT_BYTES);
            }
        }
    }
}

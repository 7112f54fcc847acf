//! The gateway's half of a session: which frame may come when, how many unanswered sends and calls a connection may
//! have, how many event bytes may be out, and the coalescing of cursor moves. Must never let a device make the
//! gateway hold more than these bounds.

use std::collections::BTreeMap;

use stentor_proto::{
    Bytes,
    frame::{ClientFrame, negotiate},
    ids::{ConversationId, Seq, SessionNo},
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
    calls: usize,
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// A connection that said nothing yet.
    pub fn new() -> Self {
        Self { phase: Phase::Hello, session_no: SessionNo(0), sends: 0, calls: 0 }
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
    pub fn wants_frames(&self) -> bool {
        matches!(self.phase, Phase::Hello | Phase::Open { .. })
            && self.sends < limits::SESSION_SENDS_IN_FLIGHT
            && self.calls < limits::SESSION_CALLS_IN_FLIGHT
    }

    /// A send was taken in.
    pub fn send_started(&mut self) {
        self.sends += 1;
    }

    /// A send was answered.
    pub fn send_answered(&mut self) {
        self.sends = self.sends.saturating_sub(1);
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
        ]
    }

    #[test]
    fn only_hello_may_come_first_and_only_once() {
        for frame in frames().iter().skip(1) {
            assert_eq!(Server::new().frame(frame), Err(Reason::UnexpectedFrame), "{frame:?}");
        }
        let mut server = Server::new();
        assert_eq!(server.frame(&frames()[0]), Ok(()));
        assert!(!server.wants_frames(), "nothing is read while the session is opened");
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
        for _ in 0..limits::SESSION_SENDS_IN_FLIGHT {
            assert!(server.wants_frames());
            server.send_started();
        }
        assert!(!server.wants_frames());
        server.send_answered();
        assert!(server.wants_frames());
        (0..limits::SESSION_CALLS_IN_FLIGHT).for_each(|_| server.call_started());
        assert!(!server.wants_frames());
        server.call_answered();
        assert!(server.wants_frames());
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

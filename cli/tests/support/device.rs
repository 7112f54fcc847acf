//! A device that speaks raw frames to a real gateway, so that tests can repeat and keep back what no honest client
//! would. Must never pass over a gap: what it hands to a test is dense.

use std::{collections::BTreeMap, net::SocketAddr};

use stentor_client::ClientTls;
use stentor_engine::{delivery::run_of_items, session::client::credit_cost};
use stentor_proto::{
    Bytes,
    frame::{ClientFrame, ServerFrame},
    v1,
};
use stentor_transport::quic::{self, FrameReader, FrameWriter, QuicConnection};

use super::DEADLINE;

/// One connection.
pub(crate) struct Device {
    _connection: QuicConnection,
    writer: FrameWriter,
    reader: FrameReader,
    user: String,
    /// The last seq that came, by conversation.
    pub(crate) last: BTreeMap<String, u64>,
}

/// What a resume brought.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resumed {
    /// Where each stream stands, by conversation.
    pub(crate) states: BTreeMap<String, v1::ConversationState>,
    /// The first and the last seq that came, by conversation.
    pub(crate) came: BTreeMap<String, (u64, u64)>,
}

impl Device {
    pub(crate) async fn connect(gateway: SocketAddr, tls: &ClientTls, user: &str) -> Self {
        let connection = quic::connect(gateway, tls).await.unwrap();
        let (writer, reader) = connection.open().await.unwrap();
        Self { _connection: connection, writer, reader, user: user.into(), last: BTreeMap::new() }
    }

    pub(crate) async fn send(&mut self, frame: impl Into<ClientFrame>) {
        self.raw(frame.into().to_bytes()).await;
    }

    /// Bytes as they are.
    pub(crate) async fn raw(&mut self, bytes: Bytes) {
        self.writer.write(&mut [bytes]).await.unwrap();
    }

    /// The next frame. Events are checked to be dense, and their credit is given back.
    pub(crate) async fn next(&mut self) -> ServerFrame {
        let read = tokio::time::timeout(DEADLINE, self.reader.next()).await.expect("no frame came");
        let (kind, message) = read.unwrap().expect("the stream ended");
        let frame = ServerFrame::decode(kind, message).unwrap().unwrap();
        if let ServerFrame::Events(events) = &frame {
            let run = run_of_items(&events.items, &self.user).unwrap().unwrap();
            if let Some(last) = self.last.insert(events.conversation.clone(), run.last.0) {
                assert_eq!(run.first.0, last + 1, "a gap or a repeat in {}", events.conversation);
            }
            let bytes = events.items.iter().map(credit_cost).sum();
            // A gateway that has said its last word reads no more; what it said comes all the same.
            let _ = self.writer.write(&mut [ClientFrame::from(v1::Credit { bytes }).to_bytes()]).await;
        }
        frame
    }

    /// The answer to a hello: the session's number, or the reason of its refusal.
    pub(crate) async fn welcome(&mut self) -> Result<u64, String> {
        match self.next().await {
            ServerFrame::Welcome(welcome) => Ok(welcome.session_no),
            ServerFrame::Fatal(fatal) => Err(fatal.refusal.unwrap().reason),
            other => panic!("{other:?}"),
        }
    }

    /// What comes until everything has come.
    pub(crate) async fn resumed(&mut self) -> Resumed {
        let (mut states, mut came) = (BTreeMap::new(), BTreeMap::new());
        loop {
            match self.next().await {
                ServerFrame::ConversationState(state) => drop(states.insert(state.conversation.clone(), state)),
                ServerFrame::Events(events) => {
                    let run = run_of_items(&events.items, &self.user).unwrap().unwrap();
                    came.entry(events.conversation).or_insert((run.first.0, 0)).1 = run.last.0;
                }
                ServerFrame::UpToDate(_) => return Resumed { states, came },
                other => panic!("{other:?}"),
            }
        }
    }

    /// Moves cursors and waits until they have moved: those that were refused, or why the session ended.
    pub(crate) async fn move_cursors(
        &mut self,
        delivered: &[(&str, u64)],
        read: &[(&str, u64)],
    ) -> Result<Vec<v1::CursorRefused>, String> {
        let (delivered, read) = (cursors(delivered), cursors(read));
        self.send(v1::MoveCursors { delivered, read }).await;
        loop {
            match self.next().await {
                ServerFrame::CursorsMoved(moved) => return Ok(moved.refused),
                ServerFrame::Fatal(fatal) => return Err(fatal.refusal.unwrap().reason),
                _ => {}
            }
        }
    }

    /// Why the connection is ended.
    pub(crate) async fn fatal(&mut self) -> String {
        loop {
            if let ServerFrame::Fatal(fatal) = self.next().await {
                return fatal.refusal.unwrap().reason;
            }
        }
    }
}

pub(crate) fn hello(token: String, nonce: [u8; 16]) -> ClientFrame {
    let session_nonce = nonce.to_vec().into();
    v1::Hello { min_version: 1, max_version: 1, token, session_nonce, agent: "test".into() }.into()
}

/// A resume with a cursor vector; also of every other conversation of the user unless `only_listed`.
pub(crate) fn resume(delivered: &[(&str, u64)], only_listed: bool) -> ClientFrame {
    v1::Resume { delivered: cursors(delivered), only_listed, ..Default::default() }.into()
}

fn cursors(cursors: &[(&str, u64)]) -> Vec<v1::Cursor> {
    let cursor = |&(conversation, seq): &(&str, u64)| v1::Cursor { conversation: conversation.into(), seq };
    cursors.iter().map(cursor).collect()
}

//! A device that speaks raw frames, so that tests can say what no honest client would.

use std::net::SocketAddr;

use stentor_proto::{
    Bytes,
    frame::{ClientFrame, ServerFrame},
    ids::key_crc,
    record,
    v1::{self, item},
};
use stentor_transport::{
    quic::{self, FrameReader, FrameWriter, QuicConnection},
    tls::ClientTls,
};

use super::PATIENCE;

pub(crate) struct Device {
    pub(crate) connection: QuicConnection,
    pub(crate) writer: FrameWriter,
    pub(crate) reader: FrameReader,
    pub(crate) session_no: u64,
    /// Granted back for every event frame, unless a test says no.
    pub(crate) gives_credit: bool,
}

impl Device {
    pub(crate) async fn connect(addr: SocketAddr, tls: &ClientTls) -> Self {
        let connection = quic::connect(addr, tls).await.unwrap();
        let (writer, reader) = connection.open().await.unwrap();
        Self { connection, writer, reader, session_no: 0, gives_credit: true }
    }

    pub(crate) async fn send(&mut self, frame: impl Into<ClientFrame>) {
        self.raw(frame.into().to_bytes()).await;
    }

    pub(crate) async fn raw(&mut self, bytes: Bytes) {
        self.writer.write(&mut [bytes]).await.unwrap();
    }

    pub(crate) async fn hello(&mut self, token: String, nonce: [u8; 16]) {
        self.send(hello(token, nonce)).await;
    }

    pub(crate) async fn welcome(&mut self) -> v1::Welcome {
        match self.next().await {
            ServerFrame::Welcome(welcome) => {
                self.session_no = welcome.session_no;
                welcome
            }
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// The next frame. Credit is given for events, as a device does that hands them on at once.
    pub(crate) async fn next(&mut self) -> ServerFrame {
        let frame = tokio::time::timeout(PATIENCE, self.reader.next()).await.expect("no frame came");
        let (kind, message) = frame.unwrap().expect("the stream ended");
        let frame = ServerFrame::decode(kind, message).unwrap().unwrap();
        if let ServerFrame::Events(events) = &frame
            && self.gives_credit
        {
            let bytes = events.items.iter().map(stentor_engine::session::client::credit_cost).sum();
            self.send(v1::Credit { bytes }).await;
        }
        frame
    }

    pub(crate) async fn fatal(&mut self) -> String {
        loop {
            if let ServerFrame::Fatal(fatal) = self.next().await {
                return fatal.refusal.unwrap().reason;
            }
        }
    }

    pub(crate) async fn state(&mut self) -> v1::ConversationState {
        loop {
            if let ServerFrame::ConversationState(state) = self.next().await {
                return state;
            }
        }
    }

    /// The answer to a send: (send_no, seq or reason, repeat).
    pub(crate) async fn sent(&mut self) -> (u64, Result<u64, v1::Refusal>) {
        loop {
            match self.next().await {
                ServerFrame::Sent(sent) => return (sent.send_no, Ok(sent.seq)),
                ServerFrame::SendRefused(refused) => return (refused.send_no, Err(refused.refusal.unwrap())),
                _ => {}
            }
        }
    }

    pub(crate) async fn response(&mut self) -> v1::Response {
        loop {
            if let ServerFrame::Response(response) = self.next().await {
                return response;
            }
        }
    }

    pub(crate) async fn cursors_moved(&mut self) -> v1::CursorsMoved {
        loop {
            if let ServerFrame::CursorsMoved(moved) = self.next().await {
                return moved;
            }
        }
    }

    /// Reads events of a conversation until `last` came; every record is verified, and the seqs must be dense.
    pub(crate) async fn events(&mut self, conversation: &str, after: u64, last: u64) -> Vec<Bytes> {
        let mut next = after + 1;
        let mut bodies = Vec::new();
        while next <= last {
            let ServerFrame::Events(events) = self.next().await else { continue };
            if events.conversation != conversation {
                continue;
            }
            for item in events.items {
                match item.item.unwrap() {
                    item::Item::Record(bytes) => {
                        let key_crc = key_crc(b"app", conversation.as_bytes());
                        let event = record::decode(&bytes, key_crc).unwrap();
                        assert_eq!(event.header.seq, next, "gap or repeat in {conversation}");
                        bodies.push(event.body);
                        next += 1;
                    }
                    item::Item::Hidden(hidden) => {
                        assert_eq!(hidden.from, next, "gap or repeat in {conversation}");
                        next = hidden.to + 1;
                    }
                }
            }
        }
        assert_eq!(next, last + 1, "more than was expected");
        bodies
    }

    pub(crate) async fn subscribe(&mut self, conversation: &str, after_seq: u64) -> v1::ConversationState {
        self.send(v1::Subscribe { conversation: conversation.into(), after_seq, from_head: false }).await;
        self.state().await
    }
}

pub(crate) fn hello(token: String, nonce: [u8; 16]) -> v1::Hello {
    v1::Hello { min_version: 1, max_version: 1, token, session_nonce: nonce.to_vec().into(), agent: "test".into() }
}

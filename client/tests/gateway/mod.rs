//! A gateway of which a test writes every frame: real QUIC and TLS, no opinion of its own.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, unreachable_pub, missing_docs)]

use std::{collections::VecDeque, future::Future, net::SocketAddr, time::Duration};

use bytes::Bytes;
use stentor_client::{Builder, Client, ConversationId, Incoming};
use stentor_proto::{
    frame::{ClientFrame, ServerFrame},
    ids::key_crc,
    reason::Reason,
    record,
    v1::{self, EventHeader, EventKind, item, request::Call, response},
};
use stentor_transport::{
    pki::Pki,
    quic::{FrameReader, FrameWriter, QuicConnection, QuicLimits, QuicListener},
    tls::ServerTls,
};

/// Nothing in these tests takes long; what does has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen in time"))
}

pub struct Gateway {
    listener: QuicListener,
    dir: tempfile::TempDir,
}

impl Gateway {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        Self::of(&pki, dir)
    }

    /// Two of one authority.
    pub fn pair() -> (Self, Self) {
        let first = Self::new();
        let pki = Pki::create(first.dir.path()).unwrap();
        let second = Self::of(&pki, tempfile::tempdir().unwrap());
        (first, second)
    }

    fn of(pki: &Pki, dir: tempfile::TempDir) -> Self {
        let files = pki.issue("gateway-1", dir.path()).unwrap();
        let tls = ServerTls::quic(&files).unwrap();
        let listener = QuicListener::bind("127.0.0.1:0".parse().unwrap(), &tls, QuicLimits::default()).unwrap();
        Self { listener, dir }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    pub fn client(&self) -> Builder {
        Client::builder().gateway(self.address()).ca_file(self.dir.path().join("ca.pem")).token("token")
    }

    pub async fn accept(&self) -> Peer {
        soon("a connection", async {
            let connection = self.listener.accept().await.unwrap().connect().await.unwrap();
            let (writer, reader) = connection.accept_stream().await.unwrap();
            Peer { connection, writer, reader, run: VecDeque::new() }
        })
        .await
    }

    /// Takes the connection and the session.
    pub async fn welcome(&self) -> (Peer, v1::Resume) {
        let mut peer = self.accept().await;
        let ClientFrame::Hello(_) = peer.frame().await else { panic!("no hello") };
        peer.give(welcome()).await;
        let ClientFrame::Resume(resume) = peer.frame().await else { panic!("no resume") };
        (peer, resume)
    }

    /// A client and the gateway's end of its connection.
    pub async fn connected(&self, builder: Builder) -> (Client, Peer) {
        let (client, (peer, _)) = tokio::join!(soon("connect", builder.connect()), self.welcome());
        (client.unwrap(), peer)
    }
}

pub fn welcome() -> v1::Welcome {
    v1::Welcome {
        version: 1,
        session_no: 1,
        app: "app".into(),
        user: "ann".into(),
        device: "phone".into(),
        max_frame_bytes: 65_536,
        max_body_bytes: 60_000,
        max_in_flight: 256,
        max_run_sends: 128,
        gateway: "gateway-1".into(),
        ..Default::default()
    }
}

pub struct Peer {
    pub connection: QuicConnection,
    writer: FrameWriter,
    reader: FrameReader,
    /// What is left of a run that was taken.
    run: VecDeque<v1::Send>,
}

impl Peer {
    /// The next frame; a run as the sends that it stands for.
    pub async fn try_frame(&mut self) -> Option<ClientFrame> {
        if let Some(send) = self.run.pop_front() {
            return Some(send.into());
        }
        match self.any_frame().await? {
            ClientFrame::SendRun(v1::SendRun { conversation, send_no, done_no, items }) => {
                self.run = (send_no..)
                    .zip(items)
                    .map(|(send_no, item)| {
                        let v1::SendItem { kind, content_type, sent_at_ms, body } = item;
                        let conversation = conversation.clone();
                        let plain = v1::Send::default();
                        v1::Send { conversation, send_no, done_no, kind, content_type, sent_at_ms, body, ..plain }
                    })
                    .collect();
                self.run.pop_front().map(Into::into)
            }
            frame => Some(frame),
        }
    }

    async fn any_frame(&mut self) -> Option<ClientFrame> {
        let (kind, message) = soon("a frame", self.reader.next()).await.ok()??;
        Some(ClientFrame::decode(kind, message).unwrap().unwrap())
    }

    pub async fn frame(&mut self) -> ClientFrame {
        self.try_frame().await.expect("a frame, not the end")
    }

    /// The next frame that is not an acknowledgement.
    pub async fn speech(&mut self) -> ClientFrame {
        loop {
            match self.frame().await {
                ClientFrame::MoveCursors(_) | ClientFrame::Credit(_) | ClientFrame::Ping(_) => {}
                frame => return frame,
            }
        }
    }

    pub async fn send(&mut self) -> v1::Send {
        match self.speech().await {
            ClientFrame::Send(send) => send,
            other => panic!("{other:?}"),
        }
    }

    pub async fn give(&mut self, frame: impl Into<ServerFrame>) {
        soon("a write", self.writer.write(&mut [frame.into().to_bytes()])).await.unwrap();
    }

    /// As `give`, to a client that may have gone.
    pub async fn try_give(&mut self, frame: impl Into<ServerFrame>) {
        let _ = soon("a write", self.writer.write(&mut [frame.into().to_bytes()])).await;
    }

    pub async fn finish(&mut self) {
        self.writer.finish().await;
    }

    pub async fn refuse(&mut self, send: &v1::Send, reason: Reason, last: u64) {
        let refusal = v1::Refusal { last, ..reason.refusal() };
        let (conversation, send_no) = (send.conversation.clone(), send.send_no);
        self.give(v1::SendRefused { conversation, send_no, refusal: Some(refusal) }).await;
    }

    pub async fn accept(&mut self, send: &v1::Send, seq: u64) {
        let (conversation, send_no) = (send.conversation.clone(), send.send_no);
        self.give(v1::Sent { conversation, send_no, seq, stamp_ms: 7, repeat: false, more: 0 }).await;
    }

    /// Answers the question for the count that comes before a first send.
    pub async fn tell_count(&mut self, last: u64) {
        let ClientFrame::Request(v1::Request { id, call: Some(Call::SendState(_)) }) = self.speech().await else {
            panic!("no question for the count");
        };
        self.respond(id, response::Result::SendState(v1::SendStateResponse { last, done_no: last })).await;
    }

    pub async fn request(&mut self) -> (u64, Call) {
        match self.speech().await {
            ClientFrame::Request(v1::Request { id, call: Some(call) }) => (id, call),
            other => panic!("{other:?}"),
        }
    }

    pub async fn respond(&mut self, id: u64, result: response::Result) {
        self.give(v1::Response { id, result: Some(result) }).await;
    }

    pub async fn events(&mut self, conversation: &ConversationId, seqs: impl IntoIterator<Item = u64>) {
        self.give(events(conversation, seqs)).await;
    }

    pub fn cut(&self) {
        self.connection.close(9, "cut");
    }
}

pub fn events(conversation: &ConversationId, seqs: impl IntoIterator<Item = u64>) -> v1::Events {
    let items = seqs.into_iter().map(|seq| event(conversation, seq, format!("body {seq}").as_bytes())).collect();
    v1::Events { conversation: conversation.as_str().into(), items }
}

pub fn event(conversation: &ConversationId, seq: u64, body: &[u8]) -> v1::Item {
    let header = EventHeader {
        seq,
        kind: EventKind::Message as i32,
        sender: Bytes::from_static(b"bob"),
        device: Bytes::from_static(b"laptop"),
        send_no: 40 + seq,
        ..Default::default()
    };
    let mut out = Vec::new();
    let crc = key_crc(b"app", conversation.as_str().as_bytes());
    record::encode(&header, body, crc, crc32fast::hash(body), &mut out);
    v1::Item { item: Some(item::Item::Record(out.into())) }
}

/// The next item that is an event, a hidden stretch or an end: notes of connections passed over.
pub async fn next(client: &Client) -> Incoming {
    loop {
        match soon("an item", client.next()).await.expect("an item, not the end") {
            Incoming::Connected { .. } | Incoming::Disconnected { .. } | Incoming::State { .. } => {}
            item => return item,
        }
    }
}

pub async fn seqs(client: &Client, count: usize) -> Vec<u64> {
    let mut seqs = Vec::new();
    while seqs.len() < count {
        match next(client).await {
            Incoming::Event { event, .. } => {
                assert_eq!(event.body, format!("body {}", event.seq));
                seqs.push(event.seq.0);
            }
            Incoming::Hidden { hidden, .. } => seqs.extend(hidden.from.0..=hidden.to.0),
            other => panic!("{other:?}"),
        }
    }
    seqs
}

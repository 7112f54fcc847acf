//! The driver over loopback: many connections at once, sockets that refuse, lose and reorder, and how connections end.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use quinn_proto::{EndpointConfig, TransportConfig, VarInt};
use tokio::time::timeout;

use super::{
    Connection, Endpoint, Socket,
    faults::{Faults, Plan},
};
use crate::{
    pki::Pki,
    quic::{
        FrameReader, QuicConnection, QuicError, QuicLimits, QuicListener, WriteError, client::client_config, connect,
        server_config,
    },
    tls::{ClientTls, SERVER_NAME, ServerTls},
};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const KIND: u8 = 5;

async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(30), future).await.expect("in time")
}

fn keys(dir: &Path) -> (ServerTls, ClientTls) {
    let pki = Pki::create(dir).unwrap();
    let files = pki.issue("gateway-1", dir).unwrap();
    (ServerTls::quic(&files).unwrap(), ClientTls::public(pki.ca_path()).unwrap())
}

fn frame(len: usize, fill: u8) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u32_le(len as u32 + 1);
    frame.put_u8(KIND);
    frame.put_bytes(fill, len);
    frame.freeze()
}

fn socket() -> (Socket, SocketAddr) {
    let socket = crate::bind::udp(ANY).unwrap();
    let addr = socket.local_addr().unwrap();
    (Socket::new(socket).unwrap(), addr)
}

fn listener(faults: Faults, tls: &ServerTls, limits: QuicLimits) -> QuicListener {
    let (socket, addr) = socket();
    QuicListener::on(socket.with_faults(faults), addr, tls, limits).unwrap()
}

fn caller(faults: Faults) -> Endpoint {
    Endpoint::new(EndpointConfig::default(), None, socket().0.with_faults(faults))
}

async fn call(from: &Endpoint, to: SocketAddr, tls: &ClientTls) -> Result<QuicConnection, QuicError> {
    let connection = from.connect(client_config(tls).unwrap(), to, SERVER_NAME)?;
    connection.connected().await?;
    Ok(QuicConnection::new(connection))
}

async fn pair(listener: &QuicListener, tls: &ClientTls) -> (QuicConnection, QuicConnection) {
    let server = async { listener.accept().await.unwrap().connect().await.unwrap() };
    let (server, client) = soon(async { tokio::join!(server, connect(listener.local_addr(), tls)) }).await;
    (server, client.unwrap())
}

/// Answers every frame with its bytes, on every connection.
fn echo(listener: Arc<QuicListener>) {
    tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            tokio::spawn(async move {
                let connection = incoming.connect().await.unwrap();
                let (mut writer, mut reader) = connection.accept_stream().await.unwrap();
                while let Ok(Some((_, message))) = reader.next().await {
                    let answer = frame(message.len(), message.first().copied().unwrap_or(0));
                    writer.write(&mut [answer]).await.unwrap();
                }
                writer.finish().await;
            });
        }
    });
}

fn length(device: usize, number: usize) -> usize {
    match (device + number) % 19 {
        0 => 9_000,
        1..4 => 1_300 + number,
        few => few * number % 200,
    }
}

/// Sends frames and checks that they come back, in order and whole.
async fn exchange(connection: QuicConnection, device: usize, frames: usize) {
    let (mut writer, mut reader) = connection.open().await.unwrap();
    let fill = |number: usize| (device * 31 + number) as u8;
    let send = async {
        for number in 0..frames {
            writer.write(&mut [frame(length(device, number), fill(number))]).await.unwrap();
        }
        writer.finish().await;
    };
    let receive = async {
        for number in 0..frames {
            let (kind, message) = reader.next().await.unwrap().unwrap();
            assert_eq!((kind, message), (KIND, Bytes::from(vec![fill(number); length(device, number)])), "{number}");
        }
        assert!(reader.next().await.unwrap().is_none());
    };
    tokio::join!(send, receive);
}

async fn exchange_on_many(listener: QuicListener, from: Endpoint, tls: ClientTls, devices: usize, frames: usize) {
    let listener = Arc::new(listener);
    echo(listener.clone());
    let to = listener.local_addr();
    let tasks: Vec<_> = (0..devices)
        .map(|device| {
            let (from, tls) = (from.clone(), tls.clone());
            tokio::spawn(async move { exchange(call(&from, to, &tls).await.unwrap(), device, frames).await })
        })
        .collect();
    for task in tasks {
        soon(task).await.unwrap();
    }
    // Everything was dropped, and everything is forgotten.
    soon(from.wait_idle()).await;
    assert_eq!(from.open_connections(), 0);
    soon(listener.wait_idle()).await;
    assert_eq!(listener.connections(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_exchange_frames_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    exchange_on_many(listener, caller(Faults::default()), client_tls, 50, 150).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_network_loses_and_reorders_nothing_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let plan = Plan { block_every: 3, lose_every: 17, overtake_every: 7, lose_after: 0 };
    let listener = listener(Faults::new(plan), &server_tls, QuicLimits::default());
    let from = caller(Faults::new(Plan { block_every: 2, lose_every: 23, overtake_every: 5, lose_after: 0 }));
    exchange_on_many(listener, from, client_tls, 8, 60).await;
}

#[tokio::test]
async fn what_a_full_socket_refuses_goes_out_later_and_in_one_runtime_thread() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let (faults, shut) = Faults::shutter();
    let listener = listener(faults, &server_tls, QuicLimits::default());
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, _reader) = client.open().await.unwrap();
    writer.write(&mut [frame(1, 1)]).await.unwrap();
    let (mut back, _from) = soon(server.accept_stream()).await.unwrap();
    shut.store(true, Ordering::Release);
    // Taken over: the window is larger, so that the writer does not wait for the socket.
    let frames: Vec<Bytes> = (0..100).map(|number| frame(1_000, number)).collect();
    soon(back.write(&mut frames.clone())).await.unwrap();
    let mut reader = _reader;
    for _ in 0..50 {
        assert!(timeout(Duration::ZERO, reader.next()).await.is_err());
        tokio::task::yield_now().await;
    }
    shut.store(false, Ordering::Release);
    for number in 0..100 {
        assert_eq!(soon(reader.next()).await.unwrap().unwrap().1, vec![number; 1_000]);
    }
}

#[tokio::test]
async fn silence_ends_a_connection_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let from = caller(Faults::default());
    let mut transport = TransportConfig::default();
    transport.max_idle_timeout(Some(VarInt::from_u32(300).into())).max_concurrent_bidi_streams(VarInt::from_u32(0));
    let mut config = client_config(&client_tls).unwrap();
    config.transport_config(Arc::new(transport));
    let client = from.connect(config, listener.local_addr(), SERVER_NAME).unwrap();
    let server = async { listener.accept().await.unwrap().connect().await.unwrap() };
    let (server, connected) = soon(async { tokio::join!(server, client.connected()) }).await;
    connected.unwrap();
    let (there, here) = soon(async { tokio::join!(server.closed(), client.closed()) }).await;
    assert!(matches!(there, QuicError::TimedOut), "{there:?}");
    assert!(matches!(QuicError::from(here), QuicError::TimedOut));
    assert!(matches!(server.open().await, Err(QuicError::TimedOut)));
    soon(listener.wait_idle()).await;
}

#[tokio::test]
async fn a_connection_without_owners_closes_and_one_half_is_an_owner() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, reader) = client.open().await.unwrap();
    drop((client.clone(), client, reader));
    writer.write(&mut [frame(3, 7)]).await.unwrap();
    let (mut back, mut from) = soon(server.accept_stream()).await.unwrap();
    assert_eq!(soon(from.next()).await.unwrap().unwrap().1.len(), 3);
    // Nobody reads there any more, which its writer is told in time.
    let stopped = async {
        loop {
            if let Err(error) = back.write(&mut [frame(1_000, 1)]).await {
                break error;
            }
            tokio::task::yield_now().await;
        }
    };
    assert!(matches!(soon(stopped).await, WriteError::Stopped(0)));
    drop(writer);
    let end = soon(server.closed()).await;
    assert!(matches!(&end, QuicError::ClosedByPeer { code: 0, reason } if reason.is_empty()), "{end:?}");
    assert!(from.next().await.is_ok_and(|frame| frame.is_none()) || from.next().await.is_err());
    soon(listener.wait_idle()).await;
}

#[tokio::test]
async fn a_listener_that_closes_tells_everybody_why() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, mut reader) = client.open().await.unwrap();
    writer.write(&mut [frame(3, 7)]).await.unwrap();
    let close = async {
        tokio::task::yield_now().await;
        listener.close("maintenance");
    };
    let (accepted, read, closed, ()) =
        soon(async { tokio::join!(listener.accept(), reader.next(), client.closed(), close) }).await;
    assert!(accepted.is_none() && read.is_err());
    assert!(matches!(&closed, QuicError::ClosedByPeer { code: 0, reason } if reason == "maintenance"), "{closed:?}");
    assert!(matches!(soon(server.closed()).await, QuicError::Closed));
    assert!(matches!(soon(connect(listener.local_addr(), &client_tls)).await, Err(QuicError::Refused)));
    soon(listener.wait_idle()).await;
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let limits = QuicLimits { handshake_timeout: Duration::from_millis(100), ..QuicLimits::default() };
    let listener = QuicListener::bind(ANY, &server_tls, limits).unwrap();
    let from = caller(Faults::new(Plan { lose_after: 1, ..Plan::default() }));
    let client = from.connect(client_config(&client_tls).unwrap(), listener.local_addr(), SERVER_NAME).unwrap();
    let result = soon(async { listener.accept().await.unwrap().connect().await }).await;
    assert!(matches!(result, Err(QuicError::TimedOut)), "{result:?}");
    drop(client);
    soon(listener.wait_idle()).await;
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn a_caller_who_is_not_answered_is_forgotten_and_one_who_is_refused_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let from = caller(Faults::default());
    let answer = async {
        drop(listener.accept().await.unwrap());
        // He tries again and is heard again.
        let incoming = listener.accept().await.unwrap();
        assert_eq!(incoming.remote_address().ip(), Ipv4Addr::LOCALHOST);
        incoming.refuse();
    };
    let ((), called) = soon(async { tokio::join!(answer, call(&from, listener.local_addr(), &client_tls)) }).await;
    assert!(matches!(called, Err(QuicError::Refused)), "{called:?}");
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn a_caller_can_be_accepted_after_his_listener_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let to = listener.local_addr();
    let answer = async {
        let incoming = listener.accept().await.unwrap();
        drop(listener);
        tokio::task::yield_now().await;
        incoming.connect().await.unwrap()
    };
    let (server, client) = soon(async { tokio::join!(answer, connect(to, &client_tls)) }).await;
    let client = client.unwrap();
    // Nobody listens for further ones.
    assert!(matches!(soon(connect(to, &client_tls)).await, Err(QuicError::Refused)));
    drop(server);
    assert!(matches!(soon(client.closed()).await, QuicError::ClosedByPeer { code: 0, .. }));
}

#[tokio::test]
async fn a_stream_too_many_waits_for_the_end_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let limits = QuicLimits { bidi_streams: 2, ..QuicLimits::default() };
    let listener = QuicListener::bind(ANY, &server_tls, limits).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let mut streams = Vec::new();
    for number in 0..2 {
        let (mut writer, reader) = client.open().await.unwrap();
        writer.write(&mut [frame(1, number)]).await.unwrap();
        streams.push((writer, reader));
    }
    assert!(timeout(Duration::ZERO, client.open()).await.is_err());
    // Both are read by one task, so that there are two waiters of one kind.
    let mut halves = Vec::new();
    for number in 0..2 {
        let (writer, mut reader) = soon(server.accept_stream()).await.unwrap();
        assert_eq!(soon(reader.next()).await.unwrap().unwrap().1[..], [number]);
        halves.push((writer, reader));
    }
    let [(_, first), (_, second)] = &mut halves[..] else { panic!("two") };
    let both = async { tokio::join!(first.next(), second.next()) };
    let write = async {
        for (writer, _) in streams.iter_mut().rev() {
            writer.write(&mut [frame(2, 2)]).await.unwrap();
        }
    };
    let ((one, two), ()) = soon(async { tokio::join!(both, write) }).await;
    assert_eq!((one.unwrap().unwrap().1.len(), two.unwrap().unwrap().1.len()), (2, 2));
    let (opened, ()) = soon(async { tokio::join!(client.open(), async { drop((streams, halves)) }) }).await;
    opened.unwrap();
}

#[tokio::test]
async fn reading_goes_on_after_the_other_side_finished_and_left() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, _reader) = client.open().await.unwrap();
    let accept = async {
        let (_writer, mut reader) = server.accept_stream().await.unwrap();
        drain(&mut reader).await
    };
    let send = async {
        writer.write(&mut (0..40).map(|_| frame(700, 3)).collect::<Vec<_>>()).await.unwrap();
        writer.finish().await;
        client.close(9, "bye");
    };
    let (count, ()) = soon(async { tokio::join!(accept, send) }).await;
    assert_eq!(count, 40);
    assert!(matches!(soon(server.closed()).await, QuicError::ClosedByPeer { code: 9, .. }));
}

/// Waits until the protocol has nothing more to do by itself than to notice a long silence.
async fn quiet(connection: &Connection) {
    let far = |deadline: Option<Instant>| deadline.is_none_or(|at| at > Instant::now() + Duration::from_secs(5));
    while !connection.0.look(|state| far(state.proto.poll_timeout())) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_a_busy_connection_writes_goes_out_although_its_reader_never_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let (config, server) = server_config(&server_tls, &QuicLimits::default()).unwrap();
    let (socket, addr) = socket();
    let listener = Endpoint::new(config, Some(server), socket);
    let from = caller(Faults::default());
    let client = from.connect(client_config(&client_tls).unwrap(), addr, SERVER_NAME).unwrap();
    let server = soon(listener.accept()).await.unwrap().accept().unwrap();
    soon(async { tokio::join!(server.connected(), client.connected()) }).await.0.unwrap();
    let (mut writer, mut reader) = soon(client.open()).await.unwrap();
    soon(writer.write(&mut [Bytes::from_static(b"ask")])).await.unwrap();
    let (mut back, ask) = soon(server.accept()).await.unwrap();
    soon(async { tokio::join!(quiet(&server), quiet(&client)) }).await;
    ask.set_busy(true);
    back.write(&mut [Bytes::from_static(b"answer")]).await.unwrap();
    let mut chunks = [Bytes::new()];
    let read = timeout(Duration::from_secs(4), reader.read(&mut chunks)).await.expect("before a keep-alive");
    assert_eq!((read.unwrap(), &chunks[0][..]), (Some(1), &b"answer"[..]));
    // Whose reader is gone is not busy.
    drop(ask);
    soon(async { tokio::join!(quiet(&server), quiet(&client)) }).await;
    back.write(&mut [Bytes::from_static(b"more")]).await.unwrap();
    assert!(!server.0.look(|state| state.late));
    assert!(soon(reader.read(&mut chunks)).await.is_ok());
}

#[tokio::test]
async fn one_who_reads_nothing_delays_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (slow_server, slow) = pair(&listener, &client_tls).await;
    let (mut writer, _unread) = slow.open().await.unwrap();
    writer.write(&mut [frame(1, 1)]).await.unwrap();
    let (mut flood, _from) = soon(slow_server.accept_stream()).await.unwrap();
    // More than all windows: it never ends.
    let flooding = tokio::spawn(async move { while flood.write(&mut [frame(60_000, 9)]).await.is_ok() {} });
    let (server, client) = pair(&listener, &client_tls).await;
    let answer = async {
        let (mut back, mut from) = server.accept_stream().await.unwrap();
        while let Ok(Some((_, message))) = from.next().await {
            back.write(&mut [frame(message.len(), 1)]).await.unwrap();
        }
    };
    let ask = async {
        let (mut writer, mut reader) = client.open().await.unwrap();
        for length in 0..100 {
            writer.write(&mut [frame(length, 1)]).await.unwrap();
            assert_eq!(reader.next().await.unwrap().unwrap().1.len(), length);
        }
        writer.finish().await;
    };
    soon(async { tokio::join!(answer, ask) }).await;
    assert!(!flooding.is_finished());
    slow.close(3, "enough");
    soon(flooding).await.unwrap();
}

async fn drain(reader: &mut FrameReader) -> usize {
    let mut count = 0;
    while let Ok(Some(_)) = reader.next().await {
        count += 1;
    }
    count
}

#[tokio::test]
async fn bytes_that_are_no_quic_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let stranger = std::net::UdpSocket::bind(ANY).unwrap();
    for seed in 0..2_000u32 {
        let length = (seed * 7 % 1_400) as usize;
        let bytes: Vec<u8> = (0..length).map(|at| (seed.wrapping_mul(2_654_435_761) >> (at % 24)) as u8).collect();
        stranger.send_to(&bytes, listener.local_addr()).unwrap();
    }
    let (mut writer, _reader) = client.open().await.unwrap();
    writer.write(&mut [frame(1, 1)]).await.unwrap();
    let (_writer, mut reader) = soon(server.accept_stream()).await.unwrap();
    assert_eq!(soon(reader.next()).await.unwrap().unwrap().1.len(), 1);
}

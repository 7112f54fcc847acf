//! Both ends of a QUIC connection over loopback.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use stentor_proto::frame::BadFrame;
use tokio::{net::UdpSocket, sync::Notify, time::timeout};

use super::*;
use crate::{
    pki::Pki,
    tls::{ClientTls, ServerTls},
};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const KIND: u8 = 5;

/// No step of a test takes this long on a healthy machine.
async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(20), future).await.expect("in time")
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

async fn pair(listener: &QuicListener, tls: &ClientTls) -> (QuicConnection, QuicConnection) {
    let server = async { listener.accept().await.unwrap().connect().await.unwrap() };
    let (server, client) = soon(async { tokio::join!(server, connect(listener.local_addr(), tls)) }).await;
    (server, client.unwrap())
}

#[tokio::test]
async fn frames_come_back_as_they_were_sent_and_the_end_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    assert_eq!(client.remote_address(), listener.local_addr());

    let echo = tokio::spawn(async move {
        let (mut writer, mut reader) = server.accept_stream().await.unwrap();
        while let Some((kind, message)) = reader.next().await.unwrap() {
            let mut frame = BytesMut::new();
            frame.put_u32_le(message.len() as u32 + 1);
            frame.put_u8(kind);
            frame.put_slice(&message);
            writer.write(&mut [frame.freeze()]).await.unwrap();
        }
        // The client has finished its half; ours still writes.
        writer.write(&mut [frame(3, 0xee)]).await.unwrap();
        writer.finish().await;
        server.close(7, "done");
    });

    let (mut writer, mut reader) = client.open().await.unwrap();
    let lengths = [0, 1, 100, 2_000, 60_000, 3, 65_535, 0, 9_000];
    let send = async {
        let mut frames: Vec<Bytes> = lengths.iter().enumerate().map(|(i, &n)| frame(n, i as u8)).collect();
        writer.write(&mut frames).await.unwrap();
        assert!(frames.iter().all(Bytes::is_empty));
        writer.finish().await;
    };
    let receive = async {
        for (i, &len) in lengths.iter().enumerate() {
            let (kind, message) = reader.next().await.unwrap().unwrap();
            assert_eq!((kind, message), (KIND, Bytes::from(vec![i as u8; len])));
        }
        assert_eq!(reader.next().await.unwrap().unwrap().1, [0xee; 3][..]);
        assert!(reader.next().await.unwrap().is_none());
    };
    soon(async { tokio::join!(send, receive) }).await;
    let end = soon(client.closed()).await;
    assert!(matches!(&end, QuicError::ClosedByPeer { code: 7, reason } if reason == "done"), "{end:?}");
    soon(echo).await.unwrap();
}

#[tokio::test]
async fn an_oversized_frame_is_refused_before_its_bytes_come() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, _reader) = client.open().await.unwrap();
    // Only the beginning of it: the rest never has to come.
    writer.write(&mut [frame(10, 1), frame(5_000, 2).slice(..100)]).await.unwrap();
    let (_writer, mut reader) = soon(server.accept_stream()).await.unwrap();
    reader.set_max_frame_bytes(1_000);
    assert_eq!(soon(reader.next()).await.unwrap().unwrap().1.len(), 10);
    for _ in 0..2 {
        let error = soon(reader.next()).await.unwrap_err();
        assert!(matches!(error, ReadError::BadFrame(BadFrame::TooLarge { bytes: 5_001, limit: 1_000 })), "{error:?}");
    }
}

#[tokio::test]
async fn a_resume_has_a_limit_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, _reader) = client.open().await.unwrap();
    let mut resume = BytesMut::from(&frame(200_000, 1)[..]);
    resume[4] = 2;
    let resume = resume.freeze();
    let (_writer, mut reader) = soon(async {
        // More than the stream's window: it is written while it is read.
        let mut frames = [resume.clone()];
        let send = writer.write(&mut frames);
        let receive = async {
            let (writer, mut reader) = server.accept_stream().await.unwrap();
            let (kind, message) = reader.next().await.unwrap().unwrap();
            assert_eq!((kind, message.len()), (2, 200_000));
            (writer, reader)
        };
        let (sent, received) = tokio::join!(send, receive);
        sent.unwrap();
        received
    })
    .await;
    reader.set_max_resume_bytes(1_000);
    writer.write(&mut [resume.slice(..100)]).await.unwrap();
    let error = soon(reader.next()).await.unwrap_err();
    assert!(matches!(error, ReadError::BadFrame(BadFrame::TooLarge { limit: 1_000, .. })), "{error:?}");
}

#[tokio::test]
async fn a_stream_that_ends_within_a_frame_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, mut reader) = client.open().await.unwrap();
    writer.write(&mut [frame(10, 1).slice(..7)]).await.unwrap();
    let (mut back, mut received) = soon(server.accept_stream()).await.unwrap();
    soon(async { tokio::join!(writer.finish(), async { assert_cut_short(&mut received).await }) }).await;
    // The other direction is still whole.
    back.write(&mut [frame(4, 9)]).await.unwrap();
    assert_eq!(soon(reader.next()).await.unwrap().unwrap().1.len(), 4);
    assert!(matches!(writer.write(&mut [frame(1, 1)]).await, Err(WriteError::Finished)));
}

async fn assert_cut_short(reader: &mut FrameReader) {
    assert!(matches!(reader.next().await, Err(ReadError::CutShort)));
}

#[tokio::test]
async fn cancelled_reads_and_writes_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (server, client) = pair(&listener, &client_tls).await;
    let (mut writer, _reader) = client.open().await.unwrap();
    const FRAMES: usize = 300;
    let send = async {
        for i in 0..FRAMES {
            // Windows of 16 KiB fill at once, so most of these are dropped in the middle.
            let _ = timeout(Duration::ZERO, writer.write(&mut [frame(3_000, i as u8), frame(1, i as u8)])).await;
        }
        writer.write(&mut []).await.unwrap();
        writer.finish().await;
    };
    let receive = async {
        let (_writer, mut reader) = server.accept_stream().await.unwrap();
        let mut seen = Vec::new();
        loop {
            match timeout(Duration::ZERO, reader.next()).await {
                Err(_) => tokio::task::yield_now().await,
                Ok(Ok(Some((_, message)))) => seen.push((message.len(), message[0])),
                Ok(Ok(None)) => break seen,
                Ok(Err(error)) => panic!("{error}"),
            }
        }
    };
    let ((), seen) = soon(async { tokio::join!(send, receive) }).await;
    let expected: Vec<_> = (0..FRAMES).flat_map(|i| [(3_000, i as u8), (1, i as u8)]).collect();
    assert_eq!(seen, expected);
}

/// Carries packets between one device and `to`, as a router does that gives the device another port when `renew` says so.
async fn router(front: UdpSocket, to: SocketAddr, renew: Arc<Notify>) {
    let mut back = UdpSocket::bind(ANY).await.unwrap();
    let (mut device, mut out, mut home) = (None, [0; 2_048], [0; 2_048]);
    loop {
        tokio::select! {
            biased;
            () = renew.notified() => back = UdpSocket::bind(ANY).await.unwrap(),
            got = front.recv_from(&mut out) => {
                let (len, from) = got.unwrap();
                device = Some(from);
                back.send_to(&out[..len], to).await.unwrap();
            }
            got = back.recv_from(&mut home) => {
                let (len, _) = got.unwrap();
                front.send_to(&home[..len], device.unwrap()).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_device_keeps_its_connection_when_its_address_changes() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let (front, renew) = (UdpSocket::bind(ANY).await.unwrap(), Arc::new(Notify::new()));
    let at = front.local_addr().unwrap();
    tokio::spawn(router(front, listener.local_addr(), renew.clone()));
    let server = async { listener.accept().await.unwrap().connect().await.unwrap() };
    let (server, client) = soon(async { tokio::join!(server, connect(at, &client_tls)) }).await;
    let client = client.unwrap();
    let (mut writer, mut reader) = client.open().await.unwrap();
    writer.write(&mut [frame(1, 0)]).await.unwrap();
    let (mut answers, mut questions) = soon(server.accept_stream()).await.unwrap();
    let mut addresses = vec![server.remote_address()];
    for round in 0..3 {
        // More than a packet each way, so that the new path has to carry both directions.
        assert!(soon(questions.next()).await.unwrap().is_some());
        answers.write(&mut [frame(9_000, round)]).await.unwrap();
        assert_eq!(soon(reader.next()).await.unwrap().unwrap().1, vec![round; 9_000]);
        renew.notify_one();
        writer.write(&mut [frame(9_000, round)]).await.unwrap();
        soon(async {
            while addresses.last() == Some(&server.remote_address()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        addresses.push(server.remote_address());
    }
    drop(answers);
    assert!(soon(questions.next()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ((server_tls, _), (_, stranger)) = (keys(dir.path()), keys(other.path()));
    let listener = QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap();
    let server = async { listener.accept().await.unwrap().connect().await };
    let (server, client) = soon(async { tokio::join!(server, connect(listener.local_addr(), &stranger)) }).await;
    assert!(matches!(client, Err(QuicError::Tls(_))), "{client:?}");
    assert!(matches!(server, Err(QuicError::Tls(_))), "{server:?}");
}

#[tokio::test]
async fn one_connection_too_many_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let limits = QuicLimits { max_connections: 1, ..QuicLimits::default() };
    let listener = QuicListener::bind(ANY, &server_tls, limits).unwrap();
    let (_server, _client) = pair(&listener, &client_tls).await;
    let accept = async { listener.accept().await };
    let refused = tokio::select! {
        _ = accept => panic!("accepted"),
        refused = soon(connect(listener.local_addr(), &client_tls)) => refused,
    };
    assert!(matches!(refused, Err(QuicError::Refused)), "{refused:?}");
}

#[tokio::test]
async fn callers_prove_their_address_when_many_knock() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let limits = QuicLimits { max_unproven_handshakes: 0, ..QuicLimits::default() };
    let listener = QuicListener::bind(ANY, &server_tls, limits).unwrap();
    let (_server, _client) = pair(&listener, &client_tls).await;
}

#[tokio::test]
async fn ipv4_devices_reach_a_dual_stack_socket_under_their_own_address() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
    let listener = QuicListener::bind(any, &server_tls, QuicLimits::default()).unwrap();
    let addr = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listener.local_addr().port());
    let server = async { listener.accept().await.unwrap().connect().await.unwrap() };
    let (server, client) = soon(async { tokio::join!(server, connect(addr, &client_tls)) }).await;
    client.unwrap();
    assert_eq!(server.remote_address().ip(), Ipv4Addr::LOCALHOST);
}

#[tokio::test]
async fn a_gateway_that_nobody_runs_is_an_error_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (_, client_tls) = keys(dir.path());
    let nobody = std::net::UdpSocket::bind(ANY).unwrap();
    let error = soon(connect(nobody.local_addr().unwrap(), &client_tls)).await.unwrap_err();
    assert!(matches!(error, QuicError::TimedOut), "{error:?}");
}

#[test]
fn a_restarted_gateway_disowns_its_old_connections_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (server_tls, client_tls) = keys(dir.path());
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (devices, first) = (runtime(), runtime());
    let gateway = first.block_on(async { QuicListener::bind(ANY, &server_tls, QuicLimits::default()).unwrap() });
    let addr = gateway.local_addr();
    let accepted = first.spawn(async move {
        let connection = gateway.accept().await.unwrap().connect().await.unwrap();
        (gateway, connection)
    });
    let connection = devices.block_on(soon(connect(addr, &client_tls))).unwrap();
    let (mut writer, _reader) = devices.block_on(connection.open()).unwrap();
    let killed = first.block_on(soon(accepted)).unwrap();
    // As a kill would: what drives the socket goes first, so that nothing can say goodbye.
    first.shutdown_timeout(Duration::from_secs(10));
    drop(killed);
    let second = runtime();
    let _restarted = second.block_on(async { QuicListener::bind(addr, &server_tls, QuicLimits::default()).unwrap() });
    let end = devices.block_on(async move {
        writer.write(&mut [frame(100, 1)]).await.unwrap();
        soon(connection.closed()).await
    });
    assert!(matches!(end, QuicError::Reset), "{end:?}");
}

//! The simulated network against what its module promises, each in paused time.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, RngSeed},
    time::{Instant, timeout},
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::*;
use crate::{
    grpc::{self, Routes},
    pki::Pki,
    quic::{QuicError, QuicLimits},
    tls::{ClientTls, ServerTls, TlsFiles},
};

const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
const AT_B: SocketAddr = SocketAddr::new(B, 7);
const LONG: Duration = Duration::from_secs(300);

fn simulate<T>(seed: u64, run: impl AsyncFnOnce(Network) -> T) -> (T, u64) {
    let builder = &mut Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).rng_seed(RngSeed::from_bytes(&seed.to_le_bytes()));
    runtime.build().unwrap().block_on(async {
        let network = Network::new(seed, 1_800_000_000_000, Trace::new(false));
        let task = tokio::spawn(network.clone().run());
        let result = run(network.clone()).await;
        task.abort();
        (result, network.trace().hash())
    })
}

/// A stream between two fresh hosts, the caller's end first.
async fn pair(network: &Network) -> (Stream, Stream) {
    let (a, b) = (inner(&network.boot(A)), inner(&network.boot(B)));
    let listener = b.listen(AT_B).unwrap();
    let (dialled, accepted) = tokio::join!(connect_stream(&a, AT_B), listener.accept());
    (dialled.unwrap(), accepted.unwrap())
}

fn inner(host: &crate::Host) -> Arc<Host> {
    host.memory().unwrap()
}

#[test]
fn bytes_arrive_in_order_and_take_time() {
    let (took, _) = simulate(1, async |network| {
        let (mut one, mut other) = pair(&network).await;
        let began = Instant::now();
        for n in 0..100u8 {
            one.write_all(&[n; 10]).await.unwrap();
        }
        one.shutdown().await.unwrap();
        let mut got = Vec::new();
        other.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, (0..100u8).flat_map(|n| [n; 10]).collect::<Vec<_>>());
        began.elapsed()
    });
    assert!(took > Duration::ZERO);
}

#[test]
fn a_writer_waits_for_its_reader() {
    simulate(2, async |network| {
        let (mut one, mut other) = pair(&network).await;
        let much = vec![7; 10 * 1024 * 1024];
        assert!(timeout(LONG, one.write_all(&much)).await.is_err(), "nobody reads");
        let writer = tokio::spawn(async move { one.write_all(&[8; 1024 * 1024]).await.map(|()| one) });
        let mut got = vec![0; 1024 * 1024];
        timeout(LONG, other.read_exact(&mut got)).await.unwrap().unwrap();
        timeout(LONG, writer).await.unwrap().unwrap().unwrap();
    });
}

#[test]
fn a_cut_link_holds_what_is_sent_and_the_other_way_stays_open() {
    simulate(3, async |network| {
        let (mut one, mut other) = pair(&network).await;
        network.cut(A, B);
        one.write_all(b"late").await.unwrap();
        other.write_all(b"back").await.unwrap();
        let mut four = [0; 4];
        timeout(LONG, one.read_exact(&mut four)).await.unwrap().unwrap();
        assert_eq!(&four, b"back");
        assert!(timeout(LONG, other.read_exact(&mut four)).await.is_err());
        one.write_all(b"r").await.unwrap();
        network.heal_all();
        let mut five = [0; 5];
        timeout(LONG, other.read_exact(&mut five)).await.unwrap().unwrap();
        assert_eq!(&five, b"later");
    });
}

#[test]
fn who_loses_power_says_nothing_until_its_successor_is_asked() {
    simulate(4, async |network| {
        let (mut one, mut other) = pair(&network).await;
        network.kill(B, Death::Power);
        assert!(other.write_all(b"ghost").await.is_err(), "a dead host's handles are good for nothing");
        one.write_all(b"anybody?").await.unwrap();
        let mut byte = [0];
        assert!(timeout(LONG, one.read(&mut byte)).await.is_err(), "silence");
        network.boot(B);
        let error = timeout(LONG, one.read(&mut byte)).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_killed_process_is_noticed_at_once_and_nobody_listens_there() {
    simulate(5, async |network| {
        let (mut one, _other) = pair(&network).await;
        network.kill(B, Death::Process);
        let error = timeout(LONG, one.read(&mut [0])).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        network.boot(B);
        let again = inner(&network.boot(A));
        let refused = timeout(LONG, connect_stream(&again, AT_B)).await.unwrap().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    });
}

fn keys(dir: &Path) -> (TlsFiles, ServerTls, ClientTls) {
    let pki = Pki::create(dir).unwrap();
    let files = pki.issue("gateway-1", dir).unwrap();
    let (server, client) = (ServerTls::quic(&files).unwrap(), ClientTls::public(pki.ca_path()).unwrap());
    (files, server, client)
}

fn frame(len: usize) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u32_le(len as u32 + 1);
    frame.put_u8(5);
    frame.put_bytes(9, len);
    frame.freeze()
}

#[test]
fn devices_have_frames_back_pressure_and_an_end_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (_, server, client) = keys(dir.path());
    simulate(6, async |network| {
        let (a, b) = (network.boot(A), network.boot(B));
        let listener = b.listen_quic(AT_B, &server, QuicLimits::default()).unwrap();
        let (device, incoming) = tokio::join!(a.connect_quic(AT_B, &client), async {
            listener.accept().await.unwrap().connect().await.unwrap()
        });
        let device = device.unwrap();
        let (mut to_gateway, mut from_gateway) = device.open().await.unwrap();
        to_gateway.write(&mut [frame(10)]).await.unwrap();
        let (mut to_device, mut from_device) = incoming.accept_stream().await.unwrap();
        assert_eq!(from_device.next().await.unwrap().unwrap().1.len(), 10);
        let mut many: Vec<_> = (0..40).map(|_| frame(60_000)).collect();
        assert!(timeout(LONG, to_device.write(&mut many)).await.is_err(), "a device that does not read");
        // The rest goes on where it stopped.
        let writer = tokio::spawn(async move { to_device.write(&mut []).await });
        for _ in 0..40 {
            let got = timeout(LONG, from_gateway.next()).await.unwrap();
            assert_eq!(got.unwrap().unwrap().1.len(), 60_000);
        }
        timeout(LONG, writer).await.unwrap().unwrap().unwrap();
        incoming.close(7, "enough");
        let ended = timeout(LONG, device.closed()).await.unwrap();
        assert!(matches!(ended, QuicError::ClosedByPeer { code: 7, reason } if reason == "enough"));
    });
}

#[test]
fn an_idle_connection_lives_and_a_cut_one_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let (_, server, client) = keys(dir.path());
    simulate(7, async |network| {
        let (a, b) = (network.boot(A), network.boot(B));
        let listener = b.listen_quic(AT_B, &server, QuicLimits::default()).unwrap();
        let (device, gateway) = tokio::join!(a.connect_quic(AT_B, &client), async {
            listener.accept().await.unwrap().connect().await.unwrap()
        });
        let device = device.unwrap();
        assert!(timeout(LONG, device.closed()).await.is_err(), "kept alive");
        network.cut(A, B);
        let began = Instant::now();
        assert!(matches!(timeout(LONG, gateway.closed()).await.unwrap(), QuicError::TimedOut));
        assert!(began.elapsed() <= Duration::from_secs(60));
    });
}

/// Calls over HTTP/2, with a restart of the server in between.
async fn calls(network: Network, files: &TlsFiles) -> Vec<Code> {
    let (tls, to) = (ServerTls::peer(files).unwrap(), ClientTls::peer(files).unwrap());
    let channel = network.boot(A).channel(AT_B, &to).unwrap();
    let mut codes = Vec::new();
    for _ in 0..3 {
        let b = network.boot(B);
        let (_, health) = tonic_health::server::health_reporter();
        let serving = grpc::serve(b.listen(AT_B).unwrap(), &tls, Routes::new(health), std::future::pending());
        let server = tokio::spawn(serving);
        for _ in 0..20 {
            let mut client = HealthClient::new(channel.clone());
            let call = timeout(LONG, client.check(HealthCheckRequest::default())).await.unwrap();
            codes.push(call.map_or_else(|status| status.code(), |_| Code::Ok));
        }
        network.kill(B, Death::Power);
        server.abort();
    }
    codes
}

#[test]
fn grpc_runs_over_it_and_a_run_repeats_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (files, ..) = keys(dir.path());
    let run = |seed| simulate(seed, async |network| calls(network, &files).await);
    let (codes, hash) = run(8);
    assert!(codes.iter().filter(|code| **code == Code::Ok).count() >= 55, "{codes:?}");
    assert_eq!(run(8), (codes, hash));
    assert_ne!(run(9).1, hash);
}

#[test]
fn wall_clocks_can_be_wrong_and_random_streams_are_a_hosts_own() {
    let draws = |others: bool| {
        simulate(10, async |network| {
            let (a, b) = (network.boot(A), network.boot(B));
            network.set_wall_skew(B, -600_000);
            assert_eq!(a.wall_ms() - b.wall_ms(), 600_000);
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(a.wall_ms(), 1_800_000_005_000);
            if others {
                b.random::<u64>();
            }
            a.random::<u64>()
        })
        .0
    };
    assert_eq!(draws(false), draws(true));
}

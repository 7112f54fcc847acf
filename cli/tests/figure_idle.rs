//! What idle costs: memory of a gateway per connection and per (device, conversation) beside a bare QUIC server, and
//! the CPU of nodes when nobody talks. Measures and prints; run it alone, from a release build (docs/performance.md).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use stentor_client::{ClientTls, ConversationId, Create, UserId};
use stentor_proto::{frame::ServerFrame, v1};
use support::{
    DEADLINE,
    device::{Device, hello, resume},
    processes::{Memory, Processes, cpu},
};

/// Devices, each of a user of its own.
const DEVICES: usize = 1_000;
/// Devices of one conversation.
const TOGETHER: usize = 10;
/// Conversations of one device, one run each; the differences are what a (device, conversation) costs.
const RUNS: [usize; 3] = [5, 50, 100];
/// All of them.
const MANY: usize = RUNS[RUNS.len() - 1];
/// Frames that a device and its server exchange before they are idle, one by one: tokio's queues, as quinn uses them,
/// keep more for a connection on which more than 32 packets came, and that is nobody's conversation.
fn talk_frames() -> u64 {
    std::env::var("STENTOR_FIGURE_PINGS").map_or(64, |count| count.parse().unwrap())
}
/// Connections that are made at the same time.
fn connecting() -> usize {
    std::env::var("STENTOR_FIGURE_CONNECTING").map_or(16, |count| count.parse().unwrap())
}

/// In each round every device is in one conversation, each time with others.
fn participants(round: usize, group: usize) -> impl Iterator<Item = usize> {
    // 2 × round + 1 runs over numbers of which some share a factor with 1,000; 7^round does not.
    let factor = (0..round).fold(1, |f, _| f * 7 % DEVICES);
    (0..TOGETHER).map(move |place| (group * TOGETHER + place) * factor % DEVICES)
}

fn talk(round: usize, group: usize) -> String {
    // As long as an id that the server gives.
    format!("talk-{round:013}-{group:013}")
}

fn user(n: usize) -> String {
    format!("user-{n:04}")
}

/// The conversations of each device, all rounds of them in order.
async fn create(cluster: &Processes) -> Vec<Vec<String>> {
    let ann = cluster.client("ann", "phone").connect().await.unwrap();
    let groups = DEVICES / TOGETHER;
    let all = (0..MANY).flat_map(|round| (0..groups).map(move |group| (round, group)));
    let creations = stream::iter(all.clone()).map(|(round, group)| {
        let users: Vec<_> = participants(round, group).map(|n| UserId::new(user(n)).unwrap()).collect();
        ann.create_conversation(Create::group(users).id(ConversationId::new(talk(round, group)).unwrap()))
    });
    creations.buffer_unordered(8).for_each(async |created| drop(created.unwrap())).await;
    ann.close().await;
    let mut of = vec![Vec::new(); DEVICES];
    for (round, group) in all {
        participants(round, group).for_each(|n| of[n].push(talk(round, group)));
    }
    assert!(of.iter().all(|own| own.len() == MANY), "a round missed a device");
    of
}

/// A device that has resumed its conversations and has nothing more to come.
async fn idle(cluster: &Processes, n: usize, own: &[String]) -> Device {
    let user = user(n);
    let mut device = Device::connect(cluster.quic("gateway-1"), &cluster.tls, &user).await;
    device.send(hello(cluster.token(&user, "phone"), [n as u8; 16])).await;
    device.welcome().await.unwrap();
    // Everything was seen: seq 1 creates, ten participants follow.
    let cursors: Vec<_> = own.iter().map(|talk| (talk.as_str(), 11)).collect();
    device.send(resume(&cursors, true)).await;
    let resumed = device.resumed().await;
    assert_eq!((resumed.states.len(), resumed.came.len()), (own.len(), 0));
    assert!(resumed.states.values().all(|state| state.refusal.is_none() && state.head == 11));
    talk_a_while(&mut device).await;
    device
}

async fn talk_a_while(device: &mut Device) {
    for token in 0..talk_frames() {
        device.send(v1::Ping { token }).await;
        device.next().await;
    }
}

/// Memory when it has stopped changing: after a burst a process gives some back.
fn settled(pid: u32) -> Memory {
    let mut memory = Memory::of(pid);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(250));
        let now = Memory::of(pid);
        let same = now.anonymous == memory.anonymous;
        memory = now;
        if same {
            break;
        }
    }
    memory
}

fn per(what: &str, before: Memory, after: Memory, count: usize) -> f64 {
    let each = |a: u64, b: u64| (a as f64 - b as f64) / count as f64;
    let anonymous = each(after.anonymous, before.anonymous);
    println!("{what}: {:.1} B resident each, {anonymous:.1} B of it anonymous", each(after.resident, before.resident));
    anonymous
}

/// The device follows these conversations too, one after the other: what a resume leaves behind at the gateway beside
/// the index (a longer burst) is not in what they cost.
async fn follow(mut device: Device, more: &[String]) -> Device {
    for talk in more {
        device.send(v1::Subscribe { conversation: talk.clone(), from_head: true, after_seq: 0 }).await;
        let ServerFrame::ConversationState(state) = device.next().await else { panic!("no state of {talk}") };
        assert_eq!((state.refusal, state.head), (None, 11));
    }
    device
}

/// A restarted gateway with all devices, and what each connection costs. `then` more conversations are followed at the
/// end, and what each of those costs is printed.
async fn idle_gateway(cluster: &Processes, of: &[Vec<String>], each: usize, then: usize) -> (Memory, f64) {
    cluster.run(&["cluster", "stop", "gateway-1"], b"").well();
    cluster.run(&["cluster", "start", "gateway-1"], b"").well();
    let pid = cluster.pid("gateway-1");
    let before = settled(pid);
    let devices: Vec<(usize, Device)> = stream::iter(of.iter().enumerate())
        .map(|(n, own)| async move { (n, idle(cluster, n, &own[..each]).await) })
        .buffer_unordered(connecting())
        .collect()
        .await;
    cluster.until("gateway-1", "stentor_gateway_resting_subscriptions", |n| n as usize == DEVICES * each).await;
    let after = settled(pid);
    println!(
        "gateway: {} KiB anonymous before, {} KiB with {} devices in {each} conversations each",
        before.anonymous >> 10,
        after.anonymous >> 10,
        devices.len()
    );
    let connection = per(&format!("gateway, connection with {each} conversations"), before, after, DEVICES);
    if then > 0 {
        let more = devices.into_iter().map(|(n, device)| follow(device, &of[n][each..each + then]));
        let devices: Vec<Device> = stream::iter(more).buffer_unordered(connecting()).collect().await;
        let all = devices.len() * (each + then);
        cluster.until("gateway-1", "stentor_gateway_resting_subscriptions", |n| n as usize == all).await;
        let what = format!("(device, conversation), {then} more than {each} followed one by one");
        per(&what, after, settled(pid), DEVICES * then);
    }
    (after, connection)
}

/// The bare server of `transport/examples`, beside the binary.
struct Bare {
    child: Child,
    address: SocketAddr,
    tls: ClientTls,
    _dir: tempfile::TempDir,
}

impl Bare {
    fn start() -> Self {
        let example = Path::new(env!("CARGO_BIN_EXE_stentor")).with_file_name("examples").join("bare_quic");
        assert!(example.exists(), "build it first: cargo build -p stentor-transport --example bare_quic");
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(example).arg(dir.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let tls = ClientTls::public(&dir.path().join("ca.pem")).unwrap();
        Self { child, address: line.trim().parse().unwrap(), tls, _dir: dir }
    }

    async fn device(&self, n: usize, token: String) -> Device {
        let mut device = Device::connect(self.address, &self.tls, "nobody").await;
        // As large as a real greeting, so that the same buffers were used once.
        device.send(hello(token, [n as u8; 16])).await;
        device.next().await;
        talk_a_while(&mut device).await;
        device
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn bare(cluster: &Processes) -> f64 {
    let server = Bare::start();
    let before = settled(server.child.id());
    let devices: Vec<Device> = stream::iter(0..DEVICES)
        .map(|n| server.device(n, cluster.token(&user(n), "phone")))
        .buffer_unordered(connecting())
        .collect()
        .await;
    let after = settled(server.child.id());
    per("bare QUIC server, connection", before, after, devices.len())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of minutes"]
async fn memory_of_idle_devices() {
    let cluster = Processes::up(1, 16);
    let of = create(&cluster).await;
    let bare = bare(&cluster).await;
    let mut last: Option<(usize, Memory)> = None;
    for each in RUNS {
        let then = if each == RUNS[0] { MANY - each } else { 0 };
        let (memory, connection) = idle_gateway(&cluster, &of, each, then).await;
        println!("over bare with {each} conversations: {:.2}", connection / bare);
        if let Some((fewer, before)) = last.replace((each, memory)) {
            per(&format!("(device, conversation), {fewer} to {each}"), before, memory, DEVICES * (each - fewer));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of minutes"]
async fn cpu_when_nobody_talks() {
    let cluster = Processes::up(1, 16);
    let of = create(&cluster).await;
    let nodes = ["broker-1", "broker-2", "broker-3", "gateway-1"];
    let mut devices = Vec::new();
    for what in ["no device", "1,000 idle devices"] {
        // Checkpoints of what was written come within their interval of 10 s; an idle node has none.
        std::thread::sleep(Duration::from_secs(25));
        let (began, before) = (Instant::now(), nodes.map(|node| cpu(cluster.pid(node))));
        std::thread::sleep(Duration::from_secs(30));
        let share = |(node, before): (&str, Duration)| {
            let share = (cpu(cluster.pid(node)) - before).as_secs_f64() / began.elapsed().as_secs_f64();
            format!("{node} {:.1} %", share * 100.0)
        };
        println!("{what}: {}", nodes.into_iter().zip(before).map(share).collect::<Vec<_>>().join(", "));
        if devices.is_empty() {
            let devices_in = stream::iter(of.iter().enumerate()).map(|(n, own)| idle(&cluster, n, own));
            devices =
                tokio::time::timeout(5 * DEADLINE, devices_in.buffer_unordered(connecting()).collect()).await.unwrap();
        }
    }
}

//! Coming back, end to end: real brokers, real gateways, the SDK and devices that speak raw frames. What a device has
//! to say to be up to date, what its cursors are, and that saying it again changes nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use stentor_client::{Builder, Client, ConversationId, Create, From, Incoming, MemoryCursors, Message, Seq, UserId};
use stentor_proto::frame::ClientFrame;
use support::{
    DEADLINE,
    device::{Device, Resumed, hello, resume},
    processes::Processes,
};

const GATEWAY: &str = "gateway-1";

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what} did not happen in time"))
}

/// Creates conversations of ann and bob under ids of their own.
async fn conversations(ann: &Client, count: usize) -> Vec<ConversationId> {
    let mut ids = Vec::new();
    for n in 0..count {
        let id = ConversationId::new(format!("talk-{n:03}")).unwrap();
        let create = Create::group([UserId::new("bob").unwrap()]).id(id.clone());
        ann.create_conversation(create).await.unwrap();
        ids.push(id);
    }
    ids
}

/// Everything that comes until the device is up to date: bodies by conversation. Each event is acknowledged.
async fn catch_up(client: &Client) -> BTreeMap<ConversationId, Vec<(u64, String)>> {
    let mut came: BTreeMap<_, Vec<_>> = BTreeMap::new();
    loop {
        match soon("an item", client.next()).await.expect("the session ended") {
            Incoming::Event { conversation, event } => {
                client.delivered(&conversation, event.seq);
                let body = String::from_utf8(event.body.to_vec()).unwrap();
                came.entry(conversation).or_default().push((event.seq.0, body));
            }
            Incoming::UpToDate => return came,
            Incoming::Ended { conversation, refusal } => panic!("{conversation}: {refusal:?}"),
            _ => {}
        }
    }
}

/// Takes what is there and leaves, all cursors moved.
async fn see_and_leave(builder: Builder, ids: &[ConversationId]) {
    let client = ids.iter().fold(builder, |b, id| b.subscribe(id, From::Seq(Seq(0)))).connect().await.unwrap();
    assert_eq!(catch_up(&client).await.len(), ids.len());
    let mut open: BTreeSet<_> = ids.iter().cloned().collect();
    while !open.is_empty() {
        let item = soon("the cursors' answer", client.next()).await.expect("the session ended");
        let Incoming::CursorsMoved { delivered, refused, .. } = item else { continue };
        assert!(refused.is_empty(), "{refused:?}");
        delivered.iter().filter(|(_, seq)| *seq == Seq(2)).for_each(|(id, _)| {
            open.remove(id);
        });
    }
    client.close().await;
}

/// The user's own shard has heard of all conversations.
async fn listed(client: &Client, count: usize) {
    soon("the list", async {
        loop {
            let (mut found, mut after) = (0, String::new());
            loop {
                let page = client.list(&after, 0).await.unwrap();
                found += page.conversations.len();
                after = page.next;
                if after.is_empty() {
                    break;
                }
            }
            if found == count {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Comes back, checks that all that was missed has come, and counts what had to be said for it.
async fn come_back(cluster: &Processes, device: &str, builder: Builder, ids: &[ConversationId]) {
    cluster.until(GATEWAY, "stentor_gateway_sessions", |sessions| sessions < 0.5).await;
    let before = cluster.device_frames(GATEWAY);
    let client = builder.connect().await.unwrap();
    let came = catch_up(&client).await;
    let after = cluster.device_frames(GATEWAY);
    assert_eq!(came.len(), CONVERSATIONS);
    for (n, id) in ids.iter().enumerate() {
        let expected: Vec<_> = (0..EACH).map(|m| (m as u64 + 3, format!("{n}-{m}"))).collect();
        assert_eq!(came[id], expected, "{id}");
    }
    let said: BTreeMap<_, _> = after.iter().map(|(kind, count)| (kind.as_str(), count - before[kind])).collect();
    println!("{device}, {} events of {CONVERSATIONS} conversations later: {said:?}", CONVERSATIONS * EACH);
    for (kind, count) in said {
        match kind {
            "hello" | "resume" => assert_eq!(count, 1, "{kind}"),
            "credit" | "move_cursors" => {}
            _ => assert_eq!(count, 0, "{kind}"),
        }
    }
    client.close().await;
}

const CONVERSATIONS: usize = 200;
const EACH: usize = 25;

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_away_is_up_to_date_after_one_resume_frame() {
    let cluster = Processes::up(1, 4);
    let ann = cluster.client("ann", "phone").connect().await.unwrap();
    let ids = conversations(&ann, CONVERSATIONS).await;
    // One keeps its cursors itself, the other leaves that to the server.
    let kept = Arc::new(MemoryCursors::new());
    see_and_leave(cluster.client("bob", "laptop").cursors(kept.clone()), &ids).await;
    see_and_leave(cluster.client("bob", "phone"), &ids).await;
    let bob = cluster.client("bob", "tablet").connect().await.unwrap();
    listed(&bob, CONVERSATIONS).await;
    bob.close().await;

    for m in 0..EACH {
        for (n, id) in ids.iter().enumerate() {
            ann.send_pipelined(id, Message::text(format!("{n}-{m}"))).await.unwrap();
        }
    }
    ann.flush().await;
    ann.close().await;

    let laptop = cluster.client("bob", "laptop").cursors(kept);
    let laptop = ids.iter().fold(laptop, |builder, id| builder.subscribe(id, From::Cursor));
    come_back(&cluster, "laptop, with its cursor vector", laptop, &ids).await;
    come_back(&cluster, "phone, from the server's cursors", cluster.client("bob", "phone").follow_all(), &ids).await;
}

const TALK: &str = "talk-000";
const PHONE: [u8; 16] = [1; 16];
const PHONE_ANEW: [u8; 16] = [2; 16];
const LAPTOP: [u8; 16] = [3; 16];

struct Bob<'a> {
    cluster: &'a Processes,
}

impl Bob<'_> {
    /// The first two frames of a connection.
    fn greeting(&self, device: &str, nonce: [u8; 16], resume: &ClientFrame) -> Vec<u8> {
        let hello = hello(self.cluster.token("bob", device), nonce);
        [hello.to_bytes(), resume.to_bytes()].concat()
    }

    /// Connects with these frames, sent in one go.
    async fn greets(&self, gateway: &str, greeting: &[u8]) -> Device {
        let mut device = Device::connect(self.cluster.quic(gateway), &self.cluster.tls, "bob").await;
        device.raw(greeting.to_vec().into()).await;
        device
    }

    /// A device that resumed the conversation from its beginning.
    async fn comes(&self, gateway: &str, device: &str, nonce: [u8; 16]) -> (Device, u64) {
        let mut connected = self.greets(gateway, &self.greeting(device, nonce, &resume(&[(TALK, 0)], true))).await;
        let session_no = connected.welcome().await.unwrap();
        assert_eq!(connected.resumed().await.came[TALK], (1, 8));
        (connected, session_no)
    }

    /// The cursors (delivered, read) that the server keeps: a session continued elsewhere asks for them.
    async fn cursors(&self, device: &str, nonce: [u8; 16]) -> (u64, u64) {
        let mut asking = self.greets("gateway-2", &self.greeting(device, nonce, &resume(&[], false))).await;
        asking.welcome().await.unwrap();
        let state = asking.resumed().await.states.remove(TALK).unwrap();
        (state.delivered, state.read)
    }

    /// All that a frame could have changed: the events, what is known of the conversation, the cursors of both devices.
    async fn all(&self, phone: [u8; 16]) -> (String, String, (u64, u64), (u64, u64)) {
        let events = self.cluster.run(&["history", TALK, "--json", "--user", "ann"], b"").well().stdout;
        let shown = self.cluster.run(&["conversation", "show", TALK, "--json", "--user", "ann"], b"").well().stdout;
        (events, shown, self.cursors("phone", phone).await, self.cursors("laptop", LAPTOP).await)
    }
}

/// One conversation with eight events that bob's shard knows of.
async fn one_conversation(cluster: &Processes) {
    let ann = cluster.client("ann", "phone").connect().await.unwrap();
    let talk = conversations(&ann, 1).await.remove(0);
    for n in 3..=8 {
        assert_eq!(ann.send(&talk, Message::text(format!("{n}"))).await.unwrap().seq, Seq(n));
    }
    let bob = cluster.client("bob", "tablet").connect().await.unwrap();
    listed(&bob, 1).await;
    bob.close().await;
    ann.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_belong_to_devices_and_users_and_old_sessions_move_none() {
    let cluster = Processes::up(2, 4);
    one_conversation(&cluster).await;
    let bob = Bob { cluster: &cluster };

    // Delivered is each device's own, read is the user's.
    let (mut phone, first) = bob.comes("gateway-1", "phone", PHONE).await;
    let (mut laptop, _) = bob.comes("gateway-1", "laptop", LAPTOP).await;
    assert!(phone.move_cursors(&[(TALK, 5)], &[(TALK, 3)]).await.unwrap().is_empty());
    assert!(laptop.move_cursors(&[(TALK, 7)], &[]).await.unwrap().is_empty());
    assert_eq!(bob.cursors("phone", PHONE).await, (5, 3));
    assert_eq!(bob.cursors("laptop", LAPTOP).await, (7, 3));
    assert!(laptop.move_cursors(&[], &[(TALK, 6)]).await.unwrap().is_empty());
    // Neither moves back.
    phone.move_cursors(&[(TALK, 4)], &[(TALK, 4)]).await.unwrap();
    assert_eq!(bob.cursors("phone", PHONE).await, (5, 6));
    assert_eq!(bob.cursors("laptop", LAPTOP).await, (7, 6));

    // A new session of the phone, through a gateway that the old one does not know of.
    let anew = bob.greeting("phone", PHONE_ANEW, &resume(&[(TALK, 5)], true));
    let mut newer = bob.greets("gateway-2", &anew).await;
    let second = newer.welcome().await.unwrap();
    assert!(second > first, "{second} after {first}");
    let resumed = newer.resumed().await;
    assert_eq!(resumed.came[TALK], (6, 8));
    let before = bob.all(PHONE_ANEW).await;
    assert_eq!((before.2, before.3), ((5, 6), (7, 6)));
    assert_eq!(phone.move_cursors(&[(TALK, 8)], &[(TALK, 8)]).await.unwrap_err(), "SESSION_SUPERSEDED");
    assert_eq!(bob.all(PHONE_ANEW).await, before, "a superseded session moved something");

    replays_change_nothing(&bob, &anew, second, &resumed).await;
}

async fn replays_change_nothing(bob: &Bob<'_>, anew: &[u8], session_no: u64, resumed: &Resumed) {
    // Moved on since: what is replayed says less than what is known.
    let (mut now, _) = (bob.greets("gateway-2", anew).await, ());
    now.welcome().await.unwrap();
    now.resumed().await;
    assert!(now.move_cursors(&[(TALK, 8)], &[(TALK, 7)]).await.unwrap().is_empty());
    let before = bob.all(PHONE_ANEW).await;
    assert_eq!((before.2, before.3), ((8, 7), (7, 7)));
    // The same bytes through either gateway: the same session, the same events, nothing else.
    for gateway in ["gateway-1", "gateway-2", "gateway-1"] {
        let mut replayed = bob.greets(gateway, anew).await;
        assert_eq!(replayed.welcome().await, Ok(session_no), "{gateway}");
        assert_eq!(replayed.resumed().await, *resumed, "{gateway}");
        assert_eq!(bob.all(PHONE_ANEW).await, before, "replayed at {gateway}");
    }
    // Those of the session before it.
    let old = bob.greeting("phone", PHONE, &resume(&[(TALK, 2)], false));
    let mut replayed = bob.greets("gateway-1", &old).await;
    assert_eq!(replayed.welcome().await.unwrap_err(), "SESSION_SUPERSEDED");
    assert_eq!(bob.all(PHONE_ANEW).await, before, "replayed by the session before");
    // Twice on one connection.
    let mut replayed = bob.greets("gateway-1", anew).await;
    assert_eq!(replayed.welcome().await, Ok(session_no));
    replayed.raw(resume(&[(TALK, 1)], false).to_bytes()).await;
    assert_eq!(replayed.fatal().await, "UNEXPECTED_FRAME");
    assert_eq!(bob.all(PHONE_ANEW).await, before, "replayed on one connection");
}

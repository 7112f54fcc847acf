//! A cluster of brokers in this process, over real loopback TLS and real directories, for tests. Must never fake a
//! part: what a test proves here is proven for the shipped code.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use stentor_broker::{AppConfig, Bootstrap, Broker, BrokerConfig, KeyConfig, PeerConfig, StoreTuning};
use stentor_proto::{
    Bytes,
    ids::{AppId, BrokerId, DeviceId, UserId, key_crc},
    internal::{
        AttachHello, BrokerFrame, GatewayBatch, GatewayFrame, broker_client::BrokerClient, broker_frame,
        gateway_frame::Frame,
    },
    record::{self, Event},
    v1::{
        ConversationKind, CreateRequest, HistoryRequest, HistoryResponse, Item, Send, Sent, StatusRequest,
        StatusResponse, VerifyLocalRequest, admin_client::AdminClient, conversations_client::ConversationsClient, item,
        messages_client::MessagesClient,
    },
};
use stentor_transport::{
    grpc::{self, Channel},
    pki::Pki,
    tls::{ClientTls, TlsFiles},
    token::{self, Claims},
};
use tokio::sync::mpsc;
use tonic::{Request, Status, Streaming};

pub const APP: &str = "demo";
pub const DEADLINE: Duration = Duration::from_secs(60);

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub configs: Vec<BrokerConfig>,
    pub brokers: Vec<Option<Broker>>,
    pub ca: std::path::PathBuf,
    pub tls: TlsFiles,
    key: String,
}

/// Below the range from which outgoing connections get theirs: a broker that is down must find its port free again.
/// Never one twice: another cluster of this process would take it, or try it, while the broker is down.
fn free_port() -> SocketAddr {
    const FIRST: u16 = 18_000;
    const PORTS: u16 = 14_000;
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random_range(0..PORTS)));
    let next = || SocketAddr::from(([127, 0, 0, 1], FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS));
    std::iter::repeat_with(next).find(|port| TcpListener::bind(port).is_ok()).unwrap()
}

/// Waits for a condition, with a deadline that only a fault reaches.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut condition: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Cluster {
    /// Configures and starts `brokers` brokers with `shards` data shards, and waits until all are ready.
    pub async fn start(brokers: u32, shards: u32) -> Self {
        let mut cluster = Self::configure(brokers, shards);
        for n in 0..brokers as usize {
            cluster.start_one(n).await;
        }
        cluster.ready().await;
        cluster
    }

    pub fn configure(brokers: u32, shards: u32) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::create(&dir.path().join("pki")).unwrap();
        let (key, public_key_pem) = token::generate_key().unwrap();
        let signing = KeyConfig { kid: "k1".into(), algorithm: "EdDSA".into(), public_key_pem, dev: true };
        let bootstrap = Bootstrap {
            cluster_id: "test-cluster".into(),
            shards,
            apps: vec![AppConfig { app: APP.into(), keys: vec![signing] }],
        };
        let peers: Vec<PeerConfig> = (1..=brokers)
            .map(|n| PeerConfig {
                broker: BrokerId(n),
                name: format!("broker-{n}"),
                peer_addr: free_port(),
                api_addr: free_port(),
            })
            .collect();
        let configs = peers.iter().map(|peer| BrokerConfig {
            name: peer.name.clone(),
            broker: peer.broker,
            data_dir: dir.path().join(&peer.name),
            peer_listen: peer.peer_addr,
            api_listen: peer.api_addr,
            http_listen: "127.0.0.1:0".parse().unwrap(),
            peers: peers.clone(),
            tls: pki.issue(&peer.name, &dir.path().join("tls")).unwrap(),
            development: true,
            bootstrap: Some(bootstrap.clone()),
            park_after_ms: 500,
            store: StoreTuning { checkpoint_interval_ms: 500, ..StoreTuning::default() },
        });
        let configs: Vec<_> = configs.collect();
        let tls = pki.issue("gateway-1", &dir.path().join("tls")).unwrap();
        let ca = pki.ca_path().to_owned();
        Self { configs, brokers: (0..brokers).map(|_| None).collect(), ca, tls, key, dir }
    }

    pub async fn start_one(&mut self, n: usize) {
        self.brokers[n] = Some(stentor_broker::start(self.configs[n].clone()).await.unwrap());
    }

    pub async fn ready(&self) {
        for broker in self.brokers.iter().flatten() {
            broker.ready(DEADLINE).await.unwrap();
        }
    }

    pub async fn halt(&mut self, n: usize) {
        self.brokers[n].take().unwrap().halt().await;
    }

    pub async fn stop(mut self) {
        for broker in self.brokers.iter_mut().filter_map(Option::take) {
            broker.halt().await;
        }
    }

    pub fn token(&self, user: &str, device: Option<&str>, admin: bool) -> String {
        let claims = Claims {
            app: AppId::new(APP).unwrap(),
            user: UserId::new(user).unwrap(),
            device: device.map(|d| DeviceId::new(d).unwrap()),
            admin,
            expires_s: u64::from(u32::MAX),
        };
        token::mint(&self.key, "k1", &claims).unwrap()
    }

    pub fn api(&self, n: usize) -> Channel {
        grpc::channel(self.configs[n].api_listen, &ClientTls::public(&self.ca).unwrap()).unwrap()
    }

    pub fn peer(&self, n: usize) -> Channel {
        grpc::channel(self.configs[n].peer_listen, &ClientTls::peer(&self.tls).unwrap()).unwrap()
    }

    /// A caller of one broker's API.
    pub fn caller(&self, n: usize, user: &str) -> Caller {
        Caller { channel: self.api(n), token: self.token(user, Some("phone"), false) }
    }

    pub async fn status(&self, n: usize) -> Result<StatusResponse, Status> {
        let token = self.token("operator", None, true);
        let mut admin = AdminClient::new(self.api(n));
        Ok(admin.status(with_token(StatusRequest {}, &token)).await?.into_inner())
    }

    /// The index of the broker that leads a shard, as broker `n` knows it.
    pub async fn leader_of(&self, n: usize, shard: u32) -> Option<usize> {
        let status = self.status(n).await.ok()?;
        let status = status.shards.into_iter().find(|s| s.shard == shard && s.quorum)?;
        self.configs.iter().position(|config| config.name == status.leader)
    }

    /// One figure of a broker's `/metrics`; 0 when it has none.
    pub async fn metric(&self, n: usize, name: &str) -> u64 {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let addr = self.brokers[n].as_ref().unwrap().addresses().http;
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or(0)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

pub fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub struct Caller {
    pub channel: Channel,
    pub token: String,
}

impl Caller {
    pub fn request<T>(&self, message: T) -> Request<T> {
        with_token(message, &self.token)
    }

    pub async fn create(&self, conversation: &str, participants: &[&str]) -> Result<String, Status> {
        let request = CreateRequest {
            conversation: conversation.into(),
            kind: ConversationKind::Group as i32,
            participants: participants.iter().map(|p| (*p).to_owned()).collect(),
            client_id: format!("create-{conversation}"),
            ..Default::default()
        };
        let mut client = ConversationsClient::new(self.channel.clone());
        Ok(client.create(self.request(request)).await?.into_inner().conversation)
    }

    pub async fn send(&self, conversation: &str, client_id: &str, body: &str) -> Result<Sent, Status> {
        let send = Send {
            conversation: conversation.into(),
            client_id: client_id.into(),
            body: Bytes::copy_from_slice(body.as_bytes()),
            ..Default::default()
        };
        self.send_raw(send).await
    }

    pub async fn send_raw(&self, send: Send) -> Result<Sent, Status> {
        let mut client = MessagesClient::new(self.channel.clone());
        Ok(client.send(self.request(send)).await?.into_inner())
    }

    pub async fn history(&self, request: HistoryRequest) -> Result<HistoryResponse, Status> {
        let mut client = MessagesClient::new(self.channel.clone());
        Ok(client.history(self.request(request)).await?.into_inner())
    }

    /// Everything after `after_seq`, page by page.
    pub async fn all(&self, conversation: &str, linearizable: bool) -> Result<Vec<Item>, Status> {
        let (mut items, mut after_seq) = (Vec::new(), 0);
        loop {
            let request = HistoryRequest {
                conversation: conversation.into(),
                after_seq: Some(after_seq),
                linearizable,
                ..Default::default()
            };
            let page = self.history(request).await?;
            items.extend(page.items);
            after_seq = items.last().map_or(0, |item| last_seq(conversation, item));
            if !page.more {
                return Ok(items);
            }
        }
    }
}

pub fn event(conversation: &str, record: &Bytes) -> Event {
    record::decode(record, key_crc(APP.as_bytes(), conversation.as_bytes())).unwrap()
}

pub fn last_seq(conversation: &str, item: &Item) -> u64 {
    match item.item.as_ref().unwrap() {
        item::Item::Record(record) => event(conversation, record).header.seq,
        item::Item::Hidden(hidden) => hidden.to,
    }
}

/// Seqs and bodies of events; hidden stretches are left out.
pub fn bodies(conversation: &str, items: &[Item]) -> Vec<(u64, String)> {
    let events = items.iter().filter_map(|item| match item.item.as_ref().unwrap() {
        item::Item::Record(record) => Some(event(conversation, record)),
        item::Item::Hidden(_) => None,
    });
    events.map(|e| (e.header.seq, String::from_utf8_lossy(&e.body).into_owned())).collect()
}

/// A gateway's stream to one broker.
pub struct Gateway {
    out: mpsc::Sender<GatewayBatch>,
    inbound: Streaming<stentor_proto::internal::BrokerBatch>,
    waiting: std::collections::VecDeque<broker_frame::Frame>,
}

impl Gateway {
    pub async fn attach(channel: Channel) -> Result<Self, Status> {
        let (out, frames) = mpsc::channel(16);
        let hello = AttachHello { gateway: "gateway-1".into(), cluster_id: "test-cluster".into() };
        let hello = GatewayBatch { frames: vec![GatewayFrame { frame: Some(Frame::Hello(hello)) }] };
        out.send(hello).await.unwrap();
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(frames);
        let inbound = BrokerClient::new(channel).attach(outgoing).await?.into_inner();
        Ok(Self { out, inbound, waiting: Default::default() })
    }

    pub async fn send(&self, frames: Vec<Frame>) {
        let frames = frames.into_iter().map(|frame| GatewayFrame { frame: Some(frame) }).collect();
        self.out.send(GatewayBatch { frames }).await.unwrap();
    }

    pub async fn next(&mut self) -> Option<broker_frame::Frame> {
        while self.waiting.is_empty() {
            let batch = tokio::time::timeout(DEADLINE, self.inbound.message()).await.expect("no frame").ok()??;
            self.waiting.extend(batch.frames.into_iter().filter_map(|frame: BrokerFrame| frame.frame));
        }
        self.waiting.pop_front()
    }

    /// The next frame that is no beat.
    pub async fn next_but_beats(&mut self) -> Option<broker_frame::Frame> {
        loop {
            match self.next().await? {
                broker_frame::Frame::Beat(_) => {}
                frame => return Some(frame),
            }
        }
    }
}

/// All replicas of all shards come to the same position and the same bytes.
pub async fn agree(cluster: &Cluster) {
    let token = cluster.token("operator", None, true);
    let reports = eventually("all replicas are at the same position", || async {
        let mut reports = Vec::new();
        for n in 0..cluster.configs.len() {
            let mut admin = AdminClient::new(cluster.api(n));
            let request = with_token(VerifyLocalRequest::default(), &token);
            let answer = admin.verify_local(request).await.unwrap().into_inner();
            assert_eq!(answer.problems, []);
            reports.push(answer.replicas);
        }
        let positions = |n: usize| reports[n].iter().map(|r| (r.shard, r.applied_index)).collect::<Vec<_>>();
        (positions(0) == positions(1) && positions(1) == positions(2)).then_some(reports)
    });
    let reports = reports.await;
    assert!(reports.windows(2).all(|w| w[0] == w[1]), "{reports:?}");
}

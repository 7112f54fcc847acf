//! What the gateway's tests stand on: a small cluster of scripted brokers over real TLS, and devices that speak raw
//! frames over real QUIC.

#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

mod broker;
mod device;
mod serving;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub(crate) use broker::World;
pub(crate) use device::Device;
pub(crate) use serving::Broker;
use stentor_gateway::{
    Gateway,
    config::{BrokerAddress, GatewayConfig, GatewayLimits},
};
use stentor_proto::ids::{AppId, BrokerId, DeviceId, UserId};
use stentor_transport::{
    pki::Pki,
    tls::ClientTls,
    token::{Claims, generate_key, mint},
};
use tempfile::TempDir;

/// Until a condition must hold.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) world: Arc<World>,
    pub(crate) brokers: Vec<Broker>,
    pub(crate) gateway: Gateway,
    pub(crate) quic: SocketAddr,
    pub(crate) tls: ClientTls,
    private_pem: String,
    _dir: TempDir,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::with(2, |_| {}).await
    }

    pub(crate) async fn with(brokers: u32, change: impl FnOnce(&mut GatewayLimits)) -> Self {
        let dir = TempDir::new().unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        let (private_pem, public_pem) = generate_key().unwrap();
        let world = World::new(brokers, &public_pem);
        let mut addresses = Vec::new();
        let mut running = Vec::new();
        for n in 1..=brokers {
            let files = pki.issue(&format!("broker-{n}"), dir.path()).unwrap();
            let broker = Broker::start(BrokerId(n), world.clone(), &files);
            addresses.push(BrokerAddress { broker: BrokerId(n), name: format!("broker-{n}"), peer_addr: broker.addr });
            running.push(broker);
        }
        let mut limits = GatewayLimits { drain_ms: 100, ..GatewayLimits::default() };
        change(&mut limits);
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = GatewayConfig {
            name: "gateway-1".into(),
            quic_listen: any,
            http_listen: any,
            brokers: addresses,
            tls: pki.issue("gateway-1", dir.path()).unwrap(),
            development: true,
            limits,
        };
        let gateway = stentor_gateway::start(config).await.unwrap();
        gateway.ready(PATIENCE).await.unwrap();
        let tls = ClientTls::public(pki.ca_path()).unwrap();
        let quic = gateway.addresses().quic;
        Self { world, brokers: running, gateway, quic, tls, private_pem, _dir: dir }
    }

    pub(crate) fn token(&self, user: &str, device: &str) -> String {
        self.token_of("app", user, Some(device), 3_600)
    }

    pub(crate) fn token_of(&self, app: &str, user: &str, device: Option<&str>, seconds: i64) -> String {
        token(&self.private_pem, app, user, device, seconds)
    }

    /// A device that was welcomed.
    pub(crate) async fn device(&self, user: &str, device: &str) -> Device {
        self.device_with(user, device, [device.len() as u8; 16]).await
    }

    pub(crate) async fn device_with(&self, user: &str, device: &str, nonce: [u8; 16]) -> Device {
        let mut connected = self.connect().await;
        connected.hello(self.token(user, device), nonce).await;
        connected.welcome().await;
        connected
    }

    /// A device that said nothing yet.
    pub(crate) async fn connect(&self) -> Device {
        Device::connect(self.quic, &self.tls).await
    }

    /// A counter of the gateway, read as Prometheus would.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = http_get(self.gateway.addresses().http, "/metrics").await;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) async fn status(&self, path: &str) -> String {
        http_get(self.gateway.addresses().http, path).await.lines().next().unwrap().to_owned()
    }
}

pub(crate) fn token(private_pem: &str, app: &str, user: &str, device: Option<&str>, seconds: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let claims = Claims {
        app: AppId::new(app).unwrap(),
        user: UserId::new(user).unwrap(),
        device: device.map(|device| DeviceId::new(device).unwrap()),
        admin: false,
        expires_s: (now + seconds) as u64,
    };
    mint(private_pem, "kid-1", &claims).unwrap()
}

async fn http_get(addr: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Waits for a condition; a deadline, not a pause, ends a test that fails.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} never came true"));
}

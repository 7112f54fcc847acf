//! The simulated cluster: which hosts there are, what runs on them, and how it is started, killed and reached. Must never
//! give a node anything that a real one would not have: its address, its disk, its certificate, its clock.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use stentor_broker::{
    AppConfig, Bootstrap, Broker, BrokerConfig, Environment, KeyConfig, PeerConfig, Place, ReadyError, StartError,
    StoreTuning,
};
use stentor_client::{Client, ClientError, MemoryCursors};
use stentor_gateway::{BrokerAddress, Gateway, GatewayConfig, GatewayLimits};
use stentor_proto::ids::{AppId, BrokerId, DeviceId, UserId};
use stentor_raft_store::{DiskError, MemoryDisk};
use stentor_transport::{
    Host,
    memory::{Death, Network, Trace},
    pki::Pki,
    tls::{ClientTls, TlsFiles},
    token::{self, Claims},
};
use tempfile::TempDir;

use super::{applied::Agreement, run::Plan};
use crate::{oracle::Device, workload::Connect};

const APP: &str = "chaos";
const KID: &str = "sim";
const PORTS: [u16; 4] = [7_411, 7_410, 7_490, 7_443];
/// Where the wall clocks begin: a moment of 2027.
const WALL_MS: u64 = 1_800_000_000_000;
/// Tokens outlive every run and every wrong clock.
const TOKEN_S: u64 = 7 * 24 * 3_600;

/// How long a disk that was told to fail may take to be used.
const DISK_PATIENCE: Duration = Duration::from_secs(5);
/// How soon a broker must have stopped after that.
const STOPS_WITHIN: Duration = Duration::from_secs(1);
/// How often it is looked whether a broker has stopped.
const LOOK: Duration = Duration::from_millis(10);

/// Certificates must be there to be read, though nobody's TLS uses them here.
struct Keys {
    _dir: TempDir,
    files: TlsFiles,
    client: ClientTls,
}

fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| {
        let made = || -> Result<Keys, Box<dyn std::error::Error>> {
            let dir = tempfile::tempdir()?;
            let pki = Pki::create(dir.path())?;
            let files = pki.issue("broker-1", dir.path())?;
            Ok(Keys { client: ClientTls::public(pki.ca_path())?, files, _dir: dir })
        };
        made().unwrap_or_else(|error| unreachable!("no certificates for a simulation: {error}"))
    })
}

struct BrokerPlace {
    disk: MemoryDisk,
    running: Option<Broker>,
    /// Counts starts and crashes, so that a late restart finds out that it is too late.
    life: u64,
    /// Its disk was told to fail: then it need not start.
    failing: bool,
    /// The life in which its disk failed as it was told: then it has to stop.
    excused: Option<u64>,
    /// The seed of its next disk.
    disks: u64,
}

/// A cluster of simulated hosts. Cheap to clone.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

struct Inner {
    network: Network,
    agreement: Arc<Agreement>,
    shards: u32,
    park_after_ms: u64,
    store: StoreTuning,
    private_key: String,
    public_key: String,
    brokers: Mutex<Vec<BrokerPlace>>,
    gateways: Mutex<Vec<Option<Gateway>>>,
    devices: Mutex<Vec<(Device, Host)>>,
    problems: Mutex<Vec<String>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    /// Switches all hosts on and starts everything; returns when all of it is ready.
    ///
    /// # Errors
    /// What is not ready within a simulated minute.
    pub(super) async fn start(seed: u64, plan: &Plan, trace: Trace) -> Result<Self, String> {
        let network = Network::new(seed, WALL_MS, trace.clone());
        tokio::spawn(network.clone().run());
        let (private_key, public_key) = token::key_of_seed([7; 32]).map_err(|e| e.to_string())?;
        let place = |n: usize| BrokerPlace {
            disk: MemoryDisk::new(seed.wrapping_mul(31).wrapping_add(n as u64)),
            running: None,
            life: 0,
            failing: false,
            excused: None,
            disks: seed.wrapping_mul(37).wrapping_add(n as u64),
        };
        let cluster = Self(Arc::new(Inner {
            network,
            agreement: Arc::new(Agreement::new(trace)),
            shards: plan.shards,
            park_after_ms: plan.park_after.as_millis() as u64,
            store: plan.store.clone(),
            private_key,
            public_key,
            brokers: Mutex::new((0..plan.brokers).map(place).collect()),
            gateways: Mutex::new((0..plan.gateways).map(|_| None).collect()),
            devices: Mutex::default(),
            problems: Mutex::default(),
        }));
        for n in 0..plan.brokers {
            if let Some(disk) = cluster.disk(n) {
                disk.set_faults(plan.disks);
            }
            cluster.start_broker(n).await;
        }
        for n in 0..plan.gateways {
            cluster.start_gateway(n).await;
        }
        cluster.ready(Duration::from_secs(60)).await?;
        Ok(cluster)
    }

    /// Waits until everything that should run is ready.
    pub(super) async fn ready(&self, within: Duration) -> Result<(), String> {
        let until = tokio::time::Instant::now() + within;
        for n in 0..self.brokers() {
            loop {
                // Taken out while it is asked: its lock is not held over a wait.
                let asked =
                    self.0.brokers.lock().get_mut(n).and_then(|place| Some((place.life, place.running.take()?)));
                let Some((life, broker)) = asked else { return Err(format!("broker {n} does not run")) };
                let ready = broker.ready(Duration::from_millis(50)).await;
                self.put_back(n, life, broker);
                match ready {
                    Ok(()) => break,
                    // It never will be; and it says so without waiting.
                    Err(ReadyError::Failed(what)) => return Err(format!("broker {n} has stopped: {what}")),
                    Err(_) if tokio::time::Instant::now() < until => {}
                    Err(error) => return Err(format!("broker {n} is not ready: {error}")),
                }
            }
        }
        Ok(())
    }

    fn put_back(&self, n: usize, life: u64, broker: Broker) {
        let mut brokers = self.0.brokers.lock();
        match brokers.get_mut(n).filter(|place| place.life == life) {
            Some(place) => place.running = Some(broker),
            None => drop(tokio::spawn(broker.halt())),
        }
    }

    /// The simulated network.
    pub fn network(&self) -> &Network {
        &self.0.network
    }

    /// How many brokers there are.
    pub fn brokers(&self) -> usize {
        self.0.brokers.lock().len()
    }

    /// How many gateways there are.
    pub fn gateways(&self) -> usize {
        self.0.gateways.lock().len()
    }

    /// A broker's disk; `None` for a number that there is not.
    pub fn disk(&self, n: usize) -> Option<MemoryDisk> {
        self.0.brokers.lock().get(n).map(|place| place.disk.clone())
    }

    /// Where broker `n` is, from 0.
    pub fn broker_ip(n: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, 1, n as u8 + 1))
    }

    /// Where gateway `n` is, from 0.
    pub fn gateway_ip(n: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, 2, n as u8 + 1))
    }

    /// What must not have happened, as far as the cluster itself saw it.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = self.0.problems.lock().clone();
        problems.extend(self.0.agreement.problems());
        problems
    }

    /// How many entries were applied.
    pub(super) fn entries(&self) -> usize {
        self.0.agreement.entries()
    }

    fn problem(&self, what: String) {
        self.0.network.trace().note("problem", &[], what.as_bytes());
        self.0.problems.lock().push(what);
    }

    /// Boots a broker's host and starts the broker, unless it runs.
    pub(super) async fn start_broker(&self, n: usize) {
        let Some((disk, life)) = ({
            let mut brokers = self.0.brokers.lock();
            brokers.get_mut(n).filter(|place| place.running.is_none() && place.life % 2 == 0).map(|place| {
                place.life += 1;
                (place.disk.clone(), place.life)
            })
        }) else {
            return;
        };
        let host = self.0.network.boot(Self::broker_ip(n));
        let observer = Some(self.0.agreement.clone() as Arc<dyn stentor_broker::Observer>);
        let environment = Environment { host, place: Place::Memory(disk), observer };
        match stentor_broker::start_in(environment, self.broker_config(n)).await {
            Ok(broker) => self.put_back(n, life, broker),
            Err(_) if self.0.brokers.lock().get(n).is_none_or(|place| place.life != life) => {}
            Err(error) => self.not_started(n, life, &error),
        }
    }

    /// A broker whose disk fails while it starts is down until somebody starts it again.
    fn not_started(&self, n: usize, life: u64, error: &StartError) {
        if let Some(place) = self.0.brokers.lock().get_mut(n).filter(|place| place.failing && place.life == life) {
            place.life += 1;
            return;
        }
        self.problem(format!("broker {n} does not start: {error}"));
    }

    /// Lets an operation of a broker's disk fail. True when the broker has stopped of it; false when nothing came of it
    /// within a while. A broker that goes on with a disk that has failed is a problem.
    pub(super) async fn fail_disk(&self, n: usize, operation: u64, error: DiskError) -> bool {
        let Some((disk, life, due)) = ({
            let mut brokers = self.0.brokers.lock();
            brokers.get_mut(n).filter(|place| !place.failing).map(|place| {
                place.failing = true;
                place.disk.fail_at(operation, error);
                (place.disk.clone(), place.life, place.disk.operations() + operation)
            })
        }) else {
            return false;
        };
        let mut until = tokio::time::Instant::now() + DISK_PATIENCE;
        let (mut failed, mut hit) = (false, false);
        while !failed && tokio::time::Instant::now() < until {
            tokio::time::sleep(LOOK).await;
            if !hit && disk.operations() >= due {
                (hit, until) = (true, tokio::time::Instant::now() + STOPS_WITHIN);
            }
            failed = self.has_failed(n);
        }
        disk.heal();
        let mut goes_on = false;
        if let Some(place) = self.0.brokers.lock().get_mut(n) {
            place.failing = false;
            goes_on = hit && !failed && place.life == life && place.running.is_some();
            if hit {
                // Of this life: a broker that was down when its disk was told to fail has met it at its start.
                place.excused = Some(place.life);
            }
        }
        if goes_on {
            self.problem(format!("broker {n} goes on though operation {operation} of its disk failed"));
        }
        failed
    }

    fn has_failed(&self, n: usize) -> bool {
        let brokers = self.0.brokers.lock();
        brokers.get(n).and_then(|place| place.running.as_ref()).is_some_and(|broker| broker.failure().is_some())
    }

    /// Puts an empty disk in the place of a broker's, unless it runs.
    pub(super) fn wipe(&self, n: usize) {
        if let Some(place) = self.0.brokers.lock().get_mut(n).filter(|place| place.life % 2 == 0) {
            place.disk = MemoryDisk::new(place.disks);
            place.disks = place.disks.wrapping_add(1_000_003);
        }
    }

    /// Ends a broker's life. A power cut forgets what was not synced, a killed process does not.
    pub(super) fn crash_broker(&self, n: usize, death: Death) {
        let running = {
            let mut brokers = self.0.brokers.lock();
            let Some(place) = brokers.get_mut(n).filter(|place| place.life % 2 == 1) else { return };
            place.life += 1;
            match death {
                Death::Power => place.disk.cut_power(),
                Death::Process => place.disk.kill_process(),
            }
            let life = place.life - 1;
            let excused = place.failing || place.excused == Some(life);
            place.running.take().map(|broker| (broker, excused))
        };
        self.0.network.kill(Self::broker_ip(n), death);
        if let Some((broker, excused)) = running {
            self.judge(n, &broker, excused);
            // What is left of it can neither speak nor write: it only has to let go.
            tokio::spawn(broker.halt());
        }
    }

    /// A broker that gave up without a fault of its disk has found something that must not be, before it was ended.
    fn judge(&self, n: usize, broker: &Broker, excused: bool) {
        if let Some(what) = broker.failure().filter(|_| !excused) {
            self.problem(format!("broker {n} had stopped by itself: {what}"));
        }
    }

    /// Stops a broker in good order: it hands over what it leads.
    pub(super) async fn stop_broker(&self, n: usize) {
        let asked = self.0.brokers.lock().get_mut(n).and_then(|place| {
            let excused = place.failing || place.excused == Some(place.life);
            Some((place.life, place.running.take()?, excused))
        });
        let Some((life, broker, excused)) = asked else { return };
        self.judge(n, &broker, excused);
        broker.shutdown().await;
        let still_it = {
            let mut brokers = self.0.brokers.lock();
            brokers.get_mut(n).filter(|place| place.life == life).map(|place| {
                place.life += 1;
                place.disk.kill_process();
            })
        };
        if still_it.is_some() {
            self.0.network.kill(Self::broker_ip(n), Death::Process);
        }
    }

    /// Boots a gateway's host and starts the gateway, unless it runs.
    pub(super) async fn start_gateway(&self, n: usize) {
        if self.0.gateways.lock().get(n).is_none_or(Option::is_some) {
            return;
        }
        let host = self.0.network.boot(Self::gateway_ip(n));
        match stentor_gateway::start_on(host, self.gateway_config(n)).await {
            Ok(gateway) => {
                if let Some(place) = self.0.gateways.lock().get_mut(n) {
                    *place = Some(gateway);
                }
            }
            Err(error) => self.problem(format!("gateway {n} does not start: {error}")),
        }
    }

    /// Ends a gateway's life.
    pub(super) fn crash_gateway(&self, n: usize, death: Death) {
        let running = self.0.gateways.lock().get_mut(n).and_then(Option::take);
        if running.is_some() {
            self.0.network.kill(Self::gateway_ip(n), death);
        }
        drop(running);
    }

    fn broker_config(&self, n: usize) -> BrokerConfig {
        let at = |port: usize| SocketAddr::new(Self::broker_ip(n), PORTS[port]);
        let peers = (0..self.brokers()).map(|n| PeerConfig {
            broker: BrokerId(n as u32 + 1),
            name: format!("broker-{}", n + 1),
            peer_addr: SocketAddr::new(Self::broker_ip(n), PORTS[0]),
            api_addr: SocketAddr::new(Self::broker_ip(n), PORTS[1]),
        });
        let key = KeyConfig {
            kid: KID.into(),
            algorithm: "EdDSA".into(),
            public_key_pem: self.0.public_key.clone(),
            dev: true,
        };
        let apps = vec![AppConfig { app: APP.into(), keys: vec![key] }];
        BrokerConfig {
            name: format!("broker-{}", n + 1),
            broker: BrokerId(n as u32 + 1),
            data_dir: format!("/data/broker-{}", n + 1).into(),
            peer_listen: at(0),
            api_listen: at(1),
            http_listen: at(2),
            peers: peers.collect(),
            tls: keys().files.clone(),
            development: true,
            bootstrap: Some(Bootstrap { cluster_id: "simulated".into(), shards: self.0.shards, apps }),
            park_after_ms: self.0.park_after_ms,
            store: self.0.store.clone(),
        }
    }

    fn gateway_config(&self, n: usize) -> GatewayConfig {
        let brokers = (0..self.brokers()).map(|n| BrokerAddress {
            broker: BrokerId(n as u32 + 1),
            name: format!("broker-{}", n + 1),
            peer_addr: SocketAddr::new(Self::broker_ip(n), PORTS[0]),
        });
        GatewayConfig {
            name: format!("gateway-{}", n + 1),
            quic_listen: SocketAddr::new(Self::gateway_ip(n), PORTS[3]),
            http_listen: SocketAddr::new(Self::gateway_ip(n), PORTS[2]),
            brokers: brokers.collect(),
            tls: keys().files.clone(),
            development: true,
            limits: GatewayLimits::default(),
        }
    }

    /// A device's machine; each has one for the whole run.
    fn device_host(&self, device: &Device) -> Host {
        let mut devices = self.0.devices.lock();
        if let Some((_, host)) = devices.iter().find(|(known, _)| known == device) {
            return host.clone();
        }
        let host = self.0.network.boot(IpAddr::V4(Ipv4Addr::new(10, 0, 3, devices.len() as u8 + 1)));
        devices.push((device.clone(), host.clone()));
        host
    }

    fn token(&self, device: &Device) -> Result<String, ClientError> {
        let bad = |error: String| ClientError::Config(error);
        let claims = Claims {
            app: AppId::new(APP).map_err(|e| bad(e.to_string()))?,
            user: UserId::new(&*device.user).map_err(|e| bad(e.to_string()))?,
            device: Some(DeviceId::new(&*device.name).map_err(|e| bad(e.to_string()))?),
            admin: false,
            expires_s: WALL_MS / 1_000 + TOKEN_S,
        };
        token::mint_at(&self.0.private_key, KID, &claims, WALL_MS / 1_000).map_err(|e| bad(e.to_string()))
    }
}

impl Connect for Cluster {
    async fn connect(
        &self,
        device: &Device,
        cursors: Arc<MemoryCursors>,
        gateway: usize,
    ) -> Result<Client, ClientError> {
        let (count, host, token) = (self.gateways().max(1), self.device_host(device), self.token(device)?);
        let builder = Client::builder().host(host).tls(keys().client.clone()).token(token).cursors(cursors);
        // All of them, so that the SDK can go elsewhere by itself; which comes first is the caller's wish.
        let order = (0..count).map(|n| SocketAddr::new(Self::gateway_ip((gateway + n) % count), PORTS[3]));
        order
            .fold(builder, |builder, addr| builder.gateway(addr))
            .connect_timeout(Duration::from_secs(5))
            .connect()
            .await
    }
}

//! Starts and stops the nodes of `stentor dev`. They share one process but nothing else: every byte between them goes
//! over sockets, as between machines.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::{join_all, select_all};
use stentor_broker::Broker;
use stentor_gateway::{Gateway, GatewayConfig, GatewayLimits};

use super::Home;
use crate::{
    cluster_file::ClusterFile,
    failure::Failure,
    layout::{self, Layout, Size},
    ports::Ports,
};

/// A cluster that is not ready by then never will be.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// The running nodes.
pub(crate) struct DevCluster {
    dir: PathBuf,
    file: ClusterFile,
    brokers: Vec<Broker>,
    gateways: Vec<Gateway>,
}

impl DevCluster {
    /// Starts everything and returns when every shard has a leader and the gateway takes devices.
    pub(crate) async fn start(home: &Home, shards: u32) -> Result<Self, Failure> {
        let dir = home.dir();
        let before = ClusterFile::read(dir)?;
        let mut ports = Ports::lock();
        let size = Size { brokers: 3, gateways: 1, shards };
        let layout = layout::plan(dir, size, before.as_ref(), &mut ports)?;
        let Layout { mut file, brokers: broker_configs, gateways: gateway_configs } = layout;
        let (mut brokers, mut gateways) = (Vec::new(), Vec::new());
        for config in broker_configs {
            brokers.push(Box::pin(stentor_broker::start(config)).await.map_err(Failure::failed)?);
        }
        for config in gateway_configs {
            // It ends with Ctrl-C; nobody waits for devices to find another gateway.
            let limits = GatewayLimits { drain_ms: 0, ..config.limits };
            let config = GatewayConfig { limits, ..config };
            gateways.push(Box::pin(stentor_gateway::start(config)).await.map_err(Failure::failed)?);
        }
        drop(ports);

        wait_until_ready(&brokers, &gateways).await?;
        file.nodes.iter_mut().for_each(|node| node.pid = Some(std::process::id()));
        file.write(dir)?;
        Ok(Self { dir: dir.to_owned(), file, brokers, gateways })
    }

    /// What `cluster.json` says.
    pub(crate) fn file(&self) -> &ClusterFile {
        &self.file
    }

    /// The folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns when a node has stopped by itself: a full disk, a damaged file.
    pub(crate) async fn failed(&self) -> Failure {
        let waits = self.brokers.iter().map(|broker| Box::pin(broker.failed()));
        let (why, which, _) = select_all(waits).await;
        Failure::failed(format_args!("broker-{} has stopped: {why}", which + 1))
    }

    /// Devices first, then brokers; the folder remembers the ports.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        join_all(self.gateways.into_iter().map(Gateway::shutdown)).await;
        join_all(self.brokers.into_iter().map(Broker::shutdown)).await;
        let mut file = self.file;
        file.nodes.iter_mut().for_each(|node| node.pid = None);
        file.write(&self.dir)
    }
}

async fn wait_until_ready(brokers: &[Broker], gateways: &[Gateway]) -> Result<(), Failure> {
    let late = |_| Failure::failed(format_args!("the cluster was not ready within {READY_WITHIN:?}"));
    tokio::time::timeout(READY_WITHIN, async {
        for broker in brokers {
            broker.ready(READY_WITHIN).await.map_err(Failure::failed)?;
        }
        for gateway in gateways {
            gateway.ready(READY_WITHIN).await.map_err(Failure::failed)?;
        }
        Ok(())
    })
    .await
    .map_err(late)?
}

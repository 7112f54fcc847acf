//! Between brokers: one stream per peer and lane carries the Raft messages of all shards. Must never mix lanes: a
//! heartbeat behind a large append would cost a leader its lease.

pub(crate) mod client;
pub(crate) mod codec;
pub(crate) mod link;
pub(crate) mod server;
pub(crate) mod snapshot;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use stentor_proto::ids::BrokerId;
use stentor_transport::{
    Host,
    grpc::Channel,
    tls::{ClientTls, TlsError},
};
use tokio::task::JoinSet;

use self::link::{Lane, Link};
use crate::{clocks::Clocks, metrics::Metrics, parking::Parking, replaced::Replaced};

struct Peer {
    control: Arc<Link>,
    append: Arc<Link>,
    /// For calls and snapshots: a connection apart, so that a snapshot cannot delay a heartbeat.
    bulk: Channel,
}

/// The outgoing streams to all peers.
pub(crate) struct Links {
    peers: BTreeMap<BrokerId, Peer>,
    /// What peers say of this directory's places.
    pub(crate) replaced: Arc<Replaced>,
    /// Which shards are parked: no vote may be asked for there.
    pub(crate) parking: Arc<Parking>,
}

impl Links {
    /// Starts a task per peer and lane; they end when `tasks` is dropped.
    pub(crate) fn start(
        (host, tls): (&Host, &ClientTls),
        (own, parking): (BrokerId, Arc<Parking>),
        peers: impl Iterator<Item = (BrokerId, SocketAddr)>,
        clocks: &Arc<Clocks>,
        metrics: &Arc<Metrics>,
        tasks: &mut JoinSet<()>,
        on_connect: impl Fn(BrokerId, Lane) + Clone + Send + 'static,
    ) -> Result<Arc<Self>, TlsError> {
        let (mut all, replaced) = (BTreeMap::new(), Arc::<Replaced>::default());
        for (broker, addr) in peers {
            let (control, append) = (Link::new(broker, &replaced), Link::new(broker, &replaced));
            for (lane, link) in [(Lane::Control, &control), (Lane::Append, &append)] {
                // A connection per lane: streams of one HTTP/2 connection share its window and its TCP queue.
                let channel = host.channel(addr, tls)?;
                let way = link::Way { link: link.clone(), own, lane, channel, host: host.clone() };
                tasks.spawn(link::run(way, clocks.clone(), metrics.clone(), on_connect.clone()));
            }
            all.insert(broker, Peer { control, append, bulk: host.channel(addr, tls)? });
        }
        Ok(Arc::new(Self { peers: all, replaced, parking }))
    }

    /// The stream to a peer; `None` for one that is not configured.
    pub(crate) fn link(&self, peer: BrokerId, lane: Lane) -> Option<Arc<Link>> {
        let peer = self.peers.get(&peer)?;
        Some(match lane {
            Lane::Control => peer.control.clone(),
            Lane::Append => peer.append.clone(),
        })
    }

    /// All peers that are configured.
    pub(crate) fn peers(&self) -> impl Iterator<Item = BrokerId> {
        self.peers.keys().copied()
    }

    /// Whatever waits for a peer fails now.
    pub(crate) fn close(&self) {
        self.peers.values().for_each(|peer| {
            peer.control.broken();
            peer.append.broken();
        });
    }

    /// The connection for calls and snapshots.
    pub(crate) fn channel(&self, peer: BrokerId) -> Option<Channel> {
        self.peers.get(&peer).map(|peer| peer.bulk.clone())
    }
}

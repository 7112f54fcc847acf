//! The meta shard's rows as this broker knows them: cluster, placement, brokers, apps; and how they come to be. Must
//! never write the rows of a new cluster over those of an existing one.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::{StreamExt, stream::FuturesUnordered};
use stentor_engine::{
    command,
    effect::Outcome,
    key::{Entity, Kind, Parts, RowKey},
    limits,
    meta::numbers,
    placement,
    placement::SlotMap,
    rows::Row,
};
use stentor_proto::{
    Bytes, Message,
    ids::{AppId, BrokerId, Incarnation, META_SHARD, ReplicaId, ShardId},
    internal::{self, AppInfo, BrokerInfo, LeaderHint, PlacementRow, PlacementView, SigningKey},
    reason::Reason,
};
use stentor_raft_store::{ReadError, ShardReader};
use stentor_transport::token::Keys;
use thiserror::Error;
use tokio::sync::watch;

use crate::{
    config::Bootstrap,
    host::{self, HostError},
    node::Node,
    shard::HostedShard,
};

/// Replicas of a data shard.
const REPLICATION: usize = 3;
/// Rows of one scan; the meta shard has few.
const SCAN_ROWS: usize = 256;

/// One picture of the meta shard.
pub(crate) struct MetaView {
    pub(crate) cluster_id: String,
    pub(crate) placement: PlacementRow,
    pub(crate) slots: SlotMap,
    pub(crate) brokers: Vec<BrokerInfo>,
    /// The directory of each broker, and the last incarnation given to one.
    pub(crate) incarnations: BTreeMap<BrokerId, (Incarnation, Incarnation)>,
    pub(crate) apps: Vec<AppInfo>,
    pub(crate) keys: Keys,
}

impl MetaView {
    /// The placement's version, that fences callers.
    pub(crate) fn version(&self) -> u64 {
        self.placement.version
    }

    /// A broker's name; its number where it has none.
    pub(crate) fn broker_name(&self, broker: BrokerId) -> String {
        let known = self.brokers.iter().find(|b| b.broker == broker.0);
        known.map_or_else(|| format!("broker {broker}"), |b| b.name.clone())
    }

    /// The number of a broker's directory; 0 for an unknown broker.
    pub(crate) fn incarnation(&self, broker: BrokerId) -> Incarnation {
        self.incarnations.get(&broker).copied().unwrap_or_default().0
    }

    /// The last number given to a directory of a broker; 0 for an unknown broker.
    pub(crate) fn given(&self, broker: BrokerId) -> Incarnation {
        self.incarnations.get(&broker).copied().unwrap_or_default().1
    }

    /// Whether the cluster wants another directory in this one's place. As long as a shard's members have it, it is needed
    /// there all the same.
    pub(crate) fn is_replaced(&self, replica: ReplicaId) -> bool {
        self.incarnation(replica.broker) > replica.incarnation
    }

    /// As gateways get it.
    pub(crate) fn to_proto(&self, leaders: Vec<LeaderHint>) -> PlacementView {
        PlacementView {
            cluster_id: self.cluster_id.clone(),
            version: self.placement.version,
            shards: self.placement.shards.clone(),
            brokers: self.brokers.clone(),
            apps: self.apps.clone(),
            leaders,
        }
    }
}

/// The latest picture; `None` until the cluster is made and this broker has heard of it.
pub(crate) struct Meta(watch::Sender<Option<Arc<MetaView>>>);

impl Default for Meta {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Meta {
    pub(crate) fn view(&self) -> Option<Arc<MetaView>> {
        self.0.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<Arc<MetaView>>> {
        self.0.subscribe()
    }

    fn publish(&self, view: MetaView) {
        self.0.send_replace(Some(Arc::new(view)));
    }
}

/// Why the meta shard's rows cannot be used: damage, or a fault of ours.
#[derive(Debug, Error)]
pub(crate) enum MetaError {
    /// They cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// They contradict themselves.
    #[error("the placement cannot be used: {0}")]
    Placement(#[from] placement::BadPlacement),
}

async fn load(reader: &ShardReader, development: bool) -> Result<Option<MetaView>, MetaError> {
    let entity = Entity::meta();
    let (mut cluster, mut placement, mut brokers, mut apps) = (None, None, Vec::new(), Vec::new());
    let mut incarnations = BTreeMap::new();
    let mut after: Option<RowKey> = None;
    loop {
        let rows = reader.scan(entity.as_bytes(), after.as_ref(), SCAN_ROWS).await?;
        let last = rows.len() < SCAN_ROWS;
        after = rows.last().map(|(key, _)| key.clone());
        for (key, row) in rows {
            match row {
                Row::Cluster(row) => cluster = Some(row),
                Row::Placement(row) => placement = Some(row),
                Row::Broker(row) => {
                    let (current, given) = numbers(&row);
                    let Some(put) = row.broker else { continue };
                    incarnations.insert(BrokerId(put.broker), (Incarnation(current), Incarnation(given)));
                    brokers.push(broker_info(&put));
                }
                Row::App(row) => apps.extend(app_info(&key, row.keys)),
                _ => {}
            }
        }
        if last {
            break;
        }
    }
    let (Some(cluster), Some(placement)) = (cluster, placement) else { return Ok(None) };
    Ok(Some(MetaView {
        cluster_id: text(&cluster.cluster_id),
        slots: SlotMap::from_row(&placement)?,
        placement,
        brokers,
        incarnations,
        keys: Keys::new(apps.clone(), development),
        apps,
    }))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn broker_info(row: &internal::PutBroker) -> BrokerInfo {
    BrokerInfo { broker: row.broker, name: text(&row.name), peer: text(&row.peer), api: text(&row.api) }
}

fn app_info(key: &RowKey, keys: Vec<SigningKey>) -> Option<AppInfo> {
    let parts = Parts::of(key.as_bytes()).filter(|parts| parts.kind == Kind::App)?;
    Some(AppInfo { app: text(parts.sub), keys })
}

/// Keeps the picture up to date and the replicas open, until the broker stops.
pub(crate) async fn follow(node: Arc<Node>, reader: ShardReader, own: ReplicaId) {
    // Moved by every entry, and by a snapshot that takes the place of many.
    let mut applied = reader.applied();
    // One at a time, beside this: thousands of replicas take long to open, and meanwhile the picture changes.
    let (mut opening, mut behind) = (FuturesUnordered::new(), false);
    loop {
        applied.mark_unchanged();
        match load(&reader, node.config.development).await {
            Ok(Some(view)) => {
                node.meta.publish(view);
                behind = true;
            }
            Ok(None) => {}
            Err(_) if node.stop.is_cancelled() => return,
            Err(error) => return node.fail(&format!("cannot read the meta shard: {error}")),
        }
        loop {
            if behind && opening.is_empty() {
                opening.push(open_replicas(&node, own));
                behind = false;
            }
            tokio::select! {
                changed = applied.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                Some(opened) = opening.next(), if !opening.is_empty() => match opened {
                    Ok(()) => {}
                    Err(_) if node.stop.is_cancelled() => return,
                    Err(error) => return node.fail(&error.to_string()),
                },
                () = node.stop.cancelled() => return,
            }
        }
    }
}

async fn open_replicas(node: &Arc<Node>, own: ReplicaId) -> Result<(), HostError> {
    match node.meta.view() {
        Some(view) => host::reconcile(node, &view, own).await,
        None => Ok(()),
    }
}

/// Who leads which shard, as far as this broker's replicas know.
pub(crate) fn leader_hints(node: &Node) -> Vec<LeaderHint> {
    let all = node.all_hosted();
    let hints = all.iter().filter_map(|hosted| {
        let known = hosted.leadership();
        let broker = known.leader?.broker.0;
        Some(LeaderHint { shard: hosted.shard.0, broker, term: known.term })
    });
    hints.collect()
}

/// Writes the rows of a new cluster when this broker leads the meta shard and there are none yet; ends when there are.
pub(crate) async fn found(node: Arc<Node>, meta: Arc<HostedShard>, bootstrap: Bootstrap) {
    let (mut leadership, mut view) = (meta.leadership.clone(), node.meta.watch());
    loop {
        if view.borrow_and_update().is_some() {
            return;
        }
        if leadership.borrow_and_update().ready {
            // The first entry of this term is applied: no rows here means that nobody has written any.
            match load(&meta.reader, node.config.development).await {
                Ok(None) => {
                    if let Err(what) = write_rows(&node, &meta, &bootstrap).await {
                        tracing::info!(what, "the cluster is not founded yet");
                    }
                }
                Ok(Some(_)) => return,
                Err(error) => return node.fail(&format!("cannot read the meta shard: {error}")),
            }
        }
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            changed = view.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(std::time::Duration::from_millis(200)) => {}
            () = node.stop.cancelled() => return,
        }
    }
}

async fn write_rows(node: &Node, meta: &HostedShard, bootstrap: &Bootstrap) -> Result<(), String> {
    let commands = founding_commands(node, bootstrap)?;
    for command in commands {
        match meta.proposer.call(command::encode(&command), 1).await.as_deref() {
            Ok([Outcome::Refused { reason: Reason::WrongVersion | Reason::AlreadyExists, .. }]) => {}
            Ok([Outcome::Refused { reason, .. }]) => return Err(format!("refused: {}", reason.code())),
            Ok(_) => {}
            Err(why) => return Err(format!("{why:?}")),
        }
    }
    Ok(())
}

fn founding_commands(node: &Node, bootstrap: &Bootstrap) -> Result<Vec<internal::Command>, String> {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let mut commands = vec![command::put_cluster(&bootstrap.cluster_id, bootstrap.shards)];
    for app in &bootstrap.apps {
        let keys = app.keys.iter().map(|key| SigningKey {
            kid: bytes(&key.kid),
            algorithm: bytes(&key.algorithm),
            public_key_pem: bytes(&key.public_key_pem),
            dev: key.dev,
        });
        let name = AppId::new(&app.app).map_err(|e| e.to_string())?;
        commands.push(command::put_app(&name, keys.collect()));
    }
    for peer in &node.config.peers {
        commands.push(command::put_broker(internal::PutBroker {
            broker: peer.broker.0,
            name: bytes(&peer.name),
            peer: bytes(&peer.peer_addr.to_string()),
            api: bytes(&peer.api_addr.to_string()),
            incarnation: FIRST_INCARNATION.0,
        }));
    }
    let replicas = first_replicas(node);
    let replication = REPLICATION.min(replicas.len());
    let mut plan = placement::plan(&replicas, bootstrap.shards, replication).map_err(|e| e.to_string())?;
    for shard in plan.iter_mut().filter(|p| ShardId(p.shard) == META_SHARD) {
        shard.replicas = meta_voters(node).map(ReplicaId::to_u64).collect();
    }
    commands.push(command::put_placement(plan, 0));
    debug_assert!(commands.iter().all(|c| c.encoded_len() <= limits::MAX_COMMAND_BYTES));
    Ok(commands)
}

/// The directories that found a cluster all have this number.
pub(crate) const FIRST_INCARNATION: Incarnation = Incarnation(1);

fn first_replicas(node: &Node) -> Vec<ReplicaId> {
    let mut replicas: Vec<_> = node
        .config
        .peers
        .iter()
        .map(|peer| ReplicaId { broker: peer.broker, incarnation: FIRST_INCARNATION })
        .collect();
    replicas.sort_unstable();
    replicas
}

/// The meta shard is on every founding broker, so that each reads its placement from its own replica.
pub(crate) fn meta_voters(node: &Node) -> impl Iterator<Item = ReplicaId> + use<> {
    first_replicas(node).into_iter().take(limits::MAX_REPLICAS)
}

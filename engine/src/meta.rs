//! The meta shard's rows: cluster, apps and their keys, brokers, placement. Must never go back to an older placement,
//! nor forget that a shard was initialized, nor give one incarnation to two directories.

use stentor_proto::{
    ids::{BrokerId, Incarnation, PlacementVersion, ReplicaId, ShardId},
    internal::{
        BrokerRow, ClusterRow, JoinBroker, MarkInitialized, PlacementRow, PutApp, PutBroker, PutCluster, PutPlacement,
        ShardPlacement, SigningKey,
    },
    reason::Reason,
};

use crate::{
    apply::{ApplyError, Call},
    effect::Outcome,
    key::{Entity, Kind, RowKey},
    limits,
    placement::SlotMap,
    rows::Rows,
    state,
};

/// The cluster's row.
pub fn cluster_key() -> RowKey {
    Entity::meta().key(Kind::Cluster, &[])
}

/// An app's row.
pub fn app_key(app: &str) -> RowKey {
    Entity::meta().key(Kind::App, &[app.as_bytes()])
}

/// A broker's row.
pub fn broker_key(broker: u32) -> RowKey {
    Entity::meta().key(Kind::Broker, &[&broker.to_be_bytes()])
}

/// The placement's row.
pub fn placement_key() -> RowKey {
    Entity::meta().key(Kind::Placement, &[])
}

/// Names the cluster; the same name again changes nothing, another one is refused.
pub(crate) fn put_cluster<R: Rows>(call: &mut Call<'_, R>, put: &PutCluster) -> Result<Outcome, ApplyError> {
    if put.cluster_id.is_empty() || put.cluster_id.len() > limits::MAX_META_TEXT_BYTES || !is_text(&put.cluster_id) {
        return Ok(Outcome::refused(Reason::BadId));
    }
    if put.shards == 0 || put.shards > limits::MAX_SHARDS {
        return Ok(Outcome::refused(Reason::Malformed));
    }
    let key = cluster_key();
    if let Some(row) = state::read::<ClusterRow>(call.rows, &key)? {
        let same = row.cluster_id == put.cluster_id && row.shards == put.shards;
        return Ok(if same { Outcome::Done } else { Outcome::refused(Reason::AlreadyExists) });
    }
    call.rows.put(key, ClusterRow { cluster_id: state::own(&put.cluster_id), shards: put.shards }.into());
    Ok(Outcome::Done)
}

/// Adds an app or replaces its keys.
pub(crate) fn put_app<R: Rows>(call: &mut Call<'_, R>, put: &PutApp) -> Result<Outcome, ApplyError> {
    let Ok(app) = stentor_proto::ids::AppId::check(&put.name) else { return Ok(Outcome::refused(Reason::BadId)) };
    let text = |b: &[u8]| b.len() <= limits::MAX_META_TEXT_BYTES && is_text(b);
    let usable = |key: &SigningKey| {
        let pem = &key.public_key_pem;
        text(&key.kid) && text(&key.algorithm) && pem.len() <= limits::MAX_KEY_PEM_BYTES && is_text(pem)
    };
    if put.keys.len() > limits::MAX_SIGNING_KEYS || !put.keys.iter().all(usable) {
        return Ok(Outcome::refused(Reason::Malformed));
    }
    let keys = put.keys.iter().map(|key| SigningKey {
        kid: state::own(&key.kid),
        algorithm: state::own(&key.algorithm),
        public_key_pem: state::own(&key.public_key_pem),
        dev: key.dev,
    });
    let row = stentor_proto::internal::AppRow { keys: keys.collect() };
    call.rows.put(app_key(app), row.into());
    Ok(Outcome::Done)
}

/// Adds a broker or replaces its addresses. Its incarnation never goes back, and after the first one it is one that was
/// given. A higher one takes the places of the one before in every shard that has committed; one that never has keeps
/// its first members, since another set of them could begin it a second time.
pub(crate) fn put_broker<R: Rows>(call: &mut Call<'_, R>, put: &PutBroker) -> Result<Outcome, ApplyError> {
    let text = |b: &[u8]| !b.is_empty() && b.len() <= limits::MAX_META_TEXT_BYTES && is_text(b);
    if put.broker == 0 || put.incarnation == 0 || ![&put.name, &put.peer, &put.api].into_iter().all(|b| text(b)) {
        return Ok(Outcome::refused(Reason::Malformed));
    }
    let key = broker_key(put.broker);
    let before = state::read::<BrokerRow>(call.rows, &key)?.cloned();
    let (last, given) = before.as_ref().map_or((0, put.incarnation), numbers);
    if put.incarnation < last || put.incarnation > given {
        return Ok(Outcome::refused(Reason::WrongVersion));
    }
    if before.is_some_and(|before| before.broker.as_ref() == Some(put)) {
        return Ok(Outcome::Done);
    }
    // Everything is read before anything is written.
    let placement = state::read::<PlacementRow>(call.rows, &placement_key())?.cloned();
    let broker = PutBroker {
        name: state::own(&put.name),
        peer: state::own(&put.peer),
        api: state::own(&put.api),
        ..put.clone()
    };
    call.rows.put(key, BrokerRow { broker: Some(broker), given }.into());
    if let Some(mut placement) = placement.filter(|_| last != 0 && put.incarnation > last) {
        let successor = ReplicaId { broker: BrokerId(put.broker), incarnation: Incarnation(put.incarnation) };
        for placed in placement.shards.iter_mut().filter(|placed| placed.initialized) {
            replace(placed, successor);
        }
        placement.version += 1;
        call.rows.put(placement_key(), placement.into());
    }
    Ok(Outcome::Done)
}

/// The incarnation that a broker has, and the last one that was given to a directory of it.
pub fn numbers(row: &BrokerRow) -> (u32, u32) {
    let current = row.broker.as_ref().map_or(0, |put| put.incarnation);
    (current, current.max(row.given))
}

/// A newer directory of a broker takes the place of an older one. True: there was one.
fn replace(placed: &mut ShardPlacement, successor: ReplicaId) -> bool {
    let older = |id: &&mut u64| {
        let replica = ReplicaId::from_u64(**id);
        replica.broker == successor.broker && replica.incarnation < successor.incarnation
    };
    placed.replicas.iter_mut().find(older).map(|id| *id = successor.to_u64()).is_some()
}

/// Replaces the placement if nobody has since `expect_version`. A shard that was initialized stays so.
pub(crate) fn put_placement<R: Rows>(call: &mut Call<'_, R>, put: &PutPlacement) -> Result<Outcome, ApplyError> {
    let key = placement_key();
    let before = state::read::<PlacementRow>(call.rows, &key)?.cloned().unwrap_or_default();
    if before.version != put.expect_version {
        return Ok(Outcome::refused(Reason::WrongVersion));
    }
    let version = before.version + 1;
    if SlotMap::new(PlacementVersion(version), &put.shards).is_err() {
        return Ok(Outcome::refused(Reason::Malformed));
    }
    let mut shards = put.shards.clone();
    for shard in &mut shards {
        shard.initialized |= before.shards.iter().any(|old| old.shard == shard.shard && old.initialized);
    }
    call.rows.put(key, PlacementRow { version, shards }.into());
    Ok(Outcome::Done)
}

/// Notes a shard's first commit, and gives places of lost directories to their successors: until now nobody could have
/// filled them.
pub(crate) fn mark_initialized<R: Rows>(call: &mut Call<'_, R>, mark: &MarkInitialized) -> Result<Outcome, ApplyError> {
    let key = placement_key();
    let shard = ShardId(mark.shard);
    let before = state::read::<PlacementRow>(call.rows, &key)?.cloned().unwrap_or_default();
    let Some(place) = before.shards.iter().position(|placed| ShardId(placed.shard) == shard) else {
        return Ok(Outcome::refused(Reason::UnknownShard));
    };
    if before.shards[place].initialized {
        return Ok(Outcome::Done);
    }
    let mut placed = ShardPlacement { initialized: true, ..before.shards[place].clone() };
    let mut replaced = false;
    for replica in before.shards[place].replicas.iter().map(|&id| ReplicaId::from_u64(id)) {
        let row = state::read::<BrokerRow>(call.rows, &broker_key(replica.broker.0))?;
        let incarnation = Incarnation(row.map_or(0, |row| numbers(row).0));
        replaced |= replace(&mut placed, ReplicaId { incarnation, ..replica });
    }
    let row = state::change::<PlacementRow>(call.rows, &key)?;
    if let Some(now) = row.shards.get_mut(place) {
        *now = placed;
    }
    // Otherwise the version stays: callers route by it, and nothing that they route by has changed.
    row.version += u64::from(replaced);
    Ok(Outcome::Done)
}

/// Gives an empty directory of a broker the next incarnation, once. It takes nobody's place yet: the number may never
/// reach a disk.
pub(crate) fn join_broker<R: Rows>(call: &mut Call<'_, R>, join: &JoinBroker) -> Result<Outcome, ApplyError> {
    let Some(cluster) = state::read::<ClusterRow>(call.rows, &cluster_key())? else {
        return Ok(Outcome::refused(Reason::Unavailable));
    };
    if cluster.cluster_id != join.cluster_id {
        return Ok(Outcome::refused(Reason::WrongCluster));
    }
    let key = broker_key(join.broker);
    let Some(given) = state::read::<BrokerRow>(call.rows, &key)?.map(|row| numbers(row).1) else {
        return Ok(Outcome::refused(Reason::UnknownBroker));
    };
    let Some(next) = given.checked_add(1).filter(|_| given == join.expect_given) else {
        return Ok(Outcome::refused(Reason::WrongVersion));
    };
    state::change::<BrokerRow>(call.rows, &key)?.given = next;
    Ok(Outcome::Joined { incarnation: Incarnation(next) })
}

fn is_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok()
}

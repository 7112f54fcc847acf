//! The meta shard's rows: cluster, apps and their keys, brokers, placement. Must never go back to an older placement,
//! nor forget that a shard was initialized.

use stentor_proto::{
    ids::{PlacementVersion, ShardId},
    internal::{
        BrokerRow, ClusterRow, MarkInitialized, PlacementRow, PutApp, PutBroker, PutCluster, PutPlacement, SigningKey,
    },
    reason::Reason,
};

use crate::{
    apply::{ApplyError, Call},
    effect::{Effect, Outcome},
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

fn changed<R: Rows>(call: &mut Call<'_, R>) -> Outcome {
    call.effects.push(Effect::MetaChanged);
    Outcome::Done
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
    Ok(changed(call))
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
    Ok(changed(call))
}

/// Adds a broker or replaces its addresses; its incarnation never goes back.
pub(crate) fn put_broker<R: Rows>(call: &mut Call<'_, R>, put: &PutBroker) -> Result<Outcome, ApplyError> {
    let text = |b: &[u8]| !b.is_empty() && b.len() <= limits::MAX_META_TEXT_BYTES && is_text(b);
    if put.broker == 0 || put.incarnation == 0 || ![&put.name, &put.peer, &put.api].into_iter().all(|b| text(b)) {
        return Ok(Outcome::refused(Reason::Malformed));
    }
    let key = broker_key(put.broker);
    let before = state::read::<BrokerRow>(call.rows, &key)?.and_then(|row| row.broker.as_ref());
    if before.is_some_and(|before| put.incarnation < before.incarnation) {
        return Ok(Outcome::refused(Reason::WrongVersion));
    }
    if before == Some(put) {
        return Ok(Outcome::Done);
    }
    let broker = PutBroker {
        name: state::own(&put.name),
        peer: state::own(&put.peer),
        api: state::own(&put.api),
        ..put.clone()
    };
    call.rows.put(key, BrokerRow { broker: Some(broker) }.into());
    Ok(changed(call))
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
    Ok(changed(call))
}

/// Notes a shard's first commit. The version stays: callers route by it, and nothing that they route by has changed.
pub(crate) fn mark_initialized<R: Rows>(call: &mut Call<'_, R>, mark: &MarkInitialized) -> Result<Outcome, ApplyError> {
    let key = placement_key();
    let place = state::read::<PlacementRow>(call.rows, &key)?
        .and_then(|row| row.shards.iter().position(|shard| ShardId(shard.shard) == ShardId(mark.shard)));
    let Some(place) = place else { return Ok(Outcome::refused(Reason::UnknownShard)) };
    let row = state::change::<PlacementRow>(call.rows, &key)?;
    match row.shards.get_mut(place) {
        Some(shard) if !shard.initialized => shard.initialized = true,
        _ => return Ok(Outcome::Done),
    }
    Ok(changed(call))
}

fn is_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok()
}

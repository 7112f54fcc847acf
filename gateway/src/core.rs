//! What all sessions of a gateway share: the placement, the shards, the streams to brokers, the tokens' keys, and which
//! session is the newest of its device. Must never hold a lock while something is awaited.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hashbrown::{HashMap, hash_map::Entry};
use parking_lot::Mutex;
use stentor_engine::{
    limits,
    placement::SlotMap,
    rate::{Bucket, Buckets},
};
use stentor_proto::{
    Bytes,
    ids::{AppId, BrokerId, ConversationId, DeviceId, META_SHARD, Seq, SessionNo, ShardId, UserId},
    internal::{BrokerBatch, BrokerFrame, PlacementView, broker_frame, gateway_frame::Frame},
    reason::Reason,
};
use stentor_transport::{Host, token::Keys};
use tokio::{sync::watch, time::Instant};

use crate::{
    config::{GatewayConfig, GatewayLimits},
    fanout::{Place, Topic},
    inbox::Inbox,
    link::Links,
    metrics::Metrics,
    sessions::{SessionPlace, Sessions},
    shard::{Around, Shard, Ticket, shard_of},
};

/// How often silent leaders and late answers are looked for.
const TICK: Duration = Duration::from_millis(50);

/// The cluster as the last placement has it.
#[derive(Default)]
struct View {
    cluster_id: String,
    slots: SlotMap,
    shards: BTreeMap<ShardId, Arc<Mutex<Shard>>>,
    /// By their places at this gateway. One that is gone keeps its place: sessions may still name it.
    places: Vec<Arc<Mutex<Shard>>>,
}

/// One device of one user.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Who {
    pub(crate) app: AppId,
    pub(crate) user: UserId,
    pub(crate) device: DeviceId,
}

/// What devices and users have spent of their rates lately.
struct Rates {
    sessions: Buckets<(AppId, UserId)>,
    sends: Buckets<Who>,
    send_bytes: Buckets<Who>,
}

impl Rates {
    fn new(limits: &GatewayLimits) -> Self {
        let most = limits::RATES_REMEMBERED;
        Self {
            sessions: Buckets::new(limits.sessions.rate(), most),
            sends: Buckets::new(limits.sends.rate(), most),
            send_bytes: Buckets::new(limits.send_bytes.rate(), most),
        }
    }
}

/// See the module.
pub(crate) struct Core {
    pub(crate) config: GatewayConfig,
    pub(crate) host: Host,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) links: Links,
    /// Where news of conversations goes.
    pub(crate) places: Sessions,
    /// True from the moment on in which this gateway sends its devices away.
    pub(crate) draining: watch::Sender<bool>,
    view: ArcSwap<View>,
    keys: ArcSwap<Keys>,
    placed: watch::Sender<bool>,
    sessions: Mutex<HashMap<Who, (SessionNo, Arc<Inbox>)>>,
    rates: Mutex<Rates>,
    started: Instant,
}

impl Core {
    pub(crate) fn new(config: GatewayConfig, host: Host, metrics: Arc<Metrics>) -> Self {
        let links = Links::new(config.brokers.iter().map(|b| b.broker));
        Self {
            rates: Mutex::new(Rates::new(&config.limits)),
            config,
            host,
            metrics,
            links,
            places: Sessions::default(),
            draining: watch::channel(false).0,
            view: ArcSwap::default(),
            keys: ArcSwap::default(),
            placed: watch::channel(false).0,
            sessions: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Monotonic time since the start, in ms.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The wall clock, in ms since the Unix epoch: for tokens and for telling devices, never for order.
    pub(crate) fn wall_ms(&self) -> u64 {
        self.host.wall_ms()
    }

    /// The instant of a time of [`Self::now_ms`].
    pub(crate) fn instant(&self, ms: u64) -> Instant {
        self.started + Duration::from_millis(ms)
    }

    /// The keys that tokens are verified with.
    pub(crate) fn keys(&self) -> Arc<Keys> {
        self.keys.load_full()
    }

    /// The cluster's id; empty before the first placement.
    pub(crate) fn cluster_id(&self) -> String {
        self.view.load().cluster_id.clone()
    }

    /// Ready once there is a placement.
    pub(crate) async fn placement_known(&self) {
        // The sender lives as long as `self`.
        let _ = self.placed.subscribe().wait_for(|placed| *placed).await;
    }

    /// Takes over a placement, unless it is older than the present one or of another cluster.
    pub(crate) fn placed(&self, view: PlacementView) {
        let before = self.view.load_full();
        let foreign = !before.cluster_id.is_empty() && before.cluster_id != view.cluster_id;
        let slots = match SlotMap::from_view(&view) {
            Ok(slots) if !foreign && slots.version() >= before.slots.version() => slots,
            Ok(_) => return tracing::warn!(version = view.version, "ignored an old or foreign placement"),
            Err(error) => return tracing::warn!(%error, "ignored a placement that cannot be used"),
        };
        let (mut shards, mut places) = (BTreeMap::new(), before.places.clone());
        // No device has anything in the meta shard, and places are counted.
        for (id, _) in slots.shards().filter(|(id, _)| *id != META_SHARD) {
            let shard = match before.shards.get(&id) {
                Some(shard) => shard.clone(),
                None if places.len() >= limits::MAX_SHARDS as usize => {
                    return tracing::error!(shard = %id, "ignored a placement: too many shards came and went");
                }
                None => {
                    let shard = Arc::new(Mutex::new(Shard::new(id, places.len() as u16)));
                    places.push(shard.clone());
                    shard
                }
            };
            shards.insert(id, shard);
        }
        let next = Arc::new(View { cluster_id: view.cluster_id, shards, places, slots });
        self.view.store(next.clone());
        self.keys.store(Arc::new(Keys::new(view.apps, self.config.development)));
        let around = self.around(&next);
        for (id, shard) in &next.shards {
            let leader = view.leaders.iter().find(|hint| hint.shard == id.0).map(|hint| BrokerId(hint.broker));
            let replicas = next.slots.replicas(*id).iter().map(|replica| replica.broker).collect();
            shard.lock().placed(replicas, leader, &around);
        }
        self.placed.send_replace(true);
    }

    /// The shard of a conversation or a user.
    pub(crate) fn shard_of(&self, app: &AppId, id: &str) -> Result<ShardId, Reason> {
        self.view.load().slots.shard_of_id(app.as_str(), id).ok_or(Reason::Unavailable)
    }

    /// Proposes commands in their order, sorted by shard on the way. What cannot be taken is answered as refused.
    pub(crate) fn propose(&self, commands: &mut Vec<(ShardId, Bytes, Ticket)>) {
        // A stable sort: the order within a shard stays.
        commands.sort_by_key(|(shard, ..)| *shard);
        let view = self.view.load();
        let around = self.around(&view);
        let mut commands = commands.drain(..).peekable();
        while let Some(&(id, ..)) = commands.peek() {
            let Some(shard) = view.shards.get(&id) else {
                commands.by_ref().take(1).for_each(|(.., ticket)| ticket.answer(Err(Reason::Unavailable.refusal())));
                continue;
            };
            let of_shard = std::iter::from_fn(|| commands.next_if(|(shard, ..)| *shard == id));
            shard.lock().propose(of_shard.map(|(_, command, ticket)| (command, ticket)), &around);
        }
    }

    /// Asks a shard's leader something.
    pub(crate) fn ask(&self, shard: ShardId, frame: Frame, ticket: Ticket) {
        self.with(shard, |shard, around| shard.ask(frame, ticket, around));
    }

    /// Lets a session watch a topic; see [`Shard::watch`].
    pub(crate) fn watch(
        &self,
        shard: ShardId,
        app: &AppId,
        topic: Topic<'_>,
        session: SessionPlace,
        inbox: &Inbox,
    ) -> Option<Place> {
        self.with(shard, |shard, around| shard.watch(app, topic, session, inbox, around))?
    }

    /// Ends what [`Self::watch`] began.
    pub(crate) fn unwatch(&self, place: Place, session: SessionPlace, inbox: &Inbox) {
        self.at(place, |shard, around| shard.unwatch(place, session, inbox, around));
    }

    /// See [`Shard::may_rest`].
    pub(crate) fn may_rest(&self, place: Place, at: Seq, inbox: &Inbox) -> bool {
        self.at(place, |shard, _| shard.may_rest(place, at, inbox)).unwrap_or(false)
    }

    /// See [`Shard::rests_at`].
    pub(crate) fn rests_at(&self, place: Place, inbox: &Inbox) -> Option<Seq> {
        self.at(place, |shard, _| shard.rests_at(place, inbox))?
    }

    /// The place of a conversation, if any session watches it.
    pub(crate) fn find(&self, app: &AppId, conversation: &str) -> Option<Place> {
        let shard = self.shard_of(app, conversation).ok()?;
        self.with(shard, |shard, _| shard.find(app, conversation))?
    }

    /// What is watched at a place.
    pub(crate) fn watched(&self, place: Place) -> Option<(ShardId, ConversationId)> {
        self.at(place, |shard, _| shard.watched(place))?
    }

    /// Everything that a broker sent in one message. A shard is locked once for its frames in a row.
    pub(crate) fn take(&self, from: BrokerId, batch: BrokerBatch) {
        let view = self.view.load();
        let around = self.around(&view);
        let mut frames = batch.frames.into_iter().peekable();
        while let Some(id) = frames.peek().map(|frame| self.shard_of_frame(&view, frame)) {
            let of_shard = std::iter::from_fn(|| frames.next_if(|frame| self.shard_of_frame(&view, frame) == id));
            match id.and_then(|id| view.shards.get(&id)) {
                Some(shard) => {
                    let mut shard = shard.lock();
                    of_shard.for_each(|frame| shard.take(from, frame, &around));
                }
                None => of_shard.for_each(drop),
            }
        }
    }

    fn shard_of_frame(&self, view: &View, frame: &BrokerFrame) -> Option<ShardId> {
        use broker_frame::Frame as F;
        match frame.frame.as_ref()? {
            F::Live(live) => view.slots.shard_of_id(&live.app, &live.conversation),
            F::Head(hint) if hint.user.is_empty() => view.slots.shard_of_id(&hint.app, &hint.conversation),
            F::Head(hint) => view.slots.shard_of_id(&hint.app, &hint.user),
            F::Beat(beat) => Some(ShardId(beat.shard)),
            F::Proposed(done) => Some(shard_of(done.id)),
            F::Interest(state) => Some(shard_of(state.id)),
            F::Read(done) => Some(shard_of(done.id)),
            F::Heads(done) => Some(shard_of(done.id)),
            F::Lookup(done) => Some(shard_of(done.id)),
        }
    }

    /// A broker's stream began.
    pub(crate) fn link_up(&self, broker: BrokerId) {
        self.each(|shard, around| shard.link_up(broker, around));
    }

    /// A broker's stream ended.
    pub(crate) fn link_down(&self, broker: BrokerId) {
        self.each(|shard, around| shard.link_down(broker, around));
    }

    /// Lets time pass for all shards until the task is dropped.
    pub(crate) async fn tick(self: Arc<Self>) {
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.each(|shard, around| shard.tick(around));
        }
    }

    /// Whether no proposal waits for an answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.view.load().shards.values().all(|shard| shard.lock().is_idle())
    }

    /// Whether a user may open one more session here now.
    pub(crate) fn may_open(&self, who: &Who) -> Result<(), Reason> {
        let user = (who.app.clone(), who.user.clone());
        if self.rates.lock().sessions.take(user, 1, self.now_ms()) {
            return Ok(());
        }
        self.metrics.rate_limited.inc();
        Err(Reason::RateLimited)
    }

    /// What a device has left of its sends and their bytes, for its session to keep.
    pub(crate) fn lend_rates(&self, who: &Who) -> (Bucket, Bucket) {
        let (mut rates, now_ms) = (self.rates.lock(), self.now_ms());
        (rates.sends.lend(who, now_ms), rates.send_bytes.lend(who, now_ms))
    }

    /// Takes back what [`Self::lend_rates`] gave.
    pub(crate) fn return_rates(&self, who: &Who, sends: Bucket, send_bytes: Bucket) {
        let (mut rates, now_ms) = (self.rates.lock(), self.now_ms());
        rates.sends.give_back(who.clone(), sends, now_ms);
        rates.send_bytes.give_back(who.clone(), send_bytes, now_ms);
    }

    /// A session was opened: it ends an older one of its device on this gateway. Refused when it is the older one.
    pub(crate) fn enter(&self, who: &Who, session_no: SessionNo, inbox: &Arc<Inbox>) -> Result<(), Reason> {
        let mut sessions = self.sessions.lock();
        match sessions.entry(who.clone()) {
            Entry::Occupied(entry) if entry.get().0 > session_no => return Err(Reason::SessionSuperseded),
            Entry::Occupied(mut entry) => entry.insert((session_no, inbox.clone())).1.supersede(),
            Entry::Vacant(entry) => drop(entry.insert((session_no, inbox.clone()))),
        }
        Ok(())
    }

    /// A session's connection ended.
    pub(crate) fn leave(&self, who: &Who, inbox: &Arc<Inbox>) {
        let mut sessions = self.sessions.lock();
        if sessions.get(who).is_some_and(|(_, current)| Arc::ptr_eq(current, inbox)) {
            sessions.remove(who);
        }
    }

    fn with<T>(&self, id: ShardId, what: impl FnOnce(&mut Shard, &Around<'_>) -> T) -> Option<T> {
        let view = self.view.load();
        let shard = view.shards.get(&id)?;
        Some(what(&mut shard.lock(), &self.around(&view)))
    }

    fn at<T>(&self, place: Place, what: impl FnOnce(&mut Shard, &Around<'_>) -> T) -> Option<T> {
        let view = self.view.load();
        let shard = view.places.get(place.shard())?;
        Some(what(&mut shard.lock(), &self.around(&view)))
    }

    fn each(&self, what: impl Fn(&mut Shard, &Around<'_>)) {
        let view = self.view.load();
        let around = self.around(&view);
        view.shards.values().for_each(|shard| what(&mut shard.lock(), &around));
    }

    fn around<'a>(&'a self, view: &View) -> Around<'a> {
        Around {
            links: &self.links,
            metrics: &self.metrics,
            sessions: &self.places,
            placement: view.slots.version(),
            now_ms: self.now_ms(),
            frame_bytes: self.config.limits.max_frame_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use stentor_engine::placement::plan;
    use stentor_proto::ids::ReplicaId;

    use super::*;

    #[test]
    fn the_largest_cluster_has_room() {
        let config = GatewayConfig::from_toml(crate::config::tests::GOOD).unwrap();
        let core = Core::new(config, Host::real(), Arc::default());
        let brokers: Vec<_> = (1..=3).map(|broker| ReplicaId::from_u64(broker << 32 | 1)).collect();
        let shards = plan(&brokers, limits::MAX_SHARDS, 3).unwrap();
        let view = PlacementView { cluster_id: "c".into(), version: 1, shards, ..Default::default() };
        core.placed(view.clone());
        assert!(*core.placed.borrow());
        core.placed(PlacementView { version: 2, ..view });
        assert_eq!(core.view.load().slots.version().0, 2, "those that are known take no second place");
    }
}

//! Many users on many devices who talk, read, come and go, through the public SDK alone, while something else breaks the
//! cluster under them. Time is tokio's and chance comes from a seed, so that it runs unchanged in a simulation. Must
//! never read a clock or draw from the system, nor record an answer before it came.

mod actor;
mod answers;
mod dice;
mod history;
mod mix;
mod participants;
mod plan;
mod read_mark;
mod reconnect;
mod retry;
mod send;
mod settle;
mod streams;
mod tail;

use std::{sync::Arc, time::Duration};

use stentor_client::{Client, ClientError, ConversationId, Create, MemoryCursors, UserId};
use tokio::task::JoinSet;

use self::actor::Actor;
pub use self::{dice::Dice, plan::Plan, settle::Settled};
use crate::oracle::{Call, Device, Name, Recorder};

/// How a device gets a session.
pub trait Connect: Send + Sync + 'static {
    /// Connects a device through one of the gateways, numbered from 0; beyond the last it begins again. Tries for a few
    /// seconds at most.
    fn connect(
        &self,
        device: &Device,
        cursors: Arc<MemoryCursors>,
        gateway: usize,
    ) -> impl Future<Output = Result<Client, ClientError>> + Send;
}

/// A conversation, by its name in the history and by its id.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) name: Name,
    pub(crate) id: ConversationId,
    /// Who created it, changes its participants, and reads all of it in the end.
    pub(crate) owner: Device,
}

/// What all devices share.
pub(crate) struct Stage<C> {
    pub(crate) plan: Plan,
    pub(crate) connect: C,
    pub(crate) recorder: Recorder,
    pub(crate) places: Vec<Place>,
    pub(crate) users: Vec<(Name, UserId)>,
}

/// A workload on its way.
pub struct Workload<C> {
    stage: Arc<Stage<C>>,
    actors: Vec<Actor<C>>,
}

impl<C> std::fmt::Debug for Workload<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload").field("plan", &self.stage.plan).finish_non_exhaustive()
    }
}

impl<C: Connect> Workload<C> {
    /// Connects every device and creates the conversations. The cluster should be whole.
    ///
    /// # Errors
    /// What the first device or conversation failed of.
    pub async fn begin(plan: Plan, connect: C, recorder: Recorder) -> Result<Self, ClientError> {
        let bad = |error: stentor_proto::ids::BadId| ClientError::Config(error.to_string());
        let place = |n| {
            let name = plan.conversation(n);
            Ok(Place { id: ConversationId::new(&*name).map_err(bad)?, name, owner: plan.owner(n) })
        };
        let places = (0..plan.conversations).map(place).collect::<Result<_, ClientError>>()?;
        let users = plan.users().map(|name| Ok((Arc::clone(&name), UserId::new(&*name).map_err(bad)?)));
        let users = users.collect::<Result<_, ClientError>>()?;
        let stage = Arc::new(Stage { plan, connect, recorder, places, users });
        let mut dice = Dice::new(stage.plan.seed).fork("actors");
        let mut actors = Vec::new();
        for device in stage.plan.devices() {
            let mut actor = Actor::new(device, Arc::clone(&stage), dice.fork("actor"));
            actor.connect_within(stage.plan.patience).await?;
            actors.push(actor);
        }
        let workload = Self { stage, actors };
        workload.create().await?;
        Ok(workload)
    }

    async fn create(&self) -> Result<(), ClientError> {
        let Stage { plan, recorder, places, users, .. } = &*self.stage;
        let mut dice = Dice::new(plan.seed).fork("conversations");
        for Place { name, id, owner } in places {
            let actor = self.actors.iter().find(|actor| actor.who == *owner);
            let client = actor.and_then(Actor::client).ok_or(ClientError::Closed)?;
            let history_full = dice.chance(1, 4);
            let others = users.iter().filter(|(user, _)| *user != owner.user);
            let others: Vec<UserId> = others.filter(|_| dice.chance(2, 3)).map(|(_, id)| id.clone()).collect();
            let create = Create { history_full, ..Create::group(others) };
            let operation = recorder.invoke(owner, name, Call::Create { history_full });
            let created = client.create_conversation(create.id(id.clone())).await;
            recorder.answer(operation, answers::created(&created));
            created?;
        }
        Ok(())
    }

    /// Lets every device do all its operations. Returns when all are done, and each has its answer or has been waited
    /// for as long as the plan's patience.
    pub async fn run(&mut self) {
        let mut running = JoinSet::new();
        for (at, actor) in self.actors.drain(..).enumerate() {
            running.spawn(async move { (at, actor.run().await) });
        }
        let mut done = Vec::new();
        while let Some(finished) = running.join_next().await {
            done.extend(finished);
        }
        done.sort_by_key(|(at, _)| *at);
        self.actors = done.into_iter().map(|(_, actor)| actor).collect();
    }

    /// When all is healed: gives every device a new session, reads every conversation whole, and waits until every device
    /// has all that is its own. What is not there within this time, for each of the three, is named in the answer.
    pub async fn settle(&mut self, within: Duration) -> Settled {
        settle::settle(&self.stage, &mut self.actors, within).await
    }
}

//! `send`: messages into conversations until they are acknowledged, through the SDK's sessions with gateways. Must never
//! count what was not acknowledged.

use std::{sync::Arc, time::Instant};

use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, UserId};

use super::{
    Stop, Tasks,
    lane::{LATE, Lane},
    spread::{self, Plan},
    talk::{self, Talk},
};
use crate::{
    BenchError, Target,
    body::{Bodies, BodySize},
    meter::Meters,
    pace::Pace,
    workers::{Load, Stage, Turns},
};

/// Devices that connect at the same time.
const CONNECTING: usize = 32;

/// What is sent, and by how many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SendSettings {
    /// Conversations, each with the same share.
    pub conversations: usize,
    /// Unanswered messages at most, all together.
    pub window: usize,
    /// Devices that send, at least; as many more as the window needs.
    pub sessions: usize,
    /// How long bodies are.
    pub body: BodySize,
}

impl Default for SendSettings {
    fn default() -> Self {
        Self { conversations: 64, window: 1_024, sessions: 1, body: BodySize::Bytes(256) }
    }
}

/// Devices and conversations, ready to send.
#[derive(Debug)]
pub struct SendLoad {
    clients: Vec<Client>,
    talks: Vec<Arc<Talk>>,
    plan: Plan,
    bodies: Arc<Bodies>,
    /// Who may look at each conversation.
    owners: Vec<usize>,
}

impl SendLoad {
    /// Connects the devices and creates the conversations.
    pub async fn prepare(target: &Target, settings: &SendSettings, bodies: Bodies) -> Result<Self, BenchError> {
        let plan = spread::plan(settings.conversations, settings.window, settings.sessions)?;
        let users: Vec<UserId> =
            (0..plan.sessions).map(|n| target.user("sender", n)).collect::<Result<_, BenchError>>()?;
        let clients = connect(target, &users).await?;
        let mut members = vec![Vec::new(); settings.conversations];
        for lane in &plan.lanes {
            lane.conversations.iter().for_each(|&conversation| members[conversation].push(lane.session));
        }
        let wanted = members.iter().enumerate().map(|(n, sessions)| {
            let others = sessions[1..].iter().map(|&session| users[session].clone()).collect();
            (clients[sessions[0]].clone(), target.named("send", n), others)
        });
        // With a window smaller than the conversations a warm-up would not get round to all of them.
        let first = (settings.conversations > settings.window).then(|| bodies.get(0));
        let talks = talk::create_all(wanted.collect(), first.as_ref()).await?;
        let owners = members.iter().map(|sessions| sessions[0]).collect();
        Ok(Self { clients, talks, plan, bodies: Arc::new(bodies), owners })
    }

    /// How many devices send.
    pub fn sessions(&self) -> usize {
        self.plan.sessions
    }

    fn lane(&self, n: usize, turns: &Turns) -> Lane {
        let plan = &self.plan.lanes[n];
        Lane {
            number: turns.number(n),
            lanes: turns.of(),
            client: self.clients[plan.session].clone(),
            talks: plan.conversations.iter().map(|&conversation| Arc::clone(&self.talks[conversation])).collect(),
            window: plan.window,
            bodies: Arc::clone(&self.bodies),
            stamped: false,
            answers: "",
            gate: None,
        }
    }

    async fn count(&self) -> Result<usize, BenchError> {
        let readers = self.owners.iter().map(|&owner| self.clients[owner].clone());
        talk::count(readers.zip(self.talks.iter().cloned()).collect()).await
    }

    /// Ends the sessions.
    pub async fn close(self) {
        join_all(self.clients.iter().map(Client::close)).await;
    }
}

impl Load for SendLoad {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let mut meters = Meters::new();
        if matches!(pace, Pace::Open { .. }) {
            meters = meters.with(LATE);
        }
        let (meters, stop) = (Arc::new(meters), Stop::default());
        let turns = stage.gather(self.plan.lanes.len()).await?;
        let began = Instant::now();
        let lane = |n| self.lane(n, &turns).run(pace, began, Arc::clone(&meters), stop.clone());
        let tasks = Tasks::start((0..self.plan.lanes.len()).map(lane));
        let measured = stage.measure(&meters).await;
        stop.now();
        tasks.ended().await?;
        measured?;
        self.count().await.map(|_| ())
    }
}

/// One device of each user.
pub(crate) async fn connect(target: &Target, users: &[UserId]) -> Result<Vec<Client>, BenchError> {
    let connected = stream::iter(users.iter().enumerate()).map(|(n, user)| async move {
        let builder = target.device(user, "phone", n)?.window(spread::SENDS_PER_SESSION);
        builder.connect().await.map_err(BenchError::client(format!("connect {user}")))
    });
    connected.buffered(CONNECTING).try_collect().await
}

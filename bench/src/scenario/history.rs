//! `history`: the last messages of random conversations, read over sessions. A unit is one page. Must never count a page
//! that is not what was written.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures_util::future::{join_all, try_join_all};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, History, Item, Message};

use super::{
    Stop, Tasks, send,
    spread::SENDS_PER_SESSION,
    talk::{self, Talk},
};
use crate::{
    BenchError, Target,
    body::{Bodies, BodySize},
    meter::Meters,
    pace::{Pace, Turns},
    workers::{Load, Stage},
};

/// Messages that come together in a conversation, as in a real one.
const BURST: usize = 5;
/// Calls that a session has under way at most.
pub const READS_PER_SESSION: usize = 8;

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HistorySettings {
    /// Conversations.
    pub conversations: usize,
    /// Messages in each.
    pub messages: usize,
    /// Events of one page: the last ones.
    pub page: u32,
    /// Users who read, each his own conversations.
    pub sessions: usize,
    /// Reads of one user at the same time, 1 to 8.
    pub concurrency: usize,
    /// How long bodies are.
    pub body: BodySize,
}

impl Default for HistorySettings {
    fn default() -> Self {
        Self { conversations: 1_000, messages: 100, page: 50, sessions: 4, concurrency: 2, body: BodySize::Bytes(120) }
    }
}

/// Conversations that are full, and their readers.
#[derive(Debug)]
pub struct HistoryLoad {
    settings: HistorySettings,
    /// By reader.
    readers: Vec<(Client, Vec<Arc<Talk>>)>,
}

impl HistoryLoad {
    /// Creates the conversations and fills them.
    pub async fn prepare(target: &Target, settings: &HistorySettings, bodies: Bodies) -> Result<Self, BenchError> {
        let s = *settings;
        if s.sessions == 0 || s.conversations < s.sessions || !(1..=READS_PER_SESSION).contains(&s.concurrency) {
            return Err(BenchError::Settings("each of the sessions needs a conversation and 1 to 8 reads".into()));
        }
        let users: Vec<_> = (0..s.sessions).map(|n| target.user("reader", n)).collect::<Result<_, BenchError>>()?;
        let clients = send::connect(target, &users).await?;
        let mine = |n: usize| (n..s.conversations).step_by(s.sessions);
        let filled = clients.into_iter().enumerate().map(|(n, client)| {
            let wanted = mine(n).map(|c| (client.clone(), target.named("history", c), Vec::new())).collect();
            let bodies = &bodies;
            async move {
                let talks = talk::create_all(wanted, None).await?;
                fill(&client, &talks, s.messages, bodies).await?;
                Ok::<_, BenchError>((client, talks))
            }
        });
        Ok(Self { settings: s, readers: try_join_all(filled).await? })
    }

    /// Ends the sessions.
    pub async fn close(self) {
        join_all(self.readers.iter().map(|(client, _)| client.close())).await;
    }
}

impl Load for HistoryLoad {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let tasks = self.readers.len() * self.settings.concurrency;
        let turns = stage.gather(tasks).await?;
        let began = Instant::now();
        let spawned = (0..tasks).map(|task| {
            let (client, talks) = &self.readers[task % self.readers.len()];
            let reader = Reader {
                task,
                client: client.clone(),
                talks: talks.clone(),
                page: self.settings.page,
                turns: Turns::new(pace, began, turns.number(task), turns.of()),
                meters: Arc::clone(&meters),
                stop: stop.clone(),
            };
            reader.run()
        });
        let spawned = Tasks::start(spawned);
        let measured = stage.measure(&meters).await;
        stop.now();
        spawned.ended().await?;
        measured
    }
}

/// In bursts, so that each conversation's messages lie between those of others.
async fn fill(client: &Client, talks: &[Arc<Talk>], messages: usize, bodies: &Bodies) -> Result<(), BenchError> {
    let mut handles = Vec::with_capacity(SENDS_PER_SESSION);
    for from in (0..messages).step_by(BURST) {
        for talk in talks {
            for n in from..messages.min(from + BURST) {
                let message = Message::bytes(String::new(), bodies.get(n));
                let sent = client.send_pipelined(&talk.id, message).await;
                handles.push(sent.map_err(BenchError::client("fill a conversation"))?);
                talk.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            if handles.len() >= SENDS_PER_SESSION {
                try_join_all(handles.drain(..)).await.map_err(BenchError::client("fill a conversation"))?;
            }
        }
    }
    try_join_all(handles).await.map_err(BenchError::client("fill a conversation"))?;
    talk::count(talks.iter().map(|talk| (client.clone(), Arc::clone(talk))).collect()).await?;
    Ok(())
}

struct Reader {
    task: usize,
    client: Client,
    talks: Vec<Arc<Talk>>,
    page: u32,
    turns: Turns,
    meters: Arc<Meters>,
    stop: Stop,
}

impl Reader {
    async fn run(mut self) {
        let mut random = StdRng::seed_from_u64(self.task as u64);
        let mut took = Vec::new();
        loop {
            let due = self.turns.next().await;
            if self.stop.is_set() {
                return;
            }
            let talk = &self.talks[random.random_range(0..self.talks.len())];
            match self.read(talk).await {
                Ok(()) => {
                    took.push(due.elapsed());
                    self.meters.units.note(self.task, &mut took);
                }
                Err(error) => self.meters.units.fail(self.task, &error),
            }
        }
    }

    async fn read(&self, talk: &Talk) -> Result<(), BenchError> {
        let page = self.client.history(&talk.id, History::last(self.page)).await;
        let page = page.map_err(BenchError::client("read history"))?;
        talk.check(page.head.0)?;
        let first = (page.head.0 + 1).saturating_sub(u64::from(self.page)).max(1);
        let seqs = page.items.iter().map(|item| match item {
            Item::Event(event) => event.seq.0,
            Item::Hidden(hidden) => hidden.from.0,
        });
        if seqs.eq(first..=page.head.0) {
            return Ok(());
        }
        Err(BenchError::Wrong(format!("a page of {} is not {first} to {}", talk.id, page.head)))
    }
}

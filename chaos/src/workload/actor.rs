//! One device: does one operation after the other, keeps what a device keeps over its sessions, and lets answers come when
//! they come. Must never have two operations of one device leave in another order than they were recorded in.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use stentor_client::{Client, ClientError, MemoryCursors, Message, Sent};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout_at},
};

use super::{Connect, Dice, Place, Stage, answers, mix::Mix, streams::Streams};
use crate::oracle::{Call, Device, Message as Said, Name, OperationId};

/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(100);

/// A session that is there.
struct Session {
    client: Client,
    reader: JoinHandle<()>,
}

/// Where answers to sends, which come later, find the session of that moment.
#[derive(Default)]
pub(super) struct Line(Mutex<Option<Session>>);

impl Line {
    pub(super) fn client(&self) -> Option<Client> {
        self.0.lock().as_ref().map(|session| session.client.clone())
    }

    /// The session is gone from one moment to the next, as if the process had been killed.
    fn cut(&self) {
        if let Some(session) = self.0.lock().take() {
            session.reader.abort();
        }
    }
}

/// A device at work.
pub(crate) struct Actor<C> {
    pub(super) who: Device,
    pub(super) stage: Arc<Stage<C>>,
    pub(super) line: Arc<Line>,
    pub(super) streams: Arc<Streams>,
    pub(super) cursors: Arc<MemoryCursors>,
    pub(super) dice: Dice,
    /// Answers that are being waited for.
    pub(super) waiting: JoinSet<()>,
    /// Counts what this device has said, so that it never says the same twice.
    said: u64,
    gateway: usize,
}

impl<C: Connect> Actor<C> {
    pub(super) fn new(who: Device, stage: Arc<Stage<C>>, mut dice: Dice) -> Self {
        let gateway = dice.below(64) as usize;
        Self {
            who,
            stage,
            line: Arc::default(),
            streams: Arc::default(),
            cursors: Arc::new(MemoryCursors::new()),
            dice,
            waiting: JoinSet::new(),
            said: 0,
            gateway,
        }
    }

    pub(super) fn client(&self) -> Option<Client> {
        self.line.client()
    }

    pub(super) fn place(&mut self) -> Option<Place> {
        self.dice.pick(&self.stage.places).cloned()
    }

    /// Connects by the next gateway, and the next one if that fails, for so long.
    pub(super) async fn connect_within(&mut self, within: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + within;
        loop {
            self.gateway = self.gateway.wrapping_add(1);
            let client = self.stage.connect.connect(&self.who, Arc::clone(&self.cursors), self.gateway).await;
            match client {
                Ok(client) => {
                    self.streams = Arc::default();
                    let reading = Arc::clone(&self.streams).read(
                        client.clone(),
                        self.who.clone(),
                        self.stage.recorder.clone(),
                        self.dice.fork("reader"),
                    );
                    let reader = tokio::spawn(reading);
                    *self.line.0.lock() = Some(Session { client, reader });
                    return Ok(());
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(AGAIN).await,
            }
        }
    }

    /// Does all its operations.
    pub(super) async fn run(mut self) -> Self {
        let pause_ms = self.stage.plan.pause.as_millis() as u64;
        for _ in 0..self.stage.plan.operations {
            sleep(Duration::from_millis(self.dice.below(pause_ms + 1))).await;
            while self.waiting.try_join_next().is_some() {}
            if self.client().is_none_or(|client| client.ended().is_some()) {
                self.cut();
                let _ = self.connect_within(self.stage.plan.patience).await;
            }
            let operation = Mix::draw(&mut self.dice, self.stage.plan.sends_only);
            operation.execute(&mut self).await;
        }
        while self.waiting.join_next().await.is_some() {}
        self
    }

    /// Ends the session without a word.
    pub(super) fn cut(&mut self) {
        self.line.cut();
    }

    /// Ends the session in good order, as far as the gateway lets it.
    pub(super) async fn close(&mut self) {
        if let Some(client) = self.client() {
            // What close itself waits for is bounded in the SDK; a gateway that is being killed is not waited for.
            let _ = tokio::time::timeout(Duration::from_secs(5), client.close()).await;
        }
        self.cut();
    }

    /// A body that nobody has sent yet: who, where and the how manieth, then bytes of any kind.
    pub(super) fn body(&mut self) -> Vec<u8> {
        self.said += 1;
        let mut body = format!("{} {} ", self.who, self.said).into_bytes();
        let length = self.dice.below(self.stage.plan.body_bytes + 1);
        while (body.len() as u64) < length {
            body.push(self.dice.below(256) as u8);
        }
        body
    }

    /// Records and queues a send; the answer is waited for by whoever takes what this returns.
    pub(super) async fn say(&self, place: &Place, message: Message) -> Option<Asked> {
        let client = self.client()?;
        ask(&client, &self.stage, &self.who, place, message).await
    }
}

/// A send that is under way.
pub(super) struct Asked {
    pub(super) operation: OperationId,
    pub(super) answer: stentor_client::SendHandle,
}

/// Records and queues a send. Nothing when it was not taken: then that is its answer.
pub(super) async fn ask<C: Connect>(
    client: &Client,
    stage: &Stage<C>,
    who: &Device,
    place: &Place,
    message: Message,
) -> Option<Asked> {
    let client_id: Option<Name> = message.client_id.as_ref().map(|id| id.as_str().into());
    let said = Said { client_id, body: message.body.clone() };
    let operation = stage.recorder.invoke(who, &place.name, Call::Send(said));
    let queued = timeout_at(Instant::now() + stage.plan.patience, client.send_pipelined(&place.id, message)).await;
    match queued {
        Ok(Ok(answer)) => Some(Asked { operation, answer }),
        Ok(Err(error)) => {
            stage.recorder.answer(operation, answers::sent(&Err::<Sent, _>(error)));
            None
        }
        // Taken or not: nobody knows.
        Err(_) => None,
    }
}

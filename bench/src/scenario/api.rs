//! `send --via api`: messages through the brokers' gRPC send streams, without gateways: what the log itself can take.
//! Must never let a stream's numbers skip: the broker takes them in order.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use stentor_client::ConversationKind;
use stentor_proto::v1::{
    CreateRequest, Send, SendAnswer, ShowRequest, conversations_client::ConversationsClient,
    messages_client::MessagesClient, send_answer::Answer,
};
use stentor_transport::grpc::{self, Channel};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, metadata::AsciiMetadataValue};

use super::{
    Stop, Tasks,
    send::SendSettings,
    spread::{self, Plan},
    talk::Talk,
};
use crate::{
    BenchError, Pace, Target,
    body::Bodies,
    meter::{Batch, Meters},
    pace::Schedule,
    workers::{Load, Stage},
};

/// Streams of one connection: HTTP/2 shares one window among them.
const STREAMS_PER_CHANNEL: usize = 64;
/// Devices of one user.
const DEVICES_PER_USER: usize = 200;
/// Calls at the same time while conversations are made and looked at.
const CALLS: usize = 64;

/// A caller of the API: one device.
#[derive(Debug, Clone)]
struct Caller {
    channel: Channel,
    bearer: AsciiMetadataValue,
    user: String,
}

/// Streams and conversations, ready to send.
#[derive(Debug)]
pub struct ApiLoad {
    plan: Plan,
    /// By lane.
    callers: Vec<Caller>,
    talks: Vec<Arc<Talk>>,
    /// The lane that made it.
    owners: Vec<usize>,
    bodies: Arc<Bodies>,
    /// Counts on over several runs, by lane.
    numbers: Vec<u64>,
}

impl ApiLoad {
    /// Creates the conversations. `sessions` are streams here: each lane has one of its own.
    pub async fn prepare(target: &Target, settings: &SendSettings, bodies: Bodies) -> Result<Self, BenchError> {
        let plan = spread::plan(settings.conversations, settings.window, settings.sessions)?;
        if plan.lanes.iter().any(|lane| lane.conversations.len() > 1) {
            return Err(BenchError::Settings("through the API the window must be at least the conversations".into()));
        }
        let callers = callers(target, plan.lanes.len())?;
        let mut lanes_of = vec![Vec::new(); settings.conversations];
        plan.lanes.iter().enumerate().for_each(|(n, lane)| lanes_of[lane.conversations[0]].push(n));
        let created = stream::iter(lanes_of.iter().enumerate()).map(|(n, lanes)| {
            let members: Vec<_> = lanes.iter().map(|&lane| callers[lane].user.clone()).collect();
            create(&callers[lanes[0]], target.named("api", n), members)
        });
        let talks: Vec<Arc<Talk>> = created.buffered(CALLS).try_collect().await?;
        let owners = lanes_of.iter().map(|lanes| lanes[0]).collect();
        let numbers = vec![0; plan.lanes.len()];
        Ok(Self { plan, callers, talks, owners, bodies: Arc::new(bodies), numbers })
    }

    /// How many streams send.
    pub fn streams(&self) -> usize {
        self.callers.len()
    }

    async fn count(&self) -> Result<(), BenchError> {
        let looked = stream::iter(self.talks.iter().zip(&self.owners))
            .map(|(talk, &owner)| async move { talk.check(head(&self.callers[owner], talk.id.as_str()).await?) });
        looked.buffer_unordered(CALLS).try_for_each(async |()| Ok(())).await
    }
}

impl Load for ApiLoad {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let turns = stage.gather(self.plan.lanes.len()).await?;
        let began = Instant::now();
        let lanes = self.plan.lanes.iter().enumerate().map(|(number, lane)| Lane {
            number,
            window: lane.window,
            caller: self.callers[number].clone(),
            talk: Arc::clone(&self.talks[lane.conversations[0]]),
            bodies: Arc::clone(&self.bodies),
            meters: Arc::clone(&meters),
            stop: stop.clone(),
            last_no: self.numbers[number],
            waiting: VecDeque::new(),
            schedule: match pace {
                Pace::Closed => None,
                Pace::Open { rate_per_s } => Some(Schedule::new(began, rate_per_s, turns.number(number), turns.of())),
            },
        });
        let tasks = Tasks::start(lanes.map(Lane::run));
        let measured = stage.measure(&meters).await;
        stop.now();
        for (number, last_no) in tasks.ended().await? {
            self.numbers[number] = last_no;
        }
        measured?;
        self.count().await
    }
}

/// A device for each lane, at the brokers in turn.
fn callers(target: &Target, lanes: usize) -> Result<Vec<Caller>, BenchError> {
    let apis = target.apis();
    if apis.is_empty() {
        return Err(BenchError::Cluster("no broker has an API address".into()));
    }
    let count = lanes.div_ceil(STREAMS_PER_CHANNEL).max(apis.len());
    let channels = (0..count).map(|n| grpc::channel(apis[n % apis.len()], target.tls()));
    let channels = channels.collect::<Result<Vec<_>, _>>().map_err(BenchError::cluster)?;
    let caller = |lane: usize| {
        let user = target.user("caller", lane / DEVICES_PER_USER)?;
        let token = target.token(&user, &format!("stream-{}", lane % DEVICES_PER_USER))?;
        let bearer = AsciiMetadataValue::try_from(format!("Bearer {token}")).map_err(BenchError::cluster)?;
        Ok(Caller { channel: channels[lane % channels.len()].clone(), bearer, user: user.to_string() })
    };
    (0..lanes).map(caller).collect()
}

impl Caller {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }
}

async fn create(owner: &Caller, id: String, members: Vec<String>) -> Result<Arc<Talk>, BenchError> {
    let mut participants: Vec<String> = members.into_iter().filter(|user| *user != owner.user).collect();
    participants.sort_unstable();
    participants.dedup();
    let create = CreateRequest {
        conversation: id.clone(),
        kind: ConversationKind::Group as i32,
        participants,
        client_id: id.clone(),
        ..CreateRequest::default()
    };
    let failed = |status: Status| BenchError::Cluster(format!("cannot create {id}: {}", status.message()));
    ConversationsClient::new(owner.channel.clone()).create(owner.request(create)).await.map_err(failed)?;
    Ok(Arc::new(Talk::new(&id, head(owner, &id).await?)?))
}

async fn head(caller: &Caller, id: &str) -> Result<u64, BenchError> {
    let show = ShowRequest { conversation: id.to_owned(), linearizable: true };
    let shown = ConversationsClient::new(caller.channel.clone()).show(caller.request(show)).await;
    let failed = |status: Status| BenchError::Cluster(format!("cannot look at {id}: {}", status.message()));
    Ok(shown.map_err(failed)?.into_inner().head)
}

/// One stream.
struct Lane {
    number: usize,
    window: usize,
    caller: Caller,
    talk: Arc<Talk>,
    bodies: Arc<Bodies>,
    meters: Arc<Meters>,
    stop: Stop,
    last_no: u64,
    /// When those without an answer were due.
    waiting: VecDeque<Instant>,
    schedule: Option<Schedule>,
}

impl Lane {
    /// Sends until it is told to stop; returns its own number and that of its last send.
    async fn run(mut self) -> (usize, u64) {
        let (sends, queue) = mpsc::channel(self.window);
        let request = self.caller.request(ReceiverStream::new(queue));
        let mut client = MessagesClient::new(self.caller.channel.clone());
        let answers = match client.send_stream(request).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => {
                self.meters.units.fail(self.number, &status.message());
                return (self.number, self.last_no);
            }
        };
        if let Err(status) = self.converse(sends, answers).await {
            self.meters.units.fail(self.number, &status.message());
            // What was sent and not answered may be there.
            self.talk.unknown.fetch_add(self.waiting.len() as u64, Ordering::Relaxed);
        }
        (self.number, self.last_no)
    }

    async fn converse(&mut self, sends: mpsc::Sender<Send>, mut answers: Streaming<SendAnswer>) -> Result<(), Status> {
        let mut noted = Batch::default();
        while !self.stop.is_set() {
            while self.waiting.len() < self.window {
                let due = match &mut self.schedule {
                    None => Instant::now(),
                    Some(schedule) => match schedule.take(Instant::now()) {
                        Some(due) => due,
                        None => break,
                    },
                };
                let send = self.next(due);
                sends.try_send(send).map_err(|_| Status::internal("the stream takes no more"))?;
            }
            let due = self.schedule.as_ref().filter(|_| self.waiting.len() < self.window).map(Schedule::due);
            let pause = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = answers.message(), if !self.waiting.is_empty() => self.answered(answer?, &mut noted)?,
                () = pause => {}
            }
            noted.hand_on(&self.meters.units, self.number);
        }
        while !self.waiting.is_empty() {
            self.answered(answers.message().await?, &mut noted)?;
            noted.hand_on(&self.meters.units, self.number);
        }
        Ok(())
    }

    fn next(&mut self, due: Instant) -> Send {
        self.waiting.push_back(due);
        let done_no = self.last_no + 1 - self.waiting.len() as u64;
        self.last_no += 1;
        Send {
            conversation: self.talk.id.as_str().to_owned(),
            send_no: self.last_no,
            done_no,
            body: self.bodies.get(self.last_no as usize + self.number * 31),
            ..Send::default()
        }
    }

    fn answered(&mut self, answer: Option<SendAnswer>, noted: &mut Batch) -> Result<(), Status> {
        let answer = answer.and_then(|answer| answer.answer);
        let due = self.waiting.pop_front();
        match (answer, due) {
            (Some(Answer::Sent(_)), Some(due)) => {
                noted.push(due.elapsed());
                self.talk.acknowledged.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // The numbers behind it cannot be taken any more.
            (Some(Answer::Refused(refused)), _) => {
                let refusal = refused.refusal.unwrap_or_default();
                Err(Status::aborted(format!("{} ({})", refusal.message, refusal.reason)))
            }
            _ => Err(Status::aborted("the stream ended")),
        }
    }
}

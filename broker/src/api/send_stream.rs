//! The send stream of `stentor.v1.Messages`: what has come is proposed together, runs of a conversation in their order.
//! Must never propose a later send of a conversation before an earlier one of the same stream has its answer.

use std::{collections::BTreeMap, pin::Pin};

use futures_util::{FutureExt, Stream, StreamExt, stream};
use stentor_engine::{command, effect::Outcome, limits};
use stentor_proto::{
    internal,
    reason::Reason,
    v1::{self, Refusal, Send, SendAnswer, SendRefused, Sent, send_answer::Answer},
};
use stentor_transport::token::Claims;
use tonic::{Status, Streaming};

use super::{Api, actor, because, conversation_id, refused};
use crate::{
    router::{self, Retry},
    status,
};

/// Sends that are taken from a stream at a time.
const SENDS_AT_ONCE: usize = 2 * limits::RUN_SENDS;

/// No more are taken once their bodies have so many bytes.
const BYTES_AT_ONCE: usize = 1024 * 1024;
/// Conversations of one stream that are proposed to at the same time.
const CONVERSATIONS_AT_ONCE: usize = 64;

/// What a stream answers.
pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<SendAnswer, Status>> + std::marker::Send>>;

/// The answers to a caller's sends, in their order. An error ends the stream; what of the sends that were taken with it
/// has no answer then may have been accepted.
pub(super) fn answers(api: Api, claims: Claims, sends: Streaming<Send>) -> Answers {
    let state = (api, claims, sends, None);
    let batches = stream::unfold(state, async |(api, claims, mut sends, ended): (_, _, _, Option<Status>)| {
        if let Some(status) = ended {
            return (!is_end(&status)).then(|| (vec![Err(status)], (api, claims, sends, Some(end()))));
        }
        let (taken, ended) = take(&mut sends).await;
        let answers = answer_all(&api, &claims, taken).await;
        let failed = answers.last().is_some_and(Result::is_err);
        Some((answers, (api, claims, sends, if failed { Some(end()) } else { ended })))
    });
    Box::pin(batches.flat_map(stream::iter))
}

/// Stands for the end of the caller's sends.
fn end() -> Status {
    Status::ok("")
}

fn is_end(status: &Status) -> bool {
    status.code() == tonic::Code::Ok
}

/// At least one send, and what has come with it; why no more will come.
async fn take(sends: &mut Streaming<Send>) -> (Vec<Send>, Option<Status>) {
    let (mut taken, mut bytes) = (Vec::new(), 0);
    let mut next = Some(sends.message().await);
    while let Some(message) = next {
        match message {
            Ok(Some(send)) => {
                bytes += send.body.len();
                taken.push(send);
            }
            Ok(None) => return (taken, Some(end())),
            Err(status) => return (taken, Some(status)),
        }
        next = if taken.len() < SENDS_AT_ONCE && bytes < BYTES_AT_ONCE { sends.message().now_or_never() } else { None };
    }
    (taken, None)
}

/// Answers in the order of the sends, up to the first that has none.
async fn answer_all(api: &Api, claims: &Claims, sends: Vec<Send>) -> Vec<Result<SendAnswer, Status>> {
    let count = sends.len();
    let mut by_conversation: BTreeMap<String, Vec<(usize, Send)>> = BTreeMap::new();
    for (place, send) in sends.into_iter().enumerate() {
        match by_conversation.get_mut(&send.conversation) {
            Some(sends) => sends.push((place, send)),
            None => drop(by_conversation.insert(send.conversation.clone(), vec![(place, send)])),
        }
    }
    let all = by_conversation.into_iter().map(|(id, sends)| of_conversation(api, claims, id, sends));
    let mut answers: Vec<Option<Result<Answer, Status>>> = (0..count).map(|_| None).collect();
    let mut all = stream::iter(all).buffer_unordered(CONVERSATIONS_AT_ONCE);
    while let Some(placed) = all.next().await {
        for (place, answer) in placed {
            if let Some(slot) = answers.get_mut(place) {
                *slot = Some(answer);
            }
        }
    }
    let mut told = Vec::with_capacity(count);
    for answer in answers {
        let answer = answer.unwrap_or_else(|| Err(because(Reason::OutcomeUnknown)));
        let failed = answer.is_err();
        told.push(answer.map(|answer| SendAnswer { answer: Some(answer) }));
        if failed {
            break;
        }
    }
    told
}

type Placed = (usize, Result<Answer, Status>);

/// The sends of one conversation, one after the other, what may go together as one.
async fn of_conversation(api: &Api, claims: &Claims, id: String, sends: Vec<(usize, Send)>) -> Vec<Placed> {
    let (mut answers, mut sends) = (Vec::with_capacity(sends.len()), &sends[..]);
    while !sends.is_empty() {
        let (run, rest) = sends.split_at(run_length(claims, sends));
        sends = rest;
        match run {
            [(place, send)] => answers.push((*place, answer_one(api, claims, send.clone()).await)),
            run => {
                let results = api.send_run(claims, &id, run).await;
                answers.extend(run.iter().map(|(place, _)| *place).zip(results));
            }
        }
        // What comes behind a send without an answer would be told nothing of use.
        if answers.last().is_some_and(|(_, answer)| answer.is_err()) {
            break;
        }
    }
    answers
}

/// How many of these, at least one, may go as one run.
fn run_length(claims: &Claims, sends: &[(usize, Send)]) -> usize {
    let Some((_, first)) = sends.first() else { return 0 };
    if first.send_no == 0 || claims.device.is_none() {
        return 1;
    }
    let mut bytes = 0;
    let fits = |(next, (_, send)): &(u64, &(usize, Send))| {
        bytes += send.body.len();
        let plain = send.client_id.is_empty() && send.first_try_ms == 0;
        let unconditional = send.expect_version.is_none() && send.expect_epoch.is_none();
        // What is told to be done with the last of them is so for all.
        let open = send.done_no < first.send_no;
        send.send_no == *next && open && plain && unconditional && bytes <= limits::RUN_BYTES
    };
    (first.send_no..).zip(sends.iter().take(limits::RUN_SENDS)).take_while(fits).count().max(1)
}

async fn answer_one(api: &Api, claims: &Claims, send: Send) -> Result<Answer, Status> {
    let (conversation, send_no) = (send.conversation.clone(), send.send_no);
    match api.send_one(claims, send).await {
        Ok(sent) => Ok(Answer::Sent(sent)),
        Err(status) => match status::to_refusal(&status) {
            Some(refusal) => Ok(refused_send(conversation, send_no, refusal)),
            None => Err(status),
        },
    }
}

fn refused_send(conversation: String, send_no: u64, refusal: Refusal) -> Answer {
    Answer::Refused(SendRefused { conversation, send_no, refusal: Some(refusal) })
}

impl Api {
    /// Sends of one conversation with numbers in a row; an answer for each.
    async fn send_run(&self, claims: &Claims, id: &str, sends: &[(usize, Send)]) -> Vec<Result<Answer, Status>> {
        let outcomes = self.propose_run(claims, id, sends).await;
        let mut outcomes = match outcomes {
            Ok(outcomes) => outcomes.into_iter(),
            Err(status) => {
                let all = sends.iter().map(|(_, send)| match status::to_refusal(&status) {
                    Some(refusal) => Ok(refused_send(id.to_owned(), send.send_no, refusal)),
                    None => Err(status.clone()),
                });
                return all.collect();
            }
        };
        let answer = |(_, send): &(usize, Send)| {
            let send_no = send.send_no;
            let refusal = match outcomes.next() {
                Some(Outcome::Accepted { seq, stamp, repeat, .. }) => {
                    let (seq, stamp_ms) = (seq.0, stamp.0);
                    return Ok(Answer::Sent(Sent {
                        conversation: id.to_owned(),
                        send_no,
                        seq,
                        stamp_ms,
                        repeat,
                        more: 0,
                    }));
                }
                Some(other) => other.refusal().unwrap_or_else(|| Reason::Internal.refusal()),
                None => Reason::OutcomeUnknown.refusal(),
            };
            Ok(refused_send(id.to_owned(), send_no, refusal))
        };
        sends.iter().map(answer).collect()
    }

    async fn propose_run(&self, claims: &Claims, id: &str, sends: &[(usize, Send)]) -> Result<Vec<Outcome>, Status> {
        let conversation = conversation_id(id)?;
        let shard = self.shard_of(&claims.app, id)?;
        let Some((_, first)) = sends.first() else { return Ok(Vec::new()) };
        let item = |send: &Send| {
            let (content_type, body) = (send.content_type.clone(), send.body.clone());
            let item = v1::SendItem { kind: send.kind, content_type, sent_at_ms: send.sent_at_ms, body };
            command::run_item(item, limits::MAX_BODY_BYTES)
        };
        let run = internal::SendRun {
            actor: Some(actor(claims)),
            send_no: first.send_no,
            done_no: sends.iter().map(|(_, send)| send.done_no).max().unwrap_or(0),
            // A device of this API has no sessions; its numbers alone keep its order.
            session_no: 0,
            items: sends.iter().map(|(_, send)| item(send)).collect(),
        };
        let command = command::send_run(&claims.app, &conversation, run);
        command::check(&command).map_err(because)?;
        let command = command::encode(&command);
        router::propose_run(&self.node, shard, command, Retry::Always).await.map_err(refused)
    }
}

//! What a follower hears of commits, and when: news waits for entries, rides on them, and is told at last in any case.
//! Must never let an answer stand for a request that it does not cover.

use std::task::Poll;

use openraft::EntryPayload;
use stentor_proto::{
    ids::{BrokerId, Incarnation},
    internal::{AppendResponse, PeerFrame, append_response::Result as R},
};
use stentor_raft_store::{
    types::{BundleBytes, RaftLogEntry},
    wire,
};
use tokio::time::advance;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::*;
use crate::{
    clocks::Clocks,
    parking::Parking,
    queue::{Batches, FrameQueue},
};

type Requests = mpsc::UnboundedSender<AppendEntriesRequest<TypeConfig>>;
type Answers<'s> = std::pin::Pin<Box<dyn Stream<Item = Result<StreamAppendResult<TypeConfig>, Error>> + 's>>;

fn id(index: u64) -> RaftLogId {
    wire::log_id(3, index)
}

fn replica(broker: u32) -> ReplicaId {
    ReplicaId { broker: BrokerId(broker), incarnation: Incarnation(1) }
}

/// Entries after `prev` as far as `last`, from a leader that has committed so far.
fn request(prev: u64, last: u64, commit: u64) -> AppendEntriesRequest<TypeConfig> {
    let payload = || EntryPayload::Normal(BundleBytes::new(b"bundle".to_vec().into()));
    AppendEntriesRequest {
        vote: Vote::new_committed(3, replica(1)),
        prev_log_id: Some(id(prev)),
        entries: (prev + 1..=last).map(|index| RaftLogEntry { log_id: id(index), payload: payload() }).collect(),
        leader_commit: Some(id(commit)),
    }
}

/// A way to a peer that the test plays.
struct Peer {
    way: Way,
    link: Arc<Link>,
}

impl Peer {
    fn new(lane: Lane) -> (Self, Batches<PeerFrame>) {
        let parking = Arc::new(Parking::new(None, 1));
        let links = Arc::new(Links { peers: Default::default(), replaced: Arc::default(), parking });
        let route = Route { shard: ShardId(1), from: replica(1), to: replica(2) };
        let (link, queue) = (Link::new(BrokerId(2), &links.replaced), FrameQueue::new(1 << 20));
        link.connected(queue.clone());
        (Self { way: Way { route, lane, links }, link }, Batches::of(queue))
    }

    fn session(&self) -> (Requests, Answers<'_>) {
        let (requests, input) = mpsc::unbounded_channel();
        let session = Session::new(&self.way, self.link.clone(), UnboundedReceiverStream::new(input), APPEND_PATIENCE);
        (requests, Box::pin(stream::unfold(session, Session::next).fuse()))
    }

    /// What it was sent since: (id, entries, committed).
    async fn heard(frames: &mut Batches<PeerFrame>) -> Vec<(u64, usize, Option<u64>)> {
        let Poll::Ready(Some(batch)) = futures_util::poll!(frames.next()) else { return Vec::new() };
        let told = |frame: PeerFrame| match frame.message {
            Some(Message::Append(append)) => (frame.id, append.entries.len(), append.commit.map(|commit| commit.index)),
            other => panic!("{other:?} is no append"),
        };
        batch.into_iter().map(told).collect()
    }
}

/// So long after a request was made that its answer says too little of what is made then.
const LATER: Duration = Duration::from_millis(AHEAD.as_millis() as u64 + 1);

fn answer(link: &Link, id: u64, result: R) {
    let message = Message::AppendResponse(AppendResponse { result: Some(result), partial_none: false });
    link.received(PeerFrame { id, message: Some(message), ..PeerFrame::default() }, &Clocks::default());
}

/// Lets the session do what it can.
async fn turn(answers: &mut Answers<'_>) -> Vec<Option<u64>> {
    let mut matched = Vec::new();
    while let Poll::Ready(Some(answer)) = futures_util::poll!(answers.next()) {
        matched.push(answer.unwrap().unwrap().map(|id| id.index));
    }
    matched
}

/// Entry 6 goes out; the news behind it is made too late for its answer.
async fn entry_and_late_news(requests: &Requests, answers: &mut Answers<'_>) {
    requests.send(request(5, 6, 5)).unwrap();
    turn(answers).await;
    advance(LATER).await;
    requests.send(request(6, 6, 6)).unwrap();
    turn(answers).await;
}

#[tokio::test(start_paused = true)]
async fn news_of_a_commit_rides_on_entries() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    requests.send(request(5, 6, 5)).unwrap();
    assert_eq!(turn(&mut answers).await, []);
    let first = Peer::heard(&mut frames).await;
    assert_eq!(first[0].1, 1);
    assert_eq!(first[0].2, Some(5), "the first request tells");
    advance(COMMIT_NEWS).await;
    requests.send(request(6, 6, 6)).unwrap();
    turn(&mut answers).await;
    assert_eq!(Peer::heard(&mut frames).await, [], "alone it waits");
    requests.send(request(6, 8, 6)).unwrap();
    turn(&mut answers).await;
    let second = Peer::heard(&mut frames).await;
    assert_eq!((second.len(), second[0].1, second[0].2), (1, 2, Some(6)));
    answer(&peer.link, first[0].0, R::Success(true));
    answer(&peer.link, second[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(6), Some(8)], "that for the carrier says what the rider's would");
}

#[tokio::test(start_paused = true)]
async fn news_comes_alone_when_nothing_carries_it() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    requests.send(request(6, 6, 6)).unwrap();
    turn(&mut answers).await;
    advance(COMMIT_NEWS / 2).await;
    requests.send(request(6, 6, 7)).unwrap();
    turn(&mut answers).await;
    assert_eq!(Peer::heard(&mut frames).await, []);
    advance(COMMIT_NEWS / 2).await;
    turn(&mut answers).await;
    let told = Peer::heard(&mut frames).await;
    assert_eq!((told.len(), told[0].1, told[0].2), (1, 0, Some(7)), "the newest tells for those before it");
    answer(&peer.link, told[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(6)]);
}

/// Two entries are under way when the first is committed: the second, answered, waits neither for news of that nor for
/// what carries the news.
#[tokio::test(start_paused = true)]
async fn news_of_one_commit_does_not_hold_up_the_next() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    requests.send(request(5, 6, 5)).unwrap();
    requests.send(request(6, 7, 5)).unwrap();
    turn(&mut answers).await;
    let entries = Peer::heard(&mut frames).await;
    answer(&peer.link, entries[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(6)]);
    advance(AHEAD).await;
    requests.send(request(7, 7, 6)).unwrap();
    assert_eq!(turn(&mut answers).await, []);
    answer(&peer.link, entries[1].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(7)]);
    requests.send(request(7, 8, 6)).unwrap();
    turn(&mut answers).await;
    let carrier = Peer::heard(&mut frames).await;
    assert_eq!((carrier.len(), carrier[0].1, carrier[0].2), (1, 1, Some(6)));
    answer(&peer.link, carrier[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(8)]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_waits_for_news_that_openraft_would_take_it_for() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    requests.send(request(4, 5, 4)).unwrap();
    requests.send(request(5, 6, 4)).unwrap();
    turn(&mut answers).await;
    advance(LATER).await;
    requests.send(request(6, 6, 6)).unwrap();
    turn(&mut answers).await;
    let entries = Peer::heard(&mut frames).await;
    for (id, ..) in &entries {
        answer(&peer.link, *id, R::Success(true));
    }
    assert_eq!(turn(&mut answers).await, [Some(5)], "the news behind 6 was made long after 6 was");
    advance(COMMIT_NEWS).await;
    assert_eq!(turn(&mut answers).await, []);
    let news = Peer::heard(&mut frames).await;
    assert_eq!((news.len(), news[0].1, news[0].2), (1, 0, Some(6)));
    // Entries behind the news, answered before it is, change nothing.
    requests.send(request(6, 7, 6)).unwrap();
    assert_eq!(turn(&mut answers).await, []);
    let behind = Peer::heard(&mut frames).await;
    answer(&peer.link, behind[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, []);
    answer(&peer.link, news[0].0, R::Success(true));
    assert_eq!(turn(&mut answers).await, [Some(7)]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_news_stands_for_the_answer_that_waited_for_it() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    entry_and_late_news(&requests, &mut answers).await;
    answer(&peer.link, Peer::heard(&mut frames).await[0].0, R::Success(true));
    advance(COMMIT_NEWS).await;
    assert_eq!(turn(&mut answers).await, []);
    let higher = Vote::new(4, replica(3));
    answer(&peer.link, Peer::heard(&mut frames).await[0].0, R::HigherVote(wire::vote_to_proto(&higher)));
    let Poll::Ready(Some(Ok(Err(refused)))) = futures_util::poll!(answers.next()) else { panic!("it is handed on") };
    assert!(matches!(refused, openraft::raft::StreamAppendError::HigherVote(vote) if vote == higher));
    assert!(matches!(futures_util::poll!(answers.next()), Poll::Ready(None)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_waits_does_not_run_out_of_patience_and_what_it_waits_for_does() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    entry_and_late_news(&requests, &mut answers).await;
    answer(&peer.link, Peer::heard(&mut frames).await[0].0, R::Success(true));
    turn(&mut answers).await;
    advance(COMMIT_NEWS).await;
    turn(&mut answers).await;
    advance(APPEND_PATIENCE - COMMIT_NEWS).await;
    assert_eq!(turn(&mut answers).await, [], "the news has been under way for less");
    advance(COMMIT_NEWS).await;
    let ended = futures_util::poll!(answers.next());
    assert!(matches!(ended, Poll::Ready(Some(Err(RPCError::Timeout(_))))), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn who_took_a_part_has_had_everything_before_it() {
    let (peer, mut frames) = Peer::new(Lane::Append);
    let (requests, mut answers) = peer.session();
    requests.send(request(6, 6, 6)).unwrap();
    requests.send(request(6, 9, 6)).unwrap();
    turn(&mut answers).await;
    let sent = Peer::heard(&mut frames).await;
    answer(&peer.link, sent[0].0, R::Partial(wire::log_id_to_proto(&id(7))));
    assert_eq!(turn(&mut answers).await, [Some(6), Some(7)], "as far as the news said, then the part");
    assert!(matches!(futures_util::poll!(answers.next()), Poll::Ready(None)), "openraft asks anew after a part");
}

#[tokio::test(start_paused = true)]
async fn nothing_waits_on_the_control_lane_or_when_nothing_more_will_come() {
    for lane in [Lane::Control, Lane::Append] {
        let (peer, mut frames) = Peer::new(lane);
        let (requests, mut answers) = peer.session();
        requests.send(request(6, 6, 7)).unwrap();
        if lane == Lane::Append {
            drop(requests);
        }
        turn(&mut answers).await;
        let told = Peer::heard(&mut frames).await;
        assert_eq!((told.len(), told[0].2), (1, Some(7)), "{lane:?}");
    }
}

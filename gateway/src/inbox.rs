//! What waits for one session's task: answers of brokers, live pushes, heads. Must stay bounded whatever the device
//! does: pushes beyond a byte budget are dropped and only their head is kept, since the session can pull them.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use stentor_engine::{
    delivery::{HeadNews, PushRun},
    effect::Outcome,
    limits,
    session::server::{CursorKind, Moves},
};
use stentor_proto::{
    Bytes,
    ids::{ConversationId, Seq, ShardId},
    internal, v1,
};
use tokio::sync::Notify;

use crate::fanout::Place;

/// A live push of one conversation, encoded once for all sessions.
#[derive(Debug)]
pub(crate) struct Push {
    /// The whole `Events` frame.
    pub(crate) frame: Bytes,
    /// What it costs of a device's credit.
    pub(crate) credit_bytes: u64,
    /// What is in it.
    pub(crate) run: PushRun,
    /// Where streams that rest stand when they get it.
    pub(crate) before: Seq,
    /// The records, kept only when somebody was removed in this push and may get just a part of it.
    pub(crate) records: Vec<Bytes>,
}

/// What a question or a proposal was for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// The session's fencing number.
    OpenSession,
    /// A send.
    Send { shard: ShardId, conversation: String, send_no: u64 },
    /// So many sends in a row, the first with this number.
    Run { shard: ShardId, conversation: String, send_no: u64, count: usize },
    /// Cursor moves, to be confirmed to the device.
    Cursors { moves: Moves },
    /// Heads for cursor moves in conversations that have no stream here.
    CursorHeads { moves: Vec<(CursorKind, ConversationId, Seq)> },
    /// A page for a stream.
    Pull { stream: u32 },
    /// Heads for streams that begin.
    Start { shard: ShardId, streams: Vec<u32> },
    /// A page of the user's conversations, for a resume.
    Conversations,
    /// A call.
    Call { id: u64, call: Call },
}

impl Purpose {
    /// Whether its answer makes the session follow conversations.
    pub(crate) fn begins_streams(&self) -> bool {
        matches!(self, Self::Conversations)
    }
}

/// What kind of answer a call wants.
#[derive(Debug)]
pub(crate) enum Call {
    History,
    Create {
        conversation: String,
    },
    Participant,
    Show,
    SendState,
    List,
    /// One conversation of a list, by the list's own number: a device may use an id twice.
    ListShow {
        list: u64,
        place: usize,
    },
}

/// What a broker said.
#[derive(Debug)]
pub(crate) enum Reply {
    Outcome(Outcome),
    /// Of a run.
    Outcomes(Vec<internal::OutcomeSpan>),
    Page(v1::HistoryResponse),
    Heads(Vec<v1::ConversationState>),
    Conversations(internal::UserState),
    Show(v1::Conversation),
}

/// An answer for the session.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) purpose: Purpose,
    pub(crate) result: Result<Reply, v1::Refusal>,
}

/// All that came since the session's task looked last.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) answers: Vec<Answer>,
    pub(crate) pushes: Vec<(Place, Arc<Push>)>,
    /// By conversation, to be looked at after the pushes.
    pub(crate) heads: BTreeMap<Place, HeadNews>,
    /// Conversations whose interest was refused for good.
    pub(crate) refused: Vec<(Place, v1::Refusal)>,
    /// A newer session of the same device took over on this gateway.
    pub(crate) superseded: bool,
    push_bytes: usize,
    closed: bool,
}

/// One session's inbox.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    news: Mutex<News>,
    notify: Notify,
}

impl Inbox {
    /// Something for which there is always room: every answer was asked for, and questions are bounded.
    pub(crate) fn answer(&self, answer: Answer) {
        self.tell(|news| news.answers.push(answer));
    }

    /// A live push. False when it was dropped and only its head is kept.
    pub(crate) fn push(&self, place: Place, push: &Arc<Push>) -> bool {
        let mut kept = true;
        self.tell(|news| {
            let fits = news.push_bytes + push.frame.len() <= limits::INBOX_PUSH_BYTES || news.pushes.is_empty();
            // Pushes are taken first: behind news of a head this one would come too early.
            kept = fits && !news.heads.get(&place).is_some_and(HeadNews::holds_back);
            if kept {
                news.push_bytes += push.frame.len();
                news.pushes.push((place, push.clone()));
            } else {
                raise(&mut news.heads, place, HeadNews::new(push.run.last, push.before, false));
            }
        });
        kept
    }

    /// News of a conversation's head.
    pub(crate) fn head(&self, place: Place, head: HeadNews) {
        self.tell(|news| raise(&mut news.heads, place, head));
    }

    /// A conversation's interest was refused for good.
    pub(crate) fn refused(&self, place: Place, refusal: v1::Refusal) {
        self.tell(|news| news.refused.push((place, refusal)));
    }

    /// Takes the refusals only; they say nothing of what came before them.
    pub(crate) fn take_refused(&self) -> Vec<(Place, v1::Refusal)> {
        std::mem::take(&mut self.news.lock().refused)
    }

    /// Where a stream that rests stands, if there is news for it that was not taken.
    pub(crate) fn before(&self, place: Place) -> Option<Seq> {
        let news = self.news.lock();
        let push = news.pushes.iter().find(|(of, _)| *of == place).map(|(_, push)| push.before);
        push.or_else(|| news.heads.get(&place).map(|head| head.before))
    }

    /// The session follows this conversation no more: its place may be another one's from now on.
    pub(crate) fn forget(&self, place: Place) {
        let mut news = self.news.lock();
        news.pushes.retain(|(of, _)| *of != place);
        news.push_bytes = news.pushes.iter().map(|(_, push)| push.frame.len()).sum();
        news.heads.remove(&place);
        news.refused.retain(|(of, _)| *of != place);
    }

    /// A newer session took over.
    pub(crate) fn supersede(&self) {
        self.tell(|news| news.superseded = true);
    }

    /// Nobody looks here any more: whatever comes is dropped.
    pub(crate) fn close(&self) {
        let mut news = self.news.lock();
        *news = News { closed: true, ..News::default() };
    }

    /// Takes everything that came.
    pub(crate) fn take(&self) -> News {
        std::mem::take(&mut *self.news.lock())
    }

    /// Ready when something came since the last [`Self::take`] (or a little earlier).
    pub(crate) async fn changed(&self) {
        self.notify.notified().await;
    }

    fn tell(&self, what: impl FnOnce(&mut News)) {
        let mut news = self.news.lock();
        if !news.closed {
            what(&mut news);
            drop(news);
            self.notify.notify_one();
        }
    }
}

fn raise(heads: &mut BTreeMap<Place, HeadNews>, place: Place, head: HeadNews) {
    heads.entry(place).or_insert(head).raise(head);
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Place = Place::new(0, 1);
    const OTHER: Place = Place::new(0, 2);

    fn push(last: u64, bytes: usize) -> Arc<Push> {
        let run = PushRun { first: Seq(last), last: Seq(last), removals: Vec::new() };
        let (frame, before) = (vec![0; bytes].into(), Seq(last - 1));
        Arc::new(Push { frame, credit_bytes: bytes as u64, run, before, records: Vec::new() })
    }

    #[test]
    fn pushes_beyond_the_budget_leave_only_their_head() {
        let inbox = Inbox::default();
        assert!(inbox.push(ONE, &push(1, limits::INBOX_PUSH_BYTES + 1)), "one is always taken");
        for seq in 2..1_000 {
            assert!(!inbox.push(ONE, &push(seq, 1_000)));
        }
        let news = inbox.take();
        assert_eq!((news.pushes.len(), news.heads.len()), (1, 1));
        assert_eq!(news.heads[&ONE], HeadNews::new(Seq(999), Seq(1), false));
        assert!(inbox.push(ONE, &push(1_000, 10)), "room again");
    }

    #[test]
    fn no_push_overtakes_news_of_its_conversations_head() {
        let inbox = Inbox::default();
        inbox.head(ONE, HeadNews::new(Seq(4), Seq(4), true));
        assert!(inbox.push(ONE, &push(5, 10)), "a registration says nothing new of the head");
        inbox.head(ONE, HeadNews::new(Seq(7), Seq(5), false));
        assert!(!inbox.push(ONE, &push(8, 10)));
        assert!(inbox.push(OTHER, &push(8, 10)));
        let news = inbox.take();
        assert_eq!(news.pushes.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [ONE, OTHER]);
        assert_eq!(news.heads[&ONE], HeadNews::new(Seq(8), Seq(5), true));
    }

    #[test]
    fn what_a_conversation_left_is_forgotten() {
        let inbox = Inbox::default();
        for place in [ONE, OTHER] {
            inbox.push(place, &push(6, limits::INBOX_PUSH_BYTES / 2));
            inbox.head(place, HeadNews::new(Seq(9), Seq(6), false));
            inbox.refused(place, v1::Refusal::default());
        }
        assert_eq!(inbox.before(ONE), Some(Seq(5)), "the oldest news says where it stood");
        inbox.forget(ONE);
        assert_eq!((inbox.before(ONE), inbox.before(OTHER)), (None, Some(Seq(5))));
        assert!(inbox.push(ONE, &push(7, limits::INBOX_PUSH_BYTES / 2)), "its bytes are free");
        let news = inbox.take();
        assert_eq!((news.pushes.len(), news.heads.len(), news.refused.len()), (2, 1, 1));
        assert_eq!(inbox.before(OTHER), None);
    }

    #[test]
    fn a_closed_inbox_takes_nothing() {
        let inbox = Inbox::default();
        inbox.close();
        inbox.head(ONE, HeadNews::new(Seq(5), Seq(4), true));
        assert!(inbox.take().heads.is_empty());
    }
}

//! What waits for one session's task: answers of brokers, live pushes, heads. Must stay bounded whatever the device
//! does: pushes beyond a byte budget are dropped and only their head is kept, since the session can pull them.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use stentor_engine::{
    delivery::PushRun,
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

/// A live push of one conversation, encoded once for all sessions.
#[derive(Debug)]
pub(crate) struct Push {
    /// The whole `Events` frame.
    pub(crate) frame: Bytes,
    /// What it costs of a device's credit.
    pub(crate) credit_bytes: u64,
    /// What is in it.
    pub(crate) run: PushRun,
    /// The records, kept only when somebody was removed in this push and may get just a part of it.
    pub(crate) records: Vec<Bytes>,
}

/// What a question or a proposal was for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// The session's fencing number.
    OpenSession,
    /// A send.
    Send { conversation: String, send_no: u64 },
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

/// News of a conversation's head, for one stream.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HeadNews {
    pub(crate) head: Seq,
    /// Interest was registered (again) at this head.
    pub(crate) registered: bool,
}

/// All that came since the session's task looked last.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) answers: Vec<Answer>,
    pub(crate) pushes: Vec<(u32, Arc<Push>)>,
    /// By stream.
    pub(crate) heads: BTreeMap<u32, HeadNews>,
    /// Streams whose interest was refused for good.
    pub(crate) refused: Vec<(u32, v1::Refusal)>,
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
    pub(crate) fn push(&self, stream: u32, push: &Arc<Push>) -> bool {
        let mut kept = true;
        self.tell(|news| {
            kept = news.push_bytes + push.frame.len() <= limits::INBOX_PUSH_BYTES || news.pushes.is_empty();
            if kept {
                news.push_bytes += push.frame.len();
                news.pushes.push((stream, push.clone()));
            } else {
                raise(&mut news.heads, stream, push.run.last, false);
            }
        });
        kept
    }

    /// The head of a stream's conversation is at least this.
    pub(crate) fn head(&self, stream: u32, head: Seq, registered: bool) {
        self.tell(|news| raise(&mut news.heads, stream, head, registered));
    }

    /// A stream's interest was refused for good.
    pub(crate) fn refused(&self, stream: u32, refusal: v1::Refusal) {
        self.tell(|news| news.refused.push((stream, refusal)));
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

fn raise(heads: &mut BTreeMap<u32, HeadNews>, stream: u32, head: Seq, registered: bool) {
    let news = heads.entry(stream).or_default();
    news.head = news.head.max(head);
    news.registered |= registered;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(last: u64, bytes: usize) -> Arc<Push> {
        let run = PushRun { first: Seq(last), last: Seq(last), removals: Vec::new() };
        Arc::new(Push { frame: vec![0; bytes].into(), credit_bytes: bytes as u64, run, records: Vec::new() })
    }

    #[test]
    fn pushes_beyond_the_budget_leave_only_their_head() {
        let inbox = Inbox::default();
        assert!(inbox.push(1, &push(1, limits::INBOX_PUSH_BYTES + 1)), "one is always taken");
        for seq in 2..1_000 {
            assert!(!inbox.push(1, &push(seq, 1_000)));
        }
        let news = inbox.take();
        assert_eq!((news.pushes.len(), news.heads.len()), (1, 1));
        assert_eq!(news.heads[&1].head, Seq(999));
        assert!(inbox.push(1, &push(1_000, 10)), "room again");
    }

    #[test]
    fn a_closed_inbox_takes_nothing() {
        let inbox = Inbox::default();
        inbox.close();
        inbox.head(1, Seq(5), true);
        assert!(inbox.take().heads.is_empty());
    }
}

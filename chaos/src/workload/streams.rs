//! What comes to a device in one session: takes everything from the SDK, writes it down, and moves the delivered cursor now
//! and then. Must never confirm what has not been written down.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use stentor_client::{Client, ConversationId, Incoming, Seq};
use tokio::sync::Notify;

use super::Dice;
use crate::oracle::{Device, Item, Moment, Name, Recorder, StreamId};

/// One conversation's stream of this session.
#[derive(Debug, Clone)]
pub(super) struct Open {
    pub(super) id: StreamId,
    pub(super) began: Moment,
    pub(super) name: Name,
    /// The last seq that came, or where it began.
    pub(super) last: u64,
    /// No more will come.
    pub(super) ended: bool,
}

/// All streams of one session.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: Mutex<BTreeMap<String, Open>>,
    /// Something came, or ended.
    pub(super) moved: Notify,
}

impl Streams {
    /// A stream was asked for.
    pub(super) fn begin(&self, conversation: &ConversationId, open: Open) {
        self.open.lock().insert(conversation.as_str().to_owned(), open);
    }

    /// Whether a conversation's stream is there and goes on.
    pub(super) fn is_open(&self, conversation: &ConversationId) -> bool {
        self.get(conversation).is_some_and(|open| !open.ended)
    }

    pub(super) fn get(&self, conversation: &ConversationId) -> Option<Open> {
        self.open.lock().get(conversation.as_str()).cloned()
    }

    fn change(&self, conversation: &ConversationId, change: impl FnOnce(&mut Open)) {
        if let Some(open) = self.open.lock().get_mut(conversation.as_str()) {
            change(open);
        }
        self.moved.notify_waiters();
    }

    /// Takes what comes until the session is over.
    pub(super) async fn read(self: Arc<Self>, client: Client, who: Device, recorder: Recorder, mut dice: Dice) {
        while let Some(incoming) = client.next().await {
            match incoming {
                Incoming::Event { conversation, event } => {
                    let seq = event.seq.0;
                    self.came(&recorder, &conversation, Item::Event((&event).into()));
                    if dice.chance(1, 4) {
                        self.confirm(&client, &who, &recorder, &conversation, seq);
                    }
                }
                Incoming::Hidden { conversation, hidden } => {
                    self.came(&recorder, &conversation, Item::Hidden { from: hidden.from.0, to: hidden.to.0 });
                }
                Incoming::State { conversation, delivered, read, .. } => {
                    if let Some(open) = self.get(&conversation) {
                        recorder.cursor_seen(&who, &open.name, open.began, false, (delivered.0, read.0));
                    }
                }
                Incoming::CursorsMoved { delivered, read, .. } => {
                    self.moved_cursors(&who, &recorder, delivered, |seq| (seq, 0));
                    self.moved_cursors(&who, &recorder, read, |seq| (0, seq));
                }
                Incoming::Ended { conversation, .. } => self.change(&conversation, |open| open.ended = true),
                _ => {}
            }
        }
        self.open.lock().values_mut().for_each(|open| open.ended = true);
        self.moved.notify_waiters();
    }

    fn came(&self, recorder: &Recorder, conversation: &ConversationId, item: Item) {
        let (_, to) = item.span();
        if let Some(open) = self.get(conversation) {
            recorder.deliver(open.id, item);
        }
        self.change(conversation, |open| open.last = to);
    }

    fn confirm(&self, client: &Client, who: &Device, recorder: &Recorder, conversation: &ConversationId, seq: u64) {
        if let Some(open) = self.get(conversation) {
            recorder.cursor_moves(who, &open.name, seq, 0);
            client.delivered(conversation, Seq(seq));
        }
    }

    fn moved_cursors(
        &self,
        who: &Device,
        recorder: &Recorder,
        cursors: Vec<(ConversationId, Seq)>,
        pair: fn(u64) -> (u64, u64),
    ) {
        for (conversation, seq) in cursors {
            if let Some(open) = self.get(&conversation) {
                recorder.cursor_seen(who, &open.name, open.began, true, pair(seq.0));
            }
        }
    }
}

//! What a user may read of a shard: pages, heads, lists, each checked against the rows of the same moment. Must never
//! answer before the leader's lease (or a quorum) vouches for it, nor tell a seq beyond the reader's own head.

use std::{collections::VecDeque, time::Duration};

use openraft::{
    ReadPolicy,
    errors::{LinearizableReadError, RaftError},
    raft::linearizable_read::LinearizerOption,
};
use stentor_engine::{
    access::{Segment, View},
    key::{Entity, Kind, Parts, RowKey},
    limits,
    rows::Row,
    user,
};
use stentor_proto::{
    ids::{BrokerId, ConversationId, DeviceId, Seq, UserId},
    internal::{
        ConversationRow, CursorRow, Heads, Lookup, ParticipantRow, Read, UserConversationRow, UserConversationState,
        UserState, lookup,
    },
    reason::Reason,
    v1::{Conversation, ConversationState, HistoryRequest, HistoryResponse, Item, ListRequest, Refusal, item},
};
use stentor_raft_store::ReadError;

use crate::{
    batcher::{NotProposed, forwarded},
    raft::READ_LEASE,
    shard::HostedShard,
};

/// Why a read has no answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum NotRead {
    /// This replica may not answer now.
    NotLeader {
        /// Who may, if known.
        leader: Option<BrokerId>,
        /// The same broker may again shortly.
        retry_here: bool,
    },
    /// It may, and refuses.
    Refused(Refusal),
}

impl From<Reason> for NotRead {
    fn from(reason: Reason) -> Self {
        Self::Refused(reason.refusal())
    }
}

impl From<ReadError> for NotRead {
    fn from(error: ReadError) -> Self {
        tracing::error!(%error, "a read failed");
        match error {
            // This broker stops; whoever leads then has the bytes.
            ReadError::Damaged(_) => Self::NotLeader { leader: None, retry_here: false },
            ReadError::Contradiction(_) => Reason::Damaged.into(),
            ReadError::Io(_) | ReadError::Stopped => Reason::Unavailable.into(),
        }
    }
}

/// Returns once this replica may answer: by its lease, or by asking a quorum.
pub(crate) async fn may_answer(hosted: &HostedShard, linearizable: bool) -> Result<(), NotRead> {
    let leadership = hosted.leadership();
    if !leadership.ready {
        let leader = leadership.elsewhere();
        return Err(NotRead::NotLeader { leader, retry_here: leadership.leads });
    }
    #[cfg(feature = "planted")]
    if linearizable && stentor_engine::planted::is_planted(stentor_engine::planted::Bug::StaleRead) {
        return Ok(());
    }
    hosted.idle.in_use().await;
    let quorum = match linearizable {
        true => ReadPolicy::ReadIndex.into(),
        false => LinearizerOption::new(Some(READ_LEASE), false).with_wait_timeout(Duration::ZERO),
    };
    let linearizer = match hosted.raft.get_read_linearizer(quorum).await {
        Ok(linearizer) => linearizer,
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
            let NotProposed::NotLeader { leader, retry_here } = forwarded(&forward) else {
                return Err(Reason::Unavailable.into());
            };
            // A lease that ran out comes back with the next heartbeat's answer, or another leader does.
            let retry_here = retry_here || leader.is_none() && leadership.leads;
            return Err(NotRead::NotLeader { leader, retry_here });
        }
        Err(_) => return Err(Reason::Unavailable.into()),
    };
    match linearizer.await_ready(&hosted.raft).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Reason::Unavailable.into()),
    }
}

struct Reader<'a> {
    hosted: &'a HostedShard,
    entity: Entity,
    view: View,
}

impl<'a> Reader<'a> {
    /// The view of one user (or an admin) on one conversation; the ids have been checked.
    async fn open(
        hosted: &'a HostedShard,
        app: &str,
        conversation: &str,
        user: &str,
        admin: bool,
    ) -> Result<Reader<'a>, NotRead> {
        let entity = Entity::conversation(app, conversation);
        let row = conversation_row(hosted, &entity).await?.ok_or(Reason::UnknownConversation)?;
        let view = if admin { View::admin(row) } else { View::new(row, participant_row(hosted, &entity, user).await?) };
        Ok(Reader { hosted, entity, view })
    }

    async fn forward(&self, after: Seq, limit: usize, max_bytes: usize) -> Result<HistoryResponse, NotRead> {
        let head = self.view.head();
        let (mut items, mut bytes, mut covered) = (Vec::new(), 0, after);
        'page: for segment in self.view.segments(after, head) {
            if items.len() >= limit {
                break;
            }
            if let Some(hidden) = segment.hidden() {
                covered = Seq(hidden.to);
                items.push(Item { item: Some(item::Item::Hidden(hidden)) });
                continue;
            }
            let Segment::Visible { from, to } = segment else { continue };
            let to = to.min(Seq(from.0.saturating_add((limit - items.len()) as u64 - 1)));
            let left = max_bytes.saturating_sub(bytes);
            if left == 0 {
                break 'page;
            }
            let records = self.hosted.reader.events(&self.entity, from, to, left).await?;
            if records.is_empty() {
                return Err(Reason::Internal.into());
            }
            covered = Seq(from.0 + records.len() as u64 - 1);
            bytes += records.iter().map(|r| r.len()).sum::<usize>();
            items.extend(records.into_iter().map(|record| Item { item: Some(item::Item::Record(record)) }));
            if covered < to {
                break 'page;
            }
        }
        Ok(HistoryResponse { items, head: head.0, more: covered < head })
    }

    async fn backward(&self, before: Seq, limit: usize, max_bytes: usize) -> Result<HistoryResponse, NotRead> {
        let head = self.view.head();
        let upto = head.min(Seq(before.0.saturating_sub(1)));
        let (mut items, mut bytes, mut lowest) = (VecDeque::new(), 0, upto.next());
        for segment in self.view.segments(Seq(0), upto).into_iter().rev() {
            let room = limit - items.len();
            let left = max_bytes.saturating_sub(bytes);
            if room == 0 || left == 0 {
                break;
            }
            if let Some(hidden) = segment.hidden() {
                lowest = Seq(hidden.from);
                items.push_front(Item { item: Some(item::Item::Hidden(hidden)) });
                continue;
            }
            let Segment::Visible { from, to } = segment else { continue };
            let wanted = room.min((to.0 - from.0 + 1) as usize);
            let records = self.hosted.reader.events_before(&self.entity, to.next(), wanted, left).await?;
            if records.is_empty() {
                return Err(Reason::Internal.into());
            }
            let got = records.len();
            lowest = Seq(to.0 + 1 - got as u64);
            bytes += records.iter().map(|r| r.len()).sum::<usize>();
            for record in records.into_iter().rev() {
                items.push_front(Item { item: Some(item::Item::Record(record)) });
            }
            if got < wanted {
                break;
            }
        }
        Ok(HistoryResponse { items: items.into(), head: head.0, more: lowest > Seq(1) })
    }
}

async fn conversation_row(hosted: &HostedShard, entity: &Entity) -> Result<Option<ConversationRow>, NotRead> {
    match hosted.reader.row(&entity.head()).await? {
        None => Ok(None),
        Some(Row::Conversation(row)) => Ok(Some(row)),
        Some(_) => Err(Reason::Internal.into()),
    }
}

async fn participant_row(hosted: &HostedShard, entity: &Entity, user: &str) -> Result<Option<ParticipantRow>, NotRead> {
    match hosted.reader.row(&entity.participant(user)).await? {
        None => Ok(None),
        Some(Row::Participant(row)) => Ok(Some(row)),
        Some(_) => Err(Reason::Internal.into()),
    }
}

/// Whether the reader may have this page. A stream that was begun while he was a participant still brings what he had
/// not got yet when he was removed, that event included.
fn may_go_on(view: &View, read: &Read) -> Result<(), Reason> {
    let after = read.request.as_ref().and_then(|request| request.after_seq);
    match view.may_read() {
        Err(_) if read.upto_removal && after.is_some_and(|after| Seq(after) < view.head()) => Ok(()),
        may => may,
    }
}

fn bad_id(_: stentor_proto::ids::BadId) -> NotRead {
    Reason::BadId.into()
}

/// One page of a conversation.
pub(crate) async fn page(hosted: &HostedShard, read: &Read) -> Result<HistoryResponse, NotRead> {
    let request: &HistoryRequest = read.request.as_ref().ok_or(Reason::Malformed)?;
    ConversationId::check(request.conversation.as_bytes()).map_err(bad_id)?;
    UserId::check(read.user.as_bytes()).map_err(bad_id)?;
    may_answer(hosted, request.linearizable).await?;
    let reader = Reader::open(hosted, &read.app, &request.conversation, &read.user, read.admin).await?;
    may_go_on(&reader.view, read)?;
    let limit = match request.limit as usize {
        0 => limits::PAGE_ITEMS,
        n => n.min(limits::PAGE_ITEMS),
    };
    let max_bytes = match read.max_bytes as usize {
        0 => limits::PAGE_BYTES,
        n => n.min(limits::PAGE_BYTES),
    };
    match (request.after_seq, request.before_seq) {
        (Some(_), Some(_)) => Err(Reason::Malformed.into()),
        (Some(after), None) => reader.forward(Seq(after), limit, max_bytes).await,
        // Without either, the last ones (docs/wire.md, "History").
        (None, before) => reader.backward(Seq(before.unwrap_or(u64::MAX)), limit, max_bytes).await,
    }
}

/// Where a session's streams begin.
pub(crate) async fn heads(hosted: &HostedShard, heads: &Heads) -> Result<Vec<ConversationState>, NotRead> {
    if heads.conversations.len() > limits::HEADS_PER_QUERY {
        return Err(Reason::TooManySubscriptions.into());
    }
    UserId::check(heads.user.as_bytes()).map_err(bad_id)?;
    may_answer(hosted, false).await?;
    let mut states = Vec::with_capacity(heads.conversations.len());
    for conversation in &heads.conversations {
        let state = match ConversationId::check(conversation.as_bytes()) {
            Ok(_) => head_state(hosted, heads, conversation).await?,
            Err(_) => refused_state(conversation, Reason::BadId),
        };
        states.push(state);
    }
    Ok(states)
}

fn refused_state(conversation: &str, reason: Reason) -> ConversationState {
    let conversation = conversation.to_owned();
    ConversationState { conversation, refusal: Some(reason.refusal()), ..Default::default() }
}

async fn head_state(hosted: &HostedShard, heads: &Heads, conversation: &str) -> Result<ConversationState, NotRead> {
    let entity = Entity::conversation(&heads.app, conversation);
    let Some(row) = conversation_row(hosted, &entity).await? else {
        return Ok(refused_state(conversation, Reason::UnknownConversation));
    };
    let view = View::new(row, participant_row(hosted, &entity, &heads.user).await?);
    let mut state =
        ConversationState { conversation: conversation.to_owned(), head: view.head().0, ..Default::default() };
    if let Err(reason) = view.may_read() {
        state.refusal = Some(reason.refusal());
    }
    if DeviceId::check(heads.device.as_bytes()).is_ok()
        && let Some(Row::SendState(sends)) = hosted.reader.row(&entity.send_state(&heads.user, &heads.device)).await?
    {
        (state.last_send_no, state.done_no) = (sends.last, sends.done_no);
    }
    Ok(state)
}

/// The answer to a lookup.
pub(crate) enum Found {
    /// One page of a user's list.
    Conversations(UserState),
    /// One conversation.
    Show(Conversation),
}

/// Reads of a user's shard, or one conversation's description.
pub(crate) async fn lookup(hosted: &HostedShard, lookup: &Lookup) -> Result<Found, NotRead> {
    UserId::check(lookup.user.as_bytes()).map_err(bad_id)?;
    match lookup.what.as_ref().ok_or(Reason::Malformed)? {
        lookup::What::Show(show) => {
            ConversationId::check(show.conversation.as_bytes()).map_err(bad_id)?;
            may_answer(hosted, show.linearizable).await?;
            let reader = Reader::open(hosted, &lookup.app, &show.conversation, &lookup.user, false).await?;
            Ok(Found::Show(reader.view.show(&show.conversation)?))
        }
        lookup::What::Conversations(list) => {
            may_answer(hosted, false).await?;
            conversations(hosted, lookup, list).await.map(Found::Conversations)
        }
    }
}

async fn conversations(hosted: &HostedShard, lookup: &Lookup, list: &ListRequest) -> Result<UserState, NotRead> {
    let user = Entity::user(&lookup.app, &lookup.user);
    let limit = match list.limit {
        0 => limits::LIST_PAGE as usize,
        n => n.min(limits::LIST_PAGE) as usize,
    };
    // Before the list: whatever changes while that is read has a higher seq.
    let head = user_head(hosted, &user).await?;
    let of = user.key(Kind::UserConversation, &[]);
    let after = (!list.after.is_empty()).then(|| user.key(Kind::UserConversation, &[list.after.as_bytes()]));
    let rows = hosted.reader.scan(of.as_bytes(), after.as_ref(), limit).await?;
    let full = rows.len() == limit;
    let mut state = UserState { head: head.0, ..Default::default() };
    for (key, row) in rows {
        let (Some(parts), Row::UserConversation(row)) = (Parts::of(key.as_bytes()), row) else {
            return Err(Reason::Internal.into());
        };
        let conversation = String::from_utf8_lossy(parts.sub).into_owned();
        if full {
            state.next.clone_from(&conversation);
        }
        if lookup.changed_after > 0 && row.user_seq <= lookup.changed_after {
            continue;
        }
        let delivered = match DeviceId::check(lookup.device.as_bytes()) {
            Ok(device) => cursor(hosted, &user.delivered(device, &conversation)).await?,
            Err(_) => 0,
        };
        let read = cursor(hosted, &user.key(Kind::Read, &[conversation.as_bytes()])).await?;
        let UserConversationRow { seq, removed, .. } = row;
        state.conversations.push(UserConversationState { conversation, delivered, read, removed, seq });
    }
    Ok(state)
}

/// The head of a user's own stream.
pub(crate) async fn user_head(hosted: &HostedShard, user: &Entity) -> Result<Seq, NotRead> {
    match hosted.reader.row(&user::user_key(user)).await? {
        None => Ok(Seq(0)),
        Some(Row::User(row)) => Ok(user::head(&row)),
        Some(_) => Err(Reason::Internal.into()),
    }
}

async fn cursor(hosted: &HostedShard, key: &RowKey) -> Result<u64, NotRead> {
    match hosted.reader.row(key).await? {
        Some(Row::Cursor(CursorRow { seq })) => Ok(seq),
        _ => Ok(0),
    }
}

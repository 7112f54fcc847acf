//! Client ids: a caller's own keys, remembered per (conversation, user) for a bounded time. Must never forget a key
//! without raising `forgotten_upto_ms` to its first try: eviction can refuse, never duplicate.

use bytes::Bytes;
use stentor_proto::{
    ids::{Seq, StampMs},
    internal::{Actor, ChangeParticipant, ClientKey, ClientKeyRow, ClientOrderRow, ClientScopeRow, Create, Send},
    reason::Reason,
};
use twox_hash::XxHash3_64;

use super::send_no::hash_words;
use crate::{
    apply::{ApplyError, Call},
    key::{Entity, Kind, RowKey},
    limits,
    rows::Rows,
    state,
};

/// What is known of a key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Known {
    /// The command carries none.
    NoKey,
    /// Not seen, or forgotten.
    Absent,
    /// Seen with the same content.
    First { seq: Seq, stamp: StampMs },
    /// Seen with another content; the first stays.
    Reused,
}

/// A key that was looked up.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lookup {
    pub(crate) known: Known,
    client_id: Bytes,
    first_try_ms: u64,
}

fn key_of(entity: &Entity, user: &str, client_id: &[u8]) -> RowKey {
    entity.key(Kind::ClientKey, &[&[user.len() as u8], user.as_bytes(), client_id])
}

fn scope_key(entity: &Entity, user: &str) -> RowKey {
    entity.key(Kind::ClientScope, &[user.as_bytes()])
}

fn order_key(entity: &Entity, user: &str, order: u64) -> RowKey {
    entity.key(Kind::ClientOrder, &[&[user.len() as u8], user.as_bytes(), &order.to_be_bytes()])
}

/// The rows that a key's lookup reads, as far as the command tells.
pub(crate) fn prefetch(entity: &Entity, user: &str, client_id: &[u8], visit: &mut dyn FnMut(RowKey)) {
    visit(key_of(entity, user, client_id));
    visit(scope_key(entity, user));
}

/// Looks a command's key up in its caller's scope.
pub(crate) fn find<R: Rows>(
    call: &mut Call<'_, R>,
    entity: &Entity,
    actor: &Actor,
    key: Option<&ClientKey>,
    hash: u64,
) -> Result<Lookup, ApplyError> {
    let Some(key) = key.filter(|key| !key.client_id.is_empty()) else {
        return Ok(Lookup { known: Known::NoKey, client_id: Bytes::new(), first_try_ms: 0 });
    };
    let row_key = key_of(entity, crate::command::text(&actor.user), &key.client_id);
    let known = match state::read::<ClientKeyRow>(call.rows, &row_key)? {
        None => Known::Absent,
        #[cfg(feature = "planted")]
        Some(_) if crate::planted::is_planted(crate::planted::Bug::NoDeduplication) => Known::Absent,
        Some(row) if row.command_hash == hash => Known::First { seq: Seq(row.seq), stamp: StampMs(row.stamp_ms) },
        Some(_) => Known::Reused,
    };
    Ok(Lookup { known, client_id: key.client_id.clone(), first_try_ms: key.first_try_ms })
}

/// Whether a command with this key, which is not known, may be accepted; if so, the insert to write with it. The inner
/// error is a final refusal.
pub(crate) fn admit<R: Rows>(
    call: &mut Call<'_, R>,
    entity: &Entity,
    actor: &Actor,
    key: Lookup,
    hash: u64,
) -> Result<Result<Option<Box<Insert>>, Reason>, ApplyError> {
    if key.known == Known::NoKey {
        return Ok(Ok(None));
    }
    let user = crate::command::text(&actor.user);
    let scope_key = scope_key(entity, user);
    let scope = state::read::<ClientScopeRow>(call.rows, &scope_key)?.cloned().unwrap_or_default();
    if key.first_try_ms > call.ctx.stamp.0.saturating_add(limits::FIRST_TRY_AHEAD_MS) {
        return Ok(Err(Reason::FirstTryInFuture));
    }
    if key.first_try_ms > 0 && key.first_try_ms <= scope.forgotten_upto_ms {
        return Ok(Err(Reason::DedupWindowPassed));
    }
    let mut insert = Insert {
        key: key_of(entity, user, &key.client_id),
        order_key: order_key(entity, user, scope.next_order),
        scope_key,
        scope,
        row: ClientKeyRow {
            stamp_ms: call.ctx.stamp.0,
            command_hash: hash,
            first_try_ms: key.first_try_ms,
            order: scope.next_order,
            seq: 0,
        },
        client_id: state::own(&key.client_id),
        drop: Vec::new(),
    };
    insert.plan(call, entity, user)?;
    Ok(Ok(Some(Box::new(insert))))
}

/// A key on its way into its scope, and what it pushes out. Everything that it needs was read.
#[derive(Debug)]
pub(crate) struct Insert {
    key: RowKey,
    order_key: RowKey,
    scope_key: RowKey,
    scope: ClientScopeRow,
    row: ClientKeyRow,
    client_id: Bytes,
    drop: Vec<RowKey>,
}

impl Insert {
    /// Carries the scope over the insert and over at most [`limits::EVICTIONS_PER_INSERT`] evictions.
    fn plan<R: Rows>(&mut self, call: &mut Call<'_, R>, entity: &Entity, user: &str) -> Result<(), ApplyError> {
        let stamp_ms = call.ctx.stamp.0;
        let scope = &mut self.scope;
        if scope.first_order == scope.next_order {
            scope.oldest_ms = stamp_ms;
        }
        scope.bytes += cost(&self.client_id);
        scope.next_order += 1;
        for _ in 0..limits::EVICTIONS_PER_INSERT {
            // The key that is being inserted is never pushed out by its own insert.
            let older = scope.next_order - 1 - scope.first_order;
            let expired = scope.oldest_ms.saturating_add(limits::CLIENT_KEY_KEPT_MS) < stamp_ms;
            let over = older >= limits::CLIENT_KEYS_PER_SCOPE || scope.bytes > limits::CLIENT_KEY_BYTES_PER_SCOPE;
            if older == 0 || !(expired || over) {
                break;
            }
            let oldest_key = order_key(entity, user, scope.first_order);
            let oldest = state::read::<ClientOrderRow>(call.rows, &oldest_key)?;
            let oldest = oldest.ok_or_else(|| ApplyError::Damaged(format!("{oldest_key:?} is missing")))?;
            scope.forgotten_upto_ms = scope.forgotten_upto_ms.max(oldest.first_try_ms);
            scope.bytes = scope.bytes.saturating_sub(cost(&oldest.client_id));
            scope.first_order += 1;
            self.drop.push(key_of(entity, user, &oldest.client_id));
            self.drop.push(oldest_key);
            scope.oldest_ms =
                match state::read::<ClientOrderRow>(call.rows, &order_key(entity, user, scope.first_order))? {
                    Some(next) => next.stamp_ms,
                    None => stamp_ms,
                };
        }
        Ok(())
    }

    /// Writes it all; `seq` is the key's first result.
    pub(crate) fn write<R: Rows>(mut self, call: &mut Call<'_, R>, seq: Seq) -> Result<(), ApplyError> {
        self.row.seq = seq.0;
        let order = ClientOrderRow {
            client_id: self.client_id,
            first_try_ms: self.row.first_try_ms,
            stamp_ms: self.row.stamp_ms,
        };
        call.rows.put(self.key, self.row.into());
        call.rows.put(self.order_key, order.into());
        self.drop.iter().for_each(|key| call.rows.remove(key));
        call.rows.put(self.scope_key, self.scope.into());
        Ok(())
    }
}

fn cost(client_id: &[u8]) -> u64 {
    client_id.len() as u64 + limits::CLIENT_KEY_COST_BYTES
}

/// What makes two sends of one key the same: what the receivers get. Stored in rows: frozen.
pub(crate) fn hash_of_send(send: &Send) -> u64 {
    let (content_type, body) = (XxHash3_64::oneshot(&send.content_type), XxHash3_64::oneshot(&send.body));
    hash_words([1, u64::from(send.kind as u32), content_type, body])
}

/// As [`hash_of_send`], for a create.
pub(crate) fn hash_of_create(create: &Create) -> u64 {
    let users = create.participants.iter().fold(0, |hash, user| XxHash3_64::oneshot_with_seed(hash, user));
    hash_words([2, u64::from(create.kind as u32), u64::from(create.history_full), users])
}

/// As [`hash_of_send`], for a change of participants.
pub(crate) fn hash_of_change(change: &ChangeParticipant) -> u64 {
    let user = XxHash3_64::oneshot(&change.user);
    hash_words([3, u64::from(change.change as u32), u64::from(change.role as u32), user])
}

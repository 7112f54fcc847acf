//! Commands: how they are made where they enter the cluster, and what makes one acceptable before anything is read.
//! Must never accept an id that the storage keys could not hold.

use bytes::Bytes;
use stentor_proto::{
    Message,
    ids::{
        AppId, BadId, ClientId, ConversationId, DIRECT_PREFIX, DeviceId, SendNo, Seq, SessionNo, Slot, UserId, key_crc,
    },
    internal::{
        self, Actor, ClientKey, Command, Create, Expire, MoveCursors, OpenSession, OutboxDone, RemoveDevice, RunItem,
        Send, SendRun, UserConversation, change_participant::Change, command::Op,
    },
    reason::Reason,
    v1::{self, ConversationKind, EventKind, Role},
};

use crate::limits;

/// A command with its checksums. `app` and `target` are empty for the meta shard.
pub fn wrap(app: Bytes, target: Bytes, op: Op) -> Command {
    let key_crc = key_crc(&app, &target);
    let body_crc = body_of(&op).map_or(0, crc32fast::hash);
    Command { app, target, key_crc, body_crc, op: Some(op) }
}

fn body_of(op: &Op) -> Option<&[u8]> {
    match op {
        Op::Send(send) if !send.body.is_empty() => Some(&send.body),
        _ => None,
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn of(app: &AppId, target: &str, op: Op) -> Command {
    wrap(bytes(app.as_str()), bytes(target), op)
}

/// Who asks; `device` is missing for an API call without one, `admin` skips permission checks.
pub fn actor(user: &UserId, device: Option<&DeviceId>, admin: bool) -> Actor {
    Actor { user: bytes(user.as_str()), device: device.map(|d| bytes(d.as_str())).unwrap_or_default(), admin }
}

/// A caller's own key; `first_try_ms` is 0 where none was given.
pub fn client_key(client_id: &ClientId, first_try_ms: u64) -> ClientKey {
    ClientKey { client_id: bytes(client_id.as_str()), first_try_ms }
}

/// Creates a conversation.
pub fn create(app: &AppId, conversation: &ConversationId, create: Create) -> Command {
    of(app, conversation.as_str(), Op::Create(create))
}

/// Sends. Fields that stay at their defaults are absent; see [`Send`].
pub fn send(app: &AppId, conversation: &ConversationId, send: Send) -> Command {
    of(app, conversation.as_str(), Op::Send(send))
}

/// Sends of one device in a row, with an outcome for each.
pub fn send_run(app: &AppId, conversation: &ConversationId, run: SendRun) -> Command {
    of(app, conversation.as_str(), Op::SendRun(run))
}

/// One send of a run, with its checksum. What no device may send becomes a refusal that consumes the number.
pub fn run_item(item: v1::SendItem, max_body_bytes: usize) -> RunItem {
    let checked = match content_of(item.kind, item.content_type.as_bytes(), item.body.len()) {
        Ok(()) if item.body.len() > max_body_bytes => Err(Reason::BodyTooLarge),
        checked => checked,
    };
    if let Err(reason) = checked {
        return RunItem { sent_at_ms: item.sent_at_ms, refused: reason as u32, ..RunItem::default() };
    }
    RunItem {
        body_crc: crc32fast::hash(&item.body),
        kind: item.kind,
        content_type: Bytes::from(item.content_type),
        sent_at_ms: item.sent_at_ms,
        body: item.body,
        refused: 0,
    }
}

/// How many outcomes a command has.
pub fn outcomes(command: &Command) -> usize {
    match &command.op {
        Some(Op::SendRun(run)) => run.items.len(),
        _ => 1,
    }
}

/// What a gateway proposes in place of a numbered send that it refuses for good: it consumes the number with that
/// reason, so that the sends behind it keep their order. `None` where the number is not to be consumed: the command is
/// no numbered send, or the reason is retryable.
pub fn refused_send(command: &Command, reason: Reason) -> Option<Command> {
    let Some(Op::Send(send)) = &command.op else { return None };
    if send.send_no == 0 || reason.retryable() {
        return None;
    }
    let send = Send {
        actor: send.actor.clone(),
        send_no: send.send_no,
        done_no: send.done_no,
        sent_at_ms: send.sent_at_ms,
        session_no: send.session_no,
        refused: reason as u32,
        ..Send::default()
    };
    Some(wrap(command.app.clone(), command.target.clone(), Op::Send(send)))
}

/// Adds a participant; `Role::Unspecified` gives the default of the conversation's kind.
pub fn add(app: &AppId, conversation: &ConversationId, actor: Actor, user: &UserId, role: Role) -> Command {
    change(app, conversation, actor, user, Change::Add, role)
}

/// Removes a participant.
pub fn remove(app: &AppId, conversation: &ConversationId, actor: Actor, user: &UserId) -> Command {
    change(app, conversation, actor, user, Change::Remove, Role::Unspecified)
}

/// Gives a participant another role.
pub fn change_role(app: &AppId, conversation: &ConversationId, actor: Actor, user: &UserId, role: Role) -> Command {
    change(app, conversation, actor, user, Change::Role, role)
}

fn change(
    app: &AppId,
    conversation: &ConversationId,
    actor: Actor,
    user: &UserId,
    change: Change,
    role: Role,
) -> Command {
    change_participant(
        app,
        conversation,
        internal::ChangeParticipant {
            actor: Some(actor),
            user: bytes(user.as_str()),
            change: change as i32,
            role: role as i32,
            expect_version: None,
            client_key: None,
        },
    )
}

/// Any change of a participant, with precondition and client key.
pub fn change_participant(app: &AppId, conversation: &ConversationId, change: internal::ChangeParticipant) -> Command {
    of(app, conversation.as_str(), Op::ChangeParticipant(change))
}

/// Removes what lies before `before_ms`.
pub fn expire(app: &AppId, conversation: &ConversationId, before_ms: u64) -> Command {
    of(app, conversation.as_str(), Op::Expire(Expire { before_ms }))
}

/// The users' shards have heard of these outbox items.
pub fn outbox_done(app: &AppId, conversation: &ConversationId, items: &[(Seq, UserId)]) -> Command {
    let done = OutboxDone {
        item: items.iter().map(|(seq, _)| seq.0).collect(),
        user: items.iter().map(|(_, user)| bytes(user.as_str())).collect(),
    };
    of(app, conversation.as_str(), Op::OutboxDone(done))
}

/// Begins, or continues, a device's session.
pub fn open_session(app: &AppId, user: &UserId, device: &DeviceId, nonce: &[u8]) -> Command {
    let open = OpenSession { device: bytes(device.as_str()), nonce: Bytes::copy_from_slice(nonce) };
    of(app, user.as_str(), Op::OpenSession(open))
}

/// Moves cursors: `delivered` of the device, `read` of its user.
pub fn move_cursors(
    app: &AppId,
    user: &UserId,
    device: &DeviceId,
    session_no: SessionNo,
    delivered: &[(ConversationId, Seq)],
    read: &[(ConversationId, Seq)],
) -> Command {
    let moves = |cursors: &[(ConversationId, Seq)]| {
        cursors.iter().map(|(c, seq)| internal::CursorMove { conversation: bytes(c.as_str()), seq: seq.0 }).collect()
    };
    let op = MoveCursors {
        device: bytes(device.as_str()),
        session_no: session_no.0,
        delivered: moves(delivered),
        read: moves(read),
    };
    of(app, user.as_str(), Op::MoveCursors(op))
}

/// Tells a user's shard of an outbox item.
pub fn user_conversation(
    app: &AppId,
    user: &UserId,
    conversation: &ConversationId,
    seq: Seq,
    removed: bool,
) -> Command {
    let item = UserConversation { conversation: bytes(conversation.as_str()), seq: seq.0, removed };
    of(app, user.as_str(), Op::UserConversation(item))
}

/// Forgets a device, and its cursors in these conversations; at most [`limits::CURSOR_MOVES_PER_COMMAND`].
pub fn remove_device(app: &AppId, user: &UserId, device: &DeviceId, delivered: &[ConversationId]) -> Command {
    let delivered = delivered.iter().map(|conversation| bytes(conversation.as_str())).collect();
    of(app, user.as_str(), Op::RemoveDevice(RemoveDevice { device: bytes(device.as_str()), delivered }))
}

fn of_meta(op: Op) -> Command {
    wrap(Bytes::new(), Bytes::new(), op)
}

/// Names the cluster, once.
pub fn put_cluster(cluster_id: &str, shards: u32) -> Command {
    of_meta(Op::PutCluster(internal::PutCluster { cluster_id: bytes(cluster_id), shards }))
}

/// Adds an app or replaces its keys.
pub fn put_app(app: &AppId, keys: Vec<internal::SigningKey>) -> Command {
    of_meta(Op::PutApp(internal::PutApp { name: bytes(app.as_str()), keys }))
}

/// Adds a broker or replaces its addresses.
pub fn put_broker(broker: internal::PutBroker) -> Command {
    of_meta(Op::PutBroker(broker))
}

/// Replaces the placement, if its version is still `expect_version` (0 before the first).
pub fn put_placement(shards: Vec<internal::ShardPlacement>, expect_version: u64) -> Command {
    of_meta(Op::PutPlacement(internal::PutPlacement { shards, expect_version }))
}

/// Notes that a shard has committed: nobody initializes it again.
pub fn mark_initialized(shard: u32) -> Command {
    of_meta(Op::MarkInitialized(internal::MarkInitialized { shard }))
}

/// Gives an empty directory of a broker its incarnation, if the last one given is still `expect_incarnation`.
pub fn join_broker(join: internal::JoinBroker) -> Command {
    of_meta(Op::JoinBroker(join))
}

/// As it stands in a bundle.
pub fn encode(command: &Command) -> Bytes {
    command.encode_to_vec().into()
}

/// Where a command belongs; `None` for the meta shard's.
pub fn target_shard_slot(command: &Command) -> Option<Slot> {
    if is_meta(command) {
        return None;
    }
    Some(Slot::of(std::str::from_utf8(&command.app).ok()?, std::str::from_utf8(&command.target).ok()?))
}

fn is_meta(command: &Command) -> bool {
    matches!(
        command.op,
        Some(
            Op::PutCluster(_)
                | Op::PutApp(_)
                | Op::PutBroker(_)
                | Op::PutPlacement(_)
                | Op::MarkInitialized(_)
                | Op::JoinBroker(_)
        )
    )
}

/// The send's number, where it has one; of a run the first.
pub fn send_no(command: &Command) -> Option<SendNo> {
    match &command.op {
        Some(Op::Send(send)) if send.send_no > 0 => Some(SendNo(send.send_no)),
        Some(Op::SendRun(run)) => Some(SendNo(run.send_no)),
        _ => None,
    }
}

/// What every command must pass before it is proposed: checksums, ids, sizes, content. Nothing has changed when it
/// fails. A numbered send that fails for good must still consume its number: propose [`refused_send`] then.
///
/// # Errors
/// The stable reason; [`Reason::Damaged`] for bytes that do not match their checksum.
pub fn check(command: &Command) -> Result<(), Reason> {
    if command.encoded_len() > limits::MAX_COMMAND_BYTES {
        return Err(Reason::BodyTooLarge);
    }
    checksums(command).map_err(|_| Reason::Damaged)?;
    shape(command)?;
    match &command.op {
        Some(Op::Send(send)) if send.refused == 0 => content(send),
        Some(Op::SendRun(run)) => run.items.iter().filter(|item| item.refused == 0).try_for_each(content_of_item),
        _ => Ok(()),
    }
}

/// Checks both checksums; the error names the part that changed.
pub(crate) fn checksums(command: &Command) -> Result<(), &'static str> {
    if command.key_crc != key_crc(&command.app, &command.target) {
        return Err("key");
    }
    let body_crc = command.op.as_ref().and_then(body_of).map_or(0, crc32fast::hash);
    let items: &[RunItem] = if let Some(Op::SendRun(run)) = &command.op { &run.items } else { &[] };
    let intact = |item: &RunItem| item.body_crc == if item.body.is_empty() { 0 } else { crc32fast::hash(&item.body) };
    if command.body_crc == body_crc && items.iter().all(intact) { Ok(()) } else { Err("body") }
}

/// Text of an id that [`shape`] has checked.
pub(crate) fn text(id: &[u8]) -> &str {
    // Checked ids are UTF-8; an unchecked one would be the empty id, which no row has.
    std::str::from_utf8(id).unwrap_or_default()
}

fn id(checked: Result<&str, BadId>) -> Result<&str, Reason> {
    checked.map_err(|_| Reason::BadId)
}

/// Checks the ids and the form: what `apply` relies on before it builds a key.
pub(crate) fn shape(command: &Command) -> Result<(), Reason> {
    let op = command.op.as_ref().ok_or(Reason::Malformed)?;
    if is_meta(command) {
        return if command.app.is_empty() && command.target.is_empty() { Ok(()) } else { Err(Reason::Malformed) };
    }
    id(AppId::check(&command.app))?;
    match op {
        Op::Create(_) | Op::Send(_) | Op::SendRun(_) | Op::ChangeParticipant(_) | Op::Expire(_) | Op::OutboxDone(_) => {
            id(ConversationId::check(&command.target))?;
        }
        _ => {
            id(UserId::check(&command.target))?;
        }
    }
    match op {
        Op::Create(create) => shape_of_create(command, create),
        Op::Send(send) => shape_of_send(send),
        Op::SendRun(run) => shape_of_run(run),
        Op::ChangeParticipant(change) => shape_of_change(change),
        Op::OutboxDone(done) => shape_of_outbox_done(done),
        Op::OpenSession(open) => {
            id(DeviceId::check(&open.device))?;
            if open.nonce.len() == limits::SESSION_NONCE_BYTES { Ok(()) } else { Err(Reason::Malformed) }
        }
        Op::MoveCursors(moves) => shape_of_moves(moves),
        Op::UserConversation(item) => {
            id(ConversationId::check(&item.conversation))?;
            if item.seq > 0 { Ok(()) } else { Err(Reason::Malformed) }
        }
        Op::RemoveDevice(remove) => {
            id(DeviceId::check(&remove.device))?;
            if remove.delivered.len() > limits::CURSOR_MOVES_PER_COMMAND {
                return Err(Reason::Malformed);
            }
            remove.delivered.iter().try_for_each(|conversation| id(ConversationId::check(conversation)).map(drop))
        }
        _ => Ok(()),
    }
}

fn shape_of_actor(actor: Option<&Actor>) -> Result<&Actor, Reason> {
    let actor = actor.ok_or(Reason::Malformed)?;
    id(UserId::check(&actor.user))?;
    if !actor.device.is_empty() {
        id(DeviceId::check(&actor.device))?;
    }
    Ok(actor)
}

fn shape_of_key(key: Option<&ClientKey>) -> Result<(), Reason> {
    match key {
        Some(key) if !key.client_id.is_empty() => id(ClientId::check(&key.client_id)).map(drop),
        _ => Ok(()),
    }
}

fn shape_of_create(command: &Command, create: &Create) -> Result<(), Reason> {
    let actor = shape_of_actor(create.actor.as_ref())?;
    shape_of_key(create.client_key.as_ref())?;
    if create.participants.len() > limits::MAX_CREATE_PARTICIPANTS {
        return Err(Reason::TooManyParticipants);
    }
    for user in &create.participants {
        id(UserId::check(user))?;
    }
    match create.kind() {
        ConversationKind::Unspecified => Err(Reason::BadKind),
        ConversationKind::Direct => {
            let [other] = &create.participants[..] else { return Err(Reason::DirectIsFixed) };
            if *other == actor.user {
                return Err(Reason::DirectIsFixed);
            }
            let (a, b) = if actor.user <= *other { (&actor.user, other) } else { (other, &actor.user) };
            let expected = [DIRECT_PREFIX.as_bytes(), a, b"/", b].concat();
            if command.target == expected { Ok(()) } else { Err(Reason::BadId) }
        }
        _ if command.target.starts_with(DIRECT_PREFIX.as_bytes()) => Err(Reason::BadId),
        _ => Ok(()),
    }
}

fn shape_of_send(send: &Send) -> Result<(), Reason> {
    let actor = shape_of_actor(send.actor.as_ref())?;
    if send.send_no == 0 {
        // A refusal is only worth forwarding for the number that it consumes.
        return if send.refused == 0 && send.done_no == 0 { Ok(()) } else { Err(Reason::Malformed) };
    }
    if actor.device.is_empty() {
        return Err(Reason::BadId);
    }
    if send.done_no >= send.send_no {
        return Err(Reason::Malformed);
    }
    shape_of_refused(send.refused, &send.body)
}

fn shape_of_refused(refused: u32, body: &[u8]) -> Result<(), Reason> {
    match Reason::from_number(refused) {
        _ if refused == 0 => Ok(()),
        Some(reason) if !reason.retryable() && body.is_empty() => Ok(()),
        _ => Err(Reason::Malformed),
    }
}

fn shape_of_run(run: &SendRun) -> Result<(), Reason> {
    let actor = shape_of_actor(run.actor.as_ref())?;
    if actor.device.is_empty() {
        return Err(Reason::BadId);
    }
    let numbered = run.done_no < run.send_no && run.send_no.checked_add(run.items.len() as u64).is_some();
    if !numbered || run.items.is_empty() || run.items.len() > limits::RUN_SENDS {
        return Err(Reason::Malformed);
    }
    run.items.iter().try_for_each(|item| shape_of_refused(item.refused, &item.body))
}

fn shape_of_change(change: &internal::ChangeParticipant) -> Result<(), Reason> {
    shape_of_actor(change.actor.as_ref())?;
    shape_of_key(change.client_key.as_ref())?;
    id(UserId::check(&change.user))?;
    let role_known = Role::try_from(change.role).is_ok();
    match change.change() {
        Change::Add | Change::Remove if role_known => Ok(()),
        Change::Role if role_known && change.role() != Role::Unspecified => Ok(()),
        _ => Err(Reason::Malformed),
    }
}

fn shape_of_outbox_done(done: &OutboxDone) -> Result<(), Reason> {
    if done.item.len() != done.user.len() || done.item.len() > limits::OUTBOX_DONE_ITEMS {
        return Err(Reason::Malformed);
    }
    done.user.iter().try_for_each(|user| id(UserId::check(user)).map(drop))
}

fn shape_of_moves(moves: &MoveCursors) -> Result<(), Reason> {
    id(DeviceId::check(&moves.device))?;
    if moves.delivered.len() + moves.read.len() > limits::CURSOR_MOVES_PER_COMMAND {
        return Err(Reason::Malformed);
    }
    moves.delivered.iter().chain(&moves.read).try_for_each(|m| id(ConversationId::check(&m.conversation)).map(drop))
}

/// Checks what a send carries. Failing is final and consumes the send's number.
pub(crate) fn content(send: &Send) -> Result<(), Reason> {
    kind_of_send(send.kind)?;
    shape_of_key(send.client_key.as_ref())?;
    content_of(send.kind, &send.content_type, send.body.len())
}

/// The same of one send of a run.
pub(crate) fn content_of_item(item: &RunItem) -> Result<(), Reason> {
    content_of(item.kind, &item.content_type, item.body.len())
}

fn kind_of_send(kind: i32) -> Result<(), Reason> {
    match EventKind::try_from(kind) {
        Ok(EventKind::Unspecified | EventKind::Message | EventKind::Action) => Ok(()),
        _ => Err(Reason::BadKind),
    }
}

fn content_of(kind: i32, content_type: &[u8], body_bytes: usize) -> Result<(), Reason> {
    kind_of_send(kind)?;
    let printable = content_type.iter().all(|b| (b' '..=b'~').contains(b));
    if content_type.len() > limits::MAX_CONTENT_TYPE_BYTES || !printable {
        return Err(Reason::BadContentType);
    }
    match body_bytes {
        0 => Err(Reason::EmptyBody),
        n if n > limits::MAX_BODY_BYTES => Err(Reason::BodyTooLarge),
        _ => Ok(()),
    }
}

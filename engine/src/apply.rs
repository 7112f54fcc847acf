//! `apply`: a pure function of (rows, command) that every replica runs alike; here an event gets its `seq`. Must never
//! see a clock, a random number or this binary's version: time and rules come with the entry.

use bytes::{Bytes, BytesMut};
use stentor_proto::{
    Message,
    bundle::Bundle,
    ids::{ApplyLevel, StampMs},
    internal::{Command, command::Op},
    v1::EventHeader,
};
use thiserror::Error;

use crate::{
    command, conversation,
    effect::{Applied, Effect, Outcome},
    key::{Entity, RowKey},
    limits, meta,
    rows::{NotLoaded, Rows},
    user,
};

/// The rules that this build writes; it knows all below. Level 2: changes of a user's list have seqs of his own stream,
/// and a removed device takes its cursors with it. Level 3: [`RUNS`].
pub const LEVEL: ApplyLevel = ApplyLevel(3);
/// From here on there are runs of sends, and answered results leave a send state many at a time.
pub(crate) const RUNS: ApplyLevel = ApplyLevel(3);

/// What an entry says about all of its commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The only time there is.
    pub stamp: StampMs,
    /// The rules to follow.
    pub level: ApplyLevel,
}

/// Why a command was not applied. None of these moved any state.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ApplyError {
    /// Load the row and apply the same command again.
    #[error(transparent)]
    NotLoaded(#[from] NotLoaded),
    /// The log or the state is not what was written: the replica must stop.
    #[error("damaged: {0}")]
    Damaged(String),
    /// A newer version wrote the entry: the replica must stop until it is upgraded.
    #[error("entry needs apply level {0}, this version knows {LEVEL}")]
    UnknownLevel(ApplyLevel),
}

/// What the commands of an entry share. `last` is the stamp of the entry before it and becomes this one's.
///
/// # Errors
/// [`ApplyError::UnknownLevel`]; `last` has not moved.
pub fn begin_entry(last: &mut StampMs, bundle: &Bundle) -> Result<Context, ApplyError> {
    if bundle.level == ApplyLevel(0) || bundle.level > LEVEL {
        return Err(ApplyError::UnknownLevel(bundle.level));
    }
    *last = (*last).max(bundle.stamp);
    Ok(Context { stamp: *last, level: bundle.level })
}

/// Applies one encoded [`Command`]: pushes its outcomes ([`command::outcomes`], one but for runs) and effects to `out`.
/// `records` is an arena for the bytes of event records; it must be empty and is empty afterwards (its capacity is what is
/// reused).
///
/// # Errors
/// See [`ApplyError`]; rows and `out` are as before.
pub fn apply_command(
    rows: &mut impl Rows,
    ctx: &Context,
    command: &Bytes,
    records: &mut BytesMut,
    out: &mut Applied,
) -> Result<(), ApplyError> {
    let command = Command::decode(command.clone()).map_err(|e| ApplyError::Damaged(format!("command: {e}")))?;
    command::checksums(&command).map_err(|what| ApplyError::Damaged(format!("command: checksum of its {what}")))?;
    let refused = |reason| std::iter::repeat_n(Outcome::refused(reason), command::outcomes(&command));
    if let Err(reason) = command::shape(&command) {
        out.outcomes.extend(refused(reason));
        return Ok(());
    }
    let mut call = Call { rows, ctx, records, effects: &mut out.effects, command: &command };
    match &command.op {
        Some(Op::SendRun(run)) if ctx.level >= RUNS => {
            conversation::send::apply_run(&mut call, run, &mut out.outcomes)?
        }
        // Nobody wrote one at that level.
        Some(Op::SendRun(_)) => out.outcomes.extend(refused(stentor_proto::reason::Reason::Malformed)),
        _ => out.outcomes.push(call.run()?),
    }
    Ok(())
}

/// Visits the rows that a command will read, as far as the command alone tells: a hint for loading them early.
pub fn prefetch(command: &Bytes, visit: &mut dyn FnMut(RowKey)) {
    let Ok(command) = Command::decode(command.clone()) else { return };
    if command::shape(&command).is_ok() {
        match &command.op {
            Some(
                Op::Create(_)
                | Op::Send(_)
                | Op::SendRun(_)
                | Op::ChangeParticipant(_)
                | Op::Expire(_)
                | Op::OutboxDone(_),
            ) => conversation::prefetch(&command, visit),
            Some(Op::OpenSession(_) | Op::MoveCursors(_) | Op::UserConversation(_) | Op::RemoveDevice(_)) => {
                user::prefetch(&command, visit);
            }
            _ => {}
        }
    }
}

/// Carries a replica's hash over one more bundle: replicas that applied the same bundles have the same hash.
pub fn chain(hash: u64, bundle: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot_with_seed(hash, bundle)
}

/// One command in progress. Ids in `command` were checked by [`command::shape`].
pub(crate) struct Call<'a, R> {
    pub(crate) rows: &'a mut R,
    pub(crate) ctx: &'a Context,
    pub(crate) command: &'a Command,
    pub(crate) effects: &'a mut Vec<Effect>,
    records: &'a mut BytesMut,
}

impl<R: Rows> Call<'_, R> {
    fn run(mut self) -> Result<Outcome, ApplyError> {
        match &self.command.op {
            Some(Op::Send(send)) => conversation::send::apply(&mut self, send),
            Some(Op::Create(create)) => conversation::create::apply(&mut self, create),
            Some(Op::ChangeParticipant(change)) => conversation::participants::apply(&mut self, change),
            Some(Op::Expire(_)) => Ok(Outcome::refused(stentor_proto::reason::Reason::NotBuilt)),
            Some(Op::OutboxDone(done)) => conversation::participants::outbox_done(&mut self, done),
            Some(Op::OpenSession(open)) => user::sessions::open(&mut self, open),
            Some(Op::RemoveDevice(remove)) => user::sessions::remove(&mut self, remove),
            Some(Op::MoveCursors(moves)) => user::cursors::apply(&mut self, moves),
            Some(Op::UserConversation(item)) => user::conversations::apply(&mut self, item),
            Some(Op::PutCluster(put)) => meta::put_cluster(&mut self, put),
            Some(Op::PutApp(put)) => meta::put_app(&mut self, put),
            Some(Op::PutBroker(put)) => meta::put_broker(&mut self, put),
            Some(Op::PutPlacement(put)) => meta::put_placement(&mut self, put),
            Some(Op::MarkInitialized(mark)) => meta::mark_initialized(&mut self, mark),
            Some(Op::JoinBroker(join)) => meta::join_broker(&mut self, join),
            // `shape` has refused the first; the second has more outcomes than one.
            None | Some(Op::SendRun(_)) => Ok(Outcome::refused(stentor_proto::reason::Reason::Malformed)),
        }
    }

    /// The app, as text.
    pub(crate) fn app(&self) -> &str {
        command::text(&self.command.app)
    }

    /// The conversation or user, as text.
    pub(crate) fn target(&self) -> &str {
        command::text(&self.command.target)
    }

    /// Writes one event: its record, and the effect that carries it out. The body comes with its CRC32. Returns the
    /// record's length in bytes.
    pub(crate) fn append(&mut self, entity: &Entity, header: &EventHeader, (body, crc): (&[u8], u32)) -> usize {
        let bytes = stentor_proto::record::PREFIX_BYTES + header.encoded_len() + body.len();
        if self.records.capacity() - self.records.len() < bytes {
            self.records.reserve(bytes.max(limits::RECORD_ARENA_BYTES));
        }
        let body_crc = if body.is_empty() { 0 } else { crc };
        stentor_proto::record::encode(header, body, self.command.key_crc, body_crc, self.records);
        let record = self.records.split().freeze();
        let seq = header.seq.into();
        self.rows.append_event(entity, seq, &record);
        let (app, conversation) = (self.command.app.clone(), self.command.target.clone());
        self.effects.push(Effect::FanOut { app, conversation, seq, record });
        bytes
    }
}

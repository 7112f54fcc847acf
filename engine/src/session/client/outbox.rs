//! A device's sends in one conversation: numbers, the window, go-back-N. Must never give a number twice to what may
//! have been accepted, and never call a send refused that may have been accepted: what it can't know it says.
//!
//! A send gets its number when it is first transmitted. A retryable refusal stops the conversation until every send
//! in flight has its answer; then, after a wait, everything unanswered goes again from the first, under the same
//! numbers, one alone at first (a probe). Numbers change only when it is proven that they are another's.

use std::collections::VecDeque;

use stentor_proto::{
    ids::{SendNo, Seq, StampMs},
    reason::Reason,
    v1,
};

use super::backoff::{Backoff, Draws};
use crate::limits;

/// What became of a send.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is an event.
    Sent {
        /// The number under which it went.
        send_no: SendNo,
        /// The event's place.
        seq: Seq,
        /// The event's time.
        stamp: StampMs,
        /// An earlier attempt had been accepted already; this is its result.
        repeat: bool,
    },
    /// The server refuses it for good; there is no event.
    Refused(v1::Refusal),
    /// It may be an event or not; nobody can tell any more. The refusal says why.
    Unknown(v1::Refusal),
}

/// How far the device knows its own count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    /// Must be asked for before anything is sent.
    Unknown,
    /// As the server has it.
    Known,
}

#[derive(Debug)]
struct Entry<S> {
    /// As it goes out; `send_no` is 0 until it has a number.
    send: v1::Send,
    ticket: S,
    /// Transmitted on this connection and not answered yet.
    flying: bool,
    /// An earlier attempt under this number has no answer, so that it may have been accepted.
    uncertain: bool,
    /// The server said that this number is another command's.
    lost_number: bool,
}

/// What the outbox wants to happen next; ask after every input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// Nothing.
    Nothing,
    /// Ask the server for the send state.
    Ask,
    /// Transmit.
    Send,
    /// Wake it at this time.
    WakeAt(u64),
}

#[derive(Debug)]
pub(super) struct Outbox<S> {
    count: Count,
    /// The highest number given.
    last: u64,
    /// Everything without an answer; those with a number first, numbers ascending.
    pending: VecDeque<Entry<S>>,
    /// How many of the front were transmitted since the last stop.
    round: usize,
    in_flight: usize,
    /// One at a time, until one is accepted.
    probing: bool,
    /// A retryable refusal came: nothing goes out until all in flight are answered and this time is reached.
    stopped: Option<u64>,
    /// Refusals in a row.
    attempt: u32,
    /// The highest `last` that came with a proof that a number is another's.
    taken_upto: u64,
    /// Since when the next send is ready, while others are in flight.
    ready_since: u64,
    /// How many of the front were there when the count was asked for: a refusal, which may be older than what came
    /// since, says nothing of the rest.
    asked: usize,
}

impl<S> Default for Outbox<S> {
    fn default() -> Self {
        Self {
            count: Count::Unknown,
            last: 0,
            pending: VecDeque::new(),
            round: 0,
            in_flight: 0,
            probing: true,
            stopped: None,
            attempt: 0,
            taken_upto: 0,
            ready_since: 0,
            asked: 0,
        }
    }
}

impl<S> Outbox<S> {
    pub(super) fn push(&mut self, now: u64, send: v1::Send, ticket: S) {
        if self.pending.len() == self.round {
            self.ready_since = now;
        }
        self.pending.push_back(Entry { send, ticket, flying: false, uncertain: false, lost_number: false });
    }

    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// The highest number given, and up to where everything has its answer.
    pub(super) fn position(&self) -> (SendNo, SendNo) {
        let done = self.pending.front().filter(|e| e.send.send_no > 0).map_or(self.last, |e| e.send.send_no - 1);
        (SendNo(self.last), SendNo(done))
    }

    /// `run_sends`: how long a run may be on this connection; below 2 there are none.
    pub(super) fn want(&self, now: u64, run_sends: usize) -> Want {
        match self.stopped {
            _ if self.pending.is_empty() || self.in_flight > 0 && self.stopped.is_some() => Want::Nothing,
            Some(at) if at > now => Want::WakeAt(at),
            _ if self.count == Count::Unknown => Want::Ask,
            _ if self.may_transmit() && self.gathers(run_sends) && now < self.ready_since + limits::RUN_LINGER_MS => {
                Want::WakeAt(self.ready_since + limits::RUN_LINGER_MS)
            }
            _ if self.may_transmit() => Want::Send,
            _ => Want::Nothing,
        }
    }

    /// Whether more is in flight than is ready: its answers bring more sends, perhaps, that had better go with these. A run
    /// costs everybody on the way as much as a single send (Nagle's rule, RFC 896, with a bound). A full one never waits.
    fn gathers(&self, run_sends: usize) -> bool {
        let ready = self.pending.len() - self.round;
        let joins = |next: &Entry<S>| goes_in_runs(&next.send) && ready * next.send.body.len() < limits::RUN_BYTES;
        ready < self.in_flight.min(run_sends) && self.pending.get(self.round).is_some_and(joins)
    }

    /// What is left after a run waits from now on.
    pub(super) fn gathers_from(&mut self, now: u64) {
        self.ready_since = now;
    }

    fn may_transmit(&self) -> bool {
        if self.probing && self.in_flight > 0 {
            return false;
        }
        self.pending.get(self.round).is_some_and(|entry| {
            let number = if entry.send.send_no > 0 { entry.send.send_no } else { self.last + 1 };
            number - self.position().1.0 <= limits::MAX_OPEN_SENDS
        })
    }

    /// The next send to transmit, numbered. Call only when [`Outbox::want`] says so.
    pub(super) fn transmit(&mut self) -> Option<&mut v1::Send> {
        self.stopped = None;
        if !self.may_transmit() {
            return None;
        }
        let entry = self.pending.get_mut(self.round)?;
        if entry.send.send_no == 0 {
            self.last += 1;
            entry.send.send_no = self.last;
        }
        entry.flying = true;
        self.in_flight += 1;
        self.round += 1;
        let done = self.position().1.0;
        let entry = self.pending.get_mut(self.round - 1)?;
        entry.send.done_no = done;
        Some(&mut entry.send)
    }

    /// Transmits what is ready as one run, if at least two sends may go together: at most `count` of them. The caller
    /// fills in the conversation.
    pub(super) fn transmit_run(&mut self, count: usize, fits: impl FnMut(&v1::Send) -> bool) -> Option<v1::SendRun> {
        let ready = self.ready_run(count.min(limits::RUN_SENDS), fits);
        if ready < 2 || !self.may_transmit() {
            return None;
        }
        self.stopped = None;
        let mut items = Vec::with_capacity(ready);
        for entry in self.pending.range_mut(self.round..self.round + ready) {
            if entry.send.send_no == 0 {
                self.last += 1;
                entry.send.send_no = self.last;
            }
            entry.flying = true;
            let v1::Send { kind, sent_at_ms, body, content_type, .. } = &entry.send;
            let (content_type, body) = (content_type.clone(), body.clone());
            items.push(v1::SendItem { kind: *kind, content_type, sent_at_ms: *sent_at_ms, body });
        }
        let send_no = self.pending.get(self.round)?.send.send_no;
        self.in_flight += ready;
        self.round += ready;
        Some(v1::SendRun { conversation: String::new(), send_no, done_no: self.position().1.0, items })
    }

    /// How many sends, from the next one on, may go in one run now.
    fn ready_run(&self, count: usize, mut fits: impl FnMut(&v1::Send) -> bool) -> usize {
        let Some(first) = self.pending.get(self.round).filter(|_| !self.probing) else { return 0 };
        let first = if first.send.send_no > 0 { first.send.send_no } else { self.last + 1 };
        let open = (first - 1).saturating_sub(self.position().1.0);
        let count = count.min(limits::MAX_OPEN_SENDS.saturating_sub(open) as usize);
        let (mut bytes, mut next) = (0, first);
        let of_run = |entry: &&Entry<S>| {
            let send = &entry.send;
            // What was answered out of its turn has left a gap in the numbers, and what has none gets the one after the
            // last: neither may stand where a run would number it otherwise.
            let in_turn = send.send_no == next || send.send_no == 0 && next > self.last;
            next += 1;
            bytes += send.body.len();
            in_turn && goes_in_runs(send) && bytes <= limits::RUN_BYTES && fits(send)
        };
        self.pending.range(self.round..).take(count).take_while(of_run).count()
    }

    /// Takes the next send out unsent: it can't be transmitted at all.
    pub(super) fn take_unsent(&mut self) -> Option<S> {
        let unnumbered = self.pending.get(self.round)?.send.send_no == 0;
        if unnumbered { self.pending.remove(self.round).map(|e| e.ticket) } else { None }
    }

    /// The next one that would be transmitted.
    pub(super) fn peek(&self) -> Option<&v1::Send> {
        self.pending.get(self.round).map(|e| &e.send)
    }

    fn find(&self, send_no: u64) -> Option<usize> {
        let numbered = self.pending.partition_point(|e| e.send.send_no > 0 && e.send.send_no < send_no);
        self.pending.get(numbered).filter(|e| send_no > 0 && e.send.send_no == send_no).map(|_| numbered)
    }

    fn finish(&mut self, at: usize) -> Option<S> {
        let entry = self.pending.remove(at)?;
        self.in_flight -= usize::from(entry.flying);
        self.round -= usize::from(at < self.round);
        Some(entry.ticket)
    }

    /// It is an event. `None` for what is answered already.
    pub(super) fn sent(&mut self, send_no: u64) -> Option<S> {
        let ticket = self.finish(self.find(send_no)?)?;
        self.probing = false;
        self.attempt = 0;
        Some(ticket)
    }

    /// It was refused. `None` for what is answered already, and for what will go again.
    pub(super) fn refused(
        &mut self,
        refusal: v1::Refusal,
        send_no: u64,
        now: u64,
        backoff: &Backoff,
        draws: &mut Draws,
    ) -> Option<(S, Answer)> {
        let at = self.find(send_no)?;
        if !self.pending[at].flying {
            return None;
        }
        let reason = Reason::from_code(&refusal.reason);
        let first = at == 0 && self.in_flight == 1;
        let entry = &mut self.pending[at];
        match reason {
            Some(Reason::DedupWindowPassed) if !entry.uncertain => {
                // Every attempt of this one was refused, so the number was used up by another session of the device.
                entry.lost_number = true;
                self.count = Count::Unknown;
            }
            Some(Reason::SendNoTaken) => {
                entry.lost_number = true;
                self.taken_upto = self.taken_upto.max(refusal.last).max(send_no);
            }
            _ if !refusal.retryable => {
                self.attempt = 0;
                let doubtful = entry.uncertain && !tells_the_outcome(reason);
                let ticket = self.finish(at)?;
                return Some((ticket, if doubtful { Answer::Unknown(refusal) } else { Answer::Refused(refusal) }));
            }
            // What is before the first is answered, so the server must know it: it forgot (removed and added again,
            // or the device was), or this answer is of an earlier attempt. The send state tells.
            Some(Reason::OutOfOrder) if first && refusal.last + 1 < send_no => self.count = Count::Unknown,
            Some(
                Reason::OutOfOrder
                | Reason::Unavailable
                | Reason::Overloaded
                | Reason::RateLimited
                | Reason::TooManyOpenSends,
            ) => {}
            _ => entry.uncertain = true,
        }
        let entry = &mut self.pending[at];
        entry.flying = false;
        self.in_flight -= 1;
        self.stop(now, backoff, draws);
        None
    }

    fn stop(&mut self, now: u64, backoff: &Backoff, draws: &mut Draws) {
        if self.stopped.is_none() {
            self.stopped = Some(now + backoff.wait_ms(self.attempt, draws));
            self.attempt = self.attempt.saturating_add(1);
        }
        self.probing = true;
    }

    /// Call when nothing is in flight after a stop: goes back to the first. What lost its number gets a new one, and
    /// so does everything behind it; what of that may have been accepted under its old number stays unknown.
    pub(super) fn go_back(&mut self, unknown: &mut Vec<S>) {
        if self.in_flight > 0 || self.stopped.is_none() {
            return;
        }
        self.round = 0;
        if self.count == Count::Known && self.pending.iter().any(|e| e.lost_number) {
            self.renumber(self.taken_upto, unknown);
        }
    }

    fn renumber(&mut self, last: u64, unknown: &mut Vec<S>) {
        let mut kept = VecDeque::with_capacity(self.pending.len());
        for mut entry in self.pending.drain(..) {
            if entry.send.send_no > 0 && entry.uncertain && !entry.lost_number {
                unknown.push(entry.ticket);
                continue;
            }
            entry.send.send_no = 0;
            entry.uncertain = false;
            entry.lost_number = false;
            kept.push_back(entry);
        }
        self.pending = kept;
        self.last = last;
        self.taken_upto = 0;
        self.probing = true;
    }

    /// Whether it waits for the server's count.
    pub(super) fn needs_count(&self) -> bool {
        self.count == Count::Unknown && !self.pending.is_empty()
    }

    /// The moment to ask for the count; whether it waits for that.
    pub(super) fn asks(&mut self) -> bool {
        self.asked = self.pending.len();
        self.needs_count()
    }

    /// Whether a conversation's state, which may be older than the last answer, is good enough for the count.
    pub(super) fn adopts_any_state(&self) -> bool {
        self.count == Count::Unknown && self.pending.iter().all(|e| e.send.send_no == 0)
    }

    /// The server's count, read after everything was answered.
    pub(super) fn adopt(&mut self, last: SendNo, unknown: &mut Vec<S>) {
        if self.count == Count::Known || self.in_flight > 0 {
            return;
        }
        self.count = Count::Known;
        self.round = 0;
        let first = self.pending.front().map_or(0, |e| e.send.send_no);
        let forgotten = first > 0 && last.0 + 1 < first;
        if first == 0 || forgotten || self.pending.iter().any(|e| e.lost_number) {
            self.renumber(last.0, unknown);
        }
    }

    /// The server's count can't be had, for good: everything that waited when it was asked is refused, or unknown.
    /// Nothing happens when it isn't waited for.
    pub(super) fn no_count(&mut self, refusal: &v1::Refusal, answers: &mut Vec<(S, Answer)>) {
        if self.count == Count::Known || self.in_flight > 0 {
            return;
        }
        self.stopped = None;
        let asked = self.asked.min(self.pending.len());
        answers.extend(self.pending.drain(..asked).map(|e| {
            let doubtful = e.uncertain && !e.lost_number;
            (e.ticket, if doubtful { Answer::Unknown(refusal.clone()) } else { Answer::Refused(refusal.clone()) })
        }));
        self.round = 0;
    }

    /// The server's count can't be had right now.
    pub(super) fn ask_later(&mut self, now: u64, backoff: &Backoff, draws: &mut Draws) {
        self.stopped = None;
        self.stop(now, backoff, draws);
    }

    /// The connection is gone: what was in flight goes again on the next one, under the same numbers.
    pub(super) fn disconnected(&mut self) {
        for entry in self.pending.iter_mut().take(self.round) {
            entry.uncertain |= entry.flying;
            entry.flying = false;
        }
        (self.round, self.in_flight, self.stopped) = (0, 0, None);
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The session is over: what is left, and whether it may have been accepted.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (S, bool)> {
        (self.round, self.in_flight) = (0, 0);
        std::mem::take(&mut self.pending).into_iter().map(|e| (e.ticket, e.flying || e.uncertain && !e.lost_number))
    }
}

/// What has a key or a condition goes alone.
fn goes_in_runs(send: &v1::Send) -> bool {
    let plain = send.client_id.is_empty() && send.first_try_ms == 0;
    plain && send.expect_version.is_none() && send.expect_epoch.is_none()
}

/// Whether a final refusal of a send whose earlier attempt has no answer says that there is no event. It does when
/// the server judged the send itself; it does not when it never looked (no access, no session), because a state that
/// held the first result may be gone.
fn tells_the_outcome(reason: Option<Reason>) -> bool {
    use Reason::*;
    matches!(
        reason,
        Some(
            PermissionDenied
                | BodyTooLarge
                | EmptyBody
                | BadContentType
                | BadKind
                | BadId
                | Malformed
                | ClientIdReused
                | FirstTryInFuture
                | WrongVersion
                | WrongEpoch
        )
    )
}

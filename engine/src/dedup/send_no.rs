//! Send numbers: a device's events keep the order in which it sent them, and each number has one answer for ever. Must
//! never accept any number but the one after the last.

use stentor_proto::{
    ids::SendNo,
    internal::{RunItem, Send, SendResult, SendRun, SendStateRow},
    reason::Reason,
};
use twox_hash::XxHash3_64;

use crate::{
    apply::{ApplyError, Context, RUNS},
    effect::Outcome,
    key::RowKey,
    limits,
    rows::Rows,
    state,
};

/// What a number means, given the state of its (device, conversation).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Judged {
    /// It is the next one: decide about the send, then consume the number, whatever the decision.
    Fresh,
    /// It has its answer already.
    First(SendResult),
    /// Nothing changes.
    Refused(Reason),
}

/// What of a send counts for its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) send_no: u64,
    pub(crate) done_no: u64,
    pub(crate) session_no: u64,
    /// What tells this command from another one under the same number.
    pub(crate) hash: u64,
}

impl Claim {
    /// `body_crc` is the command's, which `apply` has checked against the body.
    pub(crate) fn of(send: &Send, body_crc: u32) -> Self {
        let Send { send_no, done_no, session_no, .. } = *send;
        Self { send_no, done_no, session_no, hash: hash(send, body_crc) }
    }

    /// The send at this place of a run, the same as if it had come alone.
    pub(crate) fn of_item(run: &SendRun, place: usize, item: &RunItem) -> Self {
        let content = Content {
            refused: item.refused,
            kind: item.kind,
            sent_at_ms: item.sent_at_ms,
            client_key: (&[], 0),
            expect: [None, None],
            content_type: &item.content_type,
            body: (&item.body, item.body_crc),
        };
        let hash = content.hash();
        let &SendRun { send_no, done_no, session_no, .. } = run;
        Self { send_no: send_no + place as u64, done_no, session_no, hash }
    }
}

/// Judges a send by its number. `fresh` sends of the same command were judged fresh before it.
pub(crate) fn judge(row: Option<&SendStateRow>, fresh: u64, send: &Claim) -> Result<Judged, ApplyError> {
    let (last, done_no) = row.map_or((0, 0), |row| (row.last, row.done_no));
    let last = last.saturating_add(fresh);
    #[cfg(feature = "planted")]
    if let Some(judged) = planted(row, send) {
        return Ok(judged);
    }
    if send.send_no > last.saturating_add(1) {
        return Ok(Judged::Refused(Reason::OutOfOrder));
    }
    if send.send_no <= done_no {
        return Ok(Judged::Refused(Reason::DedupWindowPassed));
    }
    if send.send_no <= last {
        let result = row.and_then(|row| find(row, send.send_no));
        let result = result.ok_or_else(|| ApplyError::Damaged(format!("no result for send {}", send.send_no)))?;
        let same = result.command_hash == send.hash;
        return Ok(if same { Judged::First(result) } else { Judged::Refused(Reason::SendNoTaken) });
    }
    // Otherwise a late send of an old session could take a number in the middle of the new one's (I10). Only here: what
    // has its answer keeps it, whoever asks.
    if send.session_no > 0 && row.is_some_and(|row| row.session_no > send.session_no) {
        return Ok(Judged::Refused(Reason::SessionSuperseded));
    }
    // `shape` has made sure that done_no < send_no, so that it cannot pass `last` here.
    let open = last - done_no.max(send.done_no);
    Ok(if open >= limits::MAX_OPEN_SENDS { Judged::Refused(Reason::TooManyOpenSends) } else { Judged::Fresh })
}

/// The judgement of a careless hand.
#[cfg(feature = "planted")]
fn planted(row: Option<&SendStateRow>, send: &Claim) -> Option<Judged> {
    use crate::planted::{Bug, is_planted};
    let (last, done_no) = row.map_or((0, 0), |row| (row.last, row.done_no));
    let superseded = send.session_no > 0 && row.is_some_and(|row| row.session_no > send.session_no);
    let missing = send.send_no > done_no && row.is_none_or(|row| find(row, send.send_no).is_none()) && !superseded;
    let again = send.send_no > done_no && send.send_no <= last;
    let fresh = is_planted(Bug::LostSendOrder) && missing || is_planted(Bug::NoDeduplication) && again;
    fresh.then_some(Judged::Fresh)
}

fn find(row: &SendStateRow, send_no: u64) -> Option<SendResult> {
    let at = row.results.binary_search_by_key(&send_no, |r| r.send_no).ok()?;
    row.results.get(at).cloned()
}

/// What a device learns about its count: (last, done_no).
pub fn counts(row: Option<&SendStateRow>) -> (SendNo, SendNo) {
    row.map_or_else(Default::default, |row| (SendNo(row.last), SendNo(row.done_no)))
}

impl Claim {
    /// The answer of its number from now on.
    pub(crate) fn result(&self, outcome: &Outcome) -> SendResult {
        let mut result = SendResult { send_no: self.send_no, command_hash: self.hash, ..SendResult::default() };
        match *outcome {
            Outcome::Accepted { seq, stamp, .. } => (result.seq, result.stamp_ms) = (seq.0, stamp.0),
            Outcome::Refused { reason, .. } => result.reason = reason as u32,
            Outcome::SessionOpened { .. } | Outcome::Joined { .. } | Outcome::Done => {}
        }
        result
    }
}

/// The row of a command's fresh numbers, which the command has read.
pub(crate) struct State {
    pub(crate) key: RowKey,
    pub(crate) exists: bool,
}

impl State {
    /// Consumes the numbers of these results, of which `send` is the last.
    pub(crate) fn consume(
        self,
        rows: &mut impl Rows,
        ctx: &Context,
        send: &Claim,
        results: impl IntoIterator<Item = SendResult>,
    ) -> Result<(), ApplyError> {
        if !self.exists {
            let &Claim { send_no: last, done_no, session_no, .. } = send;
            let row = SendStateRow { last, done_no, results: results.into_iter().collect(), session_no };
            rows.put(self.key, row.into());
            return Ok(());
        }
        let row = state::change::<SendStateRow>(rows, &self.key)?;
        row.last = send.send_no;
        row.session_no = row.session_no.max(send.session_no);
        if row.done_no < send.done_no {
            row.done_no = send.done_no;
            let answered = row.results.partition_point(|r| r.send_no <= send.done_no);
            // Nobody reads what is answered; moving the others each time costs more than it frees.
            if ctx.level < RUNS || answered * 2 >= row.results.len() {
                row.results.drain(..answered);
            }
        }
        row.results.extend(results);
        #[cfg(feature = "planted")]
        {
            row.last = row.results.iter().map(|result| result.send_no).max().unwrap_or_default();
            row.results.sort_by_key(|result| result.send_no);
        }
        Ok(())
    }
}

/// What makes two sends of one number the same: all that a retry keeps, so without `done_no`. Its hash is stored in rows:
/// frozen.
struct Content<'a> {
    refused: u32,
    kind: i32,
    sent_at_ms: u64,
    /// Client id and first try.
    client_key: (&'a [u8], u64),
    /// Version and epoch.
    expect: [Option<u64>; 2],
    content_type: &'a [u8],
    /// With its CRC32, which `apply` has checked.
    body: (&'a [u8], u32),
}

impl Content<'_> {
    fn hash(&self) -> u64 {
        let [version, epoch] = self.expect.map(|expected| expected.map_or(0, |e| e.wrapping_add(1)));
        hash_words([
            u64::from(self.refused) << 32 | u64::from(self.kind as u32),
            self.sent_at_ms,
            self.client_key.1,
            version,
            epoch,
            XxHash3_64::oneshot(self.client_key.0),
            XxHash3_64::oneshot(self.content_type),
            XxHash3_64::oneshot(self.body.0),
            u64::from(self.body.1),
        ])
    }
}

fn hash(send: &Send, body_crc: u32) -> u64 {
    let content = Content {
        refused: send.refused,
        kind: send.kind,
        sent_at_ms: send.sent_at_ms,
        client_key: send.client_key.as_ref().map_or((&[], 0), |k| (&k.client_id, k.first_try_ms)),
        expect: [send.expect_version, send.expect_epoch],
        content_type: &send.content_type,
        body: (&send.body, body_crc),
    };
    content.hash()
}

/// One hash over fixed words; longer parts come in as their own hashes.
pub(crate) fn hash_words<const N: usize>(words: [u64; N]) -> u64 {
    XxHash3_64::oneshot(words.map(u64::to_le_bytes).as_flattened())
}

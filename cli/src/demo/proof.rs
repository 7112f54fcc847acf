//! The proof: what every device saw, held against what was acknowledged to the senders. Pure: it must never trust the
//! SDK's own checks, and it counts every fault instead of stopping at the first.

use std::ops::RangeInclusive;

use stentor_proto::{ids::Seq, v1::EventKind};
use twox_hash::XxHash3_64;

/// Marks an arrival that says nothing about latency: the device was catching up.
pub(crate) const NOT_LIVE: u32 = u32::MAX;

/// What makes two events the same to a reader, in 64 bits.
pub(crate) fn fingerprint(kind: EventKind, sender: &str, body: &[u8]) -> u64 {
    let who = XxHash3_64::oneshot_with_seed(kind as u64, sender.as_bytes());
    XxHash3_64::oneshot_with_seed(who, body)
}

/// An acknowledged send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Acknowledged {
    /// The sending device's index.
    pub(crate) device: usize,
    /// What it was answered.
    pub(crate) seq: Seq,
    /// What it sent.
    pub(crate) fingerprint: u64,
    /// When it was handed to the SDK, in µs since the demo began.
    pub(crate) sent_us: u32,
}

/// An event as it reached a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The seq that it came under.
    pub(crate) seq: Seq,
    /// What came.
    pub(crate) fingerprint: u64,
    /// When it came, in µs since the demo began, or [`NOT_LIVE`].
    pub(crate) at_us: u32,
}

/// Faults and deliveries of one conversation, or of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// How many events all devices together should have got.
    pub(crate) expected: u64,
    /// How many of these came, counted once each.
    pub(crate) delivered: u64,
    /// How many never came.
    pub(crate) missing: u64,
    /// How many came again, or were acknowledged under a seq that was taken.
    pub(crate) duplicate: u64,
    /// How many came after a later one, or took a seq against their device's order.
    pub(crate) out_of_order: u64,
    /// How many came otherwise than sent, or were sent by nobody.
    pub(crate) altered: u64,
    /// From send to arrival, in µs, of live deliveries.
    pub(crate) delivery_us: Vec<u32>,
}

impl Verdict {
    /// Adds another conversation's.
    pub(crate) fn add(&mut self, mut other: Self) {
        self.expected += other.expected;
        self.delivered += other.delivered;
        self.missing += other.missing;
        self.duplicate += other.duplicate;
        self.out_of_order += other.out_of_order;
        self.altered += other.altered;
        self.delivery_us.append(&mut other.delivery_us);
    }

    /// Whether nothing is off.
    pub(crate) fn clean(&self) -> bool {
        self.missing + self.duplicate + self.out_of_order + self.altered == 0 && self.delivered == self.expected
    }
}

/// What a conversation must look like to everybody.
#[derive(Debug)]
pub(crate) struct Truth {
    /// By seq - 1.
    events: Vec<Slot>,
    /// Faults found in the acknowledgements themselves.
    faults: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// No send was acknowledged under it.
    Nobody,
    /// Made by the server (created, participant added): all readers must see the same, whatever the first one saw.
    Server(Option<u64>),
    /// An acknowledged send.
    Sent { fingerprint: u64, sent_us: u32 },
}

impl Truth {
    /// `setup` are the seqs of events that setting the conversation up made; acknowledgements come in the order in
    /// which their lines stand in the file.
    pub(crate) fn new(setup: &[Seq], acknowledged: &[Acknowledged]) -> Self {
        let head = acknowledged.iter().map(|a| a.seq).chain(setup.iter().copied()).max().unwrap_or_default();
        let mut truth = Self { events: vec![Slot::Nobody; head.0 as usize], faults: Verdict::default() };
        for seq in setup {
            truth.take(*seq, Slot::Server(None));
        }
        let mut last = std::collections::HashMap::new();
        for ack in acknowledged {
            truth.take(ack.seq, Slot::Sent { fingerprint: ack.fingerprint, sent_us: ack.sent_us });
            if let Some(before) = last.insert(ack.device, ack.seq)
                && ack.seq < before
            {
                truth.faults.out_of_order += 1;
            }
        }
        truth
    }

    /// The last seq.
    pub(crate) fn head(&self) -> Seq {
        Seq(self.events.len() as u64)
    }

    fn take(&mut self, seq: Seq, slot: Slot) {
        match seq.0.checked_sub(1).and_then(|n| self.events.get_mut(n as usize)) {
            Some(free @ Slot::Nobody) => *free = slot,
            _ => self.faults.duplicate += 1,
        }
    }

    /// Holds one device's arrivals, in the order in which they came, against the truth. `first` is the first seq that
    /// its user may see.
    pub(crate) fn check(&mut self, first: Seq, arrivals: &[Arrival], verdict: &mut Verdict) {
        let range = first..=self.head();
        verdict.expected += (range.end().0 + 1).saturating_sub(range.start().0);
        let mut seen = vec![false; self.events.len()];
        let mut last = Seq(0);
        for arrival in arrivals {
            if !self.place(&range, arrival, &mut seen, verdict) {
                continue;
            }
            if arrival.seq < last {
                verdict.out_of_order += 1;
            }
            last = last.max(arrival.seq);
            verdict.delivered += 1;
        }
        let due = range.start().0.saturating_sub(1) as usize;
        verdict.missing += seen.iter().skip(due).filter(|seen| !**seen).count() as u64;
    }

    /// Whether an arrival is the first of its seq; compares its content.
    fn place(
        &mut self,
        range: &RangeInclusive<Seq>,
        arrival: &Arrival,
        seen: &mut [bool],
        verdict: &mut Verdict,
    ) -> bool {
        if !range.contains(&arrival.seq) {
            verdict.altered += 1;
            return false;
        }
        let n = arrival.seq.0 as usize - 1;
        if std::mem::replace(&mut seen[n], true) {
            verdict.duplicate += 1;
            return false;
        }
        match &mut self.events[n] {
            Slot::Sent { fingerprint, sent_us } if *fingerprint == arrival.fingerprint => {
                if arrival.at_us != NOT_LIVE {
                    verdict.delivery_us.push(arrival.at_us.saturating_sub(*sent_us));
                }
            }
            Slot::Server(first) => {
                verdict.altered += u64::from(*first.get_or_insert(arrival.fingerprint) != arrival.fingerprint);
            }
            _ => verdict.altered += 1,
        }
        true
    }

    /// The faults of the acknowledgements, to be added once.
    pub(crate) fn faults(self) -> Verdict {
        self.faults
    }
}

/// The value below which `share` of all lie, in ms; 0 without any.
pub(crate) fn percentile_ms(values_us: &mut [u32], share: f64) -> f64 {
    if values_us.is_empty() {
        return 0.0;
    }
    let rank = ((values_us.len() as f64 * share).ceil() as usize).clamp(1, values_us.len());
    let (_, value, _) = values_us.select_nth_unstable(rank - 1);
    f64::from(*value) / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(device: usize, seq: u64) -> Acknowledged {
        Acknowledged { device, seq: Seq(seq), fingerprint: seq * 7, sent_us: 10 }
    }

    fn arrival(seq: u64) -> Arrival {
        Arrival { seq: Seq(seq), fingerprint: seq * 7, at_us: 30 }
    }

    fn check(arrivals: &[Arrival]) -> Verdict {
        let mut truth = Truth::new(&[Seq(1)], &[ack(0, 2), ack(1, 3), ack(0, 4)]);
        let mut verdict = Verdict::default();
        truth.check(Seq(1), arrivals, &mut verdict);
        verdict.add(truth.faults());
        verdict
    }

    #[test]
    fn everything_once_in_order_is_clean() {
        let verdict = check(&[arrival(1), arrival(2), arrival(3), arrival(4)]);
        assert!(verdict.clean(), "{verdict:?}");
        assert_eq!((verdict.expected, verdict.delivered), (4, 4));
        assert_eq!(verdict.delivery_us, [20, 20, 20]);
    }

    #[test]
    fn every_fault_is_counted_as_what_it_is() {
        let missing = check(&[arrival(1), arrival(2), arrival(4)]);
        assert_eq!((missing.missing, missing.delivered, missing.clean()), (1, 3, false));
        let twice = check(&[arrival(1), arrival(2), arrival(2), arrival(3), arrival(4)]);
        assert_eq!((twice.duplicate, twice.delivered, twice.clean()), (1, 4, false));
        let swapped = check(&[arrival(1), arrival(3), arrival(2), arrival(4)]);
        assert_eq!((swapped.out_of_order, swapped.missing, swapped.clean()), (1, 0, false));
        let altered = check(&[arrival(1), Arrival { fingerprint: 1, ..arrival(2) }, arrival(3), arrival(4)]);
        assert_eq!((altered.altered, altered.delivered, altered.clean()), (1, 4, false));
        let unknown = check(&[arrival(1), arrival(2), arrival(3), arrival(4), arrival(5)]);
        assert_eq!((unknown.altered, unknown.clean()), (1, false));
    }

    #[test]
    fn an_event_that_nobody_sent_is_altered() {
        let mut truth = Truth::new(&[Seq(1)], &[ack(0, 3)]);
        let mut verdict = Verdict::default();
        truth.check(Seq(1), &[arrival(1), arrival(2), arrival(3)], &mut verdict);
        assert_eq!((verdict.altered, verdict.missing), (1, 0));
    }

    #[test]
    fn readers_must_agree_on_what_the_server_made() {
        let mut truth = Truth::new(&[Seq(1)], &[]);
        let mut verdict = Verdict::default();
        truth.check(Seq(1), &[arrival(1)], &mut verdict);
        truth.check(Seq(1), &[Arrival { fingerprint: 99, ..arrival(1) }], &mut verdict);
        assert_eq!(verdict.altered, 1);
    }

    #[test]
    fn who_joined_later_owes_only_what_came_after() {
        let mut truth = Truth::new(&[Seq(1), Seq(2)], &[ack(0, 3)]);
        let mut verdict = Verdict::default();
        truth.check(Seq(2), &[arrival(2), arrival(3)], &mut verdict);
        assert!(verdict.clean(), "{verdict:?}");
        truth.check(Seq(2), &[arrival(1), arrival(2), arrival(3)], &mut verdict);
        assert_eq!(verdict.altered, 1);
    }

    #[test]
    fn acknowledgements_are_checked_themselves() {
        let truth = Truth::new(&[Seq(1)], &[ack(0, 2), ack(1, 2), ack(0, 4), ack(0, 3)]);
        let faults = truth.faults();
        assert_eq!((faults.duplicate, faults.out_of_order), (1, 1));
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut values: Vec<u32> = (1..=100).map(|n| n * 1_000).collect();
        assert_eq!(percentile_ms(&mut values, 0.5), 50.0);
        assert_eq!(percentile_ms(&mut values, 0.99), 99.0);
        assert_eq!(percentile_ms(&mut [], 0.5), 0.0);
    }

    #[test]
    fn one_changed_byte_changes_the_fingerprint() {
        let of = |sender, body: &[u8]| fingerprint(EventKind::Message, sender, body);
        assert_ne!(of("ann", b"hello"), of("ann", b"hellp"));
        assert_ne!(of("ann", b"x"), of("an", b"nx"));
        assert_ne!(of("ann", b"x"), fingerprint(EventKind::Action, "ann", b"x"));
    }
}

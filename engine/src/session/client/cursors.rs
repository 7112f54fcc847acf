//! A device's delivered and read cursors in one conversation: only the highest counts, moves wait to be sent together.
//! Must never move a delivered cursor past what the stream handed on, nor any cursor back.

use stentor_proto::ids::Seq;

/// One cursor: where it is, what was sent, what the server confirmed.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    at: u64,
    sent: u64,
    confirmed: u64,
}

impl Mark {
    fn raise(&mut self, seq: u64) -> bool {
        let moved = seq > self.at;
        self.at = self.at.max(seq);
        moved
    }

    fn due(&mut self) -> Option<Seq> {
        (self.at > self.sent.max(self.confirmed)).then(|| {
            self.sent = self.at;
            Seq(self.at)
        })
    }
}

/// Both cursors of one conversation.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cursors {
    delivered: Mark,
    read: Mark,
}

impl Cursors {
    /// Raises them; `received` bounds the delivered one. True when one moved.
    pub(super) fn raise(&mut self, delivered: Seq, read: Seq, received: Option<Seq>) -> bool {
        let delivered = received.map_or(delivered, |r| delivered.min(r));
        // Both must be tried: no short circuit.
        self.delivered.raise(delivered.0) | self.read.raise(read.0)
    }

    /// The server has these.
    pub(super) fn confirmed(&mut self, delivered: Seq, read: Seq) {
        self.delivered.confirmed = self.delivered.confirmed.max(delivered.0);
        self.read.confirmed = self.read.confirmed.max(read.0);
    }

    /// What was sent may be lost: what is not confirmed goes again. True when there is such.
    pub(super) fn disconnected(&mut self) -> bool {
        (self.delivered.sent, self.read.sent) = (0, 0);
        self.is_due()
    }

    pub(super) fn is_due(&self) -> bool {
        [self.delivered, self.read].iter().any(|m| m.at > m.sent.max(m.confirmed))
    }

    /// What to send now: (delivered, read).
    pub(super) fn take_due(&mut self) -> (Option<Seq>, Option<Seq>) {
        (self.delivered.due(), self.read.due())
    }

    pub(super) fn delivered(&self) -> Seq {
        Seq(self.delivered.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_highest_is_sent_and_again_when_it_may_be_lost() {
        let mut cursors = Cursors::default();
        assert!(cursors.raise(Seq(5), Seq(0), Some(Seq(9))));
        assert!(cursors.raise(Seq(12), Seq(3), Some(Seq(9))), "no further than what came");
        assert!(!cursors.raise(Seq(4), Seq(1), Some(Seq(9))), "never back");
        assert_eq!(cursors.take_due(), (Some(Seq(9)), Some(Seq(3))));
        assert_eq!(cursors.take_due(), (None, None));
        cursors.confirmed(Seq(9), Seq(0));
        assert!(cursors.disconnected());
        assert_eq!(cursors.take_due(), (None, Some(Seq(3))), "what the server has does not go again");
    }
}

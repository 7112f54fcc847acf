//! Who may see and do what in a conversation, decided from its rows alone. Must never name a seq that this reader may
//! not know of: hidden stretches end at the reader's own head.

use stentor_proto::{
    ids::{Epoch, Seq, Version},
    internal::{ConversationRow, ParticipantRow, Stay},
    reason::Reason,
    v1::{self, HiddenReason, Role},
};

/// One step of a reader's dense stream. Both ends are included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// The reader gets these events.
    Visible {
        /// First.
        from: Seq,
        /// Last.
        to: Seq,
    },
    /// The reader gets only the fact that they are not for him.
    Hidden {
        /// First.
        from: Seq,
        /// Last.
        to: Seq,
        /// Why.
        reason: HiddenReason,
    },
}

impl Segment {
    /// A hidden stretch as it travels; `None` for a visible one.
    pub fn hidden(&self) -> Option<v1::Hidden> {
        match *self {
            Self::Hidden { from, to, reason } => Some(v1::Hidden { from: from.0, to: to.0, reason: reason as i32 }),
            Self::Visible { .. } => None,
        }
    }
}

/// What one reader may see of one conversation.
#[derive(Debug, Clone)]
pub struct View {
    conversation: ConversationRow,
    participant: Option<ParticipantRow>,
    admin: bool,
}

impl View {
    /// A user's view, from the two rows as they stand now.
    pub fn new(conversation: ConversationRow, participant: Option<ParticipantRow>) -> Self {
        Self { conversation, participant, admin: false }
    }

    /// An admin's view: everything that is still there.
    pub fn admin(conversation: ConversationRow) -> Self {
        Self { conversation, participant: None, admin: true }
    }

    fn stays(&self) -> &[Stay] {
        self.participant.as_ref().map_or(&[], |p| &p.stays)
    }

    /// The last seq that the reader may see; 0 if none.
    pub fn head(&self) -> Seq {
        let last = self.conversation.next_seq.saturating_sub(1);
        match self.stays().last() {
            _ if self.admin => Seq(last),
            None => Seq(0),
            Some(stay) if stay.to == 0 => Seq(last),
            Some(stay) => Seq(stay.to),
        }
    }

    /// The reader's role while he is a participant.
    pub fn role(&self) -> Option<Role> {
        self.participant.as_ref().and_then(role)
    }

    /// The conversation's version.
    pub fn version(&self) -> Version {
        Version(self.conversation.version)
    }

    /// The conversation's epoch.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.conversation.epoch)
    }

    /// Whether the reader may read at all.
    ///
    /// # Errors
    /// [`Reason::NotAParticipant`], also for what he had seen while he was one.
    pub fn may_read(&self) -> Result<(), Reason> {
        if self.admin || self.role().is_some() { Ok(()) } else { Err(Reason::NotAParticipant) }
    }

    /// Everything in (`after`, `upto`] that lies at or below the reader's head: dense, ascending, never two visible or
    /// two like hidden stretches in a row. At most twice as many as the reader's stays, and two.
    pub fn segments(&self, after: Seq, upto: Seq) -> Vec<Segment> {
        let mut segments = Segments { next: after.0.saturating_add(1), last: upto.min(self.head()).0, out: Vec::new() };
        segments.hide_below(self.conversation.first_seq, HiddenReason::Retention);
        if self.admin {
            segments.show_upto(segments.last);
        }
        let mut reason = HiddenReason::BeforeJoin;
        for stay in self.stays() {
            segments.hide_below(stay.from, reason);
            segments.show_upto(if stay.to == 0 { u64::MAX } else { stay.to });
            reason = HiddenReason::NotParticipant;
        }
        segments.out
    }

    /// As `show` tells it.
    ///
    /// # Errors
    /// As [`Self::may_read`].
    pub fn show(&self, conversation: &str) -> Result<v1::Conversation, Reason> {
        self.may_read()?;
        Ok(v1::Conversation {
            conversation: conversation.to_owned(),
            kind: self.conversation.kind,
            head: self.head().0,
            version: self.conversation.version,
            epoch: self.conversation.epoch,
            participants: self.conversation.participants,
            role: self.role().unwrap_or(Role::Unspecified) as i32,
            since_seq: self.stays().last().map_or(0, |s| s.from),
        })
    }
}

/// Segments under construction: everything below `next` is told already.
struct Segments {
    next: u64,
    last: u64,
    out: Vec<Segment>,
}

impl Segments {
    fn hide_below(&mut self, first_seen: u64, reason: HiddenReason) {
        let to = first_seen.saturating_sub(1).min(self.last);
        if self.next <= to {
            self.out.push(Segment::Hidden { from: Seq(self.next), to: Seq(to), reason });
            self.next = to + 1;
        }
    }

    fn show_upto(&mut self, to: u64) {
        let to = to.min(self.last);
        if self.next <= to {
            match self.out.last_mut() {
                // A stay that begins where the one before it ended.
                Some(Segment::Visible { to: end, .. }) => *end = Seq(to),
                _ => self.out.push(Segment::Visible { from: Seq(self.next), to: Seq(to) }),
            }
            self.next = to + 1;
        }
    }
}

/// A participant's role; `None` while he is away.
pub fn role(participant: &ParticipantRow) -> Option<Role> {
    participant.stays.last().filter(|stay| stay.to == 0)?;
    Some(participant.role())
}

/// Whether a participant of this role may send.
///
/// # Errors
/// [`Reason::NotAParticipant`] or [`Reason::PermissionDenied`].
pub fn may_send(role: Option<Role>) -> Result<(), Reason> {
    match role {
        None => Err(Reason::NotAParticipant),
        Some(Role::Writer | Role::Admin | Role::Owner) => Ok(()),
        Some(_) => Err(Reason::PermissionDenied),
    }
}

/// Whether a participant of role `actor` may change one who has, and is to have, at most role `subject`. Nobody reaches
/// above himself.
///
/// # Errors
/// [`Reason::NotAParticipant`] or [`Reason::PermissionDenied`].
pub fn may_change(actor: Option<Role>, subject: Role) -> Result<(), Reason> {
    match actor {
        None => Err(Reason::NotAParticipant),
        Some(Role::Admin | Role::Owner) if actor >= Some(subject) => Ok(()),
        Some(_) => Err(Reason::PermissionDenied),
    }
}

/// The first seq that a participant sees who joins at `joined`. Only one who was never here gets what lies before: what
/// happened while a participant was away stays hidden from him, however much history the conversation shows to others.
pub fn first_seen(conversation: &ConversationRow, stays: &[Stay], joined: Seq) -> Seq {
    if conversation.history_full && stays.is_empty() { Seq(1) } else { joined }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view(next_seq: u64, first_seq: u64, stays: &[(u64, u64)]) -> View {
        let conversation = ConversationRow { next_seq, first_seq, ..Default::default() };
        let stays = stays.iter().map(|&(from, to)| Stay { from, to }).collect();
        View::new(conversation, Some(ParticipantRow { role: Role::Writer as i32, stays }))
    }

    #[test]
    fn who_left_reads_nothing_and_knows_no_later_seq() {
        let away = view(100, 1, &[(3, 9)]);
        assert_eq!((away.may_read(), away.head(), away.role()), (Err(Reason::NotAParticipant), Seq(9), None));
        assert_eq!(away.show("c"), Err(Reason::NotAParticipant));
        let stranger = View::new(ConversationRow { next_seq: 9, ..Default::default() }, None);
        assert_eq!((stranger.head(), stranger.segments(Seq(0), Seq(99))), (Seq(0), vec![]));
    }

    #[test]
    fn coming_back_hides_only_the_time_between() {
        use Segment::{Hidden, Visible};
        let back = view(21, 5, &[(3, 9), (15, 0)]);
        assert_eq!(
            back.segments(Seq(0), Seq(u64::MAX)),
            [
                Hidden { from: Seq(1), to: Seq(4), reason: HiddenReason::Retention },
                Visible { from: Seq(5), to: Seq(9) },
                Hidden { from: Seq(10), to: Seq(14), reason: HiddenReason::NotParticipant },
                Visible { from: Seq(15), to: Seq(20) },
            ]
        );
        assert_eq!(back.show("c").unwrap().since_seq, 15);
    }

    #[test]
    fn nobody_reaches_above_himself() {
        for actor in [None, Some(Role::Reader), Some(Role::Writer)] {
            assert!(may_change(actor, Role::Reader).is_err());
        }
        assert_eq!(may_change(Some(Role::Admin), Role::Admin), Ok(()));
        assert_eq!(may_change(Some(Role::Admin), Role::Owner), Err(Reason::PermissionDenied));
        assert_eq!(may_send(Some(Role::Reader)), Err(Reason::PermissionDenied));
    }

    proptest! {
        #[test]
        fn segments_are_dense_and_show_exactly_the_stays(
            gaps in prop::collection::vec((1u64..4, 0u64..4), 0..6), open: bool, first_seq in 0u64..12,
            beyond in 0u64..5, after in 0u64..30, upto in 0u64..40,
        ) {
            let (mut at, mut stays) = (0, Vec::new());
            for (gap, length) in gaps {
                stays.push((at + gap, at + gap + length));
                at += gap + length;
            }
            let next_seq = at + 1 + beyond;
            if open && let Some(last) = stays.last_mut() {
                last.1 = 0;
            }
            let view = view(next_seq, first_seq, &stays);
            let sees = |seq| stays.iter().any(|&(from, to)| from <= seq && (to == 0 || seq <= to));
            let last_seen = (1..next_seq).filter(|&seq| sees(seq)).max().unwrap_or(0);
            prop_assert_eq!(view.head(), Seq(last_seen));
            let mut next = after + 1;
            for segment in view.segments(Seq(after), Seq(upto)) {
                let (from, to, visible) = match segment {
                    Segment::Visible { from, to } => (from.0, to.0, true),
                    Segment::Hidden { from, to, .. } => (from.0, to.0, false),
                };
                prop_assert_eq!(from, next);
                prop_assert!(to >= from);
                (from..=to).for_each(|seq| assert_eq!(visible, sees(seq) && seq >= first_seq, "{seq}"));
                next = to + 1;
            }
            prop_assert_eq!(next.max(after + 1), (upto.min(last_seen) + 1).max(after + 1));
        }
    }
}

//! What the SDK's answers mean for the oracle. Must never call an outcome refused that may have happened.

use stentor_client::{ClientError, Created, HistoryPage, ParticipantChanged, Sent};

use crate::oracle::{Answer, Item, Outcome, Page};

pub(super) fn sent(answer: &Result<Sent, ClientError>) -> Outcome<Answer> {
    outcome(answer, |sent| Answer::Event { seq: sent.seq.0, repeat: sent.repeat })
}

pub(super) fn changed(answer: &Result<ParticipantChanged, ClientError>) -> Outcome<Answer> {
    outcome(answer, |changed| Answer::Event { seq: changed.seq.0, repeat: changed.repeat })
}

/// The event of a creation is the first one, whatever came with it.
pub(super) fn created(answer: &Result<Created, ClientError>) -> Outcome<Answer> {
    outcome(answer, |created| Answer::Event { seq: 1, repeat: created.repeat })
}

pub(super) fn page(answer: &Result<HistoryPage, ClientError>) -> Outcome<Answer> {
    outcome(answer, |page| {
        let items = page.items.iter().map(Item::from).collect();
        Answer::Page(Page { items, head: page.head.0, more: page.more })
    })
}

fn outcome<T>(answer: &Result<T, ClientError>, acknowledged: impl FnOnce(&T) -> Answer) -> Outcome<Answer> {
    match answer {
        Ok(answer) => Outcome::Acknowledged(acknowledged(answer)),
        Err(ClientError::Refused(refusal) | ClientError::Ended(refusal)) => Outcome::Refused((*refusal.reason).into()),
        // The SDK says of each of these that nothing happened by the call.
        Err(ClientError::Closed | ClientError::Full(_) | ClientError::Unreachable(_) | ClientError::Config(_)) => {
            Outcome::Refused("NOT_ASKED".into())
        }
        Err(ClientError::Unknown(_) | ClientError::Damaged(_) | ClientError::Store(_)) => Outcome::Unknown,
    }
}

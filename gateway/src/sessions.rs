//! The sessions of this gateway under small numbers, so that a conversation knows its sessions by four bytes each. Must
//! never be locked for writing while a shard waits for it: sessions come and go seldom.

use std::sync::Arc;

use parking_lot::{RwLock, RwLockReadGuard};

use crate::{fanout::grow, inbox::Inbox};

/// A session's place at this gateway, its own until it has left.
pub(crate) type SessionPlace = u32;

/// The places of all sessions.
#[derive(Default)]
pub(crate) struct Places {
    inboxes: Vec<Option<Arc<Inbox>>>,
    free: Vec<SessionPlace>,
}

impl Places {
    /// The inboxes of these sessions, as far as they are here.
    pub(crate) fn all<'a>(&'a self, sessions: &'a [SessionPlace]) -> impl Iterator<Item = &'a Arc<Inbox>> {
        sessions.iter().filter_map(|&session| self.inboxes.get(session as usize)?.as_ref())
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Sessions(RwLock<Places>);

impl Sessions {
    /// A session comes. It must leave, and watch nothing any more when it does.
    pub(crate) fn enter(&self, inbox: &Arc<Inbox>) -> SessionPlace {
        let mut places = self.0.write();
        let place = places.free.pop().unwrap_or_else(|| {
            grow(&mut places.inboxes);
            places.inboxes.push(None);
            (places.inboxes.len() - 1) as SessionPlace
        });
        if let Some(inbox_place) = places.inboxes.get_mut(place as usize) {
            *inbox_place = Some(inbox.clone());
        }
        place
    }

    /// A session has left.
    pub(crate) fn leave(&self, place: SessionPlace) {
        let mut places = self.0.write();
        if places.inboxes.get_mut(place as usize).and_then(Option::take).is_some() {
            places.free.push(place);
        }
    }

    /// For telling several at once.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Places> {
        self.0.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_its_sessions_alone_until_it_has_left() {
        let sessions = Sessions::default();
        let inboxes = [0; 3].map(|_| Arc::new(Inbox::default()));
        assert_eq!(inboxes.each_ref().map(|inbox| sessions.enter(inbox)), [0, 1, 2]);
        sessions.leave(1);
        sessions.leave(1);
        assert_eq!(sessions.read().all(&[0, 1, 2, 9]).count(), 2);
        let next = Arc::new(Inbox::default());
        assert_eq!((sessions.enter(&next), sessions.enter(&next)), (1, 3), "given once");
        assert!(Arc::ptr_eq(sessions.read().all(&[1]).next().unwrap(), &next));
    }
}

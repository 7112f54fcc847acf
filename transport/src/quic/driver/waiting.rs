//! Who waits for a connection's streams. Must cost an idle connection no allocation: a session has one stream, one reader
//! and one writer.

use std::task::Waker;

use quinn_proto::StreamId;

/// A half of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Receive,
    Send,
}

struct Waiter {
    half: Half,
    stream: StreamId,
    waker: Waker,
}

/// See the module.
#[derive(Default)]
pub(super) struct Waiting {
    receiver: Option<Waiter>,
    sender: Option<Waiter>,
    /// Of further streams.
    others: Vec<Waiter>,
}

/// Who is to be woken once no lock is held.
#[derive(Default)]
pub(super) struct Woken {
    receiver: Option<Waker>,
    sender: Option<Waker>,
    others: Vec<Waker>,
    /// Everybody who waits for the connection itself: its handshake, streams to accept or open, its end.
    pub(super) everybody: bool,
    /// The endpoint's task.
    pub(super) task: bool,
}

impl Waiting {
    /// The half has one owner, so that there is one waiter; the last call counts.
    pub(super) fn wait(&mut self, half: Half, stream: StreamId, waker: &Waker) {
        let place = self.place(half);
        match place {
            Some(waiter) if waiter.stream == stream => waiter.waker.clone_from(waker),
            None => *place = Some(Waiter { half, stream, waker: waker.clone() }),
            Some(_) => match self.others.iter_mut().find(|other| (other.half, other.stream) == (half, stream)) {
                Some(waiter) => waiter.waker.clone_from(waker),
                None => self.others.push(Waiter { half, stream, waker: waker.clone() }),
            },
        }
    }

    /// Whether this one waits already, so that nothing has happened since it looked.
    pub(super) fn waits(&self, half: Half, stream: StreamId, waker: &Waker) -> bool {
        let place = match half {
            Half::Receive => &self.receiver,
            Half::Send => &self.sender,
        };
        place.as_ref().is_some_and(|waiter| waiter.stream == stream && waiter.waker.will_wake(waker))
    }

    pub(super) fn forget(&mut self, half: Half, stream: StreamId) {
        drop(self.take(half, stream));
    }

    pub(super) fn wake(&mut self, half: Half, stream: StreamId, woken: &mut Woken) {
        if let Some(waker) = self.take(half, stream) {
            woken.add(half, waker);
        }
    }

    pub(super) fn wake_all(&mut self, woken: &mut Woken) {
        woken.everybody = true;
        let waiters =
            self.receiver.take().into_iter().chain(self.sender.take()).chain(std::mem::take(&mut self.others));
        waiters.for_each(|waiter| woken.add(waiter.half, waiter.waker));
    }

    fn place(&mut self, half: Half) -> &mut Option<Waiter> {
        match half {
            Half::Receive => &mut self.receiver,
            Half::Send => &mut self.sender,
        }
    }

    fn take(&mut self, half: Half, stream: StreamId) -> Option<Waker> {
        let waiter = match self.place(half).take_if(|waiter| waiter.stream == stream) {
            Some(waiter) => waiter,
            None => {
                let at = self.others.iter().position(|other| (other.half, other.stream) == (half, stream))?;
                self.others.swap_remove(at)
            }
        };
        Some(waiter.waker)
    }
}

impl Woken {
    fn add(&mut self, half: Half, waker: Waker) {
        let place = match half {
            Half::Receive => &mut self.receiver,
            Half::Send => &mut self.sender,
        };
        match place {
            None => *place = Some(waker),
            Some(_) => self.others.push(waker),
        }
    }

    /// Whether somebody is among them who will read.
    pub(super) fn reads(&self) -> bool {
        self.receiver.is_some()
    }

    /// Wakes the streams' owners. No lock may be held.
    pub(super) fn wake(self) {
        let wakers = self.receiver.into_iter().chain(self.sender).chain(self.others);
        wakers.for_each(Waker::wake);
    }
}

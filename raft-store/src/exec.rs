//! Where the store's workers run: on threads of their own, or as tasks of a simulation's runtime.
//! Must never have a loop of its own: a worker's body is the same in both.

use std::{future::Future, io, thread};

use tokio::{runtime, task};

/// The two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exec {
    /// A thread per worker, and blocking calls on the runtime's blocking threads.
    Threads,
    /// Tasks of the runtime that the store was opened in; nothing blocks there, so blocking calls run in place.
    Tasks,
}

/// A worker that was started.
pub(crate) enum Worker {
    Thread(thread::JoinHandle<()>),
    Task(task::JoinHandle<()>),
}

impl Exec {
    /// Starts a worker; it ends when its body does.
    pub(crate) fn spawn(self, name: &str, body: impl Future<Output = ()> + Send + 'static) -> io::Result<Worker> {
        match self {
            Self::Threads => {
                // No runtime is shared: whoever holds the network's threads must not be able to hold up the disk's.
                let own = runtime::Builder::new_current_thread().enable_time().build()?;
                let thread = thread::Builder::new().name(name.into()).spawn(move || own.block_on(body))?;
                Ok(Worker::Thread(thread))
            }
            Self::Tasks => Ok(Worker::Task(task::spawn(body))),
        }
    }

    /// Runs what may block on the disk, off the runtime's own threads. Once begun it is never cut off half-way.
    pub(crate) async fn run<R: Send + 'static>(
        self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R, task::JoinError> {
        match self {
            Self::Threads => task::spawn_blocking(work).await,
            Self::Tasks => {
                // Others go first, as they would if this took a thread's time.
                task::yield_now().await;
                Ok(work())
            }
        }
    }

    /// Waits until these workers have ended.
    pub(crate) async fn join(self, workers: Vec<Worker>) {
        for worker in workers {
            // A worker that panicked has ended too.
            match worker {
                Worker::Thread(thread) => drop(self.run(move || drop(thread.join())).await),
                Worker::Task(task) => drop(task.await),
            }
        }
    }
}

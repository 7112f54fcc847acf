//! The works that a cluster is put under. Each prepares its users and conversations, runs for as long as it is measured,
//! and then counts: a figure of a run whose counts are wrong must never be given out.

pub mod api;
pub mod connect;
pub mod fanout;
pub mod history;
pub mod idle;
mod lane;
pub mod mixed;
pub mod resume;
pub mod send;
mod spread;
mod talk;
mod work;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};

pub use work::{Prepared, Work};

use crate::BenchError;

/// What is under way must end so long after a load was told to stop: the SDK itself waits for a cluster for ever.
const ENDED_WITHIN: Duration = Duration::from_secs(120);

/// Tells the tasks of a load to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The tasks of a load; cut off when dropped.
pub(crate) struct Tasks<T>(JoinSet<T>);

impl<T: Send + 'static> Tasks<T> {
    /// Starts all.
    pub(crate) fn start<F: Future<Output = T> + Send + 'static>(tasks: impl IntoIterator<Item = F>) -> Self {
        Self(tasks.into_iter().collect())
    }

    /// Waits for the end of all; what they gave, in no order. A cluster that has died answers nothing any more.
    pub(crate) async fn ended(mut self) -> Result<Vec<T>, BenchError> {
        let mut all = Vec::with_capacity(self.0.len());
        let ending = async {
            while let Some(ended) = self.0.join_next().await {
                all.push(ended.map_err(BenchError::cluster)?);
            }
            Ok(())
        };
        match timeout(ENDED_WITHIN, ending).await {
            Ok(ended) => ended.map(|()| all),
            Err(_) => Err(BenchError::Late("the answer to the last message".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tasks_that_do_not_end_are_told_and_cut_off() {
        let ended = Tasks::start([1, 2].map(|n| async move { n })).ended().await.unwrap();
        assert_eq!(ended.iter().sum::<i32>(), 3);
        let held = Arc::new(());
        let other = Arc::clone(&held);
        let never = Tasks::start([async move {
            let _held = other;
            std::future::pending::<()>().await;
        }]);
        assert!(matches!(never.ended().await, Err(BenchError::Late(_))));
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&held), 1);
    }
}

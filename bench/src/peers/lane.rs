//! One task that sends to a peer in a closed loop, whatever its client is called. Must never spawn a task per message,
//! as our own lanes do not either.

use std::{
    collections::VecDeque,
    fmt::Display,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::BoxFuture};

use crate::{meter::Meters, scenario::Stop};

/// A server that refuses is not asked again at once.
const AFTER_FAILURE: Duration = Duration::from_millis(20);

/// The answer to one send.
pub(crate) type Answer = BoxFuture<'static, Result<(), String>>;

/// Sends until it is told to stop and every answer is there; answers come in the order of the sends. Returns how many
/// were acknowledged.
pub(crate) async fn run<S, F, E>(number: usize, window: usize, mut send: S, meters: Arc<Meters>, stop: Stop) -> u64
where
    S: FnMut() -> F + Send,
    F: Future<Output = Result<Answer, E>> + Send,
    E: Display + Send,
{
    let mut waiting: VecDeque<(Instant, Answer)> = VecDeque::with_capacity(window);
    let mut noted = Vec::new();
    let mut acknowledged = 0;
    loop {
        let mut failed = false;
        while !stop.is_set() && waiting.len() < window {
            let began = Instant::now();
            match send().await {
                Ok(answer) => waiting.push_back((began, answer)),
                Err(error) => {
                    meters.units.fail(number, &error);
                    failed = true;
                    break;
                }
            }
        }
        let Some((began, oldest)) = waiting.pop_front() else {
            if stop.is_set() {
                return acknowledged;
            }
            tokio::time::sleep(AFTER_FAILURE).await;
            continue;
        };
        let mut answered = vec![(began, oldest.await)];
        while let Some((began, next)) = waiting.front_mut() {
            let Some(answer) = next.now_or_never() else { break };
            answered.push((*began, answer));
            waiting.pop_front();
        }
        for (began, answer) in answered {
            match answer {
                Ok(()) => noted.push(began.elapsed()),
                Err(error) => {
                    meters.units.fail(number, &error);
                    failed = true;
                }
            }
        }
        acknowledged += noted.len() as u64;
        meters.units.note(number, &mut noted);
        if failed {
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}

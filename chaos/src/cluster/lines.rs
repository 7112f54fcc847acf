//! Lines through `stentor send --stdin`, as a caller's script would send them, each written down before it is handed over
//! and when its answer is printed. Must never count a line as in flight that was not handed over.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout},
    sync::{Notify, Semaphore},
    time::Instant,
};

use super::{ClusterError, json, processes::Processes};
use crate::oracle::{Call, Device, Message, Name, OperationId, Outcome, Recorder};

/// How lines are sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// At least so many, and on until nothing is broken any more.
    pub(super) lines: u64,
    /// A ceiling, per second.
    pub(super) rate: Option<u32>,
    /// So many are unanswered at most.
    pub(super) window: usize,
}

/// What is known while lines are on their way.
#[derive(Debug, Default)]
pub(super) struct Progress {
    handed_over: AtomicU64,
    answered: AtomicU64,
    /// Nothing more will be broken.
    unbroken: AtomicBool,
    /// So many lines were handed over in all; 0 until that is known.
    in_all: AtomicU64,
    finished: AtomicBool,
    /// When the last answer came, and the longest time between two.
    stall: Mutex<(Option<Instant>, Duration)>,
    pub(super) moved: Notify,
}

impl Progress {
    /// Of a workload that counts for itself: faults may begin at once.
    pub(super) fn begun() -> Self {
        Self { answered: AtomicU64::new(1), ..Self::default() }
    }

    pub(super) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// Handed over and without an answer.
    pub(super) fn unanswered(&self) -> u64 {
        self.handed_over.load(Ordering::Acquire).saturating_sub(self.answered())
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// How many lines there are, once that is known.
    pub(super) fn in_all(&self) -> Option<u64> {
        Some(self.in_all.load(Ordering::Acquire)).filter(|lines| *lines > 0)
    }

    /// Nothing more will be broken: the sender may come to its end.
    pub(super) fn leave_unbroken(&self) {
        self.unbroken.store(true, Ordering::Release);
    }

    pub(super) fn longest_stall(&self) -> Duration {
        self.stall.lock().1
    }

    fn answer_came(&self) {
        let now = Instant::now();
        let mut stall = self.stall.lock();
        if let Some(last) = stall.0.replace(now) {
            stall.1 = stall.1.max(now - last);
        }
        drop(stall);
        self.answered.fetch_add(1, Ordering::AcqRel);
        self.moved.notify_waiters();
    }

    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Release);
        self.moved.notify_waiters();
    }

    /// Waits until it is so, or all is over.
    pub(super) async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if is_so(self) || self.is_finished() {
                return;
            }
            moved.await;
        }
    }
}

/// The body of a line; some are no UTF-8.
pub(super) fn body(seed: u64, line: u64) -> Bytes {
    let mut body = format!("line {line} of {seed:x}").into_bytes();
    if line.is_multiple_of(16) {
        body.extend_from_slice(b" \xe9t\xe9");
    }
    body.into()
}

/// Sends lines and writes down what became of them. Returns when every line has its answer, or the sender gave up.
pub(super) async fn send(
    processes: &Processes,
    recorder: &Recorder,
    conversation: &Name,
    (by, seed, pace): (&Device, u64, Pace),
    progress: &Arc<Progress>,
) -> Result<(), ClusterError> {
    let (rate, window) = (pace.rate.map(|rate| rate.to_string()), pace.window.to_string());
    let mut arguments = vec!["send", conversation, "--stdin", "--json", "--timeout", "300", "--window", &window];
    arguments.extend(rate.iter().flat_map(|rate| ["--rate", rate]));
    arguments.extend(["--user", &by.user, "--device", &by.name]);
    let mut child = processes.spawn(&arguments, Stdio::piped())?;
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(ClusterError::Output { command: "send".into(), why: "it has no pipes".into() });
    };
    // The pipe holds lines too, and those have not been sent: no more are handed over than may be unanswered.
    let window = Arc::new(Semaphore::new(pace.window));
    let operations = Arc::new(Mutex::new(Vec::<OperationId>::new()));
    let writing = write(stdin, recorder, conversation, (by, seed, pace.lines), &window, &operations, progress);
    let reading = read(stdout, recorder, &window, &operations, progress);
    let (written, read) = tokio::join!(writing, reading);
    progress.finish();
    written?;
    read?;
    ended(child).await
}

async fn write(
    mut stdin: ChildStdin,
    recorder: &Recorder,
    conversation: &Name,
    (by, seed, lines): (&Device, u64, u64),
    window: &Semaphore,
    operations: &Mutex<Vec<OperationId>>,
    progress: &Progress,
) -> Result<(), ClusterError> {
    for line in 1.. {
        if line > lines && progress.unbroken.load(Ordering::Acquire) {
            break;
        }
        // Closed when the sender is gone: what it did not take was never sent.
        let Ok(place) = window.acquire().await else { return Ok(()) };
        place.forget();
        let body = body(seed, line);
        let mut bytes = body.to_vec();
        bytes.push(b'\n');
        let message = Message { client_id: None, body };
        operations.lock().push(recorder.invoke(by, conversation, Call::Send(message)));
        stdin.write_all(&bytes).await.map_err(ClusterError::io("hand a line over"))?;
        progress.handed_over.fetch_add(1, Ordering::AcqRel);
        progress.moved.notify_waiters();
    }
    progress.in_all.store(progress.handed_over.load(Ordering::Acquire), Ordering::Release);
    progress.moved.notify_waiters();
    Ok(())
}

async fn read(
    stdout: ChildStdout,
    recorder: &Recorder,
    window: &Semaphore,
    operations: &Mutex<Vec<OperationId>>,
    progress: &Progress,
) -> Result<(), ClusterError> {
    let mut lines = BufReader::new(stdout).lines();
    let result = loop {
        let line = match lines.next_line().await {
            Ok(Some(line)) => line,
            Ok(None) => break Ok(()),
            Err(error) => break Err(ClusterError::io("read an answer")(error)),
        };
        let answer = match json::acknowledgement(&line) {
            Ok(answer) => answer,
            Err(error) => break Err(error),
        };
        let operation = answer.line.checked_sub(1).and_then(|at| operations.lock().get(at).copied());
        let outcome = answer.outcome();
        if let Some(operation) = operation.filter(|_| outcome != Outcome::Unknown) {
            recorder.answer(operation, outcome);
        }
        progress.answer_came();
        window.add_permits(1);
    };
    window.close();
    result
}

async fn ended(mut child: Child) -> Result<(), ClusterError> {
    let status = child.wait().await.map_err(ClusterError::io("wait for the sender"))?;
    match status.code() {
        // 3: some lines were refused, and 1: some stayed unknown; both are written down.
        Some(0 | 1 | 3) => Ok(()),
        code => Err(ClusterError::Command {
            command: "send".into(),
            code: code.unwrap_or(-1),
            said: "its last words are in send.said in the cluster's folder".into(),
        }),
    }
}

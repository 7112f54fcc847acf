//! What happened in a simulated run, as one number: two runs that have the same one did the same at the same virtual
//! times. Must never take in anything of the real world: no address of memory, no real clock, no order of a random map.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;
use twox_hash::XxHash3_64;

/// So much of a note's bytes stands in its line.
const LINE_BYTES: usize = 2_048;

/// A running hash over everything that is noted; clones share it.
#[derive(Debug, Clone)]
pub struct Trace(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    started: Instant,
    hash: u64,
    notes: u64,
    /// Every note as a line, when somebody wants to see where two runs part.
    lines: Option<Vec<String>>,
}

impl Trace {
    /// An empty trace that begins now. `lines`: keep every note for [`Self::take_lines`].
    pub fn new(lines: bool) -> Self {
        let lines = lines.then(Vec::new);
        Self(Arc::new(Mutex::new(State { started: Instant::now(), hash: 0, notes: 0, lines })))
    }

    /// Takes `what`, `numbers` and `bytes` in, with the virtual time.
    pub fn note(&self, what: &str, numbers: &[u64], bytes: &[u8]) {
        let mut state = self.0.lock();
        let at_us = state.started.elapsed().as_micros() as u64;
        let mut head = Vec::with_capacity(what.len() + 8 * (numbers.len() + 1));
        head.extend_from_slice(what.as_bytes());
        head.extend_from_slice(&at_us.to_le_bytes());
        numbers.iter().for_each(|number| head.extend_from_slice(&number.to_le_bytes()));
        let content = XxHash3_64::oneshot(bytes);
        head.extend_from_slice(&content.to_le_bytes());
        state.hash = XxHash3_64::oneshot_with_seed(state.hash, &head);
        state.notes += 1;
        if let Some(lines) = &mut state.lines {
            let text = bytes[..bytes.len().min(LINE_BYTES)].escape_ascii();
            lines.push(format!("{at_us} {what} {numbers:?} {} bytes {content:016x} {text}", bytes.len()));
        }
    }

    /// The hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.0.lock().hash
    }

    /// How much was noted.
    pub fn notes(&self) -> u64 {
        self.0.lock().notes
    }

    /// The notes since the last call, one a line; none unless they are kept.
    pub fn take_lines(&self) -> Vec<String> {
        self.0.lock().lines.as_mut().map(std::mem::take).unwrap_or_default()
    }
}

//! `stentor chat`: conversations in a terminal. The model decides (`update`), the view draws, the work talks to the
//! server; here they meet. Must never leave a terminal in a state that its user did not have before.
//!
//! ```text
//! terminal ─ keys ─▶ ┌───────────────┐ ─ effects ─▶ work ─▶ SDK
//! SDK ── events ───▶ │ Model::update │ ◀─ answers ── work
//! clock ── ticks ──▶ └───────────────┘ ─ &Model ──▶ view ─▶ terminal
//! ```

mod areas;
mod composer;
mod conversation;
mod keys;
mod lines;
mod model;
mod row;
mod scroll;
mod terminal;
mod text;
mod update;
mod view;
mod work;

#[cfg(test)]
mod tests;

use std::{
    io::IsTerminal,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use chrono::{Local, Offset, TimeZone};
use crossterm::event::{Event, EventStream};
use futures_util::StreamExt;
use stentor_client::{Client, Connection};
use tokio::sync::mpsc;

use self::{
    model::{Effect, Input, Model},
    terminal::Screen,
    work::Work,
};
use crate::{args::ChatArgs, dev::stop_signal, failure::Failure, output::Output, session};

/// Answers that wait to be looked at; whoever has more waits.
const INPUTS: usize = 256;
/// Taken at once before the screen is drawn.
const BURST: usize = 256;
/// How often the clock is looked at: marks of time, the next listing.
const TICK: Duration = Duration::from_secs(1);
/// The same while a reconnect is counted down.
const TICK_OFFLINE: Duration = Duration::from_millis(200);
/// A silent gateway is asked after this whether it is there: a person looks at the state line.
const PING_IDLE: Duration = Duration::from_secs(5);
/// Unanswered sends of the session.
const WINDOW: usize = 256;

/// Chats until the user leaves.
pub(crate) async fn run(args: ChatArgs, output: Output) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::misuse("chat needs a terminal; `send`, `tail` and `history` do without"));
    }
    let stop = stop_signal()?;
    output.news("connecting…");
    let session = Box::pin(session::connect_with(&args.context, |b| b.window(WINDOW).ping_idle(PING_IDLE))).await?;
    let client = &session.client;
    let Some(me) = client.identity().cloned() else { return Err(Failure::failed("the session names no device")) };

    let size = crossterm::terminal::size().map_err(Failure::failed)?;
    let mut model = Model::new(me.clone(), zone, now_ms(), size);
    let (inputs, answers) = mpsc::channel(INPUTS);
    let work = Work::new(client.clone(), me, inputs);
    let mut screen = Screen::take().map_err(|e| Failure::failed(format_args!("the terminal cannot be used: {e}")))?;
    let ended = turn(&mut model, &mut screen, client, &work, answers, stop).await;
    drop(screen);
    ended?;
    let waiting = model.waiting() + model.unknown();
    if let Some(refusal) = model.ended {
        return Err(Failure::Refused(refusal));
    }
    session.client.close().await;
    match waiting {
        0 => Ok(()),
        n => Err(Failure::failed(format_args!("what became of {n} messages without an answer is unknown"))),
    }
}

/// Takes what happens, does what follows, and draws, until it is time to leave.
async fn turn(
    model: &mut Model,
    screen: &mut Screen,
    client: &Client,
    work: &Work,
    mut answers: mpsc::Receiver<Input>,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let mut keys = EventStream::new();
    tokio::pin!(stop);
    let mut inputs = vec![Input::Tick(client.connection())];
    loop {
        let mut redraw = false;
        for input in inputs.drain(..) {
            for effect in model.update(now_ms(), input) {
                match effect {
                    Effect::Leave => return Ok(()),
                    Effect::Redraw => redraw = true,
                    other => work.begin(other),
                }
            }
        }
        if redraw {
            screen.terminal.clear().map_err(gone)?;
        }
        screen.terminal.draw(|frame| view::view(model, frame)).map_err(gone)?;
        let tick = if matches!(model.connection, Connection::Online { .. }) { TICK } else { TICK_OFFLINE };
        tokio::select! {
            () = &mut stop => return Ok(()),
            key = keys.next() => match key {
                Some(Ok(event)) => {
                    terminal::panic_if_told();
                    inputs.extend(input(event));
                }
                Some(Err(error)) => return Err(gone(error)),
                None => return Ok(()),
            },
            incoming = client.next() => inputs.push(match incoming {
                Some(incoming) => Input::Incoming(incoming),
                None => Input::Ended(client.ended().cloned()),
            }),
            Some(answer) = answers.recv() => inputs.push(answer),
            () = tokio::time::sleep(tick) => {}
        }
        while inputs.len() < BURST {
            let Some(incoming) = client.try_next() else { break };
            inputs.push(Input::Incoming(incoming));
        }
        while inputs.len() < BURST {
            let Ok(answer) = answers.try_recv() else { break };
            inputs.push(answer);
        }
        // With every turn, so that the state line is never older than what stands above it.
        inputs.push(Input::Tick(client.connection()));
    }
}

fn input(event: Event) -> Option<Input> {
    match event {
        Event::Key(key) => Some(Input::Key(key)),
        Event::Paste(text) => Some(Input::Paste(text)),
        Event::Resize(columns, rows) => Some(Input::Resize(columns, rows)),
        Event::FocusGained => Some(Input::Focus(true)),
        Event::FocusLost => Some(Input::Focus(false)),
        Event::Mouse(_) => None,
    }
}

fn gone(error: std::io::Error) -> Failure {
    Failure::failed(format_args!("the terminal is gone: {error}"))
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// This machine's time zone.
fn zone(at_ms: u64) -> i32 {
    let at = i64::try_from(at_ms).ok().and_then(|ms| Local.timestamp_millis_opt(ms).single());
    at.map_or(0, |at| at.offset().fix().local_minus_utc())
}

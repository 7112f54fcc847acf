//! `stentor send`: one message a line, pipelined, in order. Must print every answer once and in the order of the lines,
//! and must never call a line refused when it only stayed without an answer.

use std::{
    io::{BufRead, Read},
    time::Duration,
};

use bytes::Bytes;
use serde_json::json;
use stentor_client::{Client, ClientError, Message, SendHandle};
use stentor_proto::{
    ids::{ClientId, ConversationId},
    reason::Reason,
    record::MAX_BODY_BYTES,
    v1::EventKind,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};

use crate::{args::SendArgs, failure::Failure, output::Output, output::error_value, session};

/// A line of input.
struct Line {
    /// From 1.
    number: u64,
    body: Bytes,
}

/// A line that was handed to the SDK.
struct Pending {
    number: u64,
    /// As the caller chose it.
    client_id: Option<String>,
    /// An error when the SDK itself did not take it.
    handle: Result<SendHandle, ClientError>,
}

/// How the lines fared.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    refused: u64,
    unknown: bool,
}

/// Sends and prints.
pub(crate) async fn run(args: SendArgs, output: Output) -> Result<(), Failure> {
    let conversation = ConversationId::new(&args.conversation)?;
    if let Some(id) = &args.client_id {
        ClientId::new(id)?;
    }
    let window = args.window as usize;
    let session = Box::pin(session::connect(&args.context, window)).await?;
    let (lines_in, lines) = mpsc::channel(window);
    read_lines(&args, lines_in);
    let (pending_in, pending) = mpsc::channel(window);
    let patience = Duration::from_secs(args.timeout);
    let bar = output.progress(0, "sent");
    let sending = send_lines(&session.client, &conversation, &args, lines, pending_in);
    let printing = print_answers(&session.client, pending, patience, output, &bar);
    tokio::pin!(sending, printing);
    let tally = tokio::select! {
        tally = &mut printing => tally?,
        () = &mut sending => printing.await?,
    };
    bar.finish_and_clear();
    output.flush()?;
    if tally.unknown {
        // The outbox is lost with this process, so these lines may or may not have been applied.
        return Err(Failure::failed(format_args!(
            "no answer for {patience:?}; what became of the lines without one is unknown"
        )));
    }
    session.client.close().await;
    if tally.refused > 0 { Err(Failure::LinesRefused) } else { Ok(()) }
}

/// Reads on a thread of its own: standard input cannot be waited for otherwise. It ends with the process.
fn read_lines(args: &SendArgs, to: mpsc::Sender<Line>) {
    if let Some(text) = &args.text {
        let _ = to.try_send(Line { number: 1, body: Bytes::copy_from_slice(text.as_bytes()) });
        return;
    }
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        for number in 1.. {
            let Some(body) = next_line(&mut input) else { return };
            if to.blocking_send(Line { number, body: body.into() }).is_err() {
                return;
            }
        }
    });
}

/// One line without its end. Of a line longer than any body only so much is kept that it will be refused as too large.
fn next_line(input: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let most = MAX_BODY_BYTES as u64 + 2;
    let read = input.by_ref().take(most).read_until(b'\n', &mut line).ok()?;
    if read == 0 {
        return None;
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if read as u64 == most {
        input.skip_until(b'\n').ok()?;
    }
    Some(line)
}

async fn send_lines(
    client: &Client,
    conversation: &ConversationId,
    args: &SendArgs,
    mut lines: mpsc::Receiver<Line>,
    to: mpsc::Sender<Pending>,
) {
    let mut ticks = args.rate.map(|rate| {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    });
    while let Some(line) = lines.recv().await {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let client_id = args.client_id.as_ref().map(|id| match args.stdin {
            true => format!("{id}-{}", line.number),
            false => id.clone(),
        });
        let handle = match client_id.as_ref().map(ClientId::new).transpose() {
            Ok(id) => client.send_pipelined(conversation, message(args, id, line.body)).await,
            // With its line's number behind it, it became too long.
            Err(bad) => Err(ClientError::Refused(Reason::BadId.with(bad.to_string()))),
        };
        if to.send(Pending { number: line.number, client_id, handle }).await.is_err() {
            return;
        }
    }
}

fn message(args: &SendArgs, client_id: Option<ClientId>, body: Bytes) -> Message {
    Message {
        kind: if args.action { EventKind::Action } else { EventKind::Message },
        // Whoever repeats the command does not know when it was first tried, so nothing is said about it.
        client_id,
        ..Message::bytes(args.content_type.as_deref().unwrap_or_default(), body)
    }
}

async fn print_answers(
    client: &Client,
    mut pending: mpsc::Receiver<Pending>,
    patience: Duration,
    output: Output,
    bar: &indicatif::ProgressBar,
) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    let device = client.identity().map_or("", |identity| identity.device.as_str());
    while let Some(Pending { number, client_id, handle }) = pending.recv().await {
        let answer = match handle {
            Ok(handle) => {
                let deadline = Instant::now() + patience;
                tokio::time::timeout_at(deadline, handle).await.unwrap_or_else(|_| Err(unknown()))
            }
            Err(error) => Err(error),
        };
        bar.inc(1);
        match answer {
            Ok(sent) => {
                let id = client_id.unwrap_or_else(|| format!("{device}-{}", sent.send_no));
                let mut value =
                    json!({ "line": number, "client_id": id, "seq": sent.seq.0, "stamp_ms": sent.stamp_ms.0 });
                if sent.repeat {
                    value["repeat"] = true.into();
                }
                match output.json() {
                    true => output.value(&value)?,
                    false => output.text(&format!("{number:>7}  seq {}", sent.seq))?,
                }
            }
            Err(ClientError::Refused(refusal)) => {
                tally.refused += 1;
                let value = json!({ "line": number, "client_id": client_id, "error": error_value(&refusal) });
                match output.json() {
                    true => output.value(&value)?,
                    false => output.text(&format!("{number:>7}  refused: {} ({})", refusal.message, refusal.reason))?,
                }
            }
            Err(ClientError::Unknown(_)) => {
                tally.unknown = true;
                return Ok(tally);
            }
            Err(other) => return Err(session::failure(other)),
        }
    }
    Ok(tally)
}

fn unknown() -> ClientError {
    ClientError::Unknown("no answer in time".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(mut input: &[u8]) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| next_line(&mut input)).collect()
    }

    #[test]
    fn lines_are_bytes_and_the_last_needs_no_end() {
        assert_eq!(lines(b"one\ntw\xe9\r\n\nlast"), [&b"one"[..], b"tw\xe9\r", b"", b"last"]);
        assert!(lines(b"").is_empty());
    }

    #[test]
    fn a_line_beyond_every_limit_is_cut_but_stays_one_line() {
        let mut input = vec![b'x'; MAX_BODY_BYTES * 2];
        input.extend_from_slice(b"\nnext\n");
        let lines = lines(&input);
        assert_eq!((lines.len(), lines[0].len()), (2, MAX_BODY_BYTES + 2));
        assert_eq!(lines[1], b"next");
    }
}

//! `stentor tail`: follows a conversation. Prints every event once and in order; what the reader may not see is said,
//! never left out silently.

use std::time::Duration;

use stentor_client::{Client, From, Incoming};
use stentor_proto::ids::{ConversationId, Seq};
use tokio::time::Instant;

use crate::{args::TailArgs, event_line, failure::Failure, output::Output, session};

/// Follows until enough was printed, or time is over.
pub(crate) async fn run(args: TailArgs, output: Output) -> Result<(), Failure> {
    let conversation = ConversationId::new(&args.conversation)?;
    let kind = args.kind.as_deref().map(event_line::kind_from_name).transpose()?;
    let session = Box::pin(session::connect(&args.context, 1)).await?;
    let from = args.after_seq.map_or(From::Head, |seq| From::Seq(Seq(seq)));
    session.client.subscribe(&conversation, from).await.map_err(session::failure)?;
    let deadline = args.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut left = args.count;
    while left != Some(0) {
        output.flush()?;
        let next = session.client.next();
        let incoming = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, next).await.map_err(|_| late(&args))?,
            None => next.await,
        };
        match incoming {
            Some(Incoming::Event { conversation, event }) => {
                if kind.is_none_or(|kind| kind == event.kind) {
                    event_line::print(output, conversation.as_str(), &event)?;
                    left = left.map(|n| n - 1);
                }
                session.client.delivered(&conversation, event.seq);
            }
            Some(Incoming::Hidden { conversation, hidden }) => {
                if kind.is_none() {
                    event_line::print_hidden(output, &hidden)?;
                }
                session.client.delivered(&conversation, hidden.to);
            }
            Some(Incoming::Ended { refusal, .. }) => return Err(Failure::Refused(refusal)),
            Some(Incoming::Disconnected { .. }) => output.news("disconnected; connecting again"),
            Some(_) => {}
            None => return Err(ended(&session.client)),
        }
    }
    output.flush()?;
    session.client.close().await;
    Ok(())
}

fn ended(client: &Client) -> Failure {
    match client.ended() {
        Some(refusal) => Failure::Refused(refusal.clone()),
        None => Failure::failed("the session has ended"),
    }
}

fn late(args: &TailArgs) -> Failure {
    Failure::failed(format_args!("not done within {} s", args.timeout.unwrap_or_default()))
}

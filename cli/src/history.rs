//! `stentor history`: reads events that are there, ascending. Pages are bounded by the server; a long history is read
//! page by page and printed as it comes, unless only its end is wanted.

use std::collections::VecDeque;

use stentor_client::{Client, ConversationId, EventKind, History, Item, Seq};

use crate::{args::HistoryArgs, event_line, failure::Failure, output::Output, session};

/// Items asked for at once; the server's own bound is on bytes.
const PAGE: u32 = 1_000;

/// What is wanted of a conversation.
struct Query {
    conversation: ConversationId,
    kind: Option<EventKind>,
    linearizable: bool,
}

/// Reads and prints.
pub(crate) async fn run(args: HistoryArgs, output: Output) -> Result<(), Failure> {
    let query = Query {
        conversation: ConversationId::new(&args.conversation)?,
        kind: args.kind.as_deref().map(event_line::kind_from_name).transpose()?,
        linearizable: args.linearizable,
    };
    let session = Box::pin(session::connect(&args.context, 1)).await?;
    match (args.after_seq, args.limit) {
        (None, Some(limit)) => last(&session.client, &query, args.before_seq, limit, output).await?,
        (after, limit) => ascending(&session.client, &query, after, args.before_seq, limit, output).await?,
    }
    output.flush()?;
    session.client.close().await;
    Ok(())
}

impl Query {
    async fn page(&self, client: &Client, which: History) -> Result<(Vec<Item>, bool), Failure> {
        let which = History { linearizable: self.linearizable, ..which };
        let page = client.history(&self.conversation, which).await.map_err(session::failure)?;
        Ok((page.items, page.more))
    }

    fn wants(&self, item: &Item) -> bool {
        match item {
            Item::Event(event) => self.kind.is_none_or(|kind| kind == event.kind),
            // Who asks for one kind of events is not after where the others are.
            Item::Hidden(_) => self.kind.is_none(),
        }
    }

    fn print(&self, item: &Item, output: Output) -> Result<(), Failure> {
        match item {
            Item::Event(event) => event_line::print(output, self.conversation.as_str(), event),
            Item::Hidden(hidden) => event_line::print_hidden(output, hidden),
        }
    }
}

fn is_event(item: &Item) -> bool {
    matches!(item, Item::Event(_))
}

fn first_seq(item: &Item) -> u64 {
    match item {
        Item::Event(event) => event.seq.0,
        Item::Hidden(hidden) => hidden.from.0,
    }
}

fn last_seq(item: &Item) -> u64 {
    match item {
        Item::Event(event) => event.seq.0,
        Item::Hidden(hidden) => hidden.to.0,
    }
}

/// From `after` (or the beginning) on, as far as `before` (or the head), at most `limit` events.
async fn ascending(
    client: &Client,
    query: &Query,
    after: Option<u64>,
    before: Option<u64>,
    limit: Option<u64>,
    output: Output,
) -> Result<(), Failure> {
    let mut after = after.unwrap_or(0);
    let mut left = limit.unwrap_or(u64::MAX);
    loop {
        let (items, more) = query.page(client, History::after(Seq(after)).limit(PAGE)).await?;
        for item in &items {
            if left == 0 || before.is_some_and(|before| first_seq(item) >= before) {
                return Ok(());
            }
            if query.wants(item) {
                query.print(item, output)?;
                left -= u64::from(is_event(item));
            }
        }
        match items.last() {
            Some(last) if more => after = last_seq(last),
            _ => return Ok(()),
        }
    }
}

/// The last `limit` events below `before` (or the head): collected from the end, printed ascending.
async fn last(
    client: &Client,
    query: &Query,
    mut before: Option<u64>,
    limit: u64,
    output: Output,
) -> Result<(), Failure> {
    let mut kept = VecDeque::new();
    let mut events = 0;
    while events < limit && before.is_none_or(|before| before > 1) {
        let wanted = (limit - events).min(u64::from(PAGE)) as u32;
        let page = if query.kind.is_none() { wanted } else { PAGE };
        let (items, _) = query.page(client, History { before_seq: before.map(Seq), ..History::last(page) }).await?;
        let Some(first) = items.first() else { break };
        before = Some(first_seq(first));
        for item in items.into_iter().rev().filter(|item| query.wants(item)) {
            if events == limit {
                break;
            }
            events += u64::from(is_event(&item));
            kept.push_front(item);
        }
    }
    kept.iter().try_for_each(|item| query.print(item, output))
}

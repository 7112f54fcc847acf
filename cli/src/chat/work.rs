//! Carries out the model's effects with the SDK. Must keep the order of sends; everything else that waits for the
//! server does so in a task of its own, few at a time.

use std::sync::Arc;

use stentor_client::{
    Client, ClientError, Conversation, ConversationId, Create, From, History, Identity, Item, Message, Role, Seq,
    UserId,
};
use tokio::sync::{Semaphore, mpsc};

use super::{
    conversation::{Fate, Page},
    model::{Effect, Input, MOST_CONVERSATIONS, MOST_SENDING},
    row::Row,
    text,
};
use crate::failure::Failure;

/// Requests at once for what nobody waits for: a connection carries eight.
const QUIETLY: usize = 3;
/// Requests at once for what somebody waits for.
const URGENTLY: usize = 3;
/// First events that say who takes part.
const FIRST_EVENTS: u32 = 8;

/// A message in its turn.
struct Outgoing {
    conversation: ConversationId,
    number: u64,
    message: Message,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Work {
    client: Client,
    me: Identity,
    inputs: mpsc::Sender<Input>,
    sends: mpsc::Sender<Outgoing>,
    quiet: Arc<Semaphore>,
    urgent: Arc<Semaphore>,
}

impl Work {
    /// Works for a client; what comes of it goes to `inputs`.
    pub(crate) fn new(client: Client, me: Identity, inputs: mpsc::Sender<Input>) -> Self {
        let (sends, turn) = mpsc::channel(MOST_SENDING);
        tokio::spawn(send_in_turn(client.clone(), turn, inputs.clone()));
        let (quiet, urgent) = (Arc::new(Semaphore::new(QUIETLY)), Arc::new(Semaphore::new(URGENTLY)));
        Self { client, me, inputs, sends, quiet, urgent }
    }

    /// Begins one effect.
    pub(crate) fn begin(&self, effect: Effect) {
        match effect {
            Effect::Delivered(conversation, seq) => self.client.delivered(&conversation, Seq(seq)),
            Effect::Read(conversation, seq) => self.client.read(&conversation, Seq(seq)),
            Effect::Send { conversation, number, text, is_action } => {
                let message = if is_action { Message::action(text) } else { Message::text(text) };
                let lost = self.sends.try_send(Outgoing { conversation: conversation.clone(), number, message });
                if lost.is_err() {
                    let fate = Fate::Refused("too many messages wait".into());
                    self.later(false, async move |_| Some(Input::Answered { conversation, number, fate }));
                }
            }
            Effect::List => self.later(true, async move |work| {
                let listed = list(&work.client).await;
                Some(Input::Listed(listed.map_err(words)))
            }),
            Effect::Subscribe(conversation) => self.later(false, async move |work| {
                // Refused by the session when it has too many; then there is no stream, and no count of what is new.
                let _ = work.client.subscribe(&conversation, From::Head).await;
                None
            }),
            Effect::Load { conversation, page, limit, urgent } => self.later(urgent, async move |work| {
                let result = work.load(&conversation, page, limit).await.map_err(words);
                Some(Input::Page { conversation, page, result })
            }),
            Effect::Meet(conversation) => self.later(false, async move |work| work.meet(conversation).await),
            Effect::Create { id, with } => self.later(true, async move |work| {
                Some(Input::Created(create(&work.client, id, with).await.map_err(words)))
            }),
            Effect::Add { conversation, user } => self.later(true, async move |work| {
                let added = work.client.add(&conversation, &user, Role::Unspecified).await;
                let user = text::one_line(user.as_str());
                Some(Input::Added { user, result: added.map(drop).map_err(words) })
            }),
            // The loop's own.
            Effect::Redraw | Effect::Leave => {}
        }
    }

    fn later<F>(&self, urgent: bool, task: impl FnOnce(Self) -> F + Send + 'static)
    where
        F: Future<Output = Option<Input>> + Send,
    {
        let work = self.clone();
        let places = Arc::clone(if urgent { &self.urgent } else { &self.quiet });
        tokio::spawn(async move {
            let Ok(_place) = places.acquire_owned().await else { return };
            let inputs = work.inputs.clone();
            if let Some(input) = task(work).await {
                // Nobody listens any more when the chat ends.
                let _ = inputs.send(input).await;
            }
        });
    }

    async fn load(&self, id: &ConversationId, page: Page, limit: u32) -> Result<(Vec<Row>, u64), ClientError> {
        let which = match page {
            Page::Before(seq) => History::before(Seq(seq)),
            Page::After(seq) => History::after(Seq(seq)),
        };
        let page = self.client.history(id, which.limit(limit)).await?;
        Ok((page.items.iter().map(|item| Row::item(item, &self.me)).collect(), page.head.0))
    }

    /// A conversation does not list its participants, but its first events name them.
    async fn meet(&self, conversation: ConversationId) -> Option<Input> {
        let first = History::after(Seq(0)).limit(FIRST_EVENTS);
        let page = self.client.history(&conversation, first).await.ok()?;
        let mut users = Vec::new();
        for item in page.items {
            let Item::Event(event) = item else { continue };
            users.extend(
                [&event.sender, &event.subject].map(|user| text::one_line(user)).into_iter().filter(|u| !u.is_empty()),
            );
        }
        Some(Input::People { conversation, users })
    }
}

async fn list(client: &Client) -> Result<(Vec<Conversation>, bool), ClientError> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let page = client.list(&after, 0).await?;
        all.extend(page.conversations);
        after = page.next;
        if after.is_empty() || all.len() >= MOST_CONVERSATIONS {
            let more = !after.is_empty() || all.len() > MOST_CONVERSATIONS;
            all.truncate(MOST_CONVERSATIONS);
            return Ok((all, more));
        }
    }
}

async fn create(client: &Client, id: Option<ConversationId>, with: Vec<UserId>) -> Result<Conversation, ClientError> {
    let created = client.create_conversation(wanted(id, with)).await?;
    client.show(&created.conversation).await
}

fn wanted(id: Option<ConversationId>, with: Vec<UserId>) -> Create {
    match (id, <[UserId; 1]>::try_from(with)) {
        (None, Ok([user])) => Create::direct(user),
        (Some(id), Ok(user)) => Create::group(user).id(id),
        (None, Err(with)) => Create::group(with),
        (Some(id), Err(with)) => Create::group(with).id(id),
    }
}

async fn send_in_turn(client: Client, mut turn: mpsc::Receiver<Outgoing>, inputs: mpsc::Sender<Input>) {
    while let Some(Outgoing { conversation, number, message }) = turn.recv().await {
        let queued = client.send_pipelined(&conversation, message).await;
        let inputs = inputs.clone();
        tokio::spawn(async move {
            let sent = match queued {
                Ok(handle) => handle.await,
                Err(error) => Err(error),
            };
            let fate = match sent {
                Ok(sent) => Fate::Acknowledged(sent.seq.0),
                Err(error) if error.is_unknown() => Fate::Unknown(words(error)),
                Err(error) => Fate::Refused(words(error)),
            };
            let _ = inputs.send(Input::Answered { conversation, number, fate }).await;
        });
    }
}

/// A failure for people; a refusal by its own sentence and its stable reason.
fn words(error: ClientError) -> String {
    match error.refusal() {
        Some(refusal) => format!("{} ({})", refusal.message, refusal.reason),
        None => Failure::failed(error).refusal().map(|refusal| refusal.message).unwrap_or_default(),
    }
}

//! The Rust SDK of Stentor: sends with exactly-once answers, dense ordered streams, automatic resume. What bench,
//! chaos, cli and users build on; it must never show an application an event twice, out of order, or with a gap.
//!
//! ```no_run
//! # async fn quick_start(token: &str) -> Result<(), Box<dyn std::error::Error>> {
//! use stentor_client::{Client, ConversationId, FileCursors, From, Incoming, Message};
//!
//! let cursors = FileCursors::open("my-device")?;
//! let client =
//!     Client::builder().gateway("127.0.0.1:7443").ca_file("ca.pem").token(token).cursors(cursors).connect().await?;
//! let general = ConversationId::new("general")?;
//! client.subscribe(&general, From::Cursor).await?;
//! let sent = client.send(&general, Message::text("hello")).await?;
//! println!("it is number {}", sent.seq);
//! while let Some(incoming) = client.next().await {
//!     let Incoming::Event { conversation, event } = incoming else { continue };
//!     println!("{}: {}", event.sender, String::from_utf8_lossy(&event.body));
//!     client.delivered(&conversation, event.seq);
//! }
//! # Ok(()) }
//! ```
//!
//! **Sends** keep their order per conversation and are repeated over reconnects until they have an answer:
//! [`ClientError::Refused`] means that there is no event, [`ClientError::Unknown`] that nobody can say.
//! [`Client::send_pipelined`] has many under way at once. **Streams** go on from where they were after every
//! reconnect. **Cursors** move when the application says so ([`Client::delivered`]), never by themselves; after a
//! restart a stream begins at the last one that was kept (see [`FileCursors`] for what a crash can cost).
//! [`Client::next`] must be called for events to flow: what waits is bounded, and the gateway keeps the rest.

#![forbid(unsafe_code)]

mod builder;
mod client;
mod connection;
mod cursors;
mod dial;
mod driver;
mod error;
mod message;
mod requests;
mod shared;
mod token;

pub use builder::Builder;
pub use client::{Client, SendHandle};
pub use connection::Connection;
pub use cursors::{Change, CursorStore, FileCursors, Identity, MemoryCursors, StoreError};
pub use error::ClientError;
pub use message::{Event, From, Hidden, Incoming, Message, Sent, Text};
pub use requests::{Create, Created, History, HistoryPage, Item, ParticipantChanged, SendState};
pub use stentor_engine::session::client::{Backoff, Full};
pub use stentor_proto::{
    ids::{AppId, ClientId, ConversationId, DeviceId, Epoch, SendNo, Seq, SessionNo, StampMs, UserId, Version},
    reason::Reason,
    v1::{Conversation, ConversationKind, EventKind, HiddenReason, ListResponse, Refusal, Role},
};
pub use stentor_transport::{Host, tls::ClientTls};

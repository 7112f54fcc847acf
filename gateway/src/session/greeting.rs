//! The beginning of a connection: hello, token, fencing number. Must never let anything happen before the token is
//! verified and the device's newest session is this one.

use std::sync::Arc;

use stentor_engine::{
    command,
    effect::Outcome,
    session::server::{Credit, Cursors, Greeting, Server, greet as check_hello},
};
use stentor_proto::{
    frame::{ClientFrame, MAX_RESUME_BYTES},
    ids::SessionNo,
    reason::Reason,
    v1::{self, Refusal},
};
use stentor_transport::quic::{FrameReader, ReadError};
use tokio::time::timeout;

use super::{Calls, HELLO_TIMEOUT, Outgoing, Rates, Session, Streams, bad_frame, unexpected};
use crate::{
    core::{Core, Who},
    inbox::{Answer, Inbox, Purpose, Reply},
    shard::Ticket,
};

/// Leads a connection to a session that was welcomed, or to the reason why not.
pub(super) async fn greet(core: &Arc<Core>, reader: &mut FrameReader) -> Result<Session, Refusal> {
    let mut server = Server::new();
    // A stranger shall not make the gateway hold megabytes.
    reader.set_max_resume_bytes(core.config.limits.max_frame_bytes);
    let hello = hello(core, &mut server, reader).await?;
    let greeting = check_hello(&hello).map_err(Reason::refusal)?;
    if *core.draining.borrow() {
        return Err(Reason::Draining.refusal());
    }
    if timeout(HELLO_TIMEOUT, core.placement_known()).await.is_err() {
        return Err(Reason::Unavailable.refusal());
    }
    let claims = core.keys().verify(&hello.token, core.wall_ms() / 1_000).map_err(Reason::refusal)?;
    let Some(device) = claims.device else {
        return Err(Reason::Unauthenticated.with("the token names no device"));
    };
    let who = Who { app: claims.app, user: claims.user, device };
    core.may_open(&who).map_err(Reason::refusal)?;
    let inbox = Arc::new(Inbox::default());
    let session_no = open(core, &who, &greeting, &inbox).await?;
    core.enter(&who, session_no, &inbox).map_err(Reason::refusal)?;
    server.opened(session_no);
    reader.set_max_resume_bytes(MAX_RESUME_BYTES);
    let mut out = Outgoing::default();
    out.push(welcome(core, &who, &greeting, session_no));
    Ok(Session {
        core: core.clone(),
        place: core.places.enter(&inbox),
        inbox,
        rates: Rates::of(core, &who),
        expires_s: claims.expires_s,
        check_token_ms: 0,
        who,
        admin: claims.admin,
        server,
        credit: Credit::default(),
        cursors: Cursors::default(),
        out,
        streams: Streams::default(),
        calls: Calls::default(),
        proposals: Vec::new(),
        ending: None,
        close_at_ms: None,
    })
}

async fn hello(core: &Core, server: &mut Server, reader: &mut FrameReader) -> Result<v1::Hello, Refusal> {
    let late = |_| Reason::Malformed.with("no hello came in time");
    let (kind, message) = match timeout(HELLO_TIMEOUT, reader.next()).await.map_err(late)? {
        Ok(Some(frame)) => frame,
        Ok(None) => return Err(Reason::Malformed.with("the stream ended before a hello")),
        Err(error) => return Err(bad_frame(&error)),
    };
    let frame = ClientFrame::decode(kind, message).map_err(|bad| bad_frame(&ReadError::from(bad)))?;
    let frame = frame.ok_or_else(|| Reason::UnexpectedFrame.refusal())?;
    core.metrics.device_frame(&frame);
    server.frame(&frame).map_err(Reason::refusal)?;
    match frame {
        ClientFrame::Hello(hello) => Ok(hello),
        _ => Err(Reason::UnexpectedFrame.refusal()),
    }
}

/// Asks the user's shard for the fencing number. The same nonce gets the same number, so that this may be repeated.
async fn open(core: &Core, who: &Who, greeting: &Greeting, inbox: &Arc<Inbox>) -> Result<SessionNo, Refusal> {
    let command = command::open_session(&who.app, &who.user, &who.device, &greeting.nonce);
    command::check(&command).map_err(Reason::refusal)?;
    let shard = core.shard_of(&who.app, who.user.as_str()).map_err(Reason::refusal)?;
    let ticket = Ticket { inbox: inbox.clone(), purpose: Purpose::OpenSession };
    core.propose(&mut vec![(shard, command::encode(&command), ticket)]);
    // The shard answers every ticket in the end, if only that nobody can be reached.
    let answer = loop {
        inbox.changed().await;
        if let Some(Answer { result, .. }) = inbox.take().answers.pop() {
            break result;
        }
    };
    match answer {
        Ok(Reply::Outcome(Outcome::SessionOpened { session_no })) => Ok(session_no),
        Ok(Reply::Outcome(Outcome::Refused { reason, .. })) => Err(reason.refusal()),
        other => Err(unexpected(other)),
    }
}

fn welcome(core: &Core, who: &Who, greeting: &Greeting, session_no: SessionNo) -> v1::Welcome {
    let limits = &core.config.limits;
    v1::Welcome {
        version: greeting.version,
        session_no: session_no.0,
        app: who.app.as_str().into(),
        user: who.user.as_str().into(),
        device: who.device.as_str().into(),
        max_frame_bytes: limits.max_frame_bytes as u32,
        max_body_bytes: limits.max_body_bytes as u32,
        max_in_flight: stentor_engine::limits::SESSION_SENDS_IN_FLIGHT as u32,
        max_run_sends: stentor_engine::limits::RUN_SENDS as u32,
        server_ms: core.wall_ms(),
        gateway: core.config.name.clone(),
    }
}

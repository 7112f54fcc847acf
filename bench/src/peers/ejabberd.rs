//! ejabberd, one server: chat between twos, with an archive in SQLite and without one, driven by `tokio-xmpp`. Must
//! never be slowed by what a chat does not need: no TLS, no passwords, no shapers.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, future::LocalBoxFuture, future::try_join, stream};
use tempfile::TempDir;
use tokio::{runtime::Handle, time::timeout};
use tokio_xmpp::{
    Client, Event, Stanza,
    connect::DnsConfig,
    jid::{FullJid, Jid},
    parsers::message::{Lang, Message, MessageType},
    parsers::presence::{Presence, Type},
    xmlstream::Timeouts,
};

use super::{
    Gauge, Load, MESSAGE_BYTES, Peer, PeerError, idle,
    server::{Server, folder, free_ports, local, need, write},
};
use crate::{Outcome, Timing, meter::Meters, scenario::Stop};

/// Where Debian puts its code.
const CODE: &str = "/usr/lib";
/// Where Debian puts the libraries of Erlang.
const LIBRARIES: &str = "/usr/lib/erlang/lib";
const CONNECTING: usize = 8;
/// A login that takes longer has failed.
const ONLINE_WITHIN: Duration = Duration::from_secs(20);
/// Now and then it never answers one of many that come at once.
const ATTEMPTS: usize = 3;
/// A message that takes longer is lost.
const ARRIVES_WITHIN: Duration = Duration::from_secs(30);
/// The end of a session is not waited for longer.
const LEAVES_WITHIN: Duration = Duration::from_secs(5);

/// A server that runs.
#[derive(Debug)]
pub struct Ejabberd {
    servers: [Server; 1],
    port: u16,
    runs: usize,
    _folder: TempDir,
}

/// The folder of its compiled code, `…/ejabberd-VERSION/ebin`.
fn code() -> Result<PathBuf, PeerError> {
    let under = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> = under(Path::new(CODE))
        .filter(|dir| dir.is_dir())
        .flat_map(|dir| under(&dir).collect::<Vec<_>>())
        .map(|dir| dir.join("ebin"))
        .filter(|ebin| ebin.join("ejabberd.app").is_file())
        .collect();
    found.sort();
    found.pop().ok_or_else(|| PeerError::Missing("ejabberd is not installed".into()))
}

/// Whether its archive can lie in SQLite.
fn has_sqlite() -> bool {
    let libraries = std::fs::read_dir(LIBRARIES).into_iter().flatten().flatten();
    libraries.map(|library| library.file_name()).any(|name| name.to_string_lossy().starts_with("p1_sqlite3"))
}

/// A client that takes its leave: dropped without, its own task panics, and it connects again and again.
struct Session(Option<Client>);

impl Session {
    fn client(&mut self) -> Result<&mut Client, PeerError> {
        self.0.as_mut().ok_or_else(|| PeerError::failed("use a session", "it has ended"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let (Some(client), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(async move { drop(timeout(LEAVES_WITHIN, client.send_end()).await) });
        }
    }
}

impl Ejabberd {
    /// Starts one server; `archive` keeps every message for both sides before it goes on.
    pub async fn start(archive: bool) -> Result<Self, PeerError> {
        let (erl, code, dir, [port]) = (need("erl")?, code()?, folder()?, free_ports()?);
        if archive && !has_sqlite() {
            let missing = "ejabberd's archive needs erlang-p1-sqlite3, which is not installed";
            return Err(PeerError::Missing(missing.into()));
        }
        let config = dir.path().join("ejabberd.yml");
        write(&config, &configuration(dir.path(), port, archive))?;
        let spool = dir.path().join("spool");
        let mut command = Command::new(erl);
        command.args(["-noinput", "-boot", "start_sasl", "+K", "true", "+P", "250000", "-pa"]).arg(code);
        // Without a name of its own it needs no port mapper.
        command.args(["-mnesia", "dir"]).arg(format!("\"{}\"", spool.display())).args(["-s", "ejabberd"]);
        command.current_dir(dir.path()).env("HOME", dir.path()).env("EJABBERD_CONFIG_PATH", &config);
        command.env("EJABBERD_LOG_PATH", dir.path().join("messages.log")).env("SPOOL_DIR", &spool);
        command.env("ERL_CRASH_DUMP_SECONDS", "0");
        let mut server = Server::start("ejabberd", command, dir.path())?;
        server.listens(port).await?;
        Ok(Self { servers: [server], port, runs: 0, _folder: dir })
    }

    /// A session that the server delivers to.
    async fn online(&self, name: &str) -> Result<Session, PeerError> {
        for _ in 0..ATTEMPTS {
            if let Ok(online) = timeout(ONLINE_WITHIN, self.log_in(name)).await {
                return online;
            }
        }
        Err(PeerError::failed(format!("log {name} in"), "no answer"))
    }

    async fn log_in(&self, name: &str) -> Result<Session, PeerError> {
        let failed = |why: String| PeerError::failed(format!("log {name} in"), why);
        let jid: FullJid = format!("{name}@localhost/phone").parse().map_err(|error| failed(format!("{error}")))?;
        let address = DnsConfig::addr(&local(self.port).to_string());
        let mut session = Session(Some(Client::new_plaintext(jid, "any", address, Timeouts::default())));
        let client = session.client()?;
        loop {
            match client.next().await {
                Some(Event::Online { .. }) => {
                    let available = client.send_stanza(Presence::new(Type::None).into()).await;
                    available.map_err(|error| failed(error.to_string()))?;
                }
                // Its own presence comes back: before that, messages for it are dropped.
                Some(Event::Stanza(Stanza::Presence(_))) => return Ok(session),
                Some(Event::Stanza(_)) => {}
                Some(Event::Disconnected(error)) => return Err(failed(error.to_string())),
                None => return Err(failed("the connection ended".into())),
            }
        }
    }

    async fn chat(&self, run: &str, pairs: usize, timing: Timing) -> Result<Outcome, PeerError> {
        let connected = stream::iter(0..pairs).map(|n| async move {
            let (one, other) = (format!("{run}-{n}-a"), format!("{run}-{n}-b"));
            try_join(self.online(&one), self.online(&other)).await
        });
        let connected: Vec<_> = connected.buffered(CONNECTING).try_collect().await?;
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let tasks: Vec<_> = connected
            .into_iter()
            .enumerate()
            .map(|(n, (one, other))| tokio::spawn(talk(n, one, other, Arc::clone(&meters), stop.clone())))
            .collect();
        let outcome = Gauge::of(&self.servers).measure(timing, &meters).await;
        stop.now();
        for task in tasks {
            task.await.map_err(|error| PeerError::failed("chat", error))??;
        }
        outcome
    }

    async fn put_under(&mut self, load: &Load, timing: Timing) -> Result<Outcome, PeerError> {
        self.servers.iter_mut().try_for_each(Server::lives)?;
        self.runs += 1;
        let run = format!("run{}", self.runs);
        match *load {
            Load::Chat { pairs } => self.chat(&run, pairs, timing).await,
            Load::Idle { connections } => {
                let server = &*self;
                let online = |n| {
                    let name = format!("{run}-{n}");
                    async move { server.online(&name).await }
                };
                idle::hold(&server.servers, connections, timing, online).await
            }
            _ => Err(PeerError::unable("ejabberd", load)),
        }
    }
}

/// One says something, and when the other has it, answers. Each message that arrived counts.
async fn talk(n: usize, one: Session, other: Session, meters: Arc<Meters>, stop: Stop) -> Result<(), PeerError> {
    let (mut from, mut to) = (one, other);
    let mut noted = Vec::new();
    let mut body = "*".repeat(MESSAGE_BYTES);
    while !stop.is_set() {
        let began = Instant::now();
        let address: Option<Jid> = to.client()?.bound_jid().cloned().map(Into::into);
        let mut message = Message::new_with_type(MessageType::Chat, address);
        message.bodies.insert(Lang::default(), std::mem::take(&mut body));
        from.client()?.send_stanza(message.into()).await.map_err(|error| PeerError::failed("send", error))?;
        body = timeout(ARRIVES_WITHIN, next_body(to.client()?))
            .await
            .map_err(|_| PeerError::failed("deliver a message", "it did not come"))??;
        noted.push(began.elapsed());
        meters.units.note(n, &mut noted);
        std::mem::swap(&mut from, &mut to);
    }
    Ok(())
}

async fn next_body(client: &mut Client) -> Result<String, PeerError> {
    loop {
        match client.next().await {
            Some(Event::Stanza(Stanza::Message(message))) => match (message.type_, message.bodies.into_values().next())
            {
                (MessageType::Error, _) => return Err(PeerError::failed("deliver a message", "it was refused")),
                // The server adds the language of the stream.
                (_, Some(body)) => return Ok(body),
                (_, None) => {}
            },
            Some(Event::Disconnected(error)) => return Err(PeerError::failed("stay connected", error)),
            Some(_) => {}
            None => return Err(PeerError::failed("stay connected", "the connection ended")),
        }
    }
}

fn configuration(dir: &Path, port: u16, archive: bool) -> String {
    let modules = match archive {
        false => "{}".to_owned(),
        true => "\n  mod_mam:\n    db_type: sql\n    default: always\n    assume_mam_usage: true".into(),
    };
    format!(
        "loglevel: error\nlog_rotate_count: 0\nhosts: [\"localhost\"]\n\
         listen:\n  - port: {port}\n    ip: \"127.0.0.1\"\n    module: ejabberd_c2s\n    backlog: 1000\n    \
         max_stanza_size: 262144\n    starttls: false\n\
         auth_method: [anonymous]\nanonymous_protocol: login_anon\nallow_multiple_connections: true\n\
         sql_type: sqlite\nsql_database: \"{}\"\nshaper: {{}}\nmodules: {modules}\n",
        dir.join("archive.sqlite").display()
    )
}

impl Peer for Ejabberd {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(self.put_under(load, timing))
    }
}

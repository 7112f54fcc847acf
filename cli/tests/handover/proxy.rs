//! A proxy before one broker: it carries bytes, holds them back in one direction, and cuts connections with all that it
//! holds. Must never change a byte.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

struct Switches {
    hold_requests: watch::Sender<bool>,
    hold_answers: watch::Sender<bool>,
    /// Connections of an earlier number are over.
    cuts: watch::Sender<u64>,
    held: AtomicUsize,
}

pub(crate) struct Proxy {
    pub(crate) addr: SocketAddr,
    switches: Arc<Switches>,
}

impl Proxy {
    pub(crate) async fn start(broker: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let switches = Arc::new(Switches {
            hold_requests: watch::channel(false).0,
            hold_answers: watch::channel(false).0,
            cuts: watch::channel(0).0,
            held: AtomicUsize::new(0),
        });
        tokio::spawn(accept(listener, broker, switches.clone()));
        Self { addr, switches }
    }

    /// Holds back, or lets go, what the gateway says.
    pub(crate) fn hold_requests(&self, hold: bool) {
        self.switches.held.store(0, Ordering::SeqCst);
        self.switches.hold_requests.send_replace(hold);
    }

    /// Holds back, or lets go, what the broker says.
    pub(crate) fn hold_answers(&self, hold: bool) {
        self.switches.hold_answers.send_replace(hold);
    }

    /// Ends all connections; what is held is lost. New ones are taken.
    pub(crate) fn cut(&self) {
        self.switches.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Bytes of the gateway that are held.
    pub(crate) fn held(&self) -> usize {
        self.switches.held.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, broker: SocketAddr, switches: Arc<Switches>) {
    while let Ok((gateway, _)) = listener.accept().await {
        let switches = switches.clone();
        tokio::spawn(async move {
            let mut cuts = switches.cuts.subscribe();
            let Ok(broker) = TcpStream::connect(broker).await else { return };
            let ((from_gateway, to_gateway), (from_broker, to_broker)) = (gateway.into_split(), broker.into_split());
            let held = &switches.held;
            tokio::select! {
                // First: what is let go with the cut is lost all the same.
                biased;
                _ = cuts.changed() => {}
                () = carry(from_gateway, to_broker, switches.hold_requests.subscribe(), Some(held)) => {}
                () = carry(from_broker, to_gateway, switches.hold_answers.subscribe(), None) => {}
            }
        });
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut hold: watch::Receiver<bool>,
    held: Option<&AtomicUsize>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if let Some(held) = held.filter(|_| *hold.borrow()) {
            held.fetch_add(read, Ordering::SeqCst);
        }
        if hold.wait_for(|hold| !hold).await.is_err() || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

//! The servers of scripted brokers: the internal gRPC service over real TLS, in front of the world they share.

use std::{collections::BTreeSet, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use stentor_proto::{
    ids::BrokerId,
    internal::{
        self, BrokerBatch, BrokerFrame, GatewayBatch, PlacementView, WatchPlacementRequest,
        broker_frame::Frame as Out,
        broker_server::{Broker as Service, BrokerServer},
    },
};
use stentor_transport::{
    bind, grpc,
    tls::{ServerTls, TlsFiles},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::broker::{Attached, World};

/// One broker's server.
pub(crate) struct Broker {
    pub(crate) addr: SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Broker {
    pub(crate) fn start(broker: BrokerId, world: Arc<World>, files: &TlsFiles) -> Self {
        let listener = bind::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr().unwrap();
        let tls = ServerTls::peer(files).unwrap();
        let routes = tonic::service::Routes::new(BrokerServer::new(Serving { broker, world }));
        let serving = grpc::serve(listener, &tls, routes, std::future::pending());
        Self { addr, server: tokio::spawn(async move { serving.await.unwrap() }) }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Serving {
    broker: BrokerId,
    world: Arc<World>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Service for Serving {
    type AttachStream = Answers<BrokerBatch>;
    type WatchPlacementStream = Answers<PlacementView>;

    async fn attach(
        &self,
        request: Request<Streaming<GatewayBatch>>,
    ) -> Result<Response<Answers<BrokerBatch>>, Status> {
        let mut inbound = request.into_inner();
        let (out, outbound) = mpsc::unbounded_channel();
        let (world, broker) = (self.world.clone(), self.broker);
        let id = {
            let mut state = world.0.lock().unwrap();
            state.next_stream += 1;
            let id = state.next_stream;
            state.streams.push(Attached { id, broker, out, interest: BTreeSet::new() });
            id
        };
        tokio::spawn(beat(world.clone(), id));
        tokio::spawn(async move {
            while let Ok(Some(batch)) = inbound.message().await {
                let mut state = world.0.lock().unwrap();
                if !state.streams.iter().any(|s| s.id == id) {
                    break;
                }
                batch.frames.into_iter().for_each(|frame| state.take(id, broker, frame));
            }
            world.0.lock().unwrap().streams.retain(|s| s.id != id);
        });
        let batches = UnboundedReceiverStream::new(outbound).map(|frame| Ok(BrokerBatch { frames: vec![frame] }));
        Ok(Response::new(Box::pin(batches)))
    }

    async fn watch_placement(
        &self,
        _: Request<WatchPlacementRequest>,
    ) -> Result<Response<Answers<PlacementView>>, Status> {
        let first = tokio_stream::once(Ok(self.world.placement()));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }
}

async fn beat(world: Arc<World>, id: u64) {
    let mut interval = tokio::time::interval(Duration::from_millis(100));
    loop {
        interval.tick().await;
        let state = world.0.lock().unwrap();
        let Some(stream) = state.streams.iter().find(|s| s.id == id) else { return };
        if stream.broker == state.leader && !state.script.mute {
            for shard in [1, 2] {
                let beat = internal::ShardBeat { shard, term: state.term, ..Default::default() };
                let _ = stream.out.send(BrokerFrame { frame: Some(Out::Beat(beat)) });
            }
        }
    }
}

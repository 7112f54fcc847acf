//! Keeps the placement fresh: asks any broker for the whole of it and for every change, and asks another one when that
//! stream breaks. Must never take a broker's word for another cluster's.

use std::{sync::Arc, time::Duration};

use stentor_proto::internal::{WatchPlacementRequest, broker_client::BrokerClient};
use stentor_transport::grpc::Channel;
use tokio::time::timeout;
use tonic::Status;

use crate::core::Core;

/// Until the first view; a broker that has none yet says so by an error.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Before the next broker is asked.
const PAUSE: Duration = Duration::from_millis(100);

/// Watches until the task is dropped.
pub(crate) async fn watch(core: Arc<Core>, channels: Vec<Channel>) {
    for channel in channels.iter().cycle() {
        if let Err(status) = follow(&core, channel.clone()).await {
            tracing::debug!(%status, "cannot follow the placement here");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(core: &Core, channel: Channel) -> Result<(), Status> {
    let request = WatchPlacementRequest { gateway: core.config.name.clone(), cluster_id: core.cluster_id() };
    let mut client = BrokerClient::new(channel);
    let late = |_| Status::deadline_exceeded("no placement in time");
    let mut views = timeout(ANSWER_TIMEOUT, client.watch_placement(request)).await.map_err(late)??.into_inner();
    let mut first = timeout(ANSWER_TIMEOUT, views.message()).await.map_err(late)??;
    while let Some(view) = first.take() {
        core.placed(view);
        first = views.message().await?;
    }
    Ok(())
}

//! Sessions of the SDK with the cluster's gateways, as any device of any user: tokens are made with its development key.
//! Must never be used but with a cluster of one's own.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use stentor_client::{AppId, Client, ClientError, ClientTls, DeviceId, MemoryCursors, UserId};
use stentor_transport::token::{self, Claims};

use super::{ClusterError, processes::Processes};
use crate::{oracle::Device, workload::Connect};

/// Longer than any run.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3_600);
/// With two gateways, of which one may be dead.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// The gateways of a cluster.
#[derive(Debug)]
pub(super) struct Gateways {
    addresses: Vec<String>,
    tls: ClientTls,
    app: AppId,
    kid: String,
    private_key: String,
}

impl Gateways {
    pub(super) fn of(processes: &Processes) -> Result<Self, ClusterError> {
        let file = processes.file()?;
        let config = |error: String| ClusterError::Client(ClientError::Config(error));
        let key = &file.signing_key.private_key;
        Ok(Self {
            addresses: file.nodes.iter().filter_map(|node| node.quic.clone()).collect(),
            tls: ClientTls::public(&file.ca).map_err(|error| config(error.to_string()))?,
            app: AppId::new(&file.app).map_err(|error| config(error.to_string()))?,
            kid: file.signing_key.kid,
            private_key: std::fs::read_to_string(key).map_err(ClusterError::io(key.display().to_string()))?,
        })
    }

    fn token(&self, device: &Device) -> Result<String, ClientError> {
        let bad = |error: stentor_proto::ids::BadId| ClientError::Config(error.to_string());
        let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + TOKEN_LIFETIME;
        let claims = Claims {
            app: self.app.clone(),
            user: UserId::new(&*device.user).map_err(bad)?,
            device: Some(DeviceId::new(&*device.name).map_err(bad)?),
            admin: false,
            expires_s: expires.as_secs(),
        };
        token::mint(&self.private_key, &self.kid, &claims).map_err(|error| ClientError::Config(error.to_string()))
    }
}

impl Connect for Gateways {
    async fn connect(
        &self,
        device: &Device,
        cursors: Arc<MemoryCursors>,
        // The SDK chooses among all of them: one may be dead for the moment.
        _: usize,
    ) -> Result<Client, ClientError> {
        let mut builder = Client::builder().tls(self.tls.clone()).token(self.token(device)?).cursors(cursors);
        for address in &self.addresses {
            builder = builder.gateway(address);
        }
        builder.connect_timeout(CONNECT_WITHIN).connect().await
    }
}

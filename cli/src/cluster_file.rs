//! `cluster.json`: what a development cluster tells everybody who is given its folder: nodes and their addresses, the
//! certificate authority, tokens. Replaced as a whole, so that no reader ever sees half of one.

use std::{
    fs, io,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

const NAME: &str = "cluster.json";

/// The whole file. An address that a node lacks is null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClusterFile {
    /// The number that every data directory of the cluster carries.
    pub(crate) cluster_id: String,
    /// All nodes.
    pub(crate) nodes: Vec<Node>,
    /// The certificate authority's certificate.
    pub(crate) ca: PathBuf,
    /// The app of the users below.
    pub(crate) app: String,
    /// May call Admin.
    pub(crate) admin_token: String,
    /// Ready to be used; the first one acts where nobody else is named.
    pub(crate) users: Vec<User>,
    /// What signs tokens for any user: a development key, refused by production.
    pub(crate) signing_key: SigningKey,
}

/// A process, or a part of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Node {
    /// `broker-1`, `gateway-1`…
    pub(crate) name: String,
    /// Which of the two.
    pub(crate) role: Role,
    /// Null while it is stopped.
    pub(crate) pid: Option<u32>,
    /// The public gRPC API.
    pub(crate) api: Option<SocketAddr>,
    /// Where other nodes connect.
    pub(crate) peer: Option<SocketAddr>,
    /// Where devices connect.
    pub(crate) quic: Option<SocketAddr>,
    /// Probes and metrics.
    pub(crate) http: Option<SocketAddr>,
    /// A broker's data.
    pub(crate) data_dir: Option<PathBuf>,
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Hosts replicas.
    Broker,
    /// Ends client connections.
    Gateway,
}

/// A user who may be used at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct User {
    /// His id.
    pub(crate) user: String,
    /// The device that the token is for.
    pub(crate) device: String,
    /// The token.
    pub(crate) token: String,
}

/// A development key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SigningKey {
    /// Its name in tokens.
    pub(crate) kid: String,
    /// The file that has the private key.
    pub(crate) private_key: PathBuf,
}

impl ClusterFile {
    /// The cluster of a folder; `None` if the folder has none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, Failure> {
        let path = dir.join(NAME);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::failed(format_args!("cannot read {}: {error}", path.display()))),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| Failure::failed(format_args!("{} is damaged: {error}", path.display())))
    }

    /// Replaces the folder's file. It holds tokens, so only its owner may read it.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Failure> {
        let path = dir.join(NAME);
        let text = serde_json::to_vec_pretty(self).map_err(Failure::failed)?;
        replace(&path, &text).map_err(|error| Failure::failed(format_args!("cannot write {}: {error}", path.display())))
    }

    /// Where devices connect.
    pub(crate) fn gateways(&self) -> Vec<SocketAddr> {
        self.nodes.iter().filter_map(|node| node.quic).collect()
    }

    /// Where the public gRPC API is.
    pub(crate) fn apis(&self) -> Vec<SocketAddr> {
        self.nodes.iter().filter_map(|node| node.api).collect()
    }
}

/// Writes a file beside the old one, syncs it, and puts it into the old one's place.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_back_what_was_written_with_nulls_for_absent_addresses() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ClusterFile::read(dir.path()).unwrap(), None);
        let node = Node {
            name: "gateway-1".into(),
            role: Role::Gateway,
            pid: Some(7),
            api: None,
            peer: None,
            quic: Some(([127, 0, 0, 1], 7443).into()),
            http: None,
            data_dir: None,
        };
        let file = ClusterFile {
            cluster_id: "c".into(),
            nodes: vec![node],
            ca: "/ca.pem".into(),
            app: "demo".into(),
            admin_token: "t".into(),
            users: vec![],
            signing_key: SigningKey { kid: "dev".into(), private_key: "/k.pem".into() },
        };
        file.write(dir.path()).unwrap();
        assert_eq!(ClusterFile::read(dir.path()).unwrap(), Some(file));
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(json["nodes"][0]["api"].is_null() && json["nodes"][0]["role"] == "gateway");
    }
}

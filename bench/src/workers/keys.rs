//! With what coordinator and workers prove to each other that they belong to the cluster: certificates of its own
//! authority, as its nodes have them. Must never make an authority, nor outlive the process with a private key that it
//! made (one that is killed leaves it in its temporary folder, readable by its owner alone).

use std::path::{Path, PathBuf};

use stentor_transport::{
    pki::Pki,
    tls::{ClientTls, ServerTls, TlsFiles},
};
use tempfile::TempDir;

use crate::{BenchError, Target};

/// A certificate of the cluster's authority, with its key.
#[derive(Debug)]
pub struct Keys {
    files: TlsFiles,
    /// Issued ones are gone with the value.
    _folder: Option<TempDir>,
}

impl Keys {
    /// Files that are there: a certificate chain that the cluster's authority signed, and its private key.
    pub fn given(target: &Target, cert: PathBuf, key: PathBuf) -> Self {
        Self { files: TlsFiles { ca: target.ca().to_owned(), cert, key }, _folder: None }
    }

    /// A new certificate of a development cluster's authority, whose key lies in the cluster's folder.
    pub fn issued(target: &Target, name: &str) -> Result<Self, BenchError> {
        let pki = target.ca().parent().unwrap_or_else(|| Path::new(".")).to_owned();
        if !pki.join("ca.key").exists() {
            return Err(BenchError::Settings(format!(
                "{} has no ca.key to make a certificate with: name one of the cluster's authority with --cert and --key",
                pki.display()
            )));
        }
        let folder = tempfile::Builder::new().prefix("stentor-bench-keys-").tempdir();
        let folder = folder.map_err(BenchError::io("make a folder for keys"))?;
        let files = Pki::create(&pki).and_then(|pki| pki.issue(name, folder.path())).map_err(BenchError::cluster)?;
        Ok(Self { files, _folder: Some(folder) })
    }

    /// For a coordinator.
    pub fn client(&self) -> Result<ClientTls, BenchError> {
        ClientTls::peer(&self.files).map_err(BenchError::cluster)
    }

    /// For a worker.
    pub fn server(&self) -> Result<ServerTls, BenchError> {
        ServerTls::peer(&self.files).map_err(BenchError::cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::cluster_folder;

    #[test]
    fn keys_are_issued_by_an_authority_that_is_there_and_do_not_stay() {
        let dir = cluster_folder("c");
        let target = Target::read(dir.path()).unwrap();
        let keys = Keys::issued(&target, "bench-worker").unwrap();
        let key = keys.files.key.clone();
        assert!(keys.client().is_ok() && keys.server().is_ok() && key.exists());
        drop(keys);
        assert!(!key.exists());
        std::fs::remove_file(dir.path().join("pki/ca.key")).unwrap();
        assert!(matches!(Keys::issued(&target, "bench-worker"), Err(BenchError::Settings(_))));
    }
}

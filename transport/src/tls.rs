//! TLS for every kind of connection: mTLS between nodes, server-side TLS for callers and devices, all on ring.
//! Certificates are read again when their files change; a connection without a checked certificate never exists.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Once},
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use rustls::{
    CipherSuite, ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::ResolvesClientCert,
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The DNS name that every node's certificate carries and every client asks for: nodes are known by the CA that signed
/// them, not by host names, which change when a node moves.
pub const SERVER_NAME: &str = "stentor";

/// ALPN of the client frames.
pub const ALPN_QUIC: &[u8] = b"stentor/1";

const ALPN_GRPC: &[u8] = b"h2";

/// How often, at most, a certificate's files are looked at; one `stat` each, during a handshake.
const RELOAD_EVERY: Duration = Duration::from_secs(10);

/// TLS 1.3 only where both ends are ours; callers of the API may be older.
static OURS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
static ANYBODY: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Where a node's keys lie: PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate authority that signed every node of the cluster.
    pub ca: PathBuf,
    /// This node's certificate chain, its own first.
    pub cert: PathBuf,
    /// This node's private key.
    pub key: PathBuf,
}

/// Keys that cannot be used: the configuration is at fault, nothing was started.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file has no certificate or key in it.
    #[error("{path} has no {what}")]
    Empty {
        /// Which file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A file's PEM is damaged.
    #[error("{path} is no PEM file: {reason}")]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// Certificate and key do not fit each other, or rustls refuses them.
    #[error("{path} cannot be used: {source}")]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
    /// A client verifier could not be built from the CA file.
    #[error("{path} cannot verify peers: {reason}")]
    Verifier {
        /// Which file.
        path: PathBuf,
        /// What rustls said.
        reason: String,
    },
    /// An address of which no URI can be made.
    #[error("{0} is no address to connect to")]
    Address(std::net::SocketAddr),
}

/// Makes ring the process's provider for libraries that ask for the default one. Ours name it themselves.
pub fn install_provider() {
    static ONCE: Once = Once::new();
    // An error means that a provider is installed already: whoever embeds us chose it, and we don't depend on it.
    ONCE.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

/// ring, whose clients would rather have AES-256 with SHA-384 (a server takes what its client likes best): processors
/// hash SHA-256 by themselves, and a handshake hashes some hundred blocks. Nothing known breaks one of the two alone.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    install_provider();
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The server's half of a TLS configuration; cheap to clone.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    /// The same for the same private key, and only for that: lets a restarted gateway disown its old connections.
    pub(crate) restart_secret: [u8; 32],
}

impl ServerTls {
    /// gRPC between nodes: a client without a certificate of the cluster's CA is refused.
    pub fn peer(files: &TlsFiles) -> Result<Self, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&files.ca)?.into(), provider())
            .build()
            .map_err(|e| TlsError::Verifier { path: files.ca.clone(), reason: e.to_string() })?;
        Self::new(files, OURS, ALPN_GRPC, |builder| builder.with_client_cert_verifier(verifier))
    }

    /// gRPC for callers, who show a token instead of a certificate.
    pub fn api(files: &TlsFiles) -> Result<Self, TlsError> {
        Self::new(files, ANYBODY, ALPN_GRPC, |builder| builder.with_no_client_auth())
    }

    /// QUIC for devices, who show a token instead of a certificate.
    pub fn quic(files: &TlsFiles) -> Result<Self, TlsError> {
        let mut tls = Self::new(files, OURS, ALPN_QUIC, |builder| builder.with_no_client_auth())?;
        let config = Arc::make_mut(&mut tls.config);
        // After a gateway's death all of its devices come at once: a resumed handshake costs no signature, and
        // stateless tickets cost no memory.
        config.ticketer = rustls::crypto::ring::Ticketer::new()
            .map_err(|source| TlsError::Unusable { path: files.key.clone(), source })?;
        config.send_tls13_tickets = 1;
        Ok(tls)
    }

    fn new(
        files: &TlsFiles,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[u8],
        verify: impl FnOnce(
            rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>,
        ) -> rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>,
    ) -> Result<Self, TlsError> {
        let certificate = Arc::new(NodeCertificate::load(files)?);
        let restart_secret = restart_secret(&private_key(&files.key)?);
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .map_err(|source| TlsError::Unusable { path: files.cert.clone(), source })?;
        let mut config = verify(builder).with_cert_resolver(certificate);
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(Self { config: Arc::new(config), restart_secret })
    }
}

/// The client's half of a TLS configuration; cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(crate) grpc: Arc<ClientConfig>,
    pub(crate) quic: Arc<ClientConfig>,
}

impl ClientTls {
    /// For a node that calls other nodes: shows its own certificate.
    pub fn peer(files: &TlsFiles) -> Result<Self, TlsError> {
        let certificate = Arc::new(NodeCertificate::load(files)?);
        Self::new(&files.ca, |builder| builder.with_client_cert_resolver(certificate))
    }

    /// For callers and devices: knows the CA, shows nothing.
    pub fn public(ca: &Path) -> Result<Self, TlsError> {
        Self::new(ca, |builder| builder.with_no_client_auth())
    }

    fn new(
        ca: &Path,
        authenticate: impl FnOnce(rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>) -> ClientConfig,
    ) -> Result<Self, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(OURS)
            .map_err(|source| TlsError::Unusable { path: ca.to_owned(), source })?
            .with_root_certificates(roots(ca)?);
        let mut grpc = authenticate(builder);
        let mut quic = grpc.clone();
        grpc.alpn_protocols = vec![ALPN_GRPC.to_vec()];
        quic.alpn_protocols = vec![ALPN_QUIC.to_vec()];
        Ok(Self { grpc: Arc::new(grpc), quic: Arc::new(quic) })
    }
}

/// A node's certificate, read again when its files change, so that renewing it needs no restart.
#[derive(Debug)]
struct NodeCertificate {
    files: TlsFiles,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    modified: Modified,
    looked_at: Instant,
}

/// When certificate and key were last written.
type Modified = (Option<SystemTime>, Option<SystemTime>);

impl NodeCertificate {
    fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let modified = Self::modified(files);
        let current = Current { key: Arc::new(Self::read(files)?), modified, looked_at: Instant::now() };
        Ok(Self { files: files.clone(), current: Mutex::new(current) })
    }

    fn read(files: &TlsFiles) -> Result<CertifiedKey, TlsError> {
        let (chain, key) = (certificates(&files.cert)?, private_key(&files.key)?);
        // Also checks that the key belongs to the certificate.
        CertifiedKey::from_der(chain, key, &provider())
            .map_err(|source| TlsError::Unusable { path: files.cert.clone(), source })
    }

    fn modified(files: &TlsFiles) -> Modified {
        let of = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        (of(&files.cert), of(&files.key))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        let mut current = self.current.lock();
        if current.looked_at.elapsed() >= RELOAD_EVERY {
            self.reload(&mut current);
        }
        current.key.clone()
    }

    fn reload(&self, current: &mut Current) {
        current.looked_at = Instant::now();
        let modified = Self::modified(&self.files);
        if modified == current.modified {
            return;
        }
        match Self::read(&self.files) {
            Ok(key) => {
                tracing::info!(cert = %self.files.cert.display(), "certificate renewed");
                (current.key, current.modified) = (Arc::new(key), modified);
            }
            // Half of a renewal, or a bad one: the old certificate serves until both files fit.
            Err(error) => tracing::warn!(%error, "new certificate cannot be used, keeping the old one"),
        }
    }
}

impl ResolvesServerCert for NodeCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for NodeCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(|e| pem(path, e))?;
    if chain.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned(), what: "certificate" });
    }
    Ok(chain)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        rustls_pki_types::pem::Error::NoItemsFound => TlsError::Empty { path: path.to_owned(), what: "private key" },
        error => pem(path, error),
    })
}

fn roots(ca: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate).map_err(|source| TlsError::Unusable { path: ca.to_owned(), source })?;
    }
    Ok(roots)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn pem(path: &Path, error: rustls_pki_types::pem::Error) -> TlsError {
    TlsError::Pem { path: path.to_owned(), reason: error.to_string() }
}

fn restart_secret(key: &PrivateKeyDer<'_>) -> [u8; 32] {
    // HMAC as a one-way function with a purpose: the secret tells nothing about the private key.
    let purpose = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"stentor: connections of this gateway");
    let mut secret = [0; 32];
    secret.copy_from_slice(ring::hmac::sign(&purpose, key.secret_der()).as_ref());
    secret
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Pki;

    #[test]
    fn a_handshake_settles_on_the_cheaper_suite() {
        let dir = tempfile::tempdir().unwrap();
        let files = Pki::create(dir.path()).unwrap().issue("a", dir.path()).unwrap();
        let client = ClientTls::public(&files.ca).unwrap();
        let grpc = (ServerTls::api(&files).unwrap(), client.grpc);
        let quic = (ServerTls::quic(&files).unwrap(), client.quic);
        for (server, client) in [grpc, quic] {
            assert_eq!(settled(server.config, client), Some(CipherSuite::TLS13_AES_128_GCM_SHA256));
        }
    }

    /// The suite of a handshake without a network.
    fn settled(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Option<CipherSuite> {
        let mut server = rustls::ServerConnection::new(server).unwrap();
        let mut client = rustls::ClientConnection::new(client, SERVER_NAME.try_into().unwrap()).unwrap();
        for _ in 0..4 {
            let (mut there, mut back) = (Vec::new(), Vec::new());
            while client.wants_write() {
                client.write_tls(&mut there).unwrap();
            }
            server.read_tls(&mut &there[..]).unwrap();
            server.process_new_packets().unwrap();
            while server.wants_write() {
                server.write_tls(&mut back).unwrap();
            }
            client.read_tls(&mut &back[..]).unwrap();
            client.process_new_packets().unwrap();
        }
        client.negotiated_cipher_suite().map(|suite| suite.suite())
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = Pki::create(dir.path()).unwrap().issue("a", dir.path()).unwrap();
        let other = Pki::create(dir.path()).unwrap().issue("b", dir.path()).unwrap();
        let with = |cert: &Path, key: &Path| TlsFiles { ca: files.ca.clone(), cert: cert.into(), key: key.into() };
        let missing = with(&dir.path().join("nothing.pem"), &files.key);
        assert!(matches!(ServerTls::api(&missing), Err(TlsError::Read { path, .. }) if path == missing.cert));
        assert!(matches!(ServerTls::api(&with(&files.cert, &other.key)), Err(TlsError::Unusable { .. })));
        assert!(matches!(ServerTls::api(&with(&files.key, &files.key)), Err(TlsError::Empty { .. })));
        assert!(matches!(ServerTls::api(&with(&files.cert, &files.cert)), Err(TlsError::Empty { .. })));
    }

    #[test]
    fn a_renewed_certificate_is_taken_up_and_half_of_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        let files = pki.issue("a", dir.path()).unwrap();
        let node = NodeCertificate::load(&files).unwrap();
        let first = node.current();
        let renewed = pki.issue("b", dir.path()).unwrap();
        let age = |path: &Path| {
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
        };
        fs::copy(&renewed.cert, &files.cert).unwrap();
        age(&files.cert);
        node.reload(&mut node.current.lock());
        assert_eq!(node.current().cert, first.cert, "the key is still the old one");
        fs::copy(&renewed.key, &files.key).unwrap();
        node.reload(&mut node.current.lock());
        assert_ne!(node.current().cert, first.cert);
    }

    #[test]
    fn the_restart_secret_belongs_to_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        let secret =
            |node: &str| ServerTls::quic(&pki.issue(node, &dir.path().join(node)).unwrap()).unwrap().restart_secret;
        let files = pki.issue("c", &dir.path().join("c")).unwrap();
        let again = || ServerTls::quic(&files).unwrap().restart_secret;
        assert_eq!(again(), again());
        assert_ne!(secret("a"), secret("b"));
    }
}

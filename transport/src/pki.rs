//! The development CA: makes the keys with which a cluster on one machine talks TLS at once. Production brings its own
//! certificates; the CA's key must never leave the directory that it was made in.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use thiserror::Error;

use crate::tls::{SERVER_NAME, TlsFiles};

/// A development cluster's directory may lie around for years.
const CA_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Nodes are issued anew whenever a cluster is set up.
const NODE_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates start in the past, for machines whose clocks disagree.
const BACKDATED: Duration = Duration::from_secs(24 * 3600);

/// Keys could not be made or stored; the machine or the directory is at fault.
#[derive(Debug, Error)]
pub enum PkiError {
    /// A file or directory.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The stored CA is damaged, or a name can stand in no certificate.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// A certificate authority in a directory.
#[derive(Debug)]
pub struct Pki {
    ca: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Opens the CA of `dir`, or makes one there: `ca.pem` and `ca.key`.
    pub fn create(dir: &Path) -> Result<Self, PkiError> {
        fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.to_owned(), source })?;
        let (ca, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        if !ca.exists() {
            let key = KeyPair::generate()?;
            let certificate = ca_params().self_signed(&key)?;
            // The certificate last: where it lies, its key lies too.
            write(&key_path, &key.serialize_pem())?;
            write(&ca, &certificate.pem())?;
        }
        let key = KeyPair::from_pem(&read(&key_path)?)?;
        // Certificates name their issuer by this name and this key; the rest of the CA's own certificate is not needed.
        Ok(Self { ca, issuer: Issuer::new(ca_params(), key) })
    }

    /// Makes a key and a certificate for `node` in `dir`: `<node>.pem` and `<node>.key`, replacing what is there. The
    /// certificate names the node, [`SERVER_NAME`], `localhost` and both loopback addresses, for servers and clients.
    pub fn issue(&self, node: &str, dir: &Path) -> Result<TlsFiles, PkiError> {
        fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.to_owned(), source })?;
        let names = [node, SERVER_NAME, "localhost", "127.0.0.1", "::1"];
        let mut params = CertificateParams::new(names.map(String::from).to_vec())?;
        params.distinguished_name = name(node);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, NODE_LIFETIME);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let files = TlsFiles {
            ca: self.ca.clone(),
            cert: dir.join(format!("{node}.pem")),
            key: dir.join(format!("{node}.key")),
        };
        write(&files.key, &key.serialize_pem())?;
        write(&files.cert, &certificate.pem())?;
        Ok(files)
    }

    /// The CA's certificate, which callers and devices need.
    pub fn ca_path(&self) -> &Path {
        &self.ca
    }
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name("stentor development CA");
    // Only nodes: a CA below this one could sign anything.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, CA_LIFETIME);
    params
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn valid_for(params: &mut CertificateParams, lifetime: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + now + lifetime;
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Io { path: path.to_owned(), source })
}

/// Whole or not at all, and readable by the owner alone.
fn write(path: &Path, pem: &str) -> Result<(), PkiError> {
    let io = |source| PkiError::Io { path: path.to_owned(), source };
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let staged = PathBuf::from(staged);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&staged).map_err(io)?;
    file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&staged, path).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_made_once_and_its_files_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = read(Pki::create(dir.path()).unwrap().ca_path()).unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        assert_eq!(read(pki.ca_path()).unwrap(), first);
        let files = pki.issue("broker-1", &dir.path().join("nodes")).unwrap();
        for path in [&files.ca, &files.cert, &files.key, &dir.path().join("ca.key")] {
            #[cfg(unix)]
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777,
                0o600
            );
            assert!(read(path).unwrap().starts_with("-----BEGIN "));
        }
    }

    #[test]
    fn a_damaged_ca_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        Pki::create(dir.path()).unwrap();
        fs::write(dir.path().join("ca.key"), "no key").unwrap();
        assert!(matches!(Pki::create(dir.path()), Err(PkiError::Certificate(_))));
    }
}

//! The development key of a cluster's folder: made at the first start, signs tokens for any user. Must never serve in
//! production, which refuses keys that are marked so.

use std::{fs, path::Path};

use stentor_transport::token;

use crate::{
    cluster_file::{self, SigningKey},
    failure::Failure,
};

/// The key that signs tokens, and its public half (PEM).
pub(crate) fn signing_key(dir: &Path) -> Result<(SigningKey, String), Failure> {
    let folder = dir.join("keys");
    let (private_key, public_key) = (folder.join("dev.key"), folder.join("dev.pub"));
    let failed = |error: std::io::Error| Failure::failed(format_args!("cannot use {}: {error}", folder.display()));
    if !public_key.exists() {
        let (private, public) = token::generate_key().map_err(Failure::failed)?;
        fs::create_dir_all(&folder).map_err(failed)?;
        // The public half last: where it lies, the other lies too.
        cluster_file::replace(&private_key, private.as_bytes()).map_err(failed)?;
        cluster_file::replace(&public_key, public.as_bytes()).map_err(failed)?;
    }
    let public = fs::read_to_string(&public_key).map_err(failed)?;
    Ok((SigningKey { kid: "dev".into(), private_key }, public))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let (_, first) = signing_key(dir.path()).unwrap();
        assert_eq!(signing_key(dir.path()).unwrap().1, first);
    }
}
